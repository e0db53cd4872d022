//! Llama (Touvron et al., 2023): pre-norm, rotary attention, gated MLP. SmolLM2 is one; Mistral is
//! one with a window.

use super::{Trunk, Weights};
use crate::config::ModelConfig;
use crate::layers::{Attention, Block, Embedding, Mlp, Norm};
use crate::load::LoadError;

pub(super) fn trunk(config: &ModelConfig, weights: &mut Weights<'_>) -> Result<Trunk, LoadError> {
    trunk_of(config, weights, |weights, layer| {
        let attention = attention(config, weights, layer, [config.attention.bias; 2])?;
        block(config, weights, layer, attention)
    })
}

/// A trunk under Llama's names, of such blocks.
pub(super) fn trunk_of(
    config: &ModelConfig,
    weights: &mut Weights<'_>,
    mut block: impl FnMut(&mut Weights<'_>, usize) -> Result<Block, LoadError>,
) -> Result<Trunk, LoadError> {
    let tokens = weights.matrix("model.embed_tokens.weight", [config.d_vocab, config.d_model])?;
    Ok(Trunk {
        embedding: Embedding { tokens, scale: None, positions: None },
        blocks: (0..config.n_layers).map(|l| block(weights, l)).collect::<Result<_, _>>()?,
        ln_final: norm(config, weights, "model.norm")?,
    })
}

/// A block that differs from Llama's in its attention.
pub(super) fn block(
    config: &ModelConfig,
    weights: &mut Weights<'_>,
    layer: usize,
    attention: Attention,
) -> Result<Block, LoadError> {
    Ok(Block {
        ln1: Some(norm(config, weights, &name(layer, "input_layernorm"))?),
        attention,
        ln1_post: None,
        ln2: Some(norm(config, weights, &name(layer, "post_attention_layernorm"))?),
        mlp: mlp(config, weights, layer)?,
        ln2_post: None,
        parallel: config.parallel,
    })
}

/// With biases on queries, keys and values, and on the output.
pub(super) fn attention(
    config: &ModelConfig,
    weights: &mut Weights<'_>,
    layer: usize,
    [bias, output_bias]: [bool; 2],
) -> Result<Attention, LoadError> {
    let name = |part| name(layer, &format!("self_attn.{part}"));
    let d_model = config.d_model;
    let [d_query, d_key] = config.attention.widths();
    let query = weights.linear(&name("q_proj"), [d_model, d_query], bias)?;
    let key = weights.linear(&name("k_proj"), [d_model, d_key], bias)?;
    let value = weights.linear(&name("v_proj"), [d_model, d_key], bias)?;
    let output = weights.linear(&name("o_proj"), [d_query, d_model], output_bias)?;
    Ok(Attention::new(&config.attention, layer, [query, key, value, output]))
}

/// A gated MLP.
pub(super) fn mlp(
    config: &ModelConfig,
    weights: &mut Weights<'_>,
    layer: usize,
) -> Result<Mlp, LoadError> {
    let name = |part| name(layer, &format!("mlp.{part}"));
    let (d_model, d_mlp, bias) = (config.d_model, config.mlp.d_mlp, config.mlp.bias);
    Ok(Mlp {
        gate: Some(weights.linear(&name("gate_proj"), [d_model, d_mlp], bias)?),
        up: weights.linear(&name("up_proj"), [d_model, d_mlp], bias)?,
        down: weights.linear(&name("down_proj"), [d_mlp, d_model], bias)?,
        nonlinearity: config.mlp.nonlinearity,
    })
}

/// A root-mean-square norm as wide as the residual stream.
pub(super) fn norm(
    config: &ModelConfig,
    weights: &mut Weights<'_>,
    name: &str,
) -> Result<Norm, LoadError> {
    weights.rms_norm(name, config.d_model, config.norm_eps)
}

pub(super) fn name(layer: usize, part: &str) -> String {
    format!("model.layers.{layer}.{part}")
}
