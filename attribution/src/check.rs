//! Whether estimates hold, measured on a sample.

use model_hooks::HookPoint;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::attribution::SiteEffects;
use crate::baseline::Baseline;
use crate::effect::Effect;
use crate::error::AttributionError;
use crate::intervention::Cut;
use crate::metric::Metric;
use crate::site::{SaeMeans, SaeSite};
use crate::study::Study;

/// How well estimates agree with what was measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// Effects compared.
    pub n: usize,
    /// Pearson's correlation; NaN where either is always the same.
    pub pearson: f64,
    /// How many of the largest are looked for.
    pub top_k: usize,
    /// The share of the `top_k` that were measured largest which are among the `top_k` that were
    /// estimated largest, by absolute value.
    pub top_k_recall: f64,
}

/// What is measured to check estimates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckConfig {
    /// Latents of each conversation, at most: half of them those with the largest estimates, half
    /// drawn from the others.
    pub n_latents: usize,
    /// Of how many of the largest the recall is.
    pub top_k: usize,
    /// Of the draw.
    pub seed: u64,
}

/// An estimate beside its measurement.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Compared {
    /// Index of the conversation.
    pub conversation: usize,
    /// Which latent.
    pub latent_idx: usize,
    /// What the gradient says.
    pub estimated: Effect,
    /// What the ablation says.
    pub measured: Effect,
}

/// Estimates that were checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Checked {
    /// Where the SAE stands.
    pub point: HookPoint,
    /// The sample.
    pub compared: Vec<Compared>,
    /// How well it agrees.
    pub check: Check,
}

impl Check {
    /// Of estimates and what was measured of the same things. Fewer than `top_k` count as all.
    ///
    /// # Panics
    /// If there is another number of either.
    pub fn new(estimated: &[f64], measured: &[f64], top_k: usize) -> Self {
        assert_eq!(estimated.len(), measured.len(), "an estimate for each measurement");
        let n = estimated.len();
        let top_k = top_k.min(n);
        let top = |values: &[f64]| {
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_by(|&a, &b| values[b].abs().total_cmp(&values[a].abs()));
            order.truncate(top_k);
            order
        };
        let (by_estimate, by_measurement) = (top(estimated), top(measured));
        let n_found = by_measurement.iter().filter(|found| by_estimate.contains(found)).count();
        Self {
            n,
            pearson: pearson(estimated, measured),
            top_k,
            top_k_recall: n_found as f64 / top_k as f64,
        }
    }
}

/// Pearson's correlation; NaN where either is always the same.
pub fn pearson(a: &[f64], b: &[f64]) -> f64 {
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

impl<M: Metric> Study<'_, M> {
    /// Measures a sample of what was estimated, and compares.
    ///
    /// # Errors
    /// If a pass fails.
    pub fn check(
        &self,
        site: &SaeSite<'_>,
        baseline: Baseline<'_, SaeMeans>,
        effects: &SiteEffects,
        config: CheckConfig,
    ) -> Result<Checked, AttributionError> {
        let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
        let mut sample = Vec::new();
        for (conversation, effects) in effects.by_conversation().into_iter().enumerate() {
            let mut effects: Vec<(usize, Effect)> = effects.into_iter().collect();
            effects.sort_by(|(_, a), (_, b)| b.change().abs().total_cmp(&a.change().abs()));
            let n_largest = config.n_latents.div_ceil(2).min(effects.len());
            effects[n_largest..].shuffle(&mut rng);
            effects.truncate(config.n_latents);
            sample
                .extend(effects.into_iter().map(|(latent, effect)| (conversation, latent, effect)));
        }
        let cuts: Vec<Cut> = sample
            .iter()
            .map(|&(conversation, latent, _)| Cut::latent(conversation, latent))
            .collect();
        let measured = self.measure_cuts(site, baseline, &cuts)?;
        let compared: Vec<Compared> = sample
            .into_iter()
            .zip(measured)
            .map(|((conversation, latent_idx, estimated), measured)| Compared {
                conversation,
                latent_idx,
                estimated,
                measured,
            })
            .collect();
        let of = |effect: fn(&Compared) -> Effect| -> Vec<f64> {
            compared.iter().map(|compared| effect(compared).change()).collect()
        };
        let check =
            Check::new(&of(|compared| compared.estimated), &of(|c| c.measured), config.top_k);
        Ok(Checked { point: site.point, compared, check })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agreement_by_hand() {
        let check = Check::new(&[1.0, -2.0, 0.5, 0.0], &[2.0, -4.0, 1.0, 0.0], 2);
        assert!((check.pearson - 1.0).abs() < 1e-12);
        assert_eq!((check.n, check.top_k, check.top_k_recall), (4, 2, 1.0));
        // The largest two are {1, 2} and {0, 1}.
        let check = Check::new(&[0.0, -3.0, 2.0], &[5.0, -4.0, 1.0], 2);
        assert_eq!(check.top_k_recall, 0.5);
        assert!(Check::new(&[1.0, 1.0], &[0.0, 1.0], 5).pearson.is_nan());
    }
}
