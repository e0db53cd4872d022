//! How well an SAE reconstructs, and how sparsely.

use burn::tensor::Tensor;

use crate::latents::SparseLatents;

/// Reconstruction and sparsity over any number of batches, summed in `f64` on the host.
///
/// Every figure is NaN until there is something to take it over.
#[derive(Debug, Clone)]
pub struct Reconstruction {
    n_rows: usize,
    /// The first row: sums about it do not cancel where the mean is large.
    pivot: Vec<f32>,
    /// `Σ (x − pivot)` per dimension.
    offset: Vec<f64>,
    /// `Σ ‖x − pivot‖²`.
    spread: f64,
    /// `Σ ‖x − x̂‖²`.
    residual: f64,
    cosine: f64,
    /// Rows that each latent is active on.
    counts: Vec<u64>,
}

impl Reconstruction {
    /// Nothing seen yet, of an SAE with `d_sae` latents.
    pub fn new(d_sae: usize) -> Self {
        Self {
            n_rows: 0,
            pivot: Vec::new(),
            offset: Vec::new(),
            spread: 0.0,
            residual: 0.0,
            cosine: 0.0,
            counts: vec![0; d_sae],
        }
    }

    /// Adds a batch.
    ///
    /// # Shapes
    /// `x` and `reconstruction`: `[n, d_in]`.
    ///
    /// # Panics
    /// If the batch does not fit together, or not the batches before it.
    pub fn update(&mut self, x: Tensor<2>, reconstruction: Tensor<2>, latents: &SparseLatents) {
        let [n, d_in] = x.dims();
        assert_eq!(reconstruction.dims(), [n, d_in], "reconstruction does not fit x");
        assert_eq!(latents.n_rows(), n, "latents do not fit x");
        assert_eq!(latents.d_sae, self.counts.len(), "latents of another SAE");
        if n == 0 {
            return;
        }
        let (x, reconstruction) = (host(x), host(reconstruction));
        if self.n_rows == 0 {
            self.pivot = x[..d_in].to_vec();
            self.offset = vec![0.0; d_in];
        }
        assert_eq!(self.pivot.len(), d_in, "x is wider or narrower than the batches before it");
        for (x, reconstruction) in x.chunks_exact(d_in).zip(reconstruction.chunks_exact(d_in)) {
            self.add_row(x, reconstruction);
        }
        for entry in latents.entries() {
            self.counts[entry.latent_idx] += 1;
        }
    }

    fn add_row(&mut self, x: &[f32], reconstruction: &[f32]) {
        let (mut dot, mut x_square, mut reconstruction_square) = (0.0, 0.0, 0.0);
        let about = self.pivot.iter().zip(&mut self.offset);
        for ((&x, &reconstruction), (&pivot, offset)) in x.iter().zip(reconstruction).zip(about) {
            let (x, reconstruction) = (f64::from(x), f64::from(reconstruction));
            let from_pivot = x - f64::from(pivot);
            *offset += from_pivot;
            self.spread += from_pivot * from_pivot;
            self.residual += (x - reconstruction) * (x - reconstruction);
            dot += x * reconstruction;
            x_square += x * x;
            reconstruction_square += reconstruction * reconstruction;
        }
        let norms = (x_square * reconstruction_square).sqrt();
        self.cosine += if norms == 0.0 { 0.0 } else { dot / norms };
        self.n_rows += 1;
    }

    /// Rows seen.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// `L0`: latents above zero per row.
    pub fn l0(&self) -> f64 {
        self.counts.iter().sum::<u64>() as f64 / self.n_rows as f64
    }

    /// `mean_i ‖xᵢ − x̂ᵢ‖²`: summed over the width.
    pub fn mse(&self) -> f64 {
        self.residual / self.n_rows as f64
    }

    /// Fraction of variance unexplained, `Σᵢ ‖xᵢ − x̂ᵢ‖² / Σᵢ ‖xᵢ − x̄‖²`, with `x̄` the mean of all
    /// rows seen.
    ///
    /// One ratio of two sums over everything: neither an average of ratios per row (SAELens'
    /// `explained_variance_legacy`) nor one per dimension, which weigh rows or dimensions
    /// differently and give other numbers for the same SAE.
    pub fn fvu(&self) -> f64 {
        let n = self.n_rows as f64;
        let mean_offset = self.offset.iter().map(|sum| sum * sum).sum::<f64>() / n;
        self.residual / (self.spread - mean_offset)
    }

    /// `1 − fvu` (SAELens' `explained_variance`).
    pub fn explained_variance(&self) -> f64 {
        1.0 - self.fvu()
    }

    /// Mean cosine between `x` and its reconstruction; a row where either is zero counts as 0.
    pub fn cosine(&self) -> f64 {
        self.cosine / self.n_rows as f64
    }

    /// The share of rows that each latent is active on.
    pub fn densities(&self) -> Vec<f64> {
        self.counts.iter().map(|&count| count as f64 / self.n_rows as f64).collect()
    }

    /// Latents that were active on no row.
    pub fn n_dead(&self) -> usize {
        self.counts.iter().filter(|&&count| count == 0).count()
    }
}

/// The share of the damage of zero-ablating a hook point that splicing the SAE in avoids:
/// `(zero − spliced) / (zero − clean)` of the model's cross-entropies. 1 is a perfect SAE, 0 one
/// as bad as nothing; it can be above or below both.
pub fn ce_recovered(ce_clean: f64, ce_spliced: f64, ce_zero: f64) -> f64 {
    (ce_zero - ce_spliced) / (ce_zero - ce_clean)
}

fn host(x: Tensor<2>) -> Vec<f32> {
    x.into_data().try_into_vec_as().expect("numbers convert to numbers")
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    /// The analytic check of SAELens' tests, with one or two of three latents on each row.
    const X: [[f32; 2]; 3] = [[-1.0, 0.0], [0.0, 2.0], [1.0, 1.0]];
    const RECONSTRUCTION: [[f32; 2]; 3] = [[0.0, 0.0], [0.0, 2.0], [0.5, 1.0]];
    const INDICES: [[i32; 2]; 3] = [[0, 1], [1, 0], [1, 0]];
    const VALUES: [[f32; 2]; 3] = [[1.0, 0.0], [1.0, 3.0], [2.0, 0.0]];

    fn seen(batches: &[(usize, usize)]) -> Reconstruction {
        let device = Device::flex();
        let mut metrics = Reconstruction::new(3);
        for &(from, to) in batches {
            let part = |all: Tensor<2>| all.slice(from..to);
            let latents = SparseLatents::new(
                Tensor::<2, burn::tensor::Int>::from_data(INDICES, &device).slice(from..to),
                part(Tensor::from_data(VALUES, &device)),
                3,
            );
            let x = part(Tensor::from_data(X, &device));
            metrics.update(x, part(Tensor::from_data(RECONSTRUCTION, &device)), &latents);
        }
        metrics
    }

    #[test]
    fn figures_by_hand() {
        let metrics = seen(&[(0, 3)]);
        assert_eq!(metrics.n_rows(), 3);
        // Residual 1 + 0 + .25; the mean is (0, 1), the variance 2 + 1 + 1.
        assert_eq!(metrics.explained_variance(), 0.6875);
        assert_eq!(metrics.fvu(), 0.3125);
        assert_eq!(metrics.mse(), 1.25 / 3.0);
        assert_eq!(metrics.l0(), 4.0 / 3.0);
        assert_eq!(metrics.densities(), [2.0 / 3.0, 2.0 / 3.0, 0.0]);
        assert_eq!(metrics.n_dead(), 1);
        // 0 for the zero row, 1, and 1.5 / (√2 · √1.25).
        let expected = (1.0 + 1.5 / 2.5f64.sqrt()) / 3.0;
        assert!((metrics.cosine() - expected).abs() < 1e-12);
    }

    #[test]
    fn batches_do_not_matter() {
        let (whole, parts) = (seen(&[(0, 3)]), seen(&[(0, 1), (1, 1), (1, 3)]));
        assert_eq!(whole.fvu(), parts.fvu());
        assert_eq!(whole.cosine(), parts.cosine());
        assert_eq!(whole.densities(), parts.densities());
    }

    #[test]
    fn a_large_mean_does_not_cancel() {
        let device = Device::flex();
        let latents = SparseLatents::new(
            Tensor::from_data([[0], [0]], &device),
            Tensor::from_data([[1.0], [1.0]], &device),
            1,
        );
        let mut metrics = Reconstruction::new(1);
        let x = Tensor::from_data([[8e6], [8e6 + 2.0]], &device);
        metrics.update(x, Tensor::from_data([[8e6 + 1.0], [8e6 + 2.0]], &device), &latents);
        assert_eq!(metrics.fvu(), 0.5);
    }

    #[test]
    fn nothing_seen_is_no_number() {
        let metrics = Reconstruction::new(3);
        assert!(metrics.fvu().is_nan() && metrics.l0().is_nan() && metrics.cosine().is_nan());
    }

    #[test]
    fn ce_recovered_by_hand() {
        assert_eq!(ce_recovered(2.0, 3.0, 10.0), 0.875);
    }
}
