//! Qwen 2 (Yang et al., 2024): Llama with biases on queries, keys and values; and Qwen 3, with norms
//! on queries and keys instead.

use super::{Trunk, Weights, llama};
use crate::config::ModelConfig;
use crate::load::LoadError;

pub(super) fn qwen2(config: &ModelConfig, weights: &mut Weights<'_>) -> Result<Trunk, LoadError> {
    llama::trunk_of(config, weights, |weights, layer| {
        let attention = llama::attention(config, weights, layer, [true, false])?;
        llama::block(config, weights, layer, attention)
    })
}

pub(super) fn qwen3(config: &ModelConfig, weights: &mut Weights<'_>) -> Result<Trunk, LoadError> {
    llama::trunk_of(config, weights, |weights, layer| {
        let mut attention = llama::attention(config, weights, layer, [config.attention.bias; 2])?;
        let mut norm = |part| {
            let name = llama::name(layer, part);
            weights.rms_norm(&name, config.attention.d_head, config.norm_eps).map(Some)
        };
        attention.query_norm = norm("self_attn.q_norm")?;
        attention.key_norm = norm("self_attn.k_norm")?;
        llama::block(config, weights, layer, attention)
    })
}
