//! OPT.

use serde::Deserialize;
use serde_json::{Value, json};

use super::super::{
    Architecture, AttentionConfig, AttentionScale, ConfigError, MlpConfig, ModelConfig,
    SpecialTokens, UnembeddingConfig,
};
use super::{head_width, nonlinearity, parse, present, refuse};

/// The ε of PyTorch's layer norm, which OPT's config does not name.
const NORM_EPS: f64 = 1e-5;

#[derive(Deserialize)]
struct HfOpt {
    hidden_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    ffn_dim: Option<usize>,
    vocab_size: Option<usize>,
    max_position_embeddings: Option<usize>,
    activation_function: Option<String>,
    tie_word_embeddings: Option<bool>,
    enable_bias: Option<bool>,
    word_embed_proj_dim: Option<Value>,
    do_layer_norm_before: Option<Value>,
    layer_norm_elementwise_affine: Option<Value>,
    #[serde(rename = "_remove_final_layer_norm")]
    remove_final_layer_norm: Option<Value>,
}

pub(super) fn opt(
    config: &[u8],
    special_tokens: SpecialTokens,
) -> Result<ModelConfig, ConfigError> {
    let hf: HfOpt = parse(config)?;
    let d_model = present(hf.hidden_size, "hidden_size")?;
    refuse([
        ("word_embed_proj_dim", &hf.word_embed_proj_dim, json!(d_model)),
        ("do_layer_norm_before", &hf.do_layer_norm_before, json!(true)),
        ("layer_norm_elementwise_affine", &hf.layer_norm_elementwise_affine, json!(true)),
        ("_remove_final_layer_norm", &hf.remove_final_layer_norm, json!(false)),
    ])?;
    let n_heads = present(hf.num_attention_heads, "num_attention_heads")?;
    let d_head = head_width(d_model, n_heads, "a divisor of hidden_size")?;
    let bias = hf.enable_bias.unwrap_or(true);
    let activation = hf.activation_function.as_deref().unwrap_or("relu");
    Ok(ModelConfig {
        architecture: Architecture::Opt,
        d_model,
        n_layers: present(hf.num_hidden_layers, "num_hidden_layers")?,
        d_vocab: present(hf.vocab_size, "vocab_size")?,
        n_ctx: present(hf.max_position_embeddings, "max_position_embeddings")?,
        norm_eps: NORM_EPS,
        parallel: false,
        attention: AttentionConfig {
            n_heads,
            n_kv_heads: n_heads,
            d_head,
            bias,
            scales: AttentionScale::Same((d_head as f64).powf(-0.5)),
            soft_cap: None,
            sliding: None,
            rope: None,
        },
        mlp: MlpConfig {
            d_mlp: present(hf.ffn_dim, "ffn_dim")?,
            nonlinearity: nonlinearity(activation)?,
            bias,
        },
        unembedding: UnembeddingConfig {
            tied: hf.tie_word_embeddings.unwrap_or(true),
            soft_cap: None,
        },
        special_tokens,
    })
}
