//! Reads `config.json`, in the spelling of transformers 4 (`rope_theta`, `rope_scaling`) and of
//! transformers 5 (`rope_parameters`).

use serde::Deserialize;
use serde_json::Value;

use super::{
    Activation, Architecture, AttentionConfig, ConfigError, MlpConfig, ModelConfig, RopeConfig,
    RopeScaling, SpecialTokens, require,
};

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
        let mut config: HfConfig = serde_json::from_slice(config).map_err(json)?;
        if let Some(generation) = generation {
            let generation: HfGeneration = serde_json::from_slice(generation).map_err(json)?;
            config.eos_token_id = generation.eos_token_id.or(config.eos_token_id);
        }
        match architecture {
            Architecture::Llama => config.try_into(),
        }
    }
}

#[derive(Deserialize)]
struct HfFamily {
    model_type: Option<String>,
}

/// The fields of `config.json` that change what a Llama computes.
#[derive(Deserialize)]
struct HfConfig {
    hidden_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    intermediate_size: Option<usize>,
    vocab_size: Option<usize>,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    hidden_act: Option<String>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    bos_token_id: Option<i64>,
    eos_token_id: Option<OneOrMany>,
    pad_token_id: Option<i64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<HfRope>,
    rope_parameters: Option<HfRope>,
    // Options that transformers knows, and that would change the model silently if passed over.
    partial_rotary_factor: Option<f64>,
    sliding_window: Option<Value>,
    quantization_config: Option<Value>,
}

/// `rope_scaling` of transformers 4 and `rope_parameters` of transformers 5. Unknown fields are
/// refused: each of them belongs to a scaling that is not built here.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HfRope {
    rope_type: Option<String>,
    /// The older name of `rope_type`; some files carry both.
    #[serde(rename = "type")]
    old_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    partial_rotary_factor: Option<f64>,
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

impl TryFrom<HfConfig> for ModelConfig {
    type Error = ConfigError;

    fn try_from(hf: HfConfig) -> Result<Self, ConfigError> {
        hf.refuse_unsupported()?;

        let d_model = present(hf.hidden_size, "hidden_size")?;
        let n_heads = present(hf.num_attention_heads, "num_attention_heads")?;
        let d_head = match hf.head_dim {
            Some(d_head) => d_head,
            None => {
                let divides = n_heads > 0 && d_model.is_multiple_of(n_heads);
                require(divides, "num_attention_heads", "a divisor of hidden_size", n_heads)?;
                d_model / n_heads
            }
        };
        let activation = match present(hf.hidden_act.as_deref(), "hidden_act")? {
            "silu" | "swish" => Activation::Silu,
            other => return Err(ConfigError::UnknownActivation { actual: other.to_owned() }),
        };
        let eos = match &hf.eos_token_id {
            None => &[][..],
            Some(OneOrMany::One(id)) => std::slice::from_ref(id),
            Some(OneOrMany::Many(ids)) => ids,
        };
        Self {
            architecture: Architecture::Llama,
            d_model,
            n_layers: present(hf.num_hidden_layers, "num_hidden_layers")?,
            d_vocab: present(hf.vocab_size, "vocab_size")?,
            n_ctx: present(hf.max_position_embeddings, "max_position_embeddings")?,
            norm_eps: present(hf.rms_norm_eps, "rms_norm_eps")?,
            tie_embeddings: hf.tie_word_embeddings.unwrap_or(false),
            attention: AttentionConfig {
                n_heads,
                n_kv_heads: hf.num_key_value_heads.unwrap_or(n_heads),
                d_head,
                bias: hf.attention_bias.unwrap_or(false),
                rope: hf.rope()?,
            },
            mlp: MlpConfig {
                d_mlp: present(hf.intermediate_size, "intermediate_size")?,
                activation,
                bias: hf.mlp_bias.unwrap_or(false),
            },
            special_tokens: SpecialTokens {
                bos: hf.bos_token_id.map(|id| token_id("bos_token_id", id)).transpose()?,
                eos: eos
                    .iter()
                    .map(|&id| token_id("eos_token_id", id))
                    .collect::<Result<_, _>>()?,
                pad: hf.pad_token_id.map(|id| token_id("pad_token_id", id)).transpose()?,
            },
        }
        .validated()
    }
}

impl HfConfig {
    fn refuse_unsupported(&self) -> Result<(), ConfigError> {
        for (field, value) in [
            ("sliding_window", &self.sliding_window),
            ("quantization_config", &self.quantization_config),
        ] {
            if let Some(value) = value {
                let (field, actual) = (field.to_owned(), value.to_string());
                return Err(ConfigError::Unsupported { field, actual });
            }
        }
        let in_rope = self.rope_parameters.as_ref().and_then(|rope| rope.partial_rotary_factor);
        for factor in [self.partial_rotary_factor, in_rope].into_iter().flatten() {
            if factor != 1.0 {
                let (field, actual) = ("partial_rotary_factor".to_owned(), factor.to_string());
                return Err(ConfigError::Unsupported { field, actual });
            }
        }
        Ok(())
    }

    fn rope(&self) -> Result<RopeConfig, ConfigError> {
        let scaling = match (&self.rope_parameters, &self.rope_scaling) {
            (None, None) => None,
            (Some(rope), None) | (None, Some(rope)) => Some(rope.scaling()?),
            (Some(new), Some(old)) => {
                let (new, old) = (new.scaling()?, old.scaling()?);
                require(new == old, "rope_parameters", "the same as rope_scaling", "another")?;
                Some(new)
            }
        };
        let new_theta = self.rope_parameters.as_ref().and_then(|rope| rope.rope_theta);
        if let (Some(new), Some(old)) = (new_theta, self.rope_theta) {
            require(new == old, "rope_theta", "the same in rope_parameters", old)?;
        }
        Ok(RopeConfig {
            // What transformers takes where a Llama's config says nothing.
            theta: new_theta.or(self.rope_theta).unwrap_or(10_000.0),
            scaling: scaling.unwrap_or(RopeScaling::Default),
        })
    }
}

impl HfRope {
    fn scaling(&self) -> Result<RopeScaling, ConfigError> {
        if let (Some(new), Some(old)) = (&self.rope_type, &self.old_type) {
            require(new == old, "rope_type", "the same as its older name `type`", new)?;
        }
        let rope_type = self.rope_type.as_deref().or(self.old_type.as_deref());
        match rope_type.unwrap_or("default") {
            "default" => Ok(RopeScaling::Default),
            "linear" => Ok(RopeScaling::Linear { factor: present(self.factor, "factor")? }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: present(self.factor, "factor")?,
                low_freq_factor: present(self.low_freq_factor, "low_freq_factor")?,
                high_freq_factor: present(self.high_freq_factor, "high_freq_factor")?,
                original_n_ctx: present(
                    self.original_max_position_embeddings,
                    "original_max_position_embeddings",
                )?,
            }),
            other => Err(ConfigError::UnknownRope { actual: other.to_owned() }),
        }
    }
}

fn present<T>(value: Option<T>, field: &'static str) -> Result<T, ConfigError> {
    value.ok_or(ConfigError::MissingField { field })
}

fn token_id(field: &'static str, id: i64) -> Result<u32, ConfigError> {
    let actual = id.to_string();
    u32::try_from(id).map_err(|_| ConfigError::Invalid { field, expected: "a token id", actual })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

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
            assert_eq!(v4.attention.rope.theta, 5e5);
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
            tie_embeddings: true,
            attention: AttentionConfig {
                n_heads: 6,
                n_kv_heads: 2,
                d_head: 8,
                bias: false,
                rope: RopeConfig { theta: 1e5, scaling: RopeScaling::Default },
            },
            mlp: MlpConfig { d_mlp: 88, activation: Activation::Silu, bias: false },
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
            (json!({"model_type": "phi3", "rope_scaling": {"long_factor": []}}), "`phi3`"),
            (json!({"model_type": "absent"}), "lacks `model_type`"),
            (json!({"hidden_act": "gelu"}), "unknown activation `gelu`"),
            (json!({"rope_scaling": {"rope_type": "yarn"}}), "unknown rope type `yarn`"),
            (json!({"rope_scaling": {"rope_type": "linear"}}), "lacks `factor`"),
            (json!({"rope_parameters": {"rope_type": "default", "mscale": 1}}), "not valid JSON"),
            (json!({"rope_parameters": {"partial_rotary_factor": 0.5}}), "partial_rotary_factor"),
            (json!({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}}), "rope_theta"),
            (json!({"quantization_config": {"bits": 4}}), "quantization_config"),
            (json!({"sliding_window": 4096}), "sliding_window"),
            (json!({"rms_norm_eps": "absent"}), "lacks `rms_norm_eps`"),
            (json!({"pad_token_id": -1}), "`pad_token_id` is -1"),
            (json!({"num_attention_heads": 0}), "a divisor of hidden_size"),
            (json!({"hidden_size": -48}), "not valid JSON"),
        ] {
            let message = with(extra.clone()).unwrap_err().to_string();
            assert!(message.contains(expected), "{extra}: {message}");
        }
    }
}
