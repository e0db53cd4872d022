//! Logistic probes.

use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::condition::Score;
use crate::rows::{Rows, dot, norm};

/// `P(towards | x) = σ(w · x + b)`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogisticProbe {
    /// `w`.
    pub weights: Vec<f32>,
    /// `b`.
    pub bias: f32,
}

/// How a probe is fitted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogisticOptions {
    /// `λ`, above zero: without it, separable classes have no optimum.
    pub l2: f64,
    /// Whether the penalty is on the weights of features brought to mean 0 and deviation 1. The
    /// probe is of the activations as they are either way.
    pub standardize: bool,
}

impl Default for LogisticOptions {
    fn default() -> Self {
        Self { l2: 1.0, standardize: false }
    }
}

/// Where the largest gradient is below this, relative to the penalty and the number of rows, the
/// optimum is reached.
const TOLERANCE: f64 = 1e-9;
const MAX_NEWTON_STEPS: usize = 200;

impl LogisticProbe {
    /// The probe with the least `λ/2 ‖w‖² + Σ log(1 + exp(∓(w · x + b)))`, over activations that are
    /// `towards` (−) and `away` (+); the bias is not penalised (scikit-learn's `LogisticRegression`
    /// with `C = 1/λ`).
    ///
    /// # Shapes
    /// `[n, d_model]` each, any number of rows.
    ///
    /// # Panics
    /// If one is empty, the widths differ, a value is not finite, or `λ` is not above zero.
    pub fn fit(towards: &Tensor<2>, away: &Tensor<2>, options: LogisticOptions) -> Self {
        let LogisticOptions { l2, standardize } = options;
        assert!(l2 > 0.0 && l2.is_finite(), "a penalty of {l2}");
        let classes = [(Rows::new(towards), 1.0), (Rows::new(away), -1.0)];
        assert_eq!(classes[0].0.width(), classes[1].0.width(), "activations of two widths");
        let all: Rows =
            classes.iter().flat_map(|(rows, _)| rows.iter().map(<[f64]>::to_vec)).collect();
        assert!(all.iter().flatten().all(|x| x.is_finite()), "activations that are not finite");
        let mut scale = vec![1.0; all.width()];
        // Fitted around the mean, the bias and the weights are nearly independent.
        let mean = all.mean();
        let centred = all.centred();
        if standardize {
            for row in centred.iter() {
                scale.iter_mut().zip(row).for_each(|(s, x)| *s += x * x);
            }
            for s in &mut scale {
                let deviation = ((*s - 1.0) / centred.len() as f64).sqrt();
                *s = if deviation > 0.0 { deviation } else { 1.0 };
            }
        }
        let rows: Vec<(Vec<f64>, f64)> = centred
            .iter()
            .zip(classes.iter().flat_map(|(rows, label)| std::iter::repeat_n(*label, rows.len())))
            .map(|(row, label)| {
                (row.iter().zip(&scale).map(|(x, s)| x / s).chain([1.0]).collect(), label)
            })
            .collect();
        let theta = newton(&rows, l2);
        let (bias, weights) = theta.split_last().expect("a bias at least");
        let weights: Vec<f64> = weights.iter().zip(&scale).map(|(w, s)| w / s).collect();
        let bias = (bias - dot(&weights, &mean)) as f32;
        Self { weights: weights.into_iter().map(|w| w as f32).collect(), bias }
    }

    /// `w · x + b`.
    pub fn logit(&self, x: &[f32]) -> f64 {
        let products = self.weights.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
        products.sum::<f64>() + f64::from(self.bias)
    }

    /// The weights as a direction.
    ///
    /// # Shapes
    /// `[d_model]`.
    pub fn direction(&self, device: &Device) -> Tensor<1> {
        Tensor::from_data(TensorData::new(self.weights.clone(), [self.weights.len()]), device)
    }

    /// What a condition reads with it.
    pub fn score(&self, device: &Device) -> Score<'static> {
        Score::Probe { weights: self.direction(device), bias: f64::from(self.bias) }
    }
}

/// Truncated Newton steps: the Hessian is only ever multiplied, by conjugate gradients.
fn newton(rows: &[(Vec<f64>, f64)], l2: f64) -> Vec<f64> {
    let d = rows[0].0.len();
    let mut theta = vec![0.0; d];
    let (mut loss, mut gradient, mut curvature) = evaluate(rows, l2, &theta);
    let enough = TOLERANCE * (l2 + rows.len() as f64);
    for _ in 0..MAX_NEWTON_STEPS {
        let size = norm(&gradient);
        if size <= enough {
            break;
        }
        let step = solve(rows, l2, &curvature, &gradient, size.sqrt().min(0.1) * size);
        let slope = dot(&gradient, &step);
        let mut length = 1.0;
        let found = loop {
            let moved: Vec<f64> = theta.iter().zip(&step).map(|(t, s)| t + length * s).collect();
            let next = evaluate(rows, l2, &moved);
            if next.0 <= loss + 1e-4 * length * slope {
                break Some((moved, next));
            }
            length *= 0.5;
            if length < 1e-10 {
                break None;
            }
        };
        // No step goes down any more: what is left is rounding.
        let Some((moved, next)) = found else { break };
        (theta, (loss, gradient, curvature)) = (moved, next);
    }
    theta
}

/// The loss, its gradient, and `σ(1 − σ)` of each row.
fn evaluate(rows: &[(Vec<f64>, f64)], l2: f64, theta: &[f64]) -> (f64, Vec<f64>, Vec<f64>) {
    let weights = &theta[..theta.len() - 1];
    let mut loss = 0.5 * l2 * dot(weights, weights);
    let mut gradient: Vec<f64> = weights.iter().map(|w| l2 * w).chain([0.0]).collect();
    let mut curvature = Vec::with_capacity(rows.len());
    for (row, label) in rows {
        let margin = label * dot(row, theta);
        loss += if margin > 0.0 { (-margin).exp().ln_1p() } else { margin.exp().ln_1p() - margin };
        let wrong = 1.0 / (1.0 + margin.exp());
        curvature.push(wrong * (1.0 - wrong));
        gradient.iter_mut().zip(row).for_each(|(g, x)| *g -= label * wrong * x);
    }
    (loss, gradient, curvature)
}

/// `−H⁻¹ g`, up to a residual of `enough`.
fn solve(
    rows: &[(Vec<f64>, f64)],
    l2: f64,
    curvature: &[f64],
    gradient: &[f64],
    enough: f64,
) -> Vec<f64> {
    let multiply = |v: &[f64]| {
        let n_weights = v.len() - 1;
        let mut product: Vec<f64> = v[..n_weights].iter().map(|v| l2 * v).chain([0.0]).collect();
        for ((row, _), curvature) in rows.iter().zip(curvature) {
            let along = curvature * dot(row, v);
            product.iter_mut().zip(row).for_each(|(p, x)| *p += along * x);
        }
        product
    };
    let mut step = vec![0.0; gradient.len()];
    let mut residual: Vec<f64> = gradient.iter().map(|g| -g).collect();
    let mut direction = residual.clone();
    let mut square = dot(&residual, &residual);
    for _ in 0..2 * gradient.len() {
        if square.sqrt() <= enough {
            break;
        }
        let image = multiply(&direction);
        let length = square / dot(&direction, &image);
        // Where the bias alone is left and no row is in doubt, the Hessian is flat.
        if !length.is_finite() {
            break;
        }
        step.iter_mut().zip(&direction).for_each(|(s, d)| *s += length * d);
        residual.iter_mut().zip(&image).for_each(|(r, i)| *r -= length * i);
        let next = dot(&residual, &residual);
        direction.iter_mut().zip(&residual).for_each(|(d, r)| *d = r + next / square * *d);
        square = next;
    }
    step
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(values: &[f32]) -> Tensor<2> {
        Tensor::from_data(TensorData::new(values.to_vec(), [values.len(), 1]), &Device::flex())
    }

    /// One of each class, at ±1: by symmetry b = 0, and λ w = 2 σ(−w), so that with w = 1,
    /// λ = 2 / (1 + e).
    #[test]
    fn two_points_by_hand() {
        let l2 = 2.0 / (1.0 + 1f64.exp());
        let options = LogisticOptions { l2, standardize: false };
        let probe = LogisticProbe::fit(&column(&[1.0]), &column(&[-1.0]), options);
        assert!((probe.weights[0] - 1.0).abs() < 1e-6 && probe.bias.abs() < 1e-6, "{probe:?}");
        // Shifted by 10, only the bias changes.
        let probe = LogisticProbe::fit(&column(&[11.0]), &column(&[9.0]), options);
        assert!((probe.weights[0] - 1.0).abs() < 1e-6, "{probe:?}");
        assert!((probe.bias + 10.0).abs() < 1e-5, "{probe:?}");
    }

    /// Scaled by 7, with the penalty on standardised features, the logits stay.
    #[test]
    fn standardised_probes_do_not_see_the_scale() {
        let options = LogisticOptions { l2: 0.5, standardize: true };
        let (towards, away) = ([1.0, 2.0, 0.5], [-1.0, 0.7]);
        let probe = LogisticProbe::fit(&column(&towards), &column(&away), options);
        let (towards, away) = (towards.map(|x| 7.0 * x), away.map(|x| 7.0 * x));
        let scaled = LogisticProbe::fit(&column(&towards), &column(&away), options);
        for x in [-1.0, 0.0, 3.0] {
            assert!((probe.logit(&[x]) - scaled.logit(&[7.0 * x])).abs() < 1e-5);
        }
    }

    /// The gradient of the loss is zero at what is found, whatever the data.
    #[test]
    fn what_is_found_is_the_optimum() {
        let row = |i: usize, shift: f64| -> Vec<f64> {
            (0..5)
                .map(|j| ((i * 7 + j * 3) as f64).sin() * (1.0 + j as f64) + shift)
                .chain([1.0])
                .collect()
        };
        let rows: Vec<(Vec<f64>, f64)> = (0..30)
            .map(|i| if i % 3 == 0 { (row(i, 0.4), 1.0) } else { (row(i, 0.0), -1.0) })
            .collect();
        for l2 in [1e-3, 1.0, 100.0] {
            let (_, gradient, _) = evaluate(&rows, l2, &newton(&rows, l2));
            assert!(norm(&gradient) < 1e-6, "{l2}: {gradient:?}");
        }
    }
}
