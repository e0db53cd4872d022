//! Phi-3 (Abdin et al., 2024): Llama with its projections fused.

use super::{Trunk, Weights, llama};
use crate::config::ModelConfig;
use crate::layers::{Attention, Block, Mlp};
use crate::load::LoadError;

pub(super) fn trunk(config: &ModelConfig, weights: &mut Weights<'_>) -> Result<Trunk, LoadError> {
    llama::trunk_of(config, weights, |weights, layer| block(config, weights, layer))
}

fn block(
    config: &ModelConfig,
    weights: &mut Weights<'_>,
    layer: usize,
) -> Result<Block, LoadError> {
    let name = |part| llama::name(layer, part);
    let (d_model, d_mlp) = (config.d_model, config.mlp.d_mlp);
    let [d_query, d_key] = config.attention.widths();
    // Rows: queries, keys, values.
    let d_fused = d_query + 2 * d_key;
    let fused = weights.fused(&name("self_attn.qkv_proj"), [d_model, d_fused], false)?;
    let query = fused.linear(0..d_query);
    let key = fused.linear(d_query..d_query + d_key);
    let value = fused.linear(d_query + d_key..d_fused);
    let output = weights.linear(&name("self_attn.o_proj"), [d_query, d_model], false)?;
    let fused = weights.fused(&name("mlp.gate_up_proj"), [d_model, 2 * d_mlp], false)?;
    Ok(Block {
        ln1: Some(llama::norm(config, weights, &name("input_layernorm"))?),
        attention: Attention::new(&config.attention, layer, [query, key, value, output]),
        ln1_post: None,
        ln2: Some(llama::norm(config, weights, &name("post_attention_layernorm"))?),
        mlp: Mlp {
            gate: Some(fused.linear(0..d_mlp)),
            up: fused.linear(d_mlp..2 * d_mlp),
            down: weights.linear(&name("mlp.down_proj"), [d_mlp, d_model], false)?,
            nonlinearity: config.mlp.nonlinearity,
        },
        ln2_post: None,
        parallel: config.parallel,
    })
}
