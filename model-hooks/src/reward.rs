//! Reward models: a score for a whole conversation, read off its last token.

use burn::tensor::{Device, Tensor};

use crate::architectures::{self, WeightDtype};
use crate::config::ModelConfig;
use crate::hook::Hook;
use crate::layers::SharedPrefix;
use crate::load::{LoadError, TensorSource};
use crate::model::{ForwardError, LanguageModel};
use crate::positions::Positions;
use crate::tokens::TokenBatch;

/// The weight of the head, as transformers' sequence classifiers call it.
const SCORE: &str = "score.weight";

/// A transformer with a linear head on the last token's normed residual stream, in place of an
/// unembedding.
///
/// Its [`body`](Self::body) can be captured, edited, harvested and differentiated as any model.
#[derive(Debug, Clone)]
pub struct RewardModel {
    body: LanguageModel,
    head: RewardHead,
}

/// `scores = x · weightᵀ`.
#[derive(Debug, Clone)]
pub struct RewardHead {
    /// `[n_scores, d_model]`.
    weight: Tensor<2>,
}

impl RewardHead {
    /// A head of one score a row.
    ///
    /// # Shapes
    /// `weight`: `[n_scores, d_model]`.
    pub fn new(weight: Tensor<2>) -> Self {
        Self { weight }
    }

    /// `[n_scores, d_model]`.
    pub fn weight(&self) -> Tensor<2> {
        self.weight.clone()
    }
}

impl RewardModel {
    /// Builds the model out of a sequence classifier's tensors (`…ForSequenceClassification`).
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

    /// As [`load`](Self::load), with the matrices of weights but the head's kept in this precision.
    ///
    /// # Errors
    /// As [`load`](Self::load), and if the device does not have this precision.
    pub fn load_as(
        dtype: WeightDtype,
        config: ModelConfig,
        tensors: &mut dyn TensorSource,
        device: &Device,
    ) -> Result<Self, LoadError> {
        let d_model = config.d_model;
        let (trunk, weight) =
            architectures::load_with(&config, tensors, dtype, device, |weights| {
                weights.take_rows(SCORE, d_model)
            })?;
        let body = LanguageModel::new(config, trunk, None, device);
        Ok(Self { body, head: RewardHead { weight } })
    }

    /// Puts a head on a model; its unembedding, if it has one, is not used.
    ///
    /// # Panics
    /// If the head is not as wide as the model.
    pub fn new(body: LanguageModel, head: RewardHead) -> Self {
        let ([_, width], d_model) = (head.weight.dims(), body.config().d_model);
        assert_eq!(width, d_model, "the head is {width} wide, the model {d_model}");
        Self { body, head }
    }

    /// The transformer.
    pub fn body(&self) -> &LanguageModel {
        &self.body
    }

    /// The head.
    pub fn head(&self) -> &RewardHead {
        &self.head
    }

    /// The scores of whole conversations, at the last token of each.
    ///
    /// # Shapes
    /// `[batch, n_scores]`.
    ///
    /// # Errors
    /// If the hook fails.
    pub fn scores<H: Hook>(
        &self,
        tokens: &TokenBatch,
        hook: &mut H,
    ) -> Result<Tensor<2>, ForwardError> {
        let positions = tokens.positions(0);
        let mut cache = self.body.cache(SharedPrefix::default(), tokens);
        let residual = self.body.embed(tokens, &positions, hook);
        let layers = 0..self.body.config().n_layers;
        let residual = self.body.blocks(residual, layers, &mut cache, hook)?;
        let scores = self.score(residual, &positions, hook);
        hook.finish()?;
        Ok(scores)
    }

    /// The final norm and the head, at the last column of a residual stream.
    ///
    /// # Shapes
    /// `residual`: `[batch, pos, d_model]`; result: `[batch, n_scores]`.
    pub fn score<H: Hook>(
        &self,
        residual: Tensor<3>,
        positions: &Positions,
        hook: &mut H,
    ) -> Tensor<2> {
        let last = self.body.norm_last(residual, positions, hook);
        kernels::dot_rows(last, self.head.weight.clone())
    }
}
