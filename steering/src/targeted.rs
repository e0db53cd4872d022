//! SAE-targeted steering (Chalnev et al., 2024): vectors made to move one latent and little else.

use burn::tensor::{Device, Tensor, TensorData};

use crate::rows::{Rows, dot, norm};

/// `effects ≈ vector · M + b`: what adding a vector does to latents further on, on average.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearEffects {
    /// `M`, a row for each latent.
    rows: Vec<Vec<f64>>,
    /// `b`.
    bias: Vec<f64>,
}

impl LinearEffects {
    /// Ridge regression on vectors that were tried, with what they did to some latents.
    ///
    /// # Shapes
    /// `vectors`: `[n, d_model]`, `effects`: `[n, n_latents]`.
    ///
    /// # Panics
    /// If there is nothing to fit, the numbers of rows differ, or `ridge` is not above zero.
    pub fn fit(vectors: &Tensor<2>, effects: &Tensor<2>, ridge: f64) -> Self {
        assert!(ridge > 0.0 && ridge.is_finite(), "a ridge of {ridge}");
        let (x, y) = (Rows::new(vectors), Rows::new(effects));
        assert_eq!(x.len(), y.len(), "an effect for each vector");
        let (x_mean, y_mean) = (x.mean(), y.mean());
        let (x, y) = (x.centred(), y.centred());
        let effects = |latent: usize| -> Vec<f64> { y.iter().map(|row| row[latent]).collect() };
        let rows: Vec<Vec<f64>> =
            (0..y.width()).map(|latent| ridge_solve(&x, &effects(latent), ridge)).collect();
        let bias = rows.iter().zip(&y_mean).map(|(row, mean)| mean - dot(row, &x_mean)).collect();
        Self { rows, bias }
    }

    /// `M_j / ‖M_j‖ − λ · M b / ‖M b‖`: along what moves the latent, away from what any vector
    /// moves.
    ///
    /// # Shapes
    /// `[d_model]`.
    ///
    /// # Panics
    /// If there is no such latent.
    pub fn direction(&self, latent: usize, lambda: f64, device: &Device) -> Tensor<1> {
        let target = &self.rows[latent];
        let mut common = vec![0.0; target.len()];
        for (row, bias) in self.rows.iter().zip(&self.bias) {
            common.iter_mut().zip(row).for_each(|(sum, x)| *sum += bias * x);
        }
        let lengths = [norm(target), norm(&common)].map(|n| if n > 0.0 { n } else { 1.0 });
        let parts = target.iter().zip(&common);
        let values: Vec<f32> =
            parts.map(|(t, c)| (t / lengths[0] - lambda * c / lengths[1]) as f32).collect();
        let shape = [values.len()];
        Tensor::from_data(TensorData::new(values, shape), device)
    }

    /// What a vector is expected to do to each latent.
    ///
    /// # Panics
    /// If it has another width.
    pub fn effects(&self, vector: &[f32]) -> Vec<f64> {
        let vector: Vec<f64> = vector.iter().copied().map(f64::from).collect();
        assert!(self.rows.iter().all(|row| row.len() == vector.len()), "a vector of another width");
        self.rows.iter().zip(&self.bias).map(|(row, bias)| dot(row, &vector) + bias).collect()
    }
}

/// `(XᵀX + ridge)⁻¹ Xᵀ y`, by conjugate gradients.
fn ridge_solve(x: &Rows, y: &[f64], ridge: f64) -> Vec<f64> {
    let mut residual = vec![0.0; x.width()];
    for (row, y) in x.iter().zip(y) {
        residual.iter_mut().zip(row).for_each(|(sum, x)| *sum += y * x);
    }
    let mut solution = vec![0.0; x.width()];
    let mut direction = residual.clone();
    let mut square = dot(&residual, &residual);
    let enough = 1e-24 * square;
    for _ in 0..10 * x.width() {
        if square <= enough {
            break;
        }
        let mut image = x.gram(&direction);
        image.iter_mut().zip(&direction).for_each(|(i, d)| *i += ridge * d);
        let length = square / dot(&direction, &image);
        solution.iter_mut().zip(&direction).for_each(|(s, d)| *s += length * d);
        residual.iter_mut().zip(&image).for_each(|(r, i)| *r -= length * i);
        let next = dot(&residual, &residual);
        direction.iter_mut().zip(&residual).for_each(|(d, r)| *d = r + next / square * *d);
        square = next;
    }
    solution
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix<const W: usize>(rows: &[[f32; W]]) -> Tensor<2> {
        Tensor::from_data(TensorData::new(rows.concat(), [rows.len(), W]), &Device::flex())
    }

    /// Effects (2x + 1, x + y − 1) of vectors (x, y): with next to no ridge, both come out.
    #[test]
    fn a_linear_map_is_found_again() {
        let vectors = [[0.0f32, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, -1.0]];
        let effects = vectors.map(|[x, y]| [2.0 * x + 1.0, x + y - 1.0]);
        let found = LinearEffects::fit(&matrix(&vectors), &matrix(&effects), 1e-9);
        for ([x, y], expected) in [([3.0, 5.0], [7.0, 7.0]), ([-1.0, 0.5], [-1.0, -1.5])] {
            let effects = found.effects(&[x, y]);
            assert!(
                (effects[0] - expected[0]).abs() < 1e-6 && (effects[1] - expected[1]).abs() < 1e-6
            );
        }
        // M_1 = (1, 1); M b = (2, 0) − (1, 1) = (1, −1).
        let direction = found.direction(1, 0.5, &Device::flex()).into_data();
        let direction = direction.as_slice::<f32>().unwrap();
        let half = 0.5f32.sqrt();
        assert!(
            (direction[0] - 0.5 * half).abs() < 1e-6 && (direction[1] - 1.5 * half).abs() < 1e-6
        );
    }
}
