//! The seam that other crates see: a forward pass with a hook, from tokens or from a residual.

use std::ops::Range;

use burn::tensor::{Device, Tensor};

use crate::architectures::{self, Trunk, WeightDtype};
use crate::cache::ActivationCache;
use crate::config::ModelConfig;
use crate::hook::{Hook, HookError, fire};
use crate::hook_point::HookPoint;
use crate::layers::{
    Block, KvCache, NormPoints, Pass, RopeLength, Rotary, RotaryTable, SharedPrefix, Unembedding,
};
use crate::load::{LoadError, TensorSource};
use crate::positions::Positions;
use crate::sampling::SamplingError;
use crate::tokens::{TokenBatch, TokenError};

/// A causal language model, or the body of a [`RewardModel`](crate::RewardModel), which has no
/// unembedding.
///
/// A pass is [`embed`](Self::embed), then [`blocks`](Self::blocks), then
/// [`unembed`](Self::unembed); the methods that take a [`TokenBatch`] put these together, and start
/// or stop anywhere by running fewer blocks.
#[derive(Debug, Clone)]
pub struct LanguageModel {
    config: ModelConfig,
    trunk: Trunk,
    unembedding: Option<Unembedding>,
    rotaries: Vec<Rotary>,
    rope_length: RopeLength,
    device: Device,
}

/// Why a pass could not be run.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
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
    /// An option of sampling that cannot be.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// The body of a reward model was asked for logits.
    #[error("this model has no unembedding: it is the body of a reward model")]
    NoUnembedding,
    /// A cached conversation grew past the length at which all its rotary angles change.
    #[error(
        "a cached conversation grows past {length} tokens, where this model's rotary angles \
         change: run it again from its first token"
    )]
    RopeSwitch {
        /// The longest conversation before the change.
        length: usize,
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
        Self::load_as(WeightDtype::F32, config, tensors, device)
    }

    /// As [`load`](Self::load), with the matrices of weights kept in this precision.
    ///
    /// # Errors
    /// As [`load`](Self::load), and if the device does not have this precision.
    pub fn load_as(
        dtype: WeightDtype,
        config: ModelConfig,
        tensors: &mut dyn TensorSource,
        device: &Device,
    ) -> Result<Self, LoadError> {
        let (trunk, unembedding) = architectures::load(&config, tensors, dtype, device)?;
        Ok(Self::new(config, trunk, Some(unembedding), device))
    }

    pub(crate) fn new(
        config: ModelConfig,
        trunk: Trunk,
        unembedding: Option<Unembedding>,
        device: &Device,
    ) -> Self {
        let rotaries = config.attention.ropes().map(Rotary::new).collect();
        let (rope_length, device) = (RopeLength::default(), device.clone());
        Self { config, trunk, unembedding, rotaries, rope_length, device }
    }

    /// Chooses by what length LongRoPE switches (other rotaries do not care).
    #[must_use]
    pub fn with_rope_length(mut self, rope_length: RopeLength) -> Self {
        self.rope_length = rope_length;
        self
    }

    /// The model's dimensions and conventions.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub(crate) fn blocks_mut(&mut self) -> &mut [Block] {
        &mut self.trunk.blocks
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Every hook point, in the order in which a pass comes by.
    pub fn hook_points(&self) -> Vec<HookPoint> {
        let blocks = self.trunk.blocks.iter().enumerate().flat_map(|(layer, block)| {
            block.sites().map(move |site| HookPoint::Block { layer, site })
        });
        std::iter::once(HookPoint::Embed)
            .chain(self.trunk.embedding.positions.as_ref().map(|_| HookPoint::PosEmbed))
            .chain(blocks)
            .chain([HookPoint::LnFinalScale, HookPoint::LnFinalNormalized])
            .collect()
    }

    /// Checks that the model has a point.
    ///
    /// # Errors
    /// [`HookError::NoSuchPoint`] if it does not.
    pub fn check_point(&self, point: HookPoint) -> Result<(), HookError> {
        if self.hook_points().contains(&point) {
            return Ok(());
        }
        let expected = match point {
            HookPoint::Block { layer, .. } if layer < self.config.n_layers => {
                let sites = self.trunk.blocks[layer].sites();
                let names = sites.map(|site| HookPoint::Block { layer, site }.to_string());
                format!("block {layer} has {}", names.collect::<Vec<_>>().join(", "))
            }
            _ => format!("its blocks are 0 to {}", self.config.n_layers - 1),
        };
        Err(HookError::NoSuchPoint { point, expected })
    }

    /// Logits at every position.
    ///
    /// # Shapes
    /// `[batch, pos, d_vocab]`.
    ///
    /// # Errors
    /// If the hook fails, or the model has no unembedding.
    pub fn logits<H: Hook>(
        &self,
        tokens: &TokenBatch,
        hook: &mut H,
    ) -> Result<Tensor<3>, ForwardError> {
        self.check_unembedding()?;
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
    /// If the hook fails, or the model has no unembedding.
    pub fn last_logits<H: Hook>(
        &self,
        tokens: &TokenBatch,
        hook: &mut H,
    ) -> Result<Tensor<2>, ForwardError> {
        self.check_unembedding()?;
        let (residual, positions) = self.through(tokens, self.config.n_layers, hook)?;
        let logits = self.unembed_last(residual, &positions, hook);
        hook.finish()?;
        Ok(logits)
    }

    /// As [`logits`](Self::logits), from the residual stream before block `layer` on: `residual`
    /// is what `blocks.{layer}.hook_resid_pre` sees for these tokens, or something in its place.
    ///
    /// # Shapes
    /// `residual`: `[batch, pos, d_model]`; result: `[batch, pos, d_vocab]`.
    ///
    /// # Errors
    /// If the model has fewer blocks or no unembedding, or the hook fails.
    pub fn logits_from<H: Hook>(
        &self,
        residual: Tensor<3>,
        layer: usize,
        tokens: &TokenBatch,
        hook: &mut H,
    ) -> Result<Tensor<3>, ForwardError> {
        self.check_unembedding()?;
        let mut cache = self.cache(SharedPrefix::default(), tokens);
        let positions = tokens.positions(0);
        let layers = layer..self.config.n_layers;
        let residual = self.blocks(residual, layers, &mut cache, hook)?;
        let logits = self.unembed(residual, &positions, hook);
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

    /// The activations at some points. Nothing behind the last of them is run.
    ///
    /// # Errors
    /// If the model does not have one of the points.
    pub fn capture(
        &self,
        tokens: &TokenBatch,
        points: impl IntoIterator<Item = HookPoint>,
    ) -> Result<ActivationCache, ForwardError> {
        let points: Vec<HookPoint> = points.into_iter().collect();
        points.iter().try_for_each(|&point| self.check_point(point))?;
        let mut kept = ActivationCache::new(points);
        let mut cache = self.cache(SharedPrefix::default(), tokens);
        self.run_for(tokens, &mut cache, &mut kept)?;
        kept.finish()?;
        Ok(kept)
    }

    /// Runs what the captures need, and nothing behind it.
    pub(crate) fn run_for(
        &self,
        tokens: &TokenBatch,
        cache: &mut KvCache,
        kept: &mut ActivationCache,
    ) -> Result<(), ForwardError> {
        let needed = |point: HookPoint| match point {
            HookPoint::Embed | HookPoint::PosEmbed => 0,
            HookPoint::Block { layer, .. } => layer + 1,
            HookPoint::LnFinalScale | HookPoint::LnFinalNormalized => self.config.n_layers + 1,
        };
        let needed = kept.points().map(needed).max().unwrap_or(0);
        let positions = cache.next_positions(tokens.dims()[1]);
        let residual = self.embed(tokens, &positions, kept);
        let residual = self.blocks(residual, 0..needed.min(self.config.n_layers), cache, kept)?;
        if needed > self.config.n_layers {
            self.norm_final(residual, &positions, kept);
        }
        Ok(())
    }

    fn through<H: Hook>(
        &self,
        tokens: &TokenBatch,
        n_blocks: usize,
        hook: &mut H,
    ) -> Result<(Tensor<3>, Positions), ForwardError> {
        let mut cache = self.cache(SharedPrefix::default(), tokens);
        let positions = tokens.positions(0);
        let residual = self.embed(tokens, &positions, hook);
        let residual = self.blocks(residual, 0..n_blocks, &mut cache, hook)?;
        Ok((residual, positions))
    }

    /// An empty cache for these conversations behind a prefix (`SharedPrefix::default()` for none).
    ///
    /// # Panics
    /// If the prefix was made with a model of another depth.
    pub fn cache(&self, prefix: SharedPrefix, tokens: &TokenBatch) -> KvCache {
        KvCache::new(self.config.n_layers, prefix, tokens.starts().to_vec())
    }

    /// Runs tokens that many conversations begin with, once.
    ///
    /// # Errors
    /// If the tokens do not fit the model. The hook is not finished: the pass goes on with the
    /// conversations.
    pub fn prefix<H: Hook>(&self, ids: &[u32], hook: &mut H) -> Result<SharedPrefix, ForwardError> {
        let tokens = TokenBatch::new(&[ids], &self.config, &self.device)?;
        let mut cache = self.cache(SharedPrefix::default(), &tokens).for_prefix();
        let positions = cache.next_positions(ids.len());
        let residual = self.embed(&tokens, &positions, hook);
        self.blocks(residual, 0..self.config.n_layers, &mut cache, hook)?;
        Ok(cache.into_prefix(ids))
    }

    /// The residual stream before the first block: token embeddings, and position embeddings where
    /// they are learned.
    ///
    /// # Shapes
    /// `[batch, pos, d_model]`.
    pub fn embed<H: Hook>(
        &self,
        tokens: &TokenBatch,
        positions: &Positions,
        hook: &mut H,
    ) -> Tensor<3> {
        hook.tokens(tokens.host_ids(), positions);
        let embedding = &self.trunk.embedding;
        let embedded = fire(hook, HookPoint::Embed, embedding.tokens(tokens.ids()), positions);
        match &embedding.positions {
            Some(learned) => {
                embedded + fire(hook, HookPoint::PosEmbed, learned.embed(positions), positions)
            }
            None => embedded,
        }
    }

    /// Runs some blocks on a residual stream: the columns that come next in the cache.
    ///
    /// # Shapes
    /// `[batch, pos, d_model]`, in and out.
    ///
    /// # Errors
    /// If the model does not have these blocks, or the conversations grow past a length at which
    /// what is cached of them is no longer right.
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
        if let Some(length) = self.rope_switch(cache, n) {
            return Err(ForwardError::RopeSwitch { length });
        }
        let positions = cache.next_positions(n);
        let table = |rotary: &Rotary| rotary.table(&positions, self.rope_length, &self.device);
        let rotaries: Vec<RotaryTable> = self.rotaries.iter().map(table).collect();
        let first_columns = positions.first_columns(&self.device);
        let mut pass = Pass { positions: &positions, rotaries: &rotaries, first_columns, cache };
        let mut x = residual;
        for layer in layers {
            x = self.trunk.blocks[layer].forward(x, layer, &mut pass, hook);
        }
        cache.advance(n);
        Ok(x)
    }

    /// The length that a cached conversation grows past with its next `n` columns, if its rotary
    /// angles change there.
    pub(crate) fn rope_switch(&self, cache: &KvCache, n: usize) -> Option<usize> {
        let switches = self.rotaries.iter().filter_map(Rotary::switch);
        switches.into_iter().find(|&length| cache.grows_past(length, n, self.rope_length))
    }

    /// The final norm and the unembedding. Of a residual stream from within the model, this is the
    /// logit lens (nostalgebraist, 2020).
    ///
    /// # Shapes
    /// `residual`: `[batch, pos, d_model]`; result: `[batch, pos, d_vocab]`.
    ///
    /// # Panics
    /// If the model is the body of a reward model.
    pub fn unembed<H: Hook>(
        &self,
        residual: Tensor<3>,
        positions: &Positions,
        hook: &mut H,
    ) -> Tensor<3> {
        let [batch, n, d_model] = residual.dims();
        let normed = self.norm_final(residual, positions, hook);
        let logits = self.unembedding().forward(normed.reshape([batch * n, d_model]));
        logits.reshape([batch, n, self.config.d_vocab])
    }

    /// As [`unembed`](Self::unembed), for the last column alone. The final norm's hooks see all
    /// columns.
    ///
    /// # Shapes
    /// `residual`: `[batch, pos, d_model]`; result: `[batch, d_vocab]`.
    ///
    /// # Panics
    /// If the model is the body of a reward model.
    pub fn unembed_last<H: Hook>(
        &self,
        residual: Tensor<3>,
        positions: &Positions,
        hook: &mut H,
    ) -> Tensor<2> {
        self.unembedding().forward(self.norm_last(residual, positions, hook))
    }

    /// The last column, normed.
    ///
    /// # Shapes
    /// `residual`: `[batch, pos, d_model]`; result: `[batch, d_model]`.
    pub(crate) fn norm_last<H: Hook>(
        &self,
        residual: Tensor<3>,
        positions: &Positions,
        hook: &mut H,
    ) -> Tensor<2> {
        let [batch, n, d_model] = residual.dims();
        let normed = self.norm_final(residual, positions, hook);
        normed.narrow(1, n - 1, 1).reshape([batch, d_model])
    }

    fn norm_final<H: Hook>(
        &self,
        residual: Tensor<3>,
        positions: &Positions,
        hook: &mut H,
    ) -> Tensor<3> {
        self.trunk.ln_final.forward(residual, NormPoints::FINAL, positions, hook)
    }

    /// What each component of a residual stream adds to some logits, with the final norm's divisor
    /// held at what the whole stream gives it (direct logit attribution; Elhage et al., 2021).
    ///
    /// The components' shares add up to the logits of the whole stream, but for the norm's and the
    /// unembedding's biases and the soft cap, which are left out.
    ///
    /// # Shapes
    /// `component` and `residual`: `[batch, pos, d_model]`; result: `[batch, pos, ids]`.
    ///
    /// # Errors
    /// If the model has no unembedding, or an id is not in its vocabulary.
    pub fn direct_logits(
        &self,
        component: Tensor<3>,
        residual: Tensor<3>,
        ids: &[u32],
    ) -> Result<Tensor<3>, ForwardError> {
        self.check_unembedding()?;
        let expected = self.config.d_vocab;
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= expected) {
            return Err(TokenError::UnknownId { row: 0, id, expected }.into());
        }
        let [batch, n, d_model] = component.dims();
        let norm = &self.trunk.ln_final;
        let scale = norm.scale(norm.centred(residual));
        let normed = norm.centred(component) / scale * norm.gain.clone().unsqueeze();
        let rows: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
        let rows =
            Tensor::from_data(burn::tensor::TensorData::new(rows, [ids.len()]), &self.device);
        let directions = self.unembedding().weight.clone().select(0, rows);
        let shares = kernels::dot_rows(normed.reshape([batch * n, d_model]), directions);
        Ok(shares.reshape([batch, n, ids.len()]))
    }

    fn check_unembedding(&self) -> Result<(), ForwardError> {
        self.unembedding.as_ref().map(|_| ()).ok_or(ForwardError::NoUnembedding)
    }

    fn unembedding(&self) -> &Unembedding {
        self.unembedding.as_ref().expect("a language model, not the body of a reward model")
    }
}
