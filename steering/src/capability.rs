//! What steering costs: answers by their log-probability, and divergence.

use model_hooks::{Continued, ForwardError, Hook, LanguageModel, TokenBatch, batches_in_order};

/// A question with what there is to choose from, in tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenQuestion {
    /// Up to where an answer begins.
    pub prompt: Vec<u32>,
    /// The answers, each of one token at least.
    pub choices: Vec<Vec<u32>>,
}

/// How likely each choice is to a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ChoiceScores {
    /// The log-probability of each choice behind the question, in nats.
    pub log_probs: Vec<f64>,
    /// The tokens of each.
    pub n_tokens: Vec<usize>,
}

impl ChoiceScores {
    /// The most likely choice; the first of several.
    pub fn best(&self) -> usize {
        first_largest(self.log_probs.iter().copied())
    }

    /// The most likely choice by token: long ones are not unlikely for being long.
    pub fn best_per_token(&self) -> usize {
        let lengths = self.n_tokens.iter().map(|&n| n as f64);
        first_largest(self.log_probs.iter().zip(lengths).map(|(log_prob, n)| log_prob / n))
    }

    /// The probability of a choice among the choices.
    ///
    /// # Panics
    /// If there is no such choice.
    pub fn probability(&self, choice: usize) -> f64 {
        let max = self.log_probs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> =
            self.log_probs.iter().map(|log_prob| (log_prob - max).exp()).collect();
        weights[choice] / weights.iter().sum::<f64>()
    }
}

fn first_largest(values: impl Iterator<Item = f64>) -> usize {
    let largest = values.enumerate().fold((0, f64::NEG_INFINITY), |best, (index, value)| {
        if value > best.1 { (index, value) } else { best }
    });
    largest.0
}

/// The log-probabilities of every question's choices, under a hook. `batch_tokens` bounds the tokens
/// of a pass (a longer question runs alone).
///
/// # Errors
/// If a text does not fit the model, or the hook fails.
///
/// # Panics
/// If a choice has no tokens.
pub fn choice_scores<H: Hook + Clone>(
    model: &LanguageModel,
    questions: &[TokenQuestion],
    batch_tokens: usize,
    hook: &H,
) -> Result<Vec<ChoiceScores>, ForwardError> {
    let texts: Vec<Continued<'_>> = questions
        .iter()
        .map(|TokenQuestion { prompt, choices }| Continued { prompt, continuations: choices })
        .collect();
    let log_probs = model.continuation_log_probs(&texts, batch_tokens, hook)?;
    let scores = log_probs.into_iter().zip(questions).map(|(log_probs, question)| {
        let n_tokens = question.choices.iter().map(Vec::len).collect();
        ChoiceScores { log_probs, n_tokens }
    });
    Ok(scores.collect())
}

/// The mean over prompts of `KL(plain ‖ steered)` where the answer begins, in nats: what a hook does to
/// prompts that it should leave alone. `batch_tokens` bounds the tokens of a pass.
///
/// # Errors
/// If a prompt does not fit the model, or the hook fails.
///
/// # Panics
/// If there are no prompts.
pub fn mean_kl<H: Hook>(
    model: &LanguageModel,
    prompts: &[impl AsRef<[u32]>],
    batch_tokens: usize,
    hook: &mut H,
) -> Result<f64, ForwardError> {
    assert!(!prompts.is_empty(), "the mean over no prompts");
    let mut sum = 0.0;
    for batch in batches_in_order(prompts, batch_tokens) {
        let tokens = TokenBatch::new(&prompts[batch], model.config(), model.device())?;
        let plain = model.last_logits(&tokens, &mut ())?.into_data();
        let steered = model.last_logits(&tokens, hook)?.into_data();
        let [plain, steered] =
            [&plain, &steered].map(|data| data.as_slice::<f32>().expect("logits are f32"));
        let d_vocab = model.config().d_vocab;
        let rows = plain.chunks_exact(d_vocab).zip(steered.chunks_exact(d_vocab));
        sum += rows.map(|(plain, steered)| kl_divergence(plain, steered)).sum::<f64>();
    }
    Ok(sum / prompts.len() as f64)
}

/// `KL(p ‖ q)` of the distributions of two rows of logits, in nats.
///
/// # Panics
/// If they differ in length, or are empty.
pub fn kl_divergence(p: &[f32], q: &[f32]) -> f64 {
    assert_eq!(p.len(), q.len(), "logits of one vocabulary");
    let log_sum = |logits: &[f32]| {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        assert!(max.is_finite(), "logits without a largest");
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
        f64::from(max) + sum.ln()
    };
    let (log_p, log_q) = (log_sum(p), log_sum(q));
    let terms = p.iter().zip(q).map(|(&p, &q)| {
        let log_prob = f64::from(p) - log_p;
        match log_prob.exp() {
            // Nothing is lost on what p never says.
            0.0 => 0.0,
            prob => prob * (log_prob - (f64::from(q) - log_q)),
        }
    });
    terms.sum::<f64>().max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_by_sum_and_by_token() {
        let scores = ChoiceScores { log_probs: vec![-3.0, -2.0, -2.0], n_tokens: vec![3, 1, 1] };
        assert_eq!((scores.best(), scores.best_per_token()), (1, 0));
        // e^-3 / (e^-3 + 2 e^-2) = 1 / (1 + 2e).
        assert!((scores.probability(0) - 1.0 / (1.0 + 2.0 * 1f64.exp())).abs() < 1e-12);
    }

    /// p = (1/4, 3/4), q = (1/2, 1/2): 1/4 ln 1/2 + 3/4 ln 3/2.
    #[test]
    fn divergence_by_hand() {
        let p = [5.0, 5.0 + 3f32.ln()];
        let expected = 0.25 * 0.5f64.ln() + 0.75 * 1.5f64.ln();
        assert!((kl_divergence(&p, &[-7.0, -7.0]) - expected).abs() < 1e-6);
        assert_eq!(kl_divergence(&p, &p), 0.0);
        assert_eq!(kl_divergence(&[0.0, f32::NEG_INFINITY], &[0.0, f32::NEG_INFINITY]), 0.0);
    }
}
