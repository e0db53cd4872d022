//! OLMo 2 (OLMo team, 2024): Llama with its norms behind each half, and norms over all queries and
//! over all keys of a position.

use super::{Trunk, Weights, llama};
use crate::config::ModelConfig;
use crate::layers::Block;
use crate::load::LoadError;

pub(super) fn trunk(config: &ModelConfig, weights: &mut Weights<'_>) -> Result<Trunk, LoadError> {
    llama::trunk_of(config, weights, |weights, layer| {
        let name = |part| llama::name(layer, part);
        let [d_query, d_key] = config.attention.widths();
        let epsilon = config.norm_eps;
        let mut attention = llama::attention(config, weights, layer, [config.attention.bias; 2])?;
        attention.query_norm =
            Some(weights.rms_norm(&name("self_attn.q_norm"), d_query, epsilon)?);
        attention.key_norm = Some(weights.rms_norm(&name("self_attn.k_norm"), d_key, epsilon)?);
        Ok(Block {
            ln1: None,
            attention,
            ln1_post: Some(llama::norm(config, weights, &name("post_attention_layernorm"))?),
            ln2: None,
            mlp: llama::mlp(config, weights, layer)?,
            ln2_post: Some(llama::norm(config, weights, &name("post_feedforward_layernorm"))?),
            parallel: config.parallel,
        })
    })
}
