//! GPT-NeoX (Black et al., 2022) and Pythia: each half behind a layer norm of its own, in parallel
//! or one after the other.

use super::{Trunk, Weights};
use crate::config::{AttentionConfig, ModelConfig};
use crate::layers::{Attention, Block, Embedding, Mlp};
use crate::load::LoadError;

pub(super) fn trunk(config: &ModelConfig, weights: &mut Weights<'_>) -> Result<Trunk, LoadError> {
    let &ModelConfig { d_model, d_vocab, norm_eps, .. } = config;
    let tokens = weights.matrix("gpt_neox.embed_in.weight", [d_vocab, d_model])?;
    Ok(Trunk {
        embedding: Embedding { tokens, scale: None, positions: None },
        blocks: (0..config.n_layers)
            .map(|layer| block(config, weights, layer))
            .collect::<Result<_, _>>()?,
        ln_final: weights.layer_norm("gpt_neox.final_layer_norm", d_model, norm_eps)?,
    })
}

fn block(
    config: &ModelConfig,
    weights: &mut Weights<'_>,
    layer: usize,
) -> Result<Block, LoadError> {
    let name = |part: &str| format!("gpt_neox.layers.{layer}.{part}");
    let &ModelConfig { d_model, norm_eps, .. } = config;
    let AttentionConfig { n_heads, d_head, bias, .. } = config.attention;
    // Rows: for each head its queries, keys and values.
    let fused = weights.fused(&name("attention.query_key_value"), [d_model, 3 * d_model], bias)?;
    let of_heads = |part| {
        (0..n_heads).flat_map(move |head| {
            let start = (3 * head + part) * d_head;
            start..start + d_head
        })
    };
    let [query, key, value] = [0, 1, 2].map(|part| fused.linear(of_heads(part)));
    let output = weights.linear(&name("attention.dense"), [d_model, d_model], bias)?;
    let widths = [d_model, config.mlp.d_mlp];
    Ok(Block {
        ln1: Some(weights.layer_norm(&name("input_layernorm"), d_model, norm_eps)?),
        attention: Attention::new(&config.attention, layer, [query, key, value, output]),
        ln1_post: None,
        ln2: Some(weights.layer_norm(&name("post_attention_layernorm"), d_model, norm_eps)?),
        mlp: Mlp {
            gate: None,
            up: weights.linear(&name("mlp.dense_h_to_4h"), widths, config.mlp.bias)?,
            down: weights.linear(
                &name("mlp.dense_4h_to_h"),
                [widths[1], widths[0]],
                config.mlp.bias,
            )?,
            nonlinearity: config.mlp.nonlinearity,
        },
        ln2_post: None,
        parallel: config.parallel,
    })
}
