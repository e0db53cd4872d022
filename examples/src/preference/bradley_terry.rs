//! A linear head by the model of Bradley and Terry (1952), and how good it is.

use serde::Serialize;
use steering::Rate;

/// Newton steps, at most; each squares the error, so that five are as a rule enough.
const MAX_STEPS: usize = 50;

/// How a head is fitted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FitConfig {
    /// Weight of `½‖w‖²`, for features of unit variance over differences, beside the mean loss.
    pub ridge: f64,
    /// A step that lowers the loss by less ends the fit.
    pub tolerance: f64,
}

impl Default for FitConfig {
    fn default() -> Self {
        Self { ridge: 1e-3, tolerance: 1e-9 }
    }
}

/// The weights `w` of a reward `⟨w, x⟩` that minimise `mean(−log σ(⟨w, chosen − rejected⟩))` and a
/// ridge, by Newton's method.
///
/// Features are scaled to unit size over the differences while it works, as those of a residual
/// stream differ by orders of magnitude.
///
/// # Shapes
/// `differences`: `chosen − rejected` of every pair, each as long as the result.
///
/// # Panics
/// If there are none, or their lengths differ.
pub fn fit(differences: &[Vec<f32>], config: FitConfig) -> Vec<f64> {
    let width = differences.first().expect("pairs to learn from").len();
    let n = differences.len() as f64;
    assert!(differences.iter().all(|row| row.len() == width), "features of different widths");
    let mut squares = vec![0f64; width];
    for row in differences {
        row.iter().zip(&mut squares).for_each(|(&x, sum)| *sum += f64::from(x).powi(2));
    }
    // A feature that never differs gets no weight.
    let scales: Vec<f64> = squares.iter().map(|sum| (sum / n).sqrt().max(1e-12)).collect();
    let scaled = |row: &Vec<f32>| -> Vec<f64> {
        row.iter().zip(&scales).map(|(&x, scale)| f64::from(x) / scale).collect()
    };
    let rows: Vec<Vec<f64>> = differences.iter().map(scaled).collect();
    let loss = |w: &[f64]| {
        let mean = rows.iter().map(|row| softplus(-dot(row, w))).sum::<f64>() / n;
        mean + 0.5 * config.ridge * dot(w, w)
    };
    let mut w = vec![0f64; width];
    let mut before = loss(&w);
    for _ in 0..MAX_STEPS {
        let (gradient, hessian) = derivatives(&rows, &w, config.ridge);
        let step = solve(hessian, gradient, width);
        // Newton's step may be too long far from the optimum; half of it lies downhill too.
        let mut share = 1.0;
        let (next, after) = loop {
            let next: Vec<f64> = w.iter().zip(&step).map(|(w, step)| w - share * step).collect();
            let after = loss(&next);
            if after <= before || share < 1e-6 {
                break (next, after);
            }
            share /= 2.0;
        };
        w = next;
        let gain = before - after;
        before = after;
        if gain < config.tolerance {
            break;
        }
    }
    w.iter().zip(&scales).map(|(w, scale)| w / scale).collect()
}

/// Gradient, and the lower half of the Hessian row by row.
fn derivatives(rows: &[Vec<f64>], w: &[f64], ridge: f64) -> (Vec<f64>, Vec<f64>) {
    use rayon::prelude::*;
    let (width, n) = (w.len(), rows.len() as f64);
    let preferred: Vec<f64> = rows.iter().map(|row| sigmoid(dot(row, w))).collect();
    let mut gradient: Vec<f64> = w.iter().map(|w| ridge * w).collect();
    for (row, p) in rows.iter().zip(&preferred) {
        row.iter().zip(&mut gradient).for_each(|(x, sum)| *sum -= (1.0 - p) * x / n);
    }
    let mut hessian = vec![0f64; width * width];
    hessian.par_chunks_mut(width).enumerate().for_each(|(i, out)| {
        for (row, p) in rows.iter().zip(&preferred) {
            let share = p * (1.0 - p) * row[i] / n;
            out[..=i].iter_mut().zip(row).for_each(|(sum, x)| *sum += share * x);
        }
        out[i] += ridge;
    });
    (gradient, hessian)
}

/// `matrix⁻¹ · b` by Cholesky's factorisation of a positive definite matrix, whose lower half is
/// given.
fn solve(mut matrix: Vec<f64>, mut b: Vec<f64>, n: usize) -> Vec<f64> {
    for i in 0..n {
        for j in 0..=i {
            let (above, row) = matrix.split_at(i * n);
            let sum = if i == j {
                dot(&row[..j], &row[..j])
            } else {
                dot(&row[..j], &above[j * n..j * n + j])
            };
            let left = matrix[i * n + j] - sum;
            matrix[i * n + j] =
                if i == j { left.max(f64::MIN_POSITIVE).sqrt() } else { left / matrix[j * n + j] };
        }
    }
    for i in 0..n {
        b[i] = (b[i] - dot(&matrix[i * n..i * n + i], &b[..i])) / matrix[i * n + i];
    }
    for i in (0..n).rev() {
        let sum: f64 = (i + 1..n).map(|j| matrix[j * n + i] * b[j]).sum();
        b[i] = (b[i] - sum) / matrix[i * n + i];
    }
    b
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `log(1 + eˣ)`.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// How rewards agree with preferences.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Agreement {
    /// Pairs whose preferred text has the higher reward, with a Wilson interval. A tie is no
    /// agreement.
    pub accuracy: Rate,
    /// Mean of `−log σ(Δ)`; a coin has log 2.
    pub loss: f64,
    /// Mean difference of the rewards, chosen − rejected.
    pub mean_difference: f64,
    /// Pairs by the probability that the model gives the text with the higher reward.
    pub calibration: Vec<CalibrationBin>,
    /// `Σ n |accuracy − confidence| / n` over the bins.
    pub calibration_error: f64,
}

/// Pairs of which the model is about as sure.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CalibrationBin {
    /// Pairs.
    pub n: usize,
    /// Mean of `σ(|Δ|)`.
    pub confidence: f64,
    /// The share of them that the model has right.
    pub accuracy: f64,
}

impl Agreement {
    /// Of the differences of rewards, chosen − rejected.
    pub fn new(differences: &[f64]) -> Self {
        /// From a confidence of ½ to 1.
        const N_BINS: usize = 5;
        let n = differences.len();
        let right = |difference: &f64| *difference > 0.0;
        let mut bins = [(0usize, 0.0, 0usize); N_BINS];
        for difference in differences {
            let confidence = sigmoid(difference.abs());
            let bin = (((confidence - 0.5) * 2.0 * N_BINS as f64) as usize).min(N_BINS - 1);
            bins[bin].0 += 1;
            bins[bin].1 += confidence;
            bins[bin].2 += usize::from(right(difference));
        }
        let calibration: Vec<CalibrationBin> = bins
            .into_iter()
            .filter(|&(n, ..)| n > 0)
            .map(|(n, confidence, right)| CalibrationBin {
                n,
                confidence: confidence / n as f64,
                accuracy: right as f64 / n as f64,
            })
            .collect();
        let apart = |bin: &CalibrationBin| bin.n as f64 * (bin.accuracy - bin.confidence).abs();
        let mean = |sum: f64| sum / n.max(1) as f64;
        Self {
            accuracy: Rate::wilson(differences.iter().filter(|d| right(d)).count(), n),
            loss: mean(differences.iter().map(|difference| softplus(-difference)).sum()),
            mean_difference: mean(differences.iter().sum()),
            calibration_error: mean(calibration.iter().map(apart).sum()),
            calibration,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn a_linear_system_by_hand() {
        // [[4, 2], [2, 3]] · [1, 2] = [8, 8].
        let x = solve(vec![4.0, f64::NAN, 2.0, 3.0], vec![8.0, 8.0], 2);
        assert!((x[0] - 1.0).abs() < 1e-12 && (x[1] - 2.0).abs() < 1e-12, "{x:?}");
    }

    #[test]
    fn one_feature_by_hand() {
        // Three of four pairs differ by +1, one by −1: σ(w) = 3/4, so w = log 3.
        let differences = [1.0, 1.0, 1.0, -1.0].map(|x| vec![x]);
        let w = fit(&differences, FitConfig { ridge: 0.0, tolerance: 1e-15 });
        assert!((w[0] - 3f64.ln()).abs() < 1e-9, "{w:?}");
    }

    #[test]
    fn the_gradient_vanishes_at_the_optimum() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let rows: Vec<Vec<f32>> = (0..200)
            .map(|_| {
                let mut row: Vec<f32> = (0..7).map(|_| rng.random_range(-1.0..1.0)).collect();
                row[0] += 0.4;
                // Features of very different size, and one that says nothing.
                row[1] *= 1000.0;
                row[6] = 0.0;
                row
            })
            .collect();
        let w = fit(&rows, FitConfig { ridge: 0.0, ..FitConfig::default() });
        assert!(w[0] > 0.0 && w.iter().all(|w| w.is_finite()), "{w:?}");
        for feature in 0..6 {
            let slope: f64 = rows
                .iter()
                .map(|row| {
                    let difference: f64 = row.iter().zip(&w).map(|(&x, w)| f64::from(x) * w).sum();
                    -f64::from(row[feature]) * sigmoid(-difference)
                })
                .sum();
            let size: f64 = rows.iter().map(|row| f64::from(row[feature]).abs()).sum();
            assert!(slope.abs() < 1e-4 * size, "feature {feature}: {slope}");
        }
    }

    #[test]
    fn agreement_by_hand() {
        let agreement = Agreement::new(&[2.0, -1.0, 0.0, 3.0]);
        assert_eq!((agreement.accuracy.rate, agreement.accuracy.n), (0.5, 4));
        assert_eq!(agreement.mean_difference, 1.0);
        // Confidences .88, .73, .5, .95 in the bins from .8, .7, .5, .9.
        assert_eq!(agreement.calibration.len(), 4);
        let sure = agreement.calibration[3];
        assert_eq!((sure.n, sure.accuracy), (1, 1.0));
        assert!((sure.confidence - 0.952_574).abs() < 1e-6);
        let swapped = Agreement::new(&[-2.0, 1.0, 0.0, -3.0]);
        assert_eq!(swapped.accuracy.rate, 0.25);
    }
}
