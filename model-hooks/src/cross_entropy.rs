//! How well a model predicts text.

use std::ops::Range;

use burn::tensor::activation::log_softmax;
use burn::tensor::{Int, Tensor, TensorData};

use crate::hook::Hook;
use crate::model::{ForwardError, LanguageModel};
use crate::positions::Positions;
use crate::tokens::TokenBatch;

/// Cross-entropy of next tokens, summed, in nats.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct CrossEntropy {
    /// `−Σ ln P(token | tokens before it)`.
    pub total: f64,
    /// Tokens predicted.
    pub n_tokens: usize,
}

impl CrossEntropy {
    /// Per token; NaN if there were none.
    pub fn mean(self) -> f64 {
        self.total / self.n_tokens as f64
    }

    /// `exp(mean)`.
    pub fn perplexity(self) -> f64 {
        self.mean().exp()
    }
}

/// What a model says comes next, for every token that another one follows.
#[derive(Debug, Clone)]
pub struct Predictions {
    /// Logarithms of the probabilities, `[batch, pos − 1, d_vocab]`.
    pub log_probs: Tensor<3>,
    /// `−ln P(the token that follows)`, `[batch, pos − 1]`, of no meaning in the padding.
    pub losses: Tensor<2>,
}

impl Predictions {
    /// Of these tokens.
    ///
    /// # Shapes
    /// `logits`: `[batch, pos, d_vocab]`, as [`LanguageModel::logits`] gives them.
    ///
    /// # Panics
    /// If there is but one column, or the logits are of other tokens.
    pub fn new(logits: Tensor<3>, tokens: &TokenBatch) -> Self {
        let [batch, n] = tokens.dims();
        assert_eq!(logits.dims()[..2], [batch, n], "logits of other tokens");
        let log_probs = log_softmax(logits.narrow(1, 0, n - 1), 2);
        let targets: Tensor<3, Int> = tokens.ids().narrow(1, 1, n - 1).reshape([batch, n - 1, 1]);
        let losses = -log_probs.clone().gather(2, targets).reshape([batch, n - 1]);
        Self { log_probs, losses }
    }

    /// Where the tokens that predict stand: the padding has no position.
    pub fn positions(tokens: &TokenBatch) -> Positions {
        Positions::packed(0, 0, tokens.dims()[1] - 1, tokens.starts().to_vec())
    }
}

/// Ranges of texts that are run together: each in their order, padded to no more than
/// `batch_tokens`, but for a longer text, which runs alone.
pub fn batches_in_order(
    texts: &[impl AsRef<[u32]>],
    batch_tokens: usize,
) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let mut longest = texts.get(start)?.as_ref().len();
        let mut end = start + 1;
        while end < texts.len() {
            longest = longest.max(texts[end].as_ref().len());
            if longest * (end + 1 - start) > batch_tokens {
                break;
            }
            end += 1;
        }
        let batch = start..end;
        start = end;
        Some(batch)
    })
}

impl LanguageModel {
    /// The cross-entropy of every token of the texts but each one's first, under a hook.
    ///
    /// `batch_tokens` bounds the tokens of a pass (a longer text runs alone).
    ///
    /// # Errors
    /// If a text is empty, too long or holds an unknown id, or the hook fails.
    pub fn cross_entropy<H: Hook>(
        &self,
        texts: &[impl AsRef<[u32]>],
        batch_tokens: usize,
        hook: &mut H,
    ) -> Result<CrossEntropy, ForwardError> {
        let mut sum = CrossEntropy::default();
        for batch in batches_in_order(texts, batch_tokens) {
            let batch = self.batch_cross_entropy(&texts[batch], hook)?;
            sum.total += batch.total;
            sum.n_tokens += batch.n_tokens;
        }
        Ok(sum)
    }

    fn batch_cross_entropy<H: Hook>(
        &self,
        rows: &[impl AsRef<[u32]>],
        hook: &mut H,
    ) -> Result<CrossEntropy, ForwardError> {
        let tokens = TokenBatch::new(rows, self.config(), self.device())?;
        let [batch, n] = tokens.dims();
        if n == 1 {
            return Ok(CrossEntropy::default());
        }
        let Predictions { losses, .. } = Predictions::new(self.logits(&tokens, hook)?, &tokens);
        let positions = Predictions::positions(&tokens);
        let weights =
            positions.cells(|row, column| f32::from(positions.get(row, column).is_some()));
        let n_tokens = weights.iter().filter(|&&weight| weight > 0.0).count();
        let weights = Tensor::from_data(TensorData::new(weights, [batch, n - 1]), self.device());
        let total = (losses * weights).sum().into_scalar::<f32>();
        Ok(CrossEntropy { total: f64::from(total), n_tokens })
    }
}
