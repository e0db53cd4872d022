//! Llama, and the families whose configs are spelt like its own.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::super::{
    Architecture, AttentionConfig, AttentionScale, ConfigError, MlpConfig, ModelConfig,
    SlidingConfig, SpecialTokens, UnembeddingConfig, require,
};
use super::rope::HfRope;
use super::{head_width, nonlinearity, parse, present, refuse};

#[derive(Deserialize)]
struct HfLlama {
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
    hidden_activation: Option<String>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    use_bidirectional_attention: Option<Value>,
    #[serde(flatten)]
    gemma: HfGemma,
    #[serde(flatten)]
    sliding: HfSliding,
    #[serde(flatten)]
    rope: HfRope,
}

/// What Gemma adds.
#[derive(Deserialize)]
struct HfGemma {
    query_pre_attn_scalar: Option<f64>,
    attn_logit_softcapping: Option<f64>,
    final_logit_softcapping: Option<f64>,
    rope_local_base_freq: Option<f64>,
}

/// Which blocks see a window only: each family says it in another way.
#[derive(Deserialize)]
struct HfSliding {
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    sliding_window_pattern: Option<usize>,
}

pub(super) fn llama(
    config: &[u8],
    architecture: Architecture,
    special_tokens: SpecialTokens,
) -> Result<ModelConfig, ConfigError> {
    let hf: HfLlama = parse(config)?;
    let is_gemma = matches!(architecture, Architecture::Gemma2 | Architecture::Gemma3);
    if !is_gemma {
        hf.gemma.refuse()?;
    }
    refuse([("use_bidirectional_attention", &hf.use_bidirectional_attention, json!(false))])?;
    let d_model = present(hf.hidden_size, "hidden_size")?;
    let n_layers = present(hf.num_hidden_layers, "num_hidden_layers")?;
    let n_heads = present(hf.num_attention_heads, "num_attention_heads")?;
    let d_head = match hf.head_dim {
        Some(d_head) => d_head,
        None => head_width(d_model, n_heads, "a divisor of hidden_size")?,
    };
    let n_ctx = present(hf.max_position_embeddings, "max_position_embeddings")?;
    let activation = match is_gemma {
        true => present(hf.hidden_activation.as_deref(), "hidden_activation")?,
        false => present(hf.hidden_act.as_deref(), "hidden_act")?,
    };
    let mut sliding = hf.sliding.config(architecture, n_layers)?;
    let rope = match architecture {
        Architecture::Gemma3 => {
            let (full, local) = hf.gemma3_ropes();
            if let Some(sliding) = &mut sliding {
                sliding.rope = Some(local.config(d_head, n_ctx, 10_000.0)?);
            }
            full.config(d_head, n_ctx, 1_000_000.0)?
        }
        // What transformers takes where a config says nothing.
        _ => hf.rope.config(d_head, n_ctx, 10_000.0)?,
    };
    let scalar = hf.gemma.query_pre_attn_scalar.unwrap_or(d_head as f64);
    Ok(ModelConfig {
        architecture,
        d_model,
        n_layers,
        d_vocab: present(hf.vocab_size, "vocab_size")?,
        n_ctx,
        norm_eps: present(hf.rms_norm_eps, "rms_norm_eps")?,
        parallel: false,
        attention: AttentionConfig {
            n_heads,
            n_kv_heads: hf.num_key_value_heads.unwrap_or(n_heads),
            d_head,
            bias: hf.attention_bias.unwrap_or(architecture == Architecture::Qwen2),
            scales: AttentionScale::Same(scalar.powf(-0.5)),
            soft_cap: hf.gemma.attn_logit_softcapping,
            sliding,
            rope: Some(rope),
        },
        mlp: MlpConfig {
            d_mlp: present(hf.intermediate_size, "intermediate_size")?,
            nonlinearity: nonlinearity(activation)?,
            bias: hf.mlp_bias.unwrap_or(false),
        },
        unembedding: UnembeddingConfig {
            // Files leave out what is the default of all configs: tied.
            tied: hf.tie_word_embeddings.unwrap_or(is_gemma),
            soft_cap: hf.gemma.final_logit_softcapping,
        },
        special_tokens,
    })
}

impl HfGemma {
    fn refuse(&self) -> Result<(), ConfigError> {
        for (field, value) in [
            ("query_pre_attn_scalar", self.query_pre_attn_scalar),
            ("attn_logit_softcapping", self.attn_logit_softcapping),
            ("final_logit_softcapping", self.final_logit_softcapping),
            ("rope_local_base_freq", self.rope_local_base_freq),
        ] {
            if let Some(value) = value {
                return Err(super::unsupported(field, value));
            }
        }
        Ok(())
    }
}

impl HfLlama {
    /// Gemma 3 has one rotary for full attention and one for windows.
    fn gemma3_ropes(&self) -> (HfRope, HfRope) {
        let part = |map: &Option<Map<String, Value>>, kind: &str| {
            map.as_ref().and_then(|map| map.get(kind)).and_then(Value::as_object).cloned()
        };
        let rope = &self.rope;
        let full = HfRope {
            rope_theta: rope.rope_theta,
            rope_scaling: rope.rope_scaling.clone(),
            rope_parameters: part(&rope.rope_parameters, "full_attention"),
            partial_rotary_factor: None,
            original_max_position_embeddings: rope.original_max_position_embeddings,
        };
        let local = HfRope {
            rope_theta: self.gemma.rope_local_base_freq,
            rope_scaling: None,
            rope_parameters: part(&rope.rope_parameters, "sliding_attention"),
            partial_rotary_factor: None,
            original_max_position_embeddings: None,
        };
        (full, local)
    }
}

impl HfSliding {
    fn config(
        &self,
        architecture: Architecture,
        n_layers: usize,
    ) -> Result<Option<SlidingConfig>, ConfigError> {
        let Some(window) = self.sliding_window else { return Ok(None) };
        let by_rule: Box<dyn Fn(usize) -> bool> = match architecture {
            Architecture::Mistral | Architecture::Phi3 => Box::new(|_| true),
            Architecture::Gemma2 => Box::new(|layer| layer % 2 == 0),
            Architecture::Gemma3 => {
                let period = self.sliding_window_pattern.unwrap_or(6);
                require(period > 0, "sliding_window_pattern", "at least 1", period)?;
                Box::new(move |layer| !(layer + 1).is_multiple_of(period))
            }
            Architecture::Qwen2 | Architecture::Qwen3 => {
                if !self.use_sliding_window.unwrap_or(false) {
                    return Ok(None);
                }
                let first = present(self.max_window_layers, "max_window_layers")?;
                Box::new(move |layer| layer >= first)
            }
            _ => return Err(super::unsupported("sliding_window", window)),
        };
        let layers = match &self.layer_types {
            Some(types) => types.iter().map(|kind| is_sliding(kind)).collect::<Result<_, _>>()?,
            // Not yet known to be sane: a huge count would not fit memory.
            None => (0..n_layers.min(1 << 20)).map(by_rule).collect(),
        };
        Ok(Some(SlidingConfig { window, layers, rope: None }))
    }
}

fn is_sliding(layer_type: &str) -> Result<bool, ConfigError> {
    match layer_type {
        "sliding_attention" => Ok(true),
        "full_attention" => Ok(false),
        other => Err(super::unsupported("layer_types", other)),
    }
}
