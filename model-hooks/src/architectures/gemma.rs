//! Gemma 2 and 3 (Gemma team, 2024, 2025): scaled embeddings, norms before and behind each half whose
//! gains are stored less one, and in Gemma 3 norms on queries and keys.

use super::{Trunk, Weights, llama};
use crate::config::ModelConfig;
use crate::layers::{Block, Norm};
use crate::load::LoadError;

pub(super) fn gemma2(config: &ModelConfig, weights: &mut Weights<'_>) -> Result<Trunk, LoadError> {
    trunk(config, weights, false)
}

pub(super) fn gemma3(config: &ModelConfig, weights: &mut Weights<'_>) -> Result<Trunk, LoadError> {
    trunk(config, weights, true)
}

fn trunk(
    config: &ModelConfig,
    weights: &mut Weights<'_>,
    qk_norms: bool,
) -> Result<Trunk, LoadError> {
    let mut trunk = llama::trunk_of(config, weights, |weights, layer| {
        let name = |part| llama::name(layer, part);
        let mut attention = llama::attention(config, weights, layer, [config.attention.bias; 2])?;
        if qk_norms {
            let d_head = config.attention.d_head;
            attention.query_norm = Some(norm(config, weights, &name("self_attn.q_norm"), d_head)?);
            attention.key_norm = Some(norm(config, weights, &name("self_attn.k_norm"), d_head)?);
        }
        let mut wide = |part| norm(config, weights, &name(part), config.d_model).map(Some);
        Ok(Block {
            ln1: wide("input_layernorm")?,
            attention,
            ln1_post: wide("post_attention_layernorm")?,
            ln2: wide("pre_feedforward_layernorm")?,
            ln2_post: wide("post_feedforward_layernorm")?,
            mlp: llama::mlp(config, weights, layer)?,
            parallel: config.parallel,
        })
    })?;
    trunk.embedding.scale = Some((config.d_model as f32).sqrt());
    trunk.ln_final.gain = trunk.ln_final.gain + 1.0;
    Ok(trunk)
}

fn norm(
    config: &ModelConfig,
    weights: &mut Weights<'_>,
    name: &str,
    width: usize,
) -> Result<Norm, LoadError> {
    let norm = weights.rms_norm(name, width, config.norm_eps)?;
    Ok(Norm { gain: norm.gain + 1.0, ..norm })
}
