//! What splicing an SAE in does to a reward model's scores.

use std::ops::ControlFlow;

use model_hooks::{RewardModel, TokenBatch, batches_in_order};
use serde::Serialize;

use super::{EvaluateError, Evaluation, MeasureProgress, Meter, Subject, reconstructions};

/// Two conversations, the first of which is preferred.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preference {
    /// Token ids of the preferred one.
    pub chosen: Vec<u32>,
    /// Token ids of the other one.
    pub rejected: Vec<u32>,
}

/// How a reward model judges with an SAE in it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rewards {
    /// Pairs judged.
    pub n_pairs: usize,
    /// Mean over the conversations of `|spliced − clean|`.
    pub mean_absolute_error: f64,
    /// Pearson's correlation of spliced and clean rewards; NaN where either is always the same.
    pub correlation: f64,
    /// The share of pairs whose preferred conversation has the higher reward, a tie counting half.
    pub pair_accuracy_clean: f64,
    /// The same with the SAE spliced in.
    pub pair_accuracy_spliced: f64,
}

/// Measures SAEs in a reward model, on pairs of conversations: once clean, and once with each SAE
/// spliced in, in batches of `batch_tokens` (a longer conversation runs alone). `progress` is called
/// after every batch of every pass, and can stop the measurement.
///
/// # Errors
/// If there is no SAE or no pair, an SAE does not fit its points, the model gives several scores,
/// a pass fails, or `progress` asks to stop.
pub fn reward_model(
    model: &RewardModel,
    subjects: &[Subject],
    pairs: &[Preference],
    batch_tokens: usize,
    progress: impl FnMut(&MeasureProgress) -> ControlFlow<()>,
) -> Result<Vec<Evaluation>, EvaluateError> {
    let [actual, _] = model.head().weight().dims();
    if actual != 1 {
        return Err(EvaluateError::Scores { actual });
    }
    if pairs.is_empty() {
        return Err(EvaluateError::Nothing { expected: "a pair of conversations" });
    }
    let texts: Vec<&[u32]> =
        pairs.iter().flat_map(|pair| [&pair.chosen[..], &pair.rejected[..]]).collect();
    let mut meter = Meter::new(&texts, 2 + subjects.len(), progress);
    let metrics = reconstructions(model.body(), subjects, &texts, batch_tokens, &mut meter)?;
    let mut clean = Vec::with_capacity(texts.len());
    let mut spliced = vec![Vec::with_capacity(texts.len()); subjects.len()];
    for batch in batches_in_order(&texts, batch_tokens) {
        let body = model.body();
        let n_tokens = texts[batch.clone()].iter().map(|text| text.len()).sum::<usize>();
        let tokens = TokenBatch::new(&texts[batch], body.config(), body.device())?;
        clean.extend(model.scores(&tokens, &mut ())?.into_data().iter::<f64>());
        meter.add(n_tokens)?;
        for (subject, spliced) in subjects.iter().zip(&mut spliced) {
            let scores = model.scores(&tokens, &mut subject.splice())?;
            spliced.extend(scores.into_data().iter::<f64>());
            meter.add(n_tokens)?;
        }
    }
    let evaluations = subjects.iter().zip(&metrics).zip(&spliced);
    Ok(evaluations
        .map(|((subject, metrics), spliced)| Evaluation {
            hook_point: subject.point.to_string(),
            target_hook_point: subject.target.map(|target| target.to_string()),
            from_position: subject.from_position,
            reconstruction: metrics.into(),
            next_tokens: None,
            rewards: Some(Rewards::new(&clean, spliced)),
        })
        .collect())
}

impl Rewards {
    /// Of the rewards of pairs, the preferred one of each first.
    fn new(clean: &[f64], spliced: &[f64]) -> Self {
        let errors = clean.iter().zip(spliced).map(|(clean, spliced)| (spliced - clean).abs());
        Self {
            n_pairs: clean.len() / 2,
            mean_absolute_error: errors.sum::<f64>() / clean.len() as f64,
            correlation: correlation(clean, spliced),
            pair_accuracy_clean: pair_accuracy(clean),
            pair_accuracy_spliced: pair_accuracy(spliced),
        }
    }
}

fn pair_accuracy(rewards: &[f64]) -> f64 {
    let right = rewards.chunks_exact(2).map(|pair| match pair[0].partial_cmp(&pair[1]) {
        Some(std::cmp::Ordering::Greater) => 1.0,
        Some(std::cmp::Ordering::Equal) => 0.5,
        _ => 0.0,
    });
    right.sum::<f64>() / (rewards.len() / 2) as f64
}

fn correlation(a: &[f64], b: &[f64]) -> f64 {
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let (mean_a, mean_b) = (mean(a), mean(b));
    let (mut products, mut squares_a, mut squares_b) = (0.0, 0.0, 0.0);
    for (a, b) in a.iter().zip(b) {
        let (a, b) = (a - mean_a, b - mean_b);
        products += a * b;
        squares_a += a * a;
        squares_b += b * b;
    }
    products / (squares_a * squares_b).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_by_hand() {
        let rewards = Rewards::new(&[1.0, 0.0, 2.0, 1.0], &[2.0, 0.0, 1.0, 1.0]);
        assert_eq!((rewards.n_pairs, rewards.mean_absolute_error), (2, 0.5));
        assert_eq!((rewards.pair_accuracy_clean, rewards.pair_accuracy_spliced), (1.0, 0.75));
        // (0, −1, 1, 0) and (1, −1, 0, 0).
        assert_eq!(rewards.correlation, 0.5);
        assert!(Rewards::new(&[1.0, 1.0], &[0.0, 1.0]).correlation.is_nan());
    }
}
