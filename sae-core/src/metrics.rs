//! How well an SAE reconstructs, and how sparsely.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use serde::Serialize;

use crate::latents::SparseLatents;

/// Reconstruction and sparsity over any number of batches, summed in `f64` on the host.
///
/// Every figure is NaN until there is something to take it over.
#[derive(Debug, Clone)]
pub struct Reconstruction {
    /// The first target: sums about it do not cancel where the mean is large.
    pivot: Vec<f32>,
    /// By the octave of the target's norm, see [`octave`].
    octaves: BTreeMap<i32, Sums>,
    cosine: f64,
    /// `Σ ‖x̂‖ / ‖x‖`, over `n_ratios` rows with an `x` other than zero.
    ratio: f64,
    n_ratios: usize,
    /// `Σ ⟨x̂, x⟩`.
    dot: f64,
    /// `Σ ‖x̂‖²`.
    reconstruction_square: f64,
    /// Rows that each latent is active on.
    counts: Vec<u64>,
}

/// Sums over rows, per dimension.
#[derive(Debug, Clone)]
struct Sums {
    n_rows: usize,
    /// `Σ (x − pivot)`.
    offset: Vec<f64>,
    /// `Σ (x − pivot)²`.
    spread: Vec<f64>,
    /// `Σ (x − x̂)²`.
    residual: Vec<f64>,
}

impl Sums {
    fn zero(width: usize) -> Self {
        let zeros = || vec![0.0; width];
        Self { n_rows: 0, offset: zeros(), spread: zeros(), residual: zeros() }
    }

    fn add(&mut self, other: &Self) {
        self.n_rows += other.n_rows;
        for (into, from) in [
            (&mut self.offset, &other.offset),
            (&mut self.spread, &other.spread),
            (&mut self.residual, &other.residual),
        ] {
            into.iter_mut().zip(from).for_each(|(into, from)| *into += from);
        }
    }

    /// `Σ (x − x̄)²` per dimension.
    fn variances(&self) -> impl Iterator<Item = f64> {
        let n = self.n_rows as f64;
        self.spread
            .iter()
            .zip(&self.offset)
            .map(move |(spread, offset)| spread - offset * offset / n)
    }

    fn fvu(&self) -> f64 {
        self.residual.iter().sum::<f64>() / self.variances().sum::<f64>()
    }
}

/// `e` with `2ᵉ ≤ norm < 2ᵉ⁺¹`; a zero is below all others, and what is no number above them.
fn octave(norm: f64) -> i32 {
    match norm {
        0.0 => i32::MIN,
        norm if norm.is_finite() => norm.log2().floor() as i32,
        _ => i32::MAX,
    }
}

/// Rows whose norm is at least so many octaves above the median's are outliers: 16 times and more.
const OUTLIER_OCTAVES: i32 = 4;

impl Reconstruction {
    /// Nothing seen yet, of an SAE with `d_sae` latents.
    pub fn new(d_sae: usize) -> Self {
        Self {
            pivot: Vec::new(),
            octaves: BTreeMap::new(),
            cosine: 0.0,
            ratio: 0.0,
            n_ratios: 0,
            dot: 0.0,
            reconstruction_square: 0.0,
            counts: vec![0; d_sae],
        }
    }

    /// Adds a batch.
    ///
    /// # Shapes
    /// `x` and `reconstruction`: `[n, d_in]`. Of a transcoder, `x` is what it is to reconstruct.
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
        if self.octaves.is_empty() {
            self.pivot = x[..d_in].to_vec();
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
        let product = |a: &[f32], b: &[f32]| {
            a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>()
        };
        let (x_square, dot) = (product(x, x), product(x, reconstruction));
        let reconstruction_square = product(reconstruction, reconstruction);
        let width = self.pivot.len();
        let sums = self.octaves.entry(octave(x_square.sqrt())).or_insert_with(|| Sums::zero(width));
        sums.n_rows += 1;
        for (dimension, (&x, &reconstruction)) in x.iter().zip(reconstruction).enumerate() {
            let (x, reconstruction) = (f64::from(x), f64::from(reconstruction));
            let from_pivot = x - f64::from(self.pivot[dimension]);
            sums.offset[dimension] += from_pivot;
            sums.spread[dimension] += from_pivot * from_pivot;
            sums.residual[dimension] += (x - reconstruction) * (x - reconstruction);
        }
        let norms = (x_square * reconstruction_square).sqrt();
        self.cosine += if norms == 0.0 { 0.0 } else { dot / norms };
        if x_square > 0.0 {
            self.ratio += (reconstruction_square / x_square).sqrt();
            self.n_ratios += 1;
        }
        self.dot += dot;
        self.reconstruction_square += reconstruction_square;
    }

    fn sums(&self, up_to: i32) -> Sums {
        let mut sums = Sums::zero(self.pivot.len());
        self.octaves.range(..=up_to).for_each(|(_, of_octave)| sums.add(of_octave));
        sums
    }

    /// The highest octave that is no outlier.
    fn ordinary(&self) -> i32 {
        let mut n_left = self.n_rows().div_ceil(2);
        let median = self.octaves.iter().find(|(_, sums)| {
            let found = n_left <= sums.n_rows;
            n_left = n_left.saturating_sub(sums.n_rows);
            found
        });
        // Beside zeros alone, everything else would be an outlier.
        let median = median.map(|(&octave, _)| octave).filter(|&octave| octave != i32::MIN);
        median.map_or(i32::MAX - 1, |median| median.saturating_add(OUTLIER_OCTAVES - 1))
    }

    /// Rows seen.
    pub fn n_rows(&self) -> usize {
        self.octaves.values().map(|sums| sums.n_rows).sum()
    }

    /// The mean of what is to be reconstructed.
    pub fn mean(&self) -> Vec<f64> {
        let (sums, n) = (self.sums(i32::MAX), self.n_rows() as f64);
        let pivot = self.pivot.iter().zip(sums.offset);
        pivot.map(|(&pivot, offset)| f64::from(pivot) + offset / n).collect()
    }

    /// `L0`: latents other than zero per row.
    pub fn l0(&self) -> f64 {
        self.counts.iter().sum::<u64>() as f64 / self.n_rows() as f64
    }

    /// `mean_i ‖xᵢ − x̂ᵢ‖²`: summed over the width.
    pub fn mse(&self) -> f64 {
        self.sums(i32::MAX).residual.iter().sum::<f64>() / self.n_rows() as f64
    }

    /// Fraction of variance unexplained, `Σᵢ ‖xᵢ − x̂ᵢ‖² / Σᵢ ‖xᵢ − x̄‖²`, with `x̄` the mean of all
    /// rows seen.
    ///
    /// One ratio of two sums over everything: neither an average of ratios per row (SAELens'
    /// `explained_variance_legacy`) nor one per dimension, which weigh rows or dimensions
    /// differently and give other numbers for the same SAE.
    pub fn fvu(&self) -> f64 {
        self.sums(i32::MAX).fvu()
    }

    /// The mean over dimensions of `Σᵢ (xᵢ − x̂ᵢ)² / Σᵢ (xᵢ − x̄)²`: every dimension counts the
    /// same, however little it varies. Those that do not vary at all are left out.
    pub fn fvu_per_dimension(&self) -> f64 {
        let sums = self.sums(i32::MAX);
        let ratios = sums.residual.iter().zip(sums.variances()).filter(|(_, v)| *v > 0.0);
        let (sum, n) = ratios.fold((0.0, 0), |(sum, n), (residual, v)| (sum + residual / v, n + 1));
        sum / f64::from(n)
    }

    /// [`fvu`](Self::fvu) without outliers, whose huge variance makes any SAE look good that gets
    /// them right: rows `x` with `‖x‖ ≥ 16 · 2ᵉ`, where `2ᵉ ≤ median ‖x‖ < 2ᵉ⁺¹`.
    pub fn fvu_without_outliers(&self) -> f64 {
        self.sums(self.ordinary()).fvu()
    }

    /// Rows that [`fvu_without_outliers`](Self::fvu_without_outliers) leaves out.
    pub fn n_outliers(&self) -> usize {
        self.n_rows() - self.sums(self.ordinary()).n_rows
    }

    /// `1 − fvu` (SAELens' `explained_variance`).
    pub fn explained_variance(&self) -> f64 {
        1.0 - self.fvu()
    }

    /// Mean cosine between `x` and its reconstruction; a row where either is zero counts as 0.
    pub fn cosine(&self) -> f64 {
        self.cosine / self.n_rows() as f64
    }

    /// Mean of `‖x̂‖ / ‖x‖`, over rows other than zero.
    pub fn l2_ratio(&self) -> f64 {
        self.ratio / self.n_ratios as f64
    }

    /// `Σ ‖x̂‖² / Σ ⟨x̂, x⟩`: what the reconstruction would have to be divided by to fit best;
    /// below 1 it shrinks (Rajamanoharan et al., 2024).
    pub fn relative_bias(&self) -> f64 {
        self.reconstruction_square / self.dot
    }

    /// The share of rows that each latent is active on.
    pub fn densities(&self) -> Vec<f64> {
        self.counts.iter().map(|&count| count as f64 / self.n_rows() as f64).collect()
    }

    /// Latents that were active on no row.
    pub fn n_dead(&self) -> usize {
        self.counts.iter().filter(|&&count| count == 0).count()
    }

    /// How many latents are how dense.
    pub fn density_histogram(&self) -> DensityHistogram {
        let mut n_latents = [0; DensityHistogram::N_BINS];
        for density in self.densities().into_iter().filter(|&density| density > 0.0) {
            let from_lowest = density.log10() - DensityHistogram::LOWEST;
            let bin = (from_lowest / DensityHistogram::BIN_WIDTH).max(0.0) as usize;
            n_latents[bin.min(DensityHistogram::N_BINS - 1)] += 1;
        }
        DensityHistogram { n_latents: n_latents.to_vec(), n_dead: self.n_dead() }
    }
}

/// How many latents are active on which share of the rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DensityHistogram {
    /// Latents by `log₁₀` of their density, in bins [`BIN_WIDTH`](Self::BIN_WIDTH) wide from
    /// [`LOWEST`](Self::LOWEST) to 0; what is below is in the first.
    pub n_latents: Vec<usize>,
    /// Latents that were never active, and are in no bin.
    pub n_dead: usize,
}

impl DensityHistogram {
    /// `log₁₀` of the density where the first bin begins.
    pub const LOWEST: f64 = -7.0;
    /// Decades that a bin is wide.
    pub const BIN_WIDTH: f64 = 0.25;
    /// Bins up to density 1.
    pub const N_BINS: usize = 28;
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
        assert_eq!(metrics.mean(), [0.0, 1.0]);
        // (1 + .25) / 2 and 0 / 2.
        assert_eq!(metrics.fvu_per_dimension(), 0.3125);
        // 0, 1 and √1.25 / √2.
        let expected = (1.0 + 0.625f64.sqrt()) / 3.0;
        assert!((metrics.l2_ratio() - expected).abs() < 1e-12);
        // 0 + 4 + 1.25 over 0 + 4 + 1.5.
        assert_eq!(metrics.relative_bias(), 5.25 / 5.5);
        // Two at log₁₀ ⅔ = −0.18, in the last bin.
        let histogram = metrics.density_histogram();
        assert_eq!((histogram.n_latents[27], histogram.n_dead), (2, 1));
        assert_eq!(histogram.n_latents.iter().sum::<usize>(), 2);
    }

    fn of_one_dimension(x: &[f32], reconstruction: &[f32]) -> Reconstruction {
        let device = Device::flex();
        let mut metrics = Reconstruction::new(1);
        for (&x, &reconstruction) in x.iter().zip(reconstruction) {
            let latents = SparseLatents::new(
                Tensor::from_data([[0]], &device),
                Tensor::from_data([[1.0]], &device),
                1,
            );
            let row = |value: f32| Tensor::from_data([[value]], &device);
            metrics.update(row(x), row(reconstruction), &latents);
        }
        metrics
    }

    #[test]
    fn outliers_are_left_out_by_their_norm() {
        // The median is 3, in the octave of 2: 32 is an outlier, 31 is none.
        let metrics = of_one_dimension(&[1.0, 3.0, 5.0, 3.0, -32.0], &[2.0, 3.0, 5.0, 3.0, -32.0]);
        assert_eq!((metrics.n_outliers(), metrics.fvu_without_outliers()), (1, 1.0 / 8.0));
        // 1068 about zero, less 20² / 5.
        assert!((metrics.fvu() - 1.0 / 988.0).abs() < 1e-12);
        let metrics = of_one_dimension(&[1.0, 3.0, 31.0], &[1.0, 3.0, 31.0]);
        assert_eq!((metrics.n_outliers(), metrics.fvu_without_outliers()), (0, 0.0));
        let zeros = of_one_dimension(&[0.0, 0.0, 1.0], &[0.0, 0.0, 0.0]);
        assert_eq!(zeros.n_outliers(), 0);
        assert!((zeros.fvu_without_outliers() - 1.5).abs() < 1e-12);
    }

    #[test]
    fn a_dimension_that_does_not_vary_has_no_share() {
        let metrics = of_one_dimension(&[2.0, 2.0], &[1.0, 1.0]);
        assert!(metrics.fvu_per_dimension().is_nan());
        assert_eq!((metrics.l2_ratio(), metrics.relative_bias()), (0.5, 0.5));
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
