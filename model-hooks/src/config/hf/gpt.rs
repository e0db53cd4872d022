//! GPT-2 and GPT-J, whose configs have names of their own.

use serde::Deserialize;
use serde_json::{Value, json};

use super::super::{
    Architecture, AttentionConfig, AttentionScale, ConfigError, MlpConfig, ModelConfig, RopeConfig,
    RopeScaling, RotaryPairs, SpecialTokens, UnembeddingConfig,
};
use super::{head_width, nonlinearity, parse, present, refuse};

#[derive(Deserialize)]
struct HfGpt {
    n_embd: Option<usize>,
    n_layer: Option<usize>,
    n_head: Option<usize>,
    n_inner: Option<usize>,
    n_positions: Option<usize>,
    vocab_size: Option<usize>,
    layer_norm_epsilon: Option<f64>,
    activation_function: Option<String>,
    tie_word_embeddings: Option<bool>,
    rotary_dim: Option<usize>,
    scale_attn_weights: Option<bool>,
    scale_attn_by_inverse_layer_idx: Option<bool>,
    add_cross_attention: Option<Value>,
}

/// Learned positions.
pub(super) fn gpt2(
    config: &[u8],
    special_tokens: SpecialTokens,
) -> Result<ModelConfig, ConfigError> {
    let hf: HfGpt = parse(config)?;
    refuse([("add_cross_attention", &hf.add_cross_attention, json!(false))])?;
    let mut config = hf.model(Architecture::Gpt2, special_tokens)?;
    let scale = match hf.scale_attn_weights.unwrap_or(true) {
        true => (config.attention.d_head as f64).powf(-0.5),
        false => 1.0,
    };
    config.attention.scales = match hf.scale_attn_by_inverse_layer_idx.unwrap_or(false) {
        true => AttentionScale::ByLayer(scale),
        false => AttentionScale::Same(scale),
    };
    config.attention.bias = true;
    config.unembedding.tied = hf.tie_word_embeddings.unwrap_or(true);
    Ok(config)
}

/// Rotary positions of neighbouring pairs, and both halves in parallel.
pub(super) fn gptj(
    config: &[u8],
    special_tokens: SpecialTokens,
) -> Result<ModelConfig, ConfigError> {
    let hf: HfGpt = parse(config)?;
    let mut config = hf.model(Architecture::GptJ, special_tokens)?;
    config.parallel = true;
    config.attention.rope = Some(RopeConfig {
        theta: 10_000.0,
        n_dims: hf.rotary_dim.unwrap_or(config.attention.d_head),
        pairs: RotaryPairs::Neighbours,
        scaling: RopeScaling::Default,
    });
    config.unembedding.tied = hf.tie_word_embeddings.unwrap_or(false);
    Ok(config)
}

impl HfGpt {
    fn model(
        &self,
        architecture: Architecture,
        special_tokens: SpecialTokens,
    ) -> Result<ModelConfig, ConfigError> {
        let d_model = present(self.n_embd, "n_embd")?;
        let n_heads = present(self.n_head, "n_head")?;
        let d_head = head_width(d_model, n_heads, "a divisor of n_embd")?;
        let activation = present(self.activation_function.as_deref(), "activation_function")?;
        Ok(ModelConfig {
            architecture,
            d_model,
            n_layers: present(self.n_layer, "n_layer")?,
            d_vocab: present(self.vocab_size, "vocab_size")?,
            n_ctx: present(self.n_positions, "n_positions")?,
            norm_eps: present(self.layer_norm_epsilon, "layer_norm_epsilon")?,
            parallel: false,
            attention: AttentionConfig {
                n_heads,
                n_kv_heads: n_heads,
                d_head,
                bias: false,
                scales: AttentionScale::Same((d_head as f64).powf(-0.5)),
                soft_cap: None,
                sliding: None,
                rope: None,
            },
            mlp: MlpConfig {
                d_mlp: self.n_inner.unwrap_or(d_model.saturating_mul(4)),
                nonlinearity: nonlinearity(activation)?,
                bias: true,
            },
            unembedding: UnembeddingConfig { tied: false, soft_cap: None },
            special_tokens,
        })
    }
}
