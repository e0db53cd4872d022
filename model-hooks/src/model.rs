//! The seam that other crates see: a forward pass with a hook, from tokens or from a residual.

use std::ops::Range;

use burn::tensor::{Device, Tensor};

use crate::architectures::{self, Network, Pass};
use crate::config::ModelConfig;
use crate::hook::{Hook, HookError, fire};
use crate::hook_point::HookPoint;
use crate::layers::{KvCache, NormPoints, Rotary, SharedPrefix};
use crate::load::{LoadError, TensorSource};
use crate::positions::Positions;
use crate::tokens::{TokenBatch, TokenError};

/// A causal language model.
///
/// A pass is [`embed`](Self::embed), then [`blocks`](Self::blocks), then
/// [`unembed`](Self::unembed); the methods that take a [`TokenBatch`] put these together, and start
/// or stop anywhere by running fewer blocks.
#[derive(Debug, Clone)]
pub struct LanguageModel {
    config: ModelConfig,
    network: Network,
    rotary: Rotary,
    device: Device,
}

/// Why a pass could not be run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ForwardError {
    /// The tokens do not fit the model.
    #[error(transparent)]
    Tokens(#[from] TokenError),
    /// A hook could not do its work.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// A block that the model does not have.
    #[error("this model has {expected} blocks, but block {actual} was asked for")]
    NoSuchLayer {
        /// Blocks of the model.
        expected: usize,
        /// The block asked for.
        actual: usize,
    },
}

impl LanguageModel {
    /// Builds the model out of a checkpoint's tensors.
    ///
    /// # Errors
    /// If a tensor is missing, has another shape, is not finite, or is left over.
    pub fn load(
        config: ModelConfig,
        tensors: &mut dyn TensorSource,
        device: &Device,
    ) -> Result<Self, LoadError> {
        let network = Network::load(&config, tensors, device)?;
        let rope = &config.attention.rope;
        let rotary = Rotary::new(config.attention.d_head, rope.theta, &rope.scaling);
        Ok(Self { config, network, rotary, device: device.clone() })
    }

    /// The model's dimensions and conventions.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Every hook point, in the order in which a pass comes by.
    pub fn hook_points(&self) -> Vec<HookPoint> {
        architectures::hook_points(&self.config)
    }

    /// Checks that the model has a point.
    ///
    /// # Errors
    /// [`HookError::NoSuchPoint`] if it does not.
    pub fn check_point(&self, point: HookPoint) -> Result<(), HookError> {
        if self.hook_points().contains(&point) {
            return Ok(());
        }
        let last = self.config.n_layers - 1;
        Err(HookError::NoSuchPoint { point, expected: format!("its blocks are 0 to {last}") })
    }

    /// Logits at every position.
    ///
    /// # Shapes
    /// `[batch, pos, d_vocab]`.
    ///
    /// # Errors
    /// If the hook fails.
    pub fn logits<H: Hook>(
        &self,
        tokens: &TokenBatch,
        hook: &mut H,
    ) -> Result<Tensor<3>, ForwardError> {
        let (residual, positions) = self.through(tokens, self.config.n_layers, hook)?;
        let logits = self.unembed(residual, &positions, hook);
        hook.finish()?;
        Ok(logits)
    }

    /// Logits at the last position only: the unembedding of the others is not computed.
    ///
    /// # Shapes
    /// `[batch, d_vocab]`.
    ///
    /// # Errors
    /// If the hook fails.
    pub fn last_logits<H: Hook>(
        &self,
        tokens: &TokenBatch,
        hook: &mut H,
    ) -> Result<Tensor<2>, ForwardError> {
        let (residual, positions) = self.through(tokens, self.config.n_layers, hook)?;
        let logits = self.unembed_last(residual, &positions, hook);
        hook.finish()?;
        Ok(logits)
    }

    /// The residual stream after the first `n_blocks` blocks; the others are not run.
    ///
    /// # Shapes
    /// `[batch, pos, d_model]`.
    ///
    /// # Errors
    /// If the model has fewer blocks, or the hook fails.
    pub fn run_until<H: Hook>(
        &self,
        tokens: &TokenBatch,
        n_blocks: usize,
        hook: &mut H,
    ) -> Result<Tensor<3>, ForwardError> {
        let (residual, _) = self.through(tokens, n_blocks, hook)?;
        hook.finish()?;
        Ok(residual)
    }

    fn through<H: Hook>(
        &self,
        tokens: &TokenBatch,
        n_blocks: usize,
        hook: &mut H,
    ) -> Result<(Tensor<3>, Positions), ForwardError> {
        let mut cache = self.cache(SharedPrefix::default(), tokens.padding().to_vec());
        let [_, n] = tokens.dims();
        let positions = cache.next_positions(n);
        let residual = self.embed(tokens, &positions, hook);
        let residual = self.blocks(residual, 0..n_blocks, &mut cache, hook)?;
        Ok((residual, positions))
    }

    /// An empty cache for this model's blocks, behind a prefix.
    ///
    /// # Panics
    /// If the prefix was made with a model of another depth.
    pub fn cache(&self, prefix: SharedPrefix, padding: Vec<usize>) -> KvCache {
        KvCache::new(self.config.n_layers, prefix, padding)
    }

    /// Runs tokens that many conversations begin with, once.
    ///
    /// # Errors
    /// If the tokens do not fit the model. The hook is not finished: the pass goes on with the
    /// conversations.
    pub fn prefix<H: Hook>(&self, ids: &[u32], hook: &mut H) -> Result<SharedPrefix, ForwardError> {
        let tokens = TokenBatch::new(&[ids], &self.config, &self.device)?;
        let mut cache = self.cache(SharedPrefix::default(), vec![0]);
        let positions = cache.next_positions(ids.len());
        let residual = self.embed(&tokens, &positions, hook);
        self.blocks(residual, 0..self.config.n_layers, &mut cache, hook)?;
        Ok(cache.into_prefix())
    }

    /// Token embeddings.
    ///
    /// # Shapes
    /// `[batch, pos, d_model]`.
    pub fn embed<H: Hook>(
        &self,
        tokens: &TokenBatch,
        positions: &Positions,
        hook: &mut H,
    ) -> Tensor<3> {
        let [batch, n] = tokens.dims();
        let ids = tokens.ids().reshape([batch * n]);
        let rows = self.network.embedding.clone().select(0, ids);
        let embedded = rows.reshape([batch, n, self.config.d_model]);
        fire(hook, HookPoint::Embed, embedded, positions)
    }

    /// Runs some blocks on a residual stream: the columns that come next in the cache.
    ///
    /// # Shapes
    /// `[batch, pos, d_model]`, in and out.
    ///
    /// # Errors
    /// If the model does not have these blocks.
    pub fn blocks<H: Hook>(
        &self,
        residual: Tensor<3>,
        layers: Range<usize>,
        cache: &mut KvCache,
        hook: &mut H,
    ) -> Result<Tensor<3>, ForwardError> {
        let expected = self.config.n_layers;
        if layers.end > expected {
            return Err(ForwardError::NoSuchLayer { expected, actual: layers.end - 1 });
        }
        let [_, n, _] = residual.dims();
        let positions = cache.next_positions(n);
        let rotary = self.rotary.table(&positions, &self.device);
        let mut pass = Pass { positions: &positions, rotary: &rotary, cache };
        let mut x = residual;
        for layer in layers {
            x = self.network.blocks[layer].forward(x, layer, &mut pass, hook);
        }
        cache.advance(n);
        Ok(x)
    }

    /// The final norm and the unembedding.
    ///
    /// # Shapes
    /// `residual`: `[batch, pos, d_model]`; result: `[batch, pos, d_vocab]`.
    pub fn unembed<H: Hook>(
        &self,
        residual: Tensor<3>,
        positions: &Positions,
        hook: &mut H,
    ) -> Tensor<3> {
        let [batch, n, d_model] = residual.dims();
        let normed = self.norm_final(residual, positions, hook);
        let rows = normed.reshape([batch * n, d_model]);
        let logits = kernels::dot_rows(rows, self.network.unembedding.clone());
        logits.reshape([batch, n, self.config.d_vocab])
    }

    /// As [`unembed`](Self::unembed), for the last column alone. The final norm's hooks see all
    /// columns.
    ///
    /// # Shapes
    /// `residual`: `[batch, pos, d_model]`; result: `[batch, d_vocab]`.
    pub fn unembed_last<H: Hook>(
        &self,
        residual: Tensor<3>,
        positions: &Positions,
        hook: &mut H,
    ) -> Tensor<2> {
        let [batch, n, d_model] = residual.dims();
        let normed = self.norm_final(residual, positions, hook);
        let last = normed.narrow(1, n - 1, 1).reshape([batch, d_model]);
        kernels::dot_rows(last, self.network.unembedding.clone())
    }

    pub(crate) fn norm_final<H: Hook>(
        &self,
        residual: Tensor<3>,
        positions: &Positions,
        hook: &mut H,
    ) -> Tensor<3> {
        self.network.ln_final.forward(residual, NormPoints::FINAL, positions, hook)
    }
}
