//! What is trained, and its gradient.

use burn::tensor::{Gradients, Tensor};
use kernels::{Select, sparse_decode, sparse_encode};

use crate::latents::SparseLatents;
use crate::loss::mse;
use crate::sae::{SaeWeights, row_norms};

/// The weights of an SAE in training, or anything of their shape: gradients, moments.
///
/// Both matrices are latent-major: a sparse gradient touches whole rows of either, and the
/// optimiser walks through both in the order they lie in.
#[derive(Debug, Clone)]
pub struct Parameters {
    /// Encoder, transposed: `[d_sae, d_in]`.
    pub w_enc: Tensor<2>,
    /// Encoder bias, `[d_sae]`.
    pub b_enc: Tensor<1>,
    /// Decoder, `[d_sae, d_in]`.
    pub w_dec: Tensor<2>,
    /// Decoder bias, `[d_in]`.
    pub b_dec: Tensor<1>,
}

/// The loss on a batch, how it came about, and where it falls.
#[derive(Debug, Clone)]
pub struct Differentiated {
    /// `mean ‖x̂ − x‖²`.
    pub loss: f64,
    /// The gradient of the loss.
    pub gradient: Parameters,
    /// The latents, not rescaled by their decoder norms.
    pub latents: SparseLatents,
}

impl Parameters {
    /// The trained copy of an SAE's weights.
    pub fn from_weights(weights: SaeWeights) -> Self {
        let SaeWeights { w_enc, b_enc, w_dec, b_dec, .. } = weights;
        // A transposed view would make every step gather columns.
        let [d_in, d_sae] = w_enc.dims();
        let w_enc = (w_enc.transpose() + 0.0).reshape([d_sae, d_in]);
        Self { w_enc, b_enc, w_dec, b_dec }
    }

    /// The weights as an SAE takes them.
    pub fn to_weights(&self) -> SaeWeights {
        let Self { w_enc, b_enc, w_dec, b_dec } = self.clone();
        SaeWeights::new(w_enc.transpose(), b_enc, w_dec, b_dec)
    }

    /// Zeros of the same shapes.
    pub fn zeros_like(&self) -> Self {
        Self {
            w_enc: self.w_enc.zeros_like(),
            b_enc: self.b_enc.zeros_like(),
            w_dec: self.w_dec.zeros_like(),
            b_dec: self.b_dec.zeros_like(),
        }
    }

    /// Reconstructs a batch and differentiates the loss.
    ///
    /// The decoder norms rank the latents and scale them between encoder and decoder; there they
    /// cancel, values and gradients, so they appear in the ranking alone.
    ///
    /// # Shapes
    /// `x`: `[n, d_in]`.
    pub fn differentiate(&self, x: Tensor<2>, k: usize) -> Differentiated {
        let leaves = self.leaves();
        let Self { w_enc, b_enc, w_dec, b_dec } = leaves.clone();
        let [d_sae, _] = w_dec.dims();
        let centred = x.clone() - b_dec.clone().unsqueeze();
        let norms = row_norms(self.w_dec.clone());
        let (values, indices) =
            sparse_encode(centred, w_enc.transpose(), b_enc, norms, Select::TopK(k));
        let decoded = sparse_decode(indices.clone(), values.clone(), w_dec);
        let loss = mse(decoded + b_dec.unsqueeze(), x);
        Differentiated {
            loss: f64::from(loss.clone().into_scalar::<f32>()),
            gradient: leaves.gradient(&loss.backward()),
            latents: SparseLatents::new(indices, values, d_sae).detached(),
        }
    }

    fn leaves(&self) -> Self {
        let Self { w_enc, b_enc, w_dec, b_dec } = self.clone();
        Self {
            w_enc: w_enc.autodiff().require_grad(),
            b_enc: b_enc.autodiff().require_grad(),
            w_dec: w_dec.autodiff().require_grad(),
            b_dec: b_dec.autodiff().require_grad(),
        }
    }

    fn gradient(&self, gradients: &Gradients) -> Self {
        fn of<const D: usize>(leaf: &Tensor<D>, gradients: &Gradients) -> Tensor<D> {
            leaf.grad(gradients).expect("every parameter is in the graph")
        }
        Self {
            w_enc: of(&self.w_enc, gradients),
            b_enc: of(&self.b_enc, gradients),
            w_dec: of(&self.w_dec, gradients),
            b_dec: of(&self.b_dec, gradients),
        }
    }

    /// `√Σ p²` over all of them.
    pub fn norm(&self) -> f64 {
        fn square<const D: usize>(x: &Tensor<D>) -> f64 {
            f64::from(x.clone().square().sum().into_scalar::<f32>())
        }
        let Self { w_enc, b_enc, w_dec, b_dec } = self;
        (square(w_enc) + square(b_enc) + square(w_dec) + square(b_dec)).sqrt()
    }

    /// Whether all of them are numbers. One that is not shows in the sum, which takes no memory.
    pub(super) fn is_finite(&self) -> bool {
        fn sum<const D: usize>(x: &Tensor<D>) -> f32 {
            x.clone().sum().into_scalar()
        }
        let Self { w_enc, b_enc, w_dec, b_dec } = self;
        [sum(w_enc), sum(b_enc), sum(w_dec), sum(b_dec)].into_iter().all(f32::is_finite)
    }

    /// All of them times `factor`.
    pub fn scaled(self, factor: f64) -> Self {
        Self {
            w_enc: self.w_enc.mul_scalar(factor),
            b_enc: self.b_enc.mul_scalar(factor),
            w_dec: self.w_dec.mul_scalar(factor),
            b_dec: self.b_dec.mul_scalar(factor),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    const N: usize = 5;
    const D_IN: usize = 4;
    const D_SAE: usize = 7;
    const K: usize = 2;
    /// Where each parameter begins in the flat list, and where the last one ends.
    const STARTS: [usize; 5] = [0, 28, 35, 63, 67];

    fn parameters(flat: &[f32]) -> Parameters {
        let part = |i: usize| &flat[STARTS[i]..STARTS[i + 1]];
        Parameters {
            w_enc: tensor(part(0), [D_SAE, D_IN]),
            b_enc: tensor(part(1), [D_SAE]),
            w_dec: tensor(part(2), [D_SAE, D_IN]),
            b_dec: tensor(part(3), [D_IN]),
        }
    }

    fn tensor<const D: usize>(values: &[f32], shape: [usize; D]) -> Tensor<D> {
        Tensor::from_data(TensorData::new(values.to_vec(), shape), &Device::flex())
    }

    fn flat(p: &Parameters) -> Vec<f32> {
        let all = [p.w_enc.to_data(), p.b_enc.to_data(), p.w_dec.to_data(), p.b_dec.to_data()];
        all.map(|data| data.iter::<f32>().collect::<Vec<_>>()).concat()
    }

    /// In each parameter alone the loss is a parabola, as long as the same latents are active: a
    /// central difference is exact there.
    #[test]
    fn the_gradient_is_that_of_finite_differences() {
        const STEP: f32 = 0.01;
        let mut random = ChaCha8Rng::seed_from_u64(3);
        let mut noise = |n: usize| (0..n).map(|_| random.random_range(-1.0..1.0)).collect();
        let (at, x): (Vec<f32>, Vec<f32>) = (noise(STARTS[4]), noise(N * D_IN));
        let moved = |index: usize, by: f32| {
            let mut at = at.clone();
            at[index] += by;
            parameters(&at).differentiate(tensor(&x, [N, D_IN]), K)
        };
        let active = |of: &Differentiated| -> Vec<_> {
            of.latents.entries().map(|entry| (entry.row, entry.latent_idx)).collect()
        };
        let gradient = flat(&moved(0, 0.0).gradient);
        let mut n_checked = 0;
        for (index, gradient) in gradient.into_iter().enumerate() {
            let (above, below) = (moved(index, STEP), moved(index, -STEP));
            if active(&above) != active(&below) {
                continue;
            }
            let difference = (above.loss - below.loss) / f64::from(2.0 * STEP);
            let off = (difference - f64::from(gradient)).abs();
            assert!(off < 2e-4 * (1.0 + difference.abs()), "{index}: {gradient} for {difference}");
            n_checked += 1;
        }
        assert!(n_checked > 50, "only {n_checked} of 67 were checked");
    }

    #[test]
    fn weights_go_there_and_back() {
        let at: Vec<f32> = (0..STARTS[4]).map(|i| i as f32).collect();
        let parameters = parameters(&at);
        let weights = parameters.to_weights();
        assert_eq!(weights.w_enc.dims(), [D_IN, D_SAE]);
        assert_eq!(flat(&Parameters::from_weights(weights)), at);
    }

    #[test]
    fn the_norm_is_over_everything() {
        let at: Vec<f32> = (0..STARTS[4]).map(|i| f32::from(i % 2 == 0)).collect();
        assert_eq!(parameters(&at).norm(), 34f64.sqrt());
        assert_eq!(parameters(&at).scaled(2.0).norm(), 136f64.sqrt());
    }

    #[test]
    fn one_that_is_no_number_is_seen_anywhere() {
        assert!(parameters(&[1.0; STARTS[4]]).is_finite());
        for (i, value) in (0..STARTS[4]).zip([f32::NAN, f32::INFINITY].into_iter().cycle()) {
            let mut at = [1.0; STARTS[4]];
            at[i] = value;
            assert!(!parameters(&at).is_finite(), "{i}");
        }
    }
}
