//! GPT-J (Wang & Komatsuzaki, 2021): attention and MLP in parallel behind one norm.

use super::{Trunk, Weights};
use crate::config::ModelConfig;
use crate::layers::{Attention, Block, Embedding, Mlp};
use crate::load::LoadError;

pub(super) fn trunk(config: &ModelConfig, weights: &mut Weights<'_>) -> Result<Trunk, LoadError> {
    let &ModelConfig { d_model, d_vocab, norm_eps, .. } = config;
    let tokens = weights.matrix("transformer.wte.weight", [d_vocab, d_model])?;
    Ok(Trunk {
        embedding: Embedding { tokens, scale: None, positions: None },
        blocks: (0..config.n_layers)
            .map(|layer| block(config, weights, layer))
            .collect::<Result<_, _>>()?,
        ln_final: weights.layer_norm("transformer.ln_f", d_model, norm_eps)?,
    })
}

fn block(
    config: &ModelConfig,
    weights: &mut Weights<'_>,
    layer: usize,
) -> Result<Block, LoadError> {
    let name = |part: &str| format!("transformer.h.{layer}.{part}");
    let &ModelConfig { d_model, norm_eps, .. } = config;
    let d_mlp = config.mlp.d_mlp;
    let mut square = |part: &str| {
        weights.linear(&name(&format!("attn.{part}")), [d_model, d_model], config.attention.bias)
    };
    let projections =
        [square("q_proj")?, square("k_proj")?, square("v_proj")?, square("out_proj")?];
    // One norm for both halves, with hook points for each: what is edited in one is not in the
    // other.
    let norm = weights.layer_norm(&name("ln_1"), d_model, norm_eps)?;
    Ok(Block {
        ln1: Some(norm.clone()),
        attention: Attention::new(&config.attention, layer, projections),
        ln1_post: None,
        ln2: Some(norm),
        mlp: Mlp {
            gate: None,
            up: weights.linear(&name("mlp.fc_in"), [d_model, d_mlp], config.mlp.bias)?,
            down: weights.linear(&name("mlp.fc_out"), [d_mlp, d_model], config.mlp.bias)?,
            nonlinearity: config.mlp.nonlinearity,
        },
        ln2_post: None,
        parallel: config.parallel,
    })
}
