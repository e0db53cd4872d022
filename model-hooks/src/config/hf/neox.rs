//! GPT-NeoX and Pythia.

use serde::Deserialize;

use super::super::{
    Architecture, AttentionConfig, AttentionScale, ConfigError, MlpConfig, ModelConfig,
    SpecialTokens, UnembeddingConfig, require,
};
use super::rope::HfRope;
use super::{head_width, nonlinearity, parse, present};

#[derive(Deserialize)]
struct HfNeoX {
    hidden_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    intermediate_size: Option<usize>,
    vocab_size: Option<usize>,
    max_position_embeddings: Option<usize>,
    layer_norm_eps: Option<f64>,
    hidden_act: Option<String>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    use_parallel_residual: Option<bool>,
    /// transformers 4's names of `partial_rotary_factor` and `rope_theta`.
    rotary_pct: Option<f64>,
    rotary_emb_base: Option<f64>,
    #[serde(flatten)]
    rope: HfRope,
}

pub(super) fn neox(
    config: &[u8],
    special_tokens: SpecialTokens,
) -> Result<ModelConfig, ConfigError> {
    let mut hf: HfNeoX = parse(config)?;
    for (field, old, new) in [
        ("rotary_pct", hf.rotary_pct, &mut hf.rope.partial_rotary_factor),
        ("rotary_emb_base", hf.rotary_emb_base, &mut hf.rope.rope_theta),
    ] {
        if let (Some(old), Some(new)) = (old, *new) {
            require(old == new, field, "the same as its newer name", old)?;
        }
        *new = new.or(old);
    }
    // What transformers takes where nothing is said anywhere.
    let said = hf.rope.rope_parameters.as_ref();
    if said.is_none_or(|said| !said.contains_key("partial_rotary_factor")) {
        hf.rope.partial_rotary_factor.get_or_insert(0.25);
    }
    let d_model = present(hf.hidden_size, "hidden_size")?;
    let n_heads = present(hf.num_attention_heads, "num_attention_heads")?;
    let d_head = head_width(d_model, n_heads, "a divisor of hidden_size")?;
    let n_ctx = present(hf.max_position_embeddings, "max_position_embeddings")?;
    Ok(ModelConfig {
        architecture: Architecture::GptNeoX,
        d_model,
        n_layers: present(hf.num_hidden_layers, "num_hidden_layers")?,
        d_vocab: present(hf.vocab_size, "vocab_size")?,
        n_ctx,
        norm_eps: present(hf.layer_norm_eps, "layer_norm_eps")?,
        parallel: hf.use_parallel_residual.unwrap_or(true),
        attention: AttentionConfig {
            n_heads,
            n_kv_heads: n_heads,
            d_head,
            bias: hf.attention_bias.unwrap_or(true),
            scales: AttentionScale::Same((d_head as f64).powf(-0.5)),
            soft_cap: None,
            sliding: None,
            rope: Some(hf.rope.config(d_head, n_ctx, 10_000.0)?),
        },
        mlp: MlpConfig {
            d_mlp: present(hf.intermediate_size, "intermediate_size")?,
            nonlinearity: nonlinearity(present(hf.hidden_act.as_deref(), "hidden_act")?)?,
            bias: true,
        },
        unembedding: UnembeddingConfig {
            tied: hf.tie_word_embeddings.unwrap_or(false),
            soft_cap: None,
        },
        special_tokens,
    })
}
