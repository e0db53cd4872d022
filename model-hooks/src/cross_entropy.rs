//! How well a model predicts text.

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
        let mut start = 0;
        while start < texts.len() {
            let (mut end, mut longest) = (start + 1, texts[start].as_ref().len());
            while end < texts.len() {
                longest = longest.max(texts[end].as_ref().len());
                if longest * (end + 1 - start) > batch_tokens {
                    break;
                }
                end += 1;
            }
            let batch = self.batch_cross_entropy(&texts[start..end], hook)?;
            sum.total += batch.total;
            sum.n_tokens += batch.n_tokens;
            start = end;
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
        let logits = self.logits(&tokens, hook)?;
        let predictions = log_softmax(logits.narrow(1, 0, n - 1), 2);
        let targets: Tensor<3, Int> = tokens.ids().narrow(1, 1, n - 1).reshape([batch, n - 1, 1]);
        let losses = -predictions.gather(2, targets).reshape([batch, n - 1]);

        // A target counts from the row's second real token on.
        let positions = Positions::packed(0, 0, n - 1, tokens.starts().to_vec());
        let weights =
            positions.cells(|row, column| f32::from(positions.get(row, column).is_some()));
        let n_tokens = weights.iter().filter(|&&weight| weight > 0.0).count();
        let weights = Tensor::from_data(TensorData::new(weights, [batch, n - 1]), self.device());
        let total = (losses * weights).sum().into_scalar::<f32>();
        Ok(CrossEntropy { total: f64::from(total), n_tokens })
    }
}
