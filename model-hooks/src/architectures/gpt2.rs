//! GPT-2 (Radford et al., 2019): learned positions, layer norms, a plain MLP.

use super::{Trunk, Weights};
use crate::config::ModelConfig;
use crate::layers::{Attention, Block, Embedding, LearnedPositions, Mlp};
use crate::load::LoadError;

pub(super) fn trunk(config: &ModelConfig, weights: &mut Weights<'_>) -> Result<Trunk, LoadError> {
    let &ModelConfig { d_model, d_vocab, n_ctx, norm_eps, .. } = config;
    // The base model's files, as the hub has them, go without the prefix.
    let prefix = if weights.has("wte.weight") { "" } else { "transformer." };
    let name = |part: &str| format!("{prefix}{part}");
    let table = weights.take(&name("wpe.weight"), [n_ctx, d_model])?;
    Ok(Trunk {
        embedding: Embedding {
            tokens: weights.matrix(&name("wte.weight"), [d_vocab, d_model])?,
            scale: None,
            positions: Some(LearnedPositions { table, offset: 0 }),
        },
        blocks: (0..config.n_layers)
            .map(|layer| block(config, weights, layer, &name(&format!("h.{layer}"))))
            .collect::<Result<_, _>>()?,
        ln_final: weights.layer_norm(&name("ln_f"), d_model, norm_eps)?,
    })
}

fn block(
    config: &ModelConfig,
    weights: &mut Weights<'_>,
    layer: usize,
    block: &str,
) -> Result<Block, LoadError> {
    let name = |part: &str| format!("{block}.{part}");
    let &ModelConfig { d_model, norm_eps, .. } = config;
    let d_mlp = config.mlp.d_mlp;
    // Columns: queries, keys, values.
    let fused = weights.fused_columns(&name("attn.c_attn"), [d_model, 3 * d_model])?;
    let [query, key, value] = [0, 1, 2].map(|i| fused.linear(i * d_model..(i + 1) * d_model));
    let output = weights.linear_columns(&name("attn.c_proj"), [d_model, d_model])?;
    Ok(Block {
        ln1: Some(weights.layer_norm(&name("ln_1"), d_model, norm_eps)?),
        attention: Attention::new(&config.attention, layer, [query, key, value, output]),
        ln1_post: None,
        ln2: Some(weights.layer_norm(&name("ln_2"), d_model, norm_eps)?),
        mlp: Mlp {
            gate: None,
            up: weights.linear_columns(&name("mlp.c_fc"), [d_model, d_mlp])?,
            down: weights.linear_columns(&name("mlp.c_proj"), [d_mlp, d_model])?,
            nonlinearity: config.mlp.nonlinearity,
        },
        ln2_post: None,
        parallel: config.parallel,
    })
}
