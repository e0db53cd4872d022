//! Choosing among what was measured.

/// A direction of refusal, tried out (Arditi et al., 2024).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DirectionTrial {
    /// The block whose activations it is of.
    pub layer: usize,
    /// How much the model refuses what is harmful with the direction ablated, as log-odds: the less,
    /// the better.
    pub ablated: f64,
    /// How much it refuses what is harmless with the direction added.
    pub induced: f64,
    /// The KL divergence that ablating it makes on what is harmless, in nats.
    pub kl: f64,
}

/// Which directions may be chosen. The default is that of Arditi et al.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DirectionRule {
    /// At most this much divergence.
    pub max_kl: f64,
    /// At least this much refusal induced.
    pub min_induced: f64,
    /// Only blocks below this share of the model's depth: what is behind them may change the words
    /// and not the mind.
    pub layer_share: f64,
}

impl Default for DirectionRule {
    fn default() -> Self {
        Self { max_kl: 0.1, min_induced: 0.0, layer_share: 0.8 }
    }
}

/// The index of the trial that leaves the least refusal when ablated, of those that the rule allows;
/// ties go to the first. A trial with a number that is none is not allowed.
pub fn select_direction(
    trials: &[DirectionTrial],
    n_layers: usize,
    rule: &DirectionRule,
) -> Option<usize> {
    let is_allowed = |trial: &DirectionTrial| {
        trial.kl <= rule.max_kl
            && trial.induced >= rule.min_induced
            && (trial.layer as f64) < rule.layer_share * n_layers as f64
            && !trial.ablated.is_nan()
    };
    let allowed = trials.iter().enumerate().filter(|(_, trial)| is_allowed(trial));
    allowed.min_by(|(_, a), (_, b)| a.ablated.total_cmp(&b.ablated)).map(|(index, _)| index)
}

/// Builds a bundle of latents: again and again the one that raises the score most, as long as one
/// raises it by more than `least_gain`. Gives the bundle and its score; ties go to the first.
///
/// `score` is asked about bundles of up to `max` candidates, the empty one first.
///
/// # Errors
/// Those of `score`.
pub fn greedy_bundle<E>(
    candidates: &[usize],
    max: usize,
    least_gain: f64,
    mut score: impl FnMut(&[usize]) -> Result<f64, E>,
) -> Result<(Vec<usize>, f64), E> {
    let mut bundle = Vec::new();
    let mut reached = score(&bundle)?;
    while bundle.len() < max {
        let mut best: Option<(usize, f64)> = None;
        for &candidate in candidates {
            if bundle.contains(&candidate) {
                continue;
            }
            bundle.push(candidate);
            let scored = score(&bundle);
            bundle.pop();
            let scored = scored?;
            if best.is_none_or(|(_, other)| scored > other) {
                best = Some((candidate, scored));
            }
        }
        match best {
            Some((candidate, scored)) if scored > reached + least_gain => {
                bundle.push(candidate);
                reached = scored;
            }
            _ => break,
        }
    }
    Ok((bundle, reached))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    #[test]
    fn the_least_refusal_that_the_rule_allows() {
        let trial = |layer, ablated, induced, kl| DirectionTrial { layer, ablated, induced, kl };
        let trials = [
            trial(3, -1.0, 1.0, 0.05),
            trial(7, -2.0, 0.0, 0.1),
            trial(8, -9.0, 1.0, 0.0),
            trial(2, -9.0, -0.1, 0.0),
            trial(2, -9.0, 1.0, 0.11),
            trial(2, f64::NAN, 1.0, 0.0),
            trial(2, -9.0, 1.0, f64::NAN),
            trial(1, -2.0, 1.0, 0.0),
        ];
        assert_eq!(select_direction(&trials, 10, &DirectionRule::default()), Some(1));
        assert_eq!(select_direction(&trials[2..7], 10, &DirectionRule::default()), None);
    }

    /// Latents 1 and 2 say much the same, and 3 takes away.
    #[test]
    fn bundles_grow_as_long_as_they_gain() {
        let score = |bundle: &[usize]| {
            let value = |&latent: &usize| [0.0, 2.0, 2.5, -1.0, 3.0][latent];
            let both = bundle.contains(&1) && bundle.contains(&2);
            let sum: f64 = bundle.iter().map(value).sum();
            Ok::<f64, Infallible>(sum - if both { 2.0 } else { 0.0 })
        };
        let greedy =
            |max, least_gain| greedy_bundle(&[1, 2, 3, 4], max, least_gain, score).unwrap();
        // Behind 4 and 2, latent 1 adds 2 and loses 2.
        assert_eq!(greedy(4, 0.0), (vec![4, 2], 5.5));
        assert_eq!(greedy(1, 0.0), (vec![4], 3.0));
        assert_eq!(greedy(4, 2.7), (vec![4], 3.0));
        assert_eq!(greedy(4, 5.0), (vec![], 0.0));
        assert_eq!(greedy_bundle(&[1], 2, 0.0, |_| Err("no")), Err("no"));
    }
}
