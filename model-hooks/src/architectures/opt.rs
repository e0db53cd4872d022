//! OPT (Zhang et al., 2022): GPT-2's wiring, with positions counted from 2.

use super::{Trunk, Weights};
use crate::config::ModelConfig;
use crate::layers::{Attention, Block, Embedding, LearnedPositions, Mlp};
use crate::load::LoadError;

/// The first two rows of the table of positions are never used.
const OFFSET: usize = 2;

pub(super) fn trunk(config: &ModelConfig, weights: &mut Weights<'_>) -> Result<Trunk, LoadError> {
    let &ModelConfig { d_model, d_vocab, n_ctx, norm_eps, .. } = config;
    let table = weights.take("model.decoder.embed_positions.weight", [n_ctx + OFFSET, d_model])?;
    Ok(Trunk {
        embedding: Embedding {
            tokens: weights.matrix("model.decoder.embed_tokens.weight", [d_vocab, d_model])?,
            scale: None,
            positions: Some(LearnedPositions { table, offset: OFFSET }),
        },
        blocks: (0..config.n_layers)
            .map(|layer| block(config, weights, layer))
            .collect::<Result<_, _>>()?,
        ln_final: weights.layer_norm("model.decoder.final_layer_norm", d_model, norm_eps)?,
    })
}

fn block(
    config: &ModelConfig,
    weights: &mut Weights<'_>,
    layer: usize,
) -> Result<Block, LoadError> {
    let name = |part: &str| format!("model.decoder.layers.{layer}.{part}");
    let &ModelConfig { d_model, norm_eps, .. } = config;
    let d_mlp = config.mlp.d_mlp;
    let mut square = |part: &str| {
        let name = name(&format!("self_attn.{part}"));
        weights.linear(&name, [d_model, d_model], config.attention.bias)
    };
    let projections =
        [square("q_proj")?, square("k_proj")?, square("v_proj")?, square("out_proj")?];
    Ok(Block {
        ln1: Some(weights.layer_norm(&name("self_attn_layer_norm"), d_model, norm_eps)?),
        attention: Attention::new(&config.attention, layer, projections),
        ln1_post: None,
        ln2: Some(weights.layer_norm(&name("final_layer_norm"), d_model, norm_eps)?),
        mlp: Mlp {
            gate: None,
            up: weights.linear(&name("fc1"), [d_model, d_mlp], config.mlp.bias)?,
            down: weights.linear(&name("fc2"), [d_mlp, d_model], config.mlp.bias)?,
            nonlinearity: config.mlp.nonlinearity,
        },
        ln2_post: None,
        parallel: config.parallel,
    })
}
