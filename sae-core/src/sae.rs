//! The sparse autoencoder.

use burn::tensor::{Int, Tensor};
use kernels::{sparse_decode, top_k_encode};

use crate::activation::Activation;
use crate::config::{ConfigError, SaeConfig, SaeMetadata};
use crate::latents::SparseLatents;

/// Norms below this count as this, so that a latent that writes nothing does not divide by zero.
const LEAST_NORM: f64 = 1e-8;

/// A sparse autoencoder of TopK kind.
///
/// ```text
/// pre    = (x − b_dec) · w_enc + b_enc
/// z      = relu(pre) at the k largest of pre ⊙ norms, times norms there
/// decode = (z / norms) · w_dec + b_dec
/// ```
///
/// with `norms = ‖w_dec[i]‖`, or 1 when the activation does not rescale. Differentiable in `x`.
#[derive(Debug, Clone)]
pub struct Sae {
    config: SaeConfig,
    weights: SaeWeights,
    decoder_norms: Tensor<1>,
}

/// The tensors of an SAE.
#[derive(Debug, Clone)]
pub struct SaeWeights {
    /// Encoder, `[d_in, d_sae]`.
    pub w_enc: Tensor<2>,
    /// Encoder bias, `[d_sae]`.
    pub b_enc: Tensor<1>,
    /// Decoder, `[d_sae, d_in]`: row `i` is what latent `i` writes.
    pub w_dec: Tensor<2>,
    /// Decoder bias, `[d_in]`.
    pub b_dec: Tensor<1>,
}

/// `x = reconstruction + error`, and the latents that reconstruct.
#[derive(Debug, Clone)]
pub struct Decomposition {
    /// The latents of `x`.
    pub latents: SparseLatents,
    /// What they decode to, `[n, d_in]`.
    pub reconstruction: Tensor<2>,
    /// What they leave out, `x − reconstruction`, `[n, d_in]`.
    pub error: Tensor<2>,
}

/// Why an SAE cannot be made, or not used as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SaeError {
    /// The configuration describes no SAE.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The SAE is for activations of another width.
    #[error("the SAE works on width {expected}, the model has {actual}")]
    Width {
        /// `d_in` of the SAE.
        expected: usize,
        /// `d_model` of the model.
        actual: usize,
    },
    /// The latents are ranked without their decoder norms: folding those in would change which
    /// ones are kept.
    #[error("decoder norms cannot be folded: the SAE ranks its latents without them")]
    RanksWithoutNorms,
}

impl Sae {
    /// From a configuration and weights that fit it.
    ///
    /// # Errors
    /// If the configuration describes no SAE.
    ///
    /// # Panics
    /// If a weight does not have the shape that the configuration says.
    pub fn new(config: SaeConfig, weights: SaeWeights) -> Result<Self, SaeError> {
        config.validate()?;
        let SaeConfig { d_in, d_sae, .. } = config;
        assert_eq!(weights.w_enc.dims(), [d_in, d_sae], "w_enc does not fit");
        assert_eq!(weights.b_enc.dims(), [d_sae], "b_enc does not fit");
        assert_eq!(weights.w_dec.dims(), [d_sae, d_in], "w_dec does not fit");
        assert_eq!(weights.b_dec.dims(), [d_in], "b_dec does not fit");
        let decoder_norms = row_norms(weights.w_dec.clone());
        Ok(Self { config, weights, decoder_norms })
    }

    /// What this SAE is.
    pub fn config(&self) -> &SaeConfig {
        &self.config
    }

    /// Its weights.
    pub fn weights(&self) -> &SaeWeights {
        &self.weights
    }

    /// `‖w_dec[i]‖`, `[d_sae]`; at least 1e-8.
    pub fn decoder_norms(&self) -> Tensor<1> {
        self.decoder_norms.clone()
    }

    /// The same SAE, said to come from elsewhere.
    pub fn with_metadata(mut self, metadata: SaeMetadata) -> Self {
        self.config.metadata = metadata;
        self
    }

    /// Checks that the SAE is for a model of this width.
    ///
    /// # Errors
    /// If it is not.
    pub fn check_fits(&self, d_model: usize) -> Result<(), SaeError> {
        match self.config.d_in {
            d_in if d_in == d_model => Ok(()),
            expected => Err(SaeError::Width { expected, actual: d_model }),
        }
    }

    /// The latents of activations.
    ///
    /// # Shapes
    /// `x`: `[n, d_in]`; latents: `[n, k]`.
    ///
    /// # Panics
    /// If `x` is not `d_in` wide.
    pub fn encode(&self, x: Tensor<2>) -> SparseLatents {
        let SaeConfig { d_sae, activation: Activation::TopK { k, .. }, .. } = self.config;
        let SaeWeights { w_enc, b_enc, b_dec, .. } = self.weights.clone();
        let x = match self.config.apply_b_dec_to_input {
            true => x - b_dec.unsqueeze(),
            false => x,
        };
        let scale = self.scale();
        let ranking = scale.clone().unwrap_or_else(|| b_enc.ones_like());
        let (values, indices) = top_k_encode(x, w_enc, b_enc, ranking, k);
        let values = match scale {
            Some(scale) => values * at(scale, &indices),
            None => values,
        };
        SparseLatents::new(indices, values, d_sae)
    }

    /// What latents write.
    ///
    /// # Shapes
    /// `[n, d_in]`.
    ///
    /// # Panics
    /// If the latents are of another SAE's number.
    pub fn decode(&self, latents: &SparseLatents) -> Tensor<2> {
        assert_eq!(latents.d_sae, self.config.d_sae, "latents of another SAE");
        let SparseLatents { indices, values, .. } = latents.clone();
        let values = match self.scale() {
            Some(scale) => values / at(scale, &indices),
            None => values,
        };
        let SaeWeights { w_dec, b_dec, .. } = self.weights.clone();
        sparse_decode(indices, values, w_dec) + b_dec.unsqueeze()
    }

    /// What one unit of each latent writes: the decoder rows, over their norms where latents are
    /// measured in those.
    ///
    /// # Shapes
    /// `[d_sae, d_in]`.
    pub fn directions(&self) -> Tensor<2> {
        let w_dec = self.weights.w_dec.clone();
        match self.scale() {
            Some(scale) => w_dec / scale.unsqueeze_dim(1),
            None => w_dec,
        }
    }

    /// Splits activations into what the SAE explains and what it does not.
    ///
    /// # Shapes
    /// `x`: `[n, d_in]`.
    ///
    /// # Panics
    /// If `x` is not `d_in` wide.
    pub fn decompose(&self, x: Tensor<2>) -> Decomposition {
        let latents = self.encode(x.clone());
        let reconstruction = self.decode(&latents);
        let error = x - reconstruction.clone();
        Decomposition { latents, reconstruction, error }
    }

    /// The same function with decoder rows of norm 1, so that no norms are needed any more
    /// (SAELens' `fold_W_dec_norm`).
    ///
    /// # Errors
    /// If the SAE ranks its latents without their norms.
    pub fn fold_decoder_norms(self) -> Result<Self, SaeError> {
        let Self { mut config, weights, decoder_norms: norms } = self;
        let Activation::TopK { rescale_by_decoder_norm, .. } = &mut config.activation;
        if !*rescale_by_decoder_norm {
            return Err(SaeError::RanksWithoutNorms);
        }
        *rescale_by_decoder_norm = false;
        let SaeWeights { w_enc, b_enc, w_dec, b_dec } = weights;
        let weights = SaeWeights {
            w_enc: w_enc * norms.clone().unsqueeze(),
            b_enc: b_enc * norms.clone(),
            w_dec: w_dec / norms.unsqueeze_dim(1),
            b_dec,
        };
        Self::new(config, weights)
    }

    /// The SAE on `x` that does what this one does on `scale · x`, reconstructing `x` itself.
    ///
    /// The latents keep their values unless the activation rescales by decoder norms, which
    /// shrink by `scale`.
    ///
    /// # Panics
    /// If `scale` is not a positive number.
    pub fn fold_input_scale(self, scale: f64) -> Self {
        assert!(scale.is_finite() && scale > 0.0, "input scale {scale}");
        let SaeWeights { w_enc, b_enc, w_dec, b_dec } = self.weights;
        let weights = SaeWeights {
            w_enc: w_enc.mul_scalar(scale),
            b_enc,
            w_dec: w_dec.div_scalar(scale),
            b_dec: b_dec.div_scalar(scale),
        };
        let decoder_norms = row_norms(weights.w_dec.clone());
        Self { config: self.config, weights, decoder_norms }
    }

    /// The norms that latents are measured in, if they are.
    fn scale(&self) -> Option<Tensor<1>> {
        let Activation::TopK { rescale_by_decoder_norm, .. } = self.config.activation;
        rescale_by_decoder_norm.then(|| self.decoder_norms())
    }
}

/// `‖rows[i]‖`, at least [`LEAST_NORM`].
pub(crate) fn row_norms(rows: Tensor<2>) -> Tensor<1> {
    rows.square().sum_dim(1).sqrt().clamp_min(LEAST_NORM).squeeze_dim(1)
}

/// `scale[indices]`.
fn at(scale: Tensor<1>, indices: &Tensor<2, Int>) -> Tensor<2> {
    scale.select(0, indices.clone().flatten(0, 1)).reshape(indices.dims())
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};
    use proptest::prelude::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// Two inputs, three latents: latent 0 reads x₀ and writes (2, 0), latent 1 reads x₁ and
    /// writes (0, 1), latent 2 reads both and writes (0.3, 0.4).
    fn example(k: usize, rescale_by_decoder_norm: bool) -> Sae {
        let device = Device::flex();
        let weights = SaeWeights {
            w_enc: Tensor::from_data([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], &device),
            b_enc: Tensor::from_data([0.0, 0.5, 0.0], &device),
            w_dec: Tensor::from_data([[2.0, 0.0], [0.0, 1.0], [0.3, 0.4]], &device),
            b_dec: Tensor::from_data([1.0, 1.0], &device),
        };
        let activation = Activation::TopK { k, rescale_by_decoder_norm };
        Sae::new(SaeConfig::new(2, 3, activation), weights).expect("valid")
    }

    fn x() -> Tensor<2> {
        Tensor::from_data([[2.0, 3.0], [0.0, 1.25]], &Device::flex())
    }

    fn assert_close<const D: usize>(actual: Tensor<D>, expected: impl Into<TensorData>) {
        let tolerance = burn::tensor::Tolerance::<f32>::absolute(1e-6);
        actual.into_data().assert_approx_eq(&expected.into(), tolerance);
    }

    #[test]
    fn plain_top_k_by_hand() {
        // x − b_dec = (1, 2), (−1, .25); pre = (1, 2.5, 3), (−1, .75, −.75).
        let sae = example(2, false);
        let latents = sae.encode(x());
        assert_close(latents.to_dense(), [[0.0f32, 2.5, 3.0], [0.0, 0.75, 0.0]]);
        assert_close(sae.decode(&latents), [[1.9f32, 4.7], [1.0, 1.75]]);
    }

    #[test]
    fn rescaled_top_k_by_hand() {
        // pre ⊙ (2, 1, .5) = (2, 2.5, 1.5), (−2, .75, −.375).
        let sae = example(2, true);
        let latents = sae.encode(x());
        assert_close(latents.to_dense(), [[2.0f32, 2.5, 0.0], [0.0, 0.75, 0.0]]);
        assert_close(sae.decode(&latents), [[3.0f32, 3.5], [1.0, 1.75]]);
    }

    #[test]
    fn parts_add_up() {
        let parts = example(1, true).decompose(x());
        assert_close(parts.reconstruction + parts.error, x().into_data());
    }

    #[test]
    fn folding_changes_no_latent_and_no_reconstruction() {
        let sae = example(2, true);
        let folded = sae.clone().fold_decoder_norms().expect("ranks by norms");
        assert_close(folded.decoder_norms(), [1.0f32, 1.0, 1.0]);
        let (before, after) = (sae.decompose(x()), folded.decompose(x()));
        assert_close(after.latents.to_dense(), before.latents.to_dense().into_data());
        assert_close(after.reconstruction, before.reconstruction.into_data());
        let error = example(2, false).fold_decoder_norms().unwrap_err();
        assert_eq!(error, SaeError::RanksWithoutNorms);
    }

    #[test]
    fn a_folded_input_scale_takes_raw_activations() {
        let sae = example(2, false);
        let scaled = sae.decompose(x().mul_scalar(4.0));
        let raw = sae.fold_input_scale(4.0).decompose(x());
        assert_close(raw.latents.to_dense(), scaled.latents.to_dense().into_data());
        assert_close(raw.reconstruction.mul_scalar(4.0), scaled.reconstruction.into_data());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn sparse_is_dense(
            (n, d_in, d_sae, k) in (1..20usize, 1..20usize, 1..40usize)
                .prop_flat_map(|(n, d_in, d_sae)| (Just(n), Just(d_in), Just(d_sae), 1..=d_sae)),
            rescale_by_decoder_norm: bool,
            apply_b_dec_to_input: bool,
            seed: u64,
        ) {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            let weights = SaeWeights {
                w_enc: noise([d_in, d_sae], &mut random),
                b_enc: noise([d_sae], &mut random),
                w_dec: noise([d_sae, d_in], &mut random),
                b_dec: noise([d_in], &mut random),
            };
            let x = noise([n, d_in], &mut random);
            let activation = Activation::TopK { k, rescale_by_decoder_norm };
            let config = SaeConfig {
                apply_b_dec_to_input,
                ..SaeConfig::new(d_in, d_sae, activation)
            };
            let dense = dense(&config, &weights, x.clone());
            let sae = Sae::new(config, weights).expect("valid");
            let latents = sae.encode(x);
            let tolerance = burn::tensor::Tolerance::<f32>::rel_abs(1e-4, 1e-4);
            latents.to_dense().into_data().assert_approx_eq(&dense.0.into_data(), tolerance);
            let decoded = sae.decode(&latents);
            decoded.into_data().assert_approx_eq(&dense.1.into_data(), tolerance);
        }
    }

    fn noise<const D: usize>(shape: [usize; D], random: &mut ChaCha8Rng) -> Tensor<D> {
        let n = shape.iter().product();
        let values: Vec<f32> = (0..n).map(|_| random.random_range(-1.0..1.0)).collect();
        Tensor::from_data(TensorData::new(values, shape), &Device::flex())
    }

    /// Latents and reconstruction by the equations, all of `[n, d_sae]` written out.
    fn dense(config: &SaeConfig, weights: &SaeWeights, x: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        let SaeWeights { w_enc, b_enc, w_dec, b_dec } = weights.clone();
        let Activation::TopK { k, rescale_by_decoder_norm } = config.activation;
        let norms = match rescale_by_decoder_norm {
            true => w_dec.clone().square().sum_dim(1).sqrt().transpose(),
            false => Tensor::ones([1, config.d_sae], &x.device()),
        };
        let centre = match config.apply_b_dec_to_input {
            true => b_dec.clone(),
            false => b_dec.zeros_like(),
        };
        let pre = (x - centre.unsqueeze()).matmul(w_enc) + b_enc.unsqueeze();
        let pre = pre * norms.clone();
        let threshold = pre.clone().sort_descending(1).narrow(1, k - 1, 1);
        let below = pre.clone().lower(threshold.expand(pre.dims()));
        let latents = pre.mask_fill(below, 0.0).clamp_min(0.0);
        let decoded = (latents.clone() / norms).matmul(w_dec) + b_dec.unsqueeze();
        (latents, decoded)
    }

    #[test]
    fn only_its_own_width_fits() {
        let sae = example(1, false);
        assert_eq!(sae.check_fits(2), Ok(()));
        assert_eq!(sae.check_fits(3), Err(SaeError::Width { expected: 2, actual: 3 }));
    }

    #[test]
    fn gradients_flow_to_the_input_through_the_kept_latents() {
        let sae = example(1, false);
        let x = x().autodiff().require_grad();
        // Row 0 keeps latent 2: d(0.7 · pre₂) = (.7, .7). Row 1 keeps latent 1: d(pre₁) = (0, 1).
        let grads = sae.decode(&sae.encode(x.clone())).sum().backward();
        assert_close(x.grad(&grads).expect("in the graph"), [[0.7f32, 0.7], [0.0, 1.0]]);
    }
}
