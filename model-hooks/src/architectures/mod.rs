//! One file per architecture: wiring and weight names only.

mod llama;
mod weights;

use burn::tensor::{Device, Tensor};

use crate::config::{Architecture, ModelConfig};
use crate::hook::Hook;
use crate::hook_point::HookPoint;
use crate::layers::{KvCache, RmsNorm, RotaryTable};
use crate::load::{LoadError, TensorSource};
use crate::positions::Positions;

/// The weights of a model, whatever its architecture.
#[derive(Debug, Clone)]
pub(crate) struct Network {
    /// `[d_vocab, d_model]`.
    pub(crate) embedding: Tensor<2>,
    pub(crate) blocks: Vec<Block>,
    pub(crate) ln_final: RmsNorm,
    /// `[d_vocab, d_model]`, as checkpoints have it: the embedding itself where the two are tied.
    pub(crate) unembedding: Tensor<2>,
}

/// A block of any architecture.
#[derive(Debug, Clone)]
pub(crate) enum Block {
    Llama(llama::Block),
}

/// What all blocks of a pass share.
pub(crate) struct Pass<'a> {
    pub(crate) positions: &'a Positions,
    pub(crate) rotary: &'a RotaryTable,
    pub(crate) cache: &'a mut KvCache,
}

impl Network {
    /// Takes every tensor that the architecture needs; one that is left over is an error.
    pub(crate) fn load(
        config: &ModelConfig,
        tensors: &mut dyn TensorSource,
        device: &Device,
    ) -> Result<Self, LoadError> {
        let mut weights = weights::Weights::new(tensors, device);
        let network = match config.architecture {
            Architecture::Llama => llama::load(config, &mut weights)?,
        };
        weights.finish()?;
        Ok(network)
    }
}

impl Block {
    pub(crate) fn forward<H: Hook>(
        &self,
        x: Tensor<3>,
        layer: usize,
        pass: &mut Pass<'_>,
        hook: &mut H,
    ) -> Tensor<3> {
        match self {
            Self::Llama(block) => block.forward(x, layer, pass, hook),
        }
    }
}

/// Every hook point of a model, in the order in which a pass comes by.
pub(crate) fn hook_points(config: &ModelConfig) -> Vec<HookPoint> {
    let sites = match config.architecture {
        Architecture::Llama => llama::SITES,
    };
    let blocks = (0..config.n_layers)
        .flat_map(|layer| sites.iter().map(move |&site| HookPoint::Block { layer, site }));
    std::iter::once(HookPoint::Embed)
        .chain(blocks)
        .chain([HookPoint::LnFinalScale, HookPoint::LnFinalNormalized])
        .collect()
}
