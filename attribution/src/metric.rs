//! What a pass is asked about: one number for each conversation.

use burn::tensor::{Int, Tensor, TensorData};
use model_hooks::{ForwardError, Hook, LanguageModel, Positions, RewardModel, TokenError};

/// A scalar of a forward pass, one for each conversation, differentiable.
///
/// Conversations of a batch do not see each other, so the gradient of the sum of their metrics is
/// the gradient of each in its own row: one backward pass serves all.
pub trait Metric {
    /// The transformer that the pass runs through.
    fn body(&self) -> &LanguageModel;

    /// The metric, from the residual stream behind the last block on.
    ///
    /// # Shapes
    /// Result: `[batch]`.
    ///
    /// # Errors
    /// If the metric does not fit the model.
    fn measure<H: Hook>(&self, end: End<'_>, hook: &mut H) -> Result<Tensor<1>, ForwardError>;
}

/// Where a pass through the blocks ends.
#[derive(Debug, Clone)]
pub struct End<'a> {
    /// The residual stream behind the last block, `[batch, pos, d_model]`.
    pub residual: Tensor<3>,
    /// Where its columns stand.
    pub positions: &'a Positions,
    /// Which conversation each row is, of those that the metric was made for: the same one may
    /// stand in several rows, each changed in another way.
    pub conversations: &'a [usize],
}

/// A score of a reward model.
#[derive(Debug, Clone, Copy)]
pub struct Reward<'a> {
    model: &'a RewardModel,
    score_idx: usize,
}

impl<'a> Reward<'a> {
    /// The only score, or the first of several.
    pub fn new(model: &'a RewardModel) -> Self {
        Self { model, score_idx: 0 }
    }

    /// One of several scores.
    ///
    /// # Panics
    /// If the head gives fewer.
    pub fn of_score(model: &'a RewardModel, score_idx: usize) -> Self {
        let [n_scores, _] = model.head().weight().dims();
        assert!(score_idx < n_scores, "score {score_idx} of a head of {n_scores}");
        Self { model, score_idx }
    }
}

impl Metric for Reward<'_> {
    fn body(&self) -> &LanguageModel {
        self.model.body()
    }

    fn measure<H: Hook>(&self, end: End<'_>, hook: &mut H) -> Result<Tensor<1>, ForwardError> {
        let scores = self.model.score(end.residual, end.positions, hook);
        Ok(scores.narrow(1, self.score_idx, 1).squeeze_dim(1))
    }
}

/// Something about the token that comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The logit of a token.
    Logit(u32),
    /// The logarithm of its probability.
    LogProb(u32),
    /// `logit(wanted) − logit(other)`, which is the difference of their log-probabilities too.
    Difference {
        /// The token counted up.
        wanted: u32,
        /// The token counted down.
        other: u32,
    },
}

/// What a language model says at the last token of each conversation.
#[derive(Debug, Clone)]
pub struct NextToken<'a> {
    model: &'a LanguageModel,
    targets: Vec<Target>,
}

impl<'a> NextToken<'a> {
    /// One target for each conversation.
    pub fn new(model: &'a LanguageModel, targets: Vec<Target>) -> Self {
        Self { model, targets }
    }
}

impl Metric for NextToken<'_> {
    fn body(&self) -> &LanguageModel {
        self.model
    }

    fn measure<H: Hook>(&self, end: End<'_>, hook: &mut H) -> Result<Tensor<1>, ForwardError> {
        let expected = self.model.config().d_vocab;
        let (n, device) = (end.conversations.len(), end.residual.device());
        let (mut ids, mut weights, mut normalised) = (Vec::new(), Vec::new(), Vec::new());
        for &row in end.conversations {
            let target = self.targets[row];
            let (of, signs) = match target {
                Target::Logit(id) | Target::LogProb(id) => ([id, id], [1.0, 0.0]),
                Target::Difference { wanted, other } => ([wanted, other], [1.0, -1.0]),
            };
            if let Some(&id) = of.iter().find(|&&id| id as usize >= expected) {
                return Err(TokenError::UnknownId { row, id, expected }.into());
            }
            ids.extend(of.map(i64::from));
            weights.extend(signs.map(|sign: f32| sign));
            normalised.push(f32::from(matches!(target, Target::LogProb(_))));
        }
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [n, 2]), &device);
        let weights = Tensor::<2>::from_data(TensorData::new(weights, [n, 2]), &device);
        let logits = self.model.unembed_last(end.residual, end.positions, hook);
        let of_targets = (logits.clone().gather(1, ids) * weights).sum_dim(1).squeeze_dim::<1>(1);
        if normalised.iter().all(|&share| share == 0.0) {
            return Ok(of_targets);
        }
        let normalised = Tensor::<1>::from_data(TensorData::new(normalised, [n]), &device);
        let largest = logits.clone().max_dim(1).detach();
        let sums = (logits - largest.clone()).exp().sum_dim(1);
        let log_sums = (sums.log() + largest).squeeze_dim::<1>(1);
        Ok(of_targets - log_sums * normalised)
    }
}

/// A metric with a weight for each conversation. With weights 1 and −1 for the two texts of a pair,
/// the sum over the pair is the difference of their metrics, and effects have its sign.
#[derive(Debug, Clone)]
pub struct Weighted<M> {
    metric: M,
    weights: Vec<f32>,
}

impl<M: Metric> Weighted<M> {
    /// A weight for each conversation.
    pub fn new(metric: M, weights: Vec<f32>) -> Self {
        Self { metric, weights }
    }

    /// For conversations that come in pairs, the preferred one of each first: its metric counts up,
    /// the other's down.
    pub fn differences(metric: M, n_pairs: usize) -> Self {
        Self { metric, weights: [1.0, -1.0].repeat(n_pairs) }
    }
}

impl<M: Metric> Metric for Weighted<M> {
    fn body(&self) -> &LanguageModel {
        self.metric.body()
    }

    fn measure<H: Hook>(&self, end: End<'_>, hook: &mut H) -> Result<Tensor<1>, ForwardError> {
        let weights: Vec<f32> = end.conversations.iter().map(|&row| self.weights[row]).collect();
        let n = weights.len();
        let weights = Tensor::from_data(TensorData::new(weights, [n]), &end.residual.device());
        Ok(self.metric.measure(end, hook)? * weights)
    }
}

impl<M: Metric> Metric for &M {
    fn body(&self) -> &LanguageModel {
        (**self).body()
    }

    fn measure<H: Hook>(&self, end: End<'_>, hook: &mut H) -> Result<Tensor<1>, ForwardError> {
        (**self).measure(end, hook)
    }
}
