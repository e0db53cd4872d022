//! How much of the difference of rewards latents carry, as their number grows.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use attribution::{Baseline, Cut, CutOf, Effect, Reward, SaeSite};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::effects::{Question, TextEffects};
use super::pairs::TokenPair;
use super::results::{Explained, Interval};
use super::saes::TrainedSae;

/// How many latents are ablated together; then all of them.
const SIZES: [usize; 8] = [1, 2, 5, 10, 20, 50, 100, 200];
/// Times that pairs are drawn anew for an interval.
const N_RESAMPLES: usize = 500;

/// The curve, and what is not the latents'.
pub(super) struct Shares {
    pub(super) curve: Vec<Explained>,
    /// What ablating all latents takes away.
    pub(super) latents: Interval,
    /// What ablating the error takes away.
    pub(super) error: Interval,
    /// What integrated gradients of all latents give of the difference.
    pub(super) attributed_to_latents: f64,
    /// The same of the error.
    pub(super) attributed_to_error: f64,
}

/// Differences of rewards, chosen − rejected.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Differences {
    clean: f64,
    /// Without so many latents.
    without: Vec<f64>,
    without_latents: f64,
    without_error: f64,
}

/// Measures by how much the difference of rewards shrinks as latents are ablated in both texts, those
/// with the largest effects on it first. They are ranked on the other half of the pairs.
pub(super) fn shares(
    question: &Question<'_>,
    trained: &TrainedSae,
    effects: &[TextEffects],
) -> Result<Shares> {
    let orders = [1, 0].map(|parity| ranked(effects, parity));
    let n = orders[0].len().min(orders[1].len());
    let sizes: Vec<usize> = SIZES.into_iter().filter(|&size| size < n).chain([n]).collect();
    let settings = json!({"sizes": sizes, "orders": orders});
    let metric = Reward::new(question.model);
    let site = SaeSite::new(&trained.sae, trained.point());
    let of_pair = |nth: usize, pair: &TokenPair| -> Result<Differences> {
        let study = question.study_pair(&metric, pair, site.point)?;
        let sets = sizes.iter().map(|&n| CutOf::Latents(orders[nth % 2][..n].to_vec()));
        let sets: Vec<CutOf> = sets.chain([CutOf::AllLatents, CutOf::Error]).collect();
        let cut = |what: &CutOf| [0, 1].map(|text| Cut { conversation: text, what: what.clone() });
        let cuts: Vec<Cut> = sets.iter().flat_map(cut).collect();
        let clean = study.clean()?;
        let measured = study.measure_cuts(&site, Baseline::Zero, &cuts);
        let measured = measured.context("while ablating sets of latents")?;
        let clean = clean[0] - clean[1];
        let change = |both: &[Effect]| clean + both[0].change() - both[1].change();
        let mut without: Vec<f64> = measured.chunks_exact(2).map(change).collect();
        let without_error = without.pop().context("the error was ablated")?;
        let without_latents = without.pop().context("all latents were ablated")?;
        Ok(Differences { clean, without, without_latents, without_error })
    };
    let pairs = question.by_pair("explained", trained, question.pairs, settings, of_pair)?;
    let counted: Vec<&Differences> =
        pairs.iter().filter(|pair| pair.clean.abs() > question.thresholds.explained).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(question.seed);
    let mut interval =
        |without: &dyn Fn(&Differences) -> f64| interval(&counted, without, &mut rng);
    let explained = |(nth, n_latents): (usize, usize)| {
        let Interval { value, low, high } = interval(&|pair| pair.without[nth]);
        Explained { layer: trained.layer, n_latents, share: value, low, high }
    };
    let curve = sizes.into_iter().enumerate().map(explained).collect();
    let latents = interval(&|pair| pair.without_latents);
    let error = interval(&|pair| pair.without_error);
    let attributed = |of: fn(&TextEffects) -> f64| {
        let (mut sum, mut whole) = (0.0, 0.0);
        for (pair, effects) in pairs.iter().zip(effects.chunks_exact(2)) {
            if pair.clean.abs() > question.thresholds.explained {
                // An effect is what goes: its sign is turned.
                sum -= pair.clean.signum() * (of(&effects[0]) - of(&effects[1]));
                whole += pair.clean.abs();
            }
        }
        sum / whole
    };
    Ok(Shares {
        curve,
        latents,
        error,
        attributed_to_latents: attributed(|text| text.ig.values().sum()),
        attributed_to_error: attributed(|text| text.error),
    })
}

/// Latents by their effect on the difference of rewards, over every other pair.
fn ranked(effects: &[TextEffects], parity: usize) -> Vec<usize> {
    let mut sums = BTreeMap::<usize, f64>::new();
    for pair in effects.chunks_exact(2).skip(parity).step_by(2) {
        for (text, sign) in pair.iter().zip([1.0, -1.0]) {
            for (&latent, effect) in &text.ig {
                *sums.entry(latent).or_default() += sign * effect;
            }
        }
    }
    let mut order: Vec<usize> = sums.keys().copied().collect();
    order.sort_by(|a, b| sums[b].abs().total_cmp(&sums[a].abs()));
    order
}

/// `1 − Σ Δ(without) / Σ Δ(clean)`, each pair by the sign of the model's own preference, with 95 %
/// of what comes of drawing the pairs anew.
fn interval(
    pairs: &[&Differences],
    without: &dyn Fn(&Differences) -> f64,
    rng: &mut ChaCha8Rng,
) -> Interval {
    let share = |pairs: &mut dyn Iterator<Item = &Differences>| {
        let (after, before) = pairs.fold((0.0, 0.0), |(after, before), pair| {
            (after + pair.clean.signum() * without(pair), before + pair.clean.abs())
        });
        1.0 - after / before
    };
    if pairs.is_empty() {
        return Interval { value: f64::NAN, low: f64::NAN, high: f64::NAN };
    }
    let n = pairs.len();
    let mut resampled: Vec<f64> = (0..N_RESAMPLES)
        .map(|_| share(&mut (0..n).map(|_| pairs[rng.random_range(0..n)])))
        .collect();
    resampled.sort_by(f64::total_cmp);
    Interval {
        value: share(&mut pairs.iter().copied()),
        low: resampled[N_RESAMPLES / 40],
        high: resampled[N_RESAMPLES - 1 - N_RESAMPLES / 40],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_by_hand() {
        let pair = |clean, without| Differences {
            clean,
            without_latents: without,
            ..Differences::default()
        };
        // The second pair is preferred the other way round: 2 + 3 of 4 + 6 are left.
        let pairs = [pair(4.0, 2.0), pair(-6.0, -3.0)];
        let pairs: Vec<&Differences> = pairs.iter().collect();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let found = interval(&pairs, &|pair| pair.without_latents, &mut rng);
        assert_eq!((found.value, found.low, found.high), (0.5, 0.5, 0.5));
        let none = interval(&[], &|pair| pair.clean, &mut rng);
        assert!(none.value.is_nan());
    }

    #[test]
    fn latents_are_ranked_by_every_other_pair() {
        let text = |ig: &[(usize, f64)]| TextEffects {
            ig: ig.iter().copied().collect(),
            ..TextEffects::default()
        };
        let effects = [
            text(&[(1, -1.0), (2, 0.5)]),
            text(&[(2, 0.4)]),
            text(&[(7, 3.0)]),
            text(&[]),
            text(&[(3, -2.0)]),
            text(&[(3, -1.5)]),
        ];
        assert_eq!(ranked(&effects, 0), [1, 3, 2]);
        assert_eq!(ranked(&effects, 1), [7]);
    }
}
