//! Reads `config.json`, in the spelling of transformers 4 (`rope_theta`, `rope_scaling`) and of
//! transformers 5 (`rope_parameters`).

mod gpt;
mod llama;
mod neox;
mod opt;
mod rope;

use serde::Deserialize;
use serde_json::Value;

use super::{Architecture, ConfigError, ModelConfig, Nonlinearity, SpecialTokens, require};

impl ModelConfig {
    /// Reads a `config.json`, and the `generation_config.json` beside it if there is one: only the
    /// latter knows every token that ends a chat model's turn.
    ///
    /// # Errors
    /// [`ConfigError`] where the JSON is broken, a field is missing or impossible, or the model
    /// needs something that is not built here.
    pub fn from_hf(config: &[u8], generation: Option<&[u8]>) -> Result<Self, ConfigError> {
        let json = |source| ConfigError::Json { source };
        // By itself and first: the fields of another family are not those of a Llama, and it should
        // be refused by its name.
        let family: HfFamily = serde_json::from_slice(config).map_err(json)?;
        let architecture = Architecture::from_name(&present(family.model_type, "model_type")?)?;
        if let Some(value) = family.quantization_config {
            return Err(unsupported("quantization_config", value));
        }
        let mut tokens = family.tokens;
        if let Some(generation) = generation {
            let generation: HfGeneration = serde_json::from_slice(generation).map_err(json)?;
            tokens.eos_token_id = generation.eos_token_id.or(tokens.eos_token_id);
        }
        let special_tokens = tokens.try_into()?;
        match architecture {
            Architecture::Gpt2 => gpt::gpt2(config, special_tokens),
            Architecture::GptJ => gpt::gptj(config, special_tokens),
            Architecture::GptNeoX => neox::neox(config, special_tokens),
            Architecture::Opt => opt::opt(config, special_tokens),
            Architecture::Llama
            | Architecture::Mistral
            | Architecture::Qwen2
            | Architecture::Qwen3
            | Architecture::Phi3
            | Architecture::Gemma2
            | Architecture::Gemma3
            | Architecture::Olmo2 => llama::llama(config, architecture, special_tokens),
        }?
        .validated()
    }
}

/// What every family has.
#[derive(Deserialize)]
struct HfFamily {
    model_type: Option<String>,
    quantization_config: Option<Value>,
    #[serde(flatten)]
    tokens: HfTokens,
}

#[derive(Deserialize)]
struct HfTokens {
    bos_token_id: Option<i64>,
    eos_token_id: Option<OneOrMany>,
    pad_token_id: Option<i64>,
}

#[derive(Deserialize)]
struct HfGeneration {
    eos_token_id: Option<OneOrMany>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(i64),
    Many(Vec<i64>),
}

impl TryFrom<HfTokens> for SpecialTokens {
    type Error = ConfigError;

    fn try_from(hf: HfTokens) -> Result<Self, ConfigError> {
        let one = |field, id: Option<i64>| id.map(|id| token_id(field, id)).transpose();
        let eos = match &hf.eos_token_id {
            None => &[][..],
            Some(OneOrMany::One(id)) => std::slice::from_ref(id),
            Some(OneOrMany::Many(ids)) => ids,
        };
        Ok(Self {
            bos: one("bos_token_id", hf.bos_token_id)?,
            eos: eos.iter().map(|&id| token_id("eos_token_id", id)).collect::<Result<_, _>>()?,
            // Some files give a negative id for none.
            pad: one("pad_token_id", hf.pad_token_id.filter(|&id| id != -1))?,
        })
    }
}

fn parse<'a, T: Deserialize<'a>>(config: &'a [u8]) -> Result<T, ConfigError> {
    serde_json::from_slice(config).map_err(|source| ConfigError::Json { source })
}

fn present<T>(value: Option<T>, field: &'static str) -> Result<T, ConfigError> {
    value.ok_or(ConfigError::MissingField { field })
}

/// An option that would change the model silently if it were passed over.
fn unsupported(field: &str, actual: impl ToString) -> ConfigError {
    ConfigError::Unsupported { field: field.to_owned(), actual: actual.to_string() }
}

/// Refuses options that are set to anything but `null` and what they would be anyway.
fn refuse<const N: usize>(options: [(&str, &Option<Value>, Value); N]) -> Result<(), ConfigError> {
    for (field, value, usual) in options {
        if let Some(value) = value.as_ref().filter(|value| !value.is_null() && **value != usual) {
            return Err(unsupported(field, value));
        }
    }
    Ok(())
}

fn nonlinearity(name: &str) -> Result<Nonlinearity, ConfigError> {
    match name {
        "silu" | "swish" => Ok(Nonlinearity::Silu),
        "gelu" => Ok(Nonlinearity::Gelu),
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(Nonlinearity::GeluTanh),
        "relu" => Ok(Nonlinearity::Relu),
        other => Err(ConfigError::UnknownActivation { actual: other.to_owned() }),
    }
}

/// `d_model / n_heads`.
fn head_width(
    d_model: usize,
    n_heads: usize,
    expected: &'static str,
) -> Result<usize, ConfigError> {
    let divides = n_heads > 0 && d_model.is_multiple_of(n_heads);
    require(divides, "num_attention_heads", expected, n_heads)?;
    Ok(d_model / n_heads)
}

fn token_id(field: &'static str, id: i64) -> Result<u32, ConfigError> {
    let actual = id.to_string();
    u32::try_from(id).map_err(|_| ConfigError::Invalid { field, expected: "a token id", actual })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{
        AttentionConfig, AttentionScale, LongRope, MlpConfig, RopeConfig, RopeScaling,
        UnembeddingConfig,
    };
    use super::*;

    /// A Llama's config without its rope, as both versions of transformers write it.
    fn with(extra: Value) -> Result<ModelConfig, ConfigError> {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 1,
            "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 48, "intermediate_size": 88,
            "max_position_embeddings": 64, "model_type": "llama", "num_attention_heads": 6,
            "num_hidden_layers": 3, "num_key_value_heads": 2, "pad_token_id": null,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "vocab_size": 131,
        });
        let fields = config.as_object_mut().unwrap();
        fields.extend(extra.as_object().unwrap().clone());
        fields.retain(|_, value| value != "absent");
        ModelConfig::from_hf(&serde_json::to_vec(&config).unwrap(), None)
    }

    #[test]
    fn both_spellings_of_rope_are_the_same_config() {
        let llama3 = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        });
        for (scaling, rope_type) in [
            (Value::Null, "default"),
            (json!({"type": "linear", "factor": 2.0}), "linear"),
            (llama3, "llama3"),
        ] {
            let mut parameters = scaling.as_object().cloned().unwrap_or_default();
            parameters.remove("type");
            parameters.insert("rope_type".into(), rope_type.into());
            parameters.insert("rope_theta".into(), 5e5.into());
            let v4 = with(json!({"rope_theta": 5e5, "rope_scaling": scaling})).unwrap();
            let v5 = with(json!({"rope_parameters": parameters})).unwrap();
            assert_eq!(v4, v5);
            assert_eq!(v4.attention.rope.unwrap().theta, 5e5);
        }
    }

    #[test]
    fn reads_every_field() {
        let config = with(json!({"eos_token_id": [2, 5], "rope_theta": 1e5})).unwrap();
        let expected = ModelConfig {
            architecture: Architecture::Llama,
            d_model: 48,
            n_layers: 3,
            d_vocab: 131,
            n_ctx: 64,
            norm_eps: 1e-5,
            parallel: false,
            attention: AttentionConfig {
                n_heads: 6,
                n_kv_heads: 2,
                d_head: 8,
                bias: false,
                scales: AttentionScale::Same(8f64.powf(-0.5)),
                soft_cap: None,
                sliding: None,
                rope: Some(RopeConfig::new(1e5, 8)),
            },
            mlp: MlpConfig { d_mlp: 88, nonlinearity: Nonlinearity::Silu, bias: false },
            unembedding: UnembeddingConfig { tied: true, soft_cap: None },
            special_tokens: SpecialTokens { bos: Some(1), eos: vec![2, 5], pad: None },
        };
        assert_eq!(config, expected);
    }

    #[test]
    fn the_generation_config_knows_the_tokens_that_end_a_turn() {
        let config = json!({
            "hidden_act": "silu", "hidden_size": 8, "intermediate_size": 8, "vocab_size": 9,
            "max_position_embeddings": 8, "model_type": "llama", "num_attention_heads": 2,
            "num_hidden_layers": 1, "rms_norm_eps": 1e-5, "eos_token_id": 2,
        });
        let generation = br#"{"eos_token_id": [4, 2], "temperature": 0.6}"#;
        let config = serde_json::to_vec(&config).unwrap();
        let config = ModelConfig::from_hf(&config, Some(generation)).unwrap();
        assert_eq!(config.special_tokens.eos, [4, 2]);
        assert_eq!(config.attention.n_kv_heads, 2);
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (extra, expected) in [
            (json!({"model_type": "mamba"}), "unknown architecture `mamba`"),
            (json!({"model_type": "absent"}), "lacks `model_type`"),
            (json!({"hidden_act": "mish"}), "unknown activation `mish`"),
            (json!({"rope_scaling": {"rope_type": "ntk"}}), "unknown rope type `ntk`"),
            (json!({"rope_scaling": {"rope_type": "linear", "mscale": 1}}), "not valid JSON"),
            (json!({"rope_scaling": {"type": "longrope"}}), "lacks `original_max_position"),
            (json!({"attn_logit_softcapping": 5.0}), "attn_logit_softcapping"),
            (json!({"rope_scaling": {"rope_type": "linear"}}), "lacks `factor`"),
            (json!({"rope_parameters": {"rope_type": "default", "mscale": 1}}), "sets `mscale`"),
            (json!({"rope_parameters": {"partial_rotary_factor": 1.5}}), "partial_rotary_factor"),
            (json!({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}}), "rope_theta"),
            (json!({"quantization_config": {"bits": 4}}), "quantization_config"),
            (json!({"sliding_window": 4096}), "sliding_window"),
            (json!({"rms_norm_eps": "absent"}), "lacks `rms_norm_eps`"),
            (json!({"pad_token_id": -2}), "`pad_token_id` is -2"),
            (json!({"num_attention_heads": 0}), "a divisor of hidden_size"),
            (json!({"hidden_size": -48}), "not valid JSON"),
        ] {
            let message = with(extra.clone()).unwrap_err().to_string();
            assert!(message.contains(expected), "{extra}: {message}");
        }
    }

    #[test]
    fn yarn_and_longrope_are_read_with_their_attention_factors() {
        let rope = |extra: Value| with(extra).unwrap().attention.rope.unwrap().scaling;
        let yarn = rope(json!({"rope_scaling":
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}));
        let expected = RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            original_n_ctx: 16,
            attention_factor: 0.1 * 4f64.ln() + 1.0,
        };
        assert_eq!(yarn, expected);
        // 64 positions after 16: √(1 + ln 4 / ln 16) = √1.5.
        let factors = json!({"type": "longrope", "short_factor": [1, 1, 1, 1],
            "long_factor": [1, 2, 3, 4], "original_max_position_embeddings": 16});
        let expected = RopeScaling::LongRope(LongRope {
            short_factors: vec![1.0; 4],
            long_factors: vec![1.0, 2.0, 3.0, 4.0],
            original_n_ctx: 16,
            attention_factor: 1.5f64.sqrt(),
        });
        assert_eq!(rope(json!({"rope_scaling": factors})), expected);
    }
}
