//! The sparse autoencoder.

mod encode;
mod fold;
#[cfg(test)]
mod kinds;
mod pursuit;

use burn::tensor::{Int, Tensor};
use kernels::{sparse_decode, sparse_dot, sparse_gather};

use crate::activation::Activation;
use crate::config::{ConfigError, SaeConfig, SaeMetadata};
use crate::latents::SparseLatents;
use crate::normalization::RowScale;

/// Norms below this count as this, so that a latent that writes nothing does not divide by zero.
const LEAST_NORM: f64 = 1e-8;

/// A sparse autoencoder, or a transcoder.
///
/// ```text
/// pre    = (x − b_dec) · w_enc + b_enc
/// z      = activation(pre)
/// decode = z · w_dec + b_dec (+ w_skip · x)
/// ```
///
/// An autoencoder sees `x` normalised ([`Normalization`](crate::Normalization)), and what it decodes
/// is brought back. A transcoder's output is another activation, which that would not fit: it is
/// left as it is decoded, and `w_skip` reads `x` as it came, as SAELens has it.
///
/// [`Activation`] says what becomes of `pre`. Where it rescales by decoder norms, `z` is measured in
/// those: pre-activations are multiplied by `‖w_dec[i]‖` before the selection, latents divided by
/// it again before decoding. Differentiable in `x`.
#[derive(Debug, Clone)]
pub struct Sae {
    config: SaeConfig,
    weights: SaeWeights,
    decoder_norms: Tensor<1>,
}

/// The tensors of an SAE.
#[derive(Debug, Clone)]
pub struct SaeWeights {
    /// Encoder, `[d_in, d_sae]`. Of a matching pursuit, the decoder transposed
    /// ([`tied`](Self::tied)).
    pub w_enc: Tensor<2>,
    /// Encoder bias, `[d_sae]`: that of the gate where there is one. A matching pursuit has none, and
    /// does not look at it.
    pub b_enc: Tensor<1>,
    /// Decoder, `[d_sae, d_out]`: row `i` is what latent `i` writes.
    pub w_dec: Tensor<2>,
    /// Decoder bias, `[d_out]`.
    pub b_dec: Tensor<1>,
    /// What latents have to exceed, `[d_sae]`: with [`Activation::JumpRelu`] and only there.
    pub threshold: Option<Tensor<1>>,
    /// Sizes of latents whose gate is open: with [`Activation::Gated`] and only there.
    pub magnitude: Option<Magnitude>,
    /// What a transcoder adds of its input, `[d_out, d_in]`.
    pub w_skip: Option<Tensor<2>>,
}

/// How a gated SAE sizes its latents.
#[derive(Debug, Clone)]
pub struct Magnitude {
    /// Logarithm of the scale of the encoder's columns, `[d_sae]`.
    pub r_mag: Tensor<1>,
    /// Bias, `[d_sae]`.
    pub b_mag: Tensor<1>,
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

impl SaeWeights {
    /// Encoder and decoder, and nothing else.
    ///
    /// # Shapes
    /// `w_enc`: `[d_in, d_sae]`, `b_enc`: `[d_sae]`, `w_dec`: `[d_sae, d_out]`, `b_dec`: `[d_out]`.
    pub fn new(w_enc: Tensor<2>, b_enc: Tensor<1>, w_dec: Tensor<2>, b_dec: Tensor<1>) -> Self {
        Self { w_enc, b_enc, w_dec, b_dec, threshold: None, magnitude: None, w_skip: None }
    }

    /// Those of a matching pursuit, whose encoder is its decoder. The encoder, which only ranks, is in
    /// no graph.
    ///
    /// # Shapes
    /// `w_dec`: `[d_sae, d_in]`, `b_dec`: `[d_in]`.
    pub fn tied(w_dec: Tensor<2>, b_dec: Tensor<1>) -> Self {
        let device = w_dec.device();
        let b_enc = Tensor::zeros([w_dec.dims()[0]], &device);
        // Laid out once: a kernel that met a view of the decoder would lay it out at each pick.
        let w_enc = Tensor::from_data(w_dec.clone().transpose().into_data(), &device);
        Self::new(w_enc, b_enc, w_dec, b_dec)
    }

    /// # Panics
    /// If a tensor has another shape than the configuration says, is missing or has no use.
    fn assert_fit(&self, config: &SaeConfig) {
        let SaeConfig { d_in, d_sae, activation, .. } = *config;
        let d_out = config.d_out();
        assert_eq!(self.w_enc.dims(), [d_in, d_sae], "w_enc does not fit");
        assert_eq!(self.b_enc.dims(), [d_sae], "b_enc does not fit");
        assert_eq!(self.w_dec.dims(), [d_sae, d_out], "w_dec does not fit");
        assert_eq!(self.b_dec.dims(), [d_out], "b_dec does not fit");
        let threshold = self.threshold.as_ref().map(Tensor::dims);
        let expected = (activation == Activation::JumpRelu).then_some([d_sae]);
        assert_eq!(threshold, expected, "threshold does not fit");
        let magnitude = self.magnitude.as_ref().map(|m| [m.r_mag.dims(), m.b_mag.dims()]);
        let expected = (activation == Activation::Gated).then_some([[d_sae]; 2]);
        assert_eq!(magnitude, expected, "r_mag and b_mag do not fit");
        if let Some(w_skip) = &self.w_skip {
            assert!(config.transcodes_to.is_some(), "only transcoders skip");
            assert_eq!(w_skip.dims(), [d_out, d_in], "w_skip does not fit");
        }
    }
}

impl Sae {
    /// From a configuration and weights that fit it.
    ///
    /// # Errors
    /// If the configuration describes no SAE.
    ///
    /// # Panics
    /// If a weight does not have the shape that the configuration says, or is missing.
    pub fn new(config: SaeConfig, weights: SaeWeights) -> Result<Self, SaeError> {
        config.validate()?;
        weights.assert_fit(&config);
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
    /// `x`: `[n, d_in]`; latents: `[n, k]`, with `k` as the activation has it, or else the largest
    /// number of latents that are active on a row.
    ///
    /// # Panics
    /// If `x` is not `d_in` wide.
    pub fn encode(&self, x: Tensor<2>) -> SparseLatents {
        let (x, _) = self.config.normalization.normalize(x);
        self.encode_normalized(x)
    }

    /// What latents write, for the activations that they were encoded from: these say what the
    /// normalisation has to put back, and what a transcoder skips.
    ///
    /// # Shapes
    /// `x`: `[n, d_in]`; result: `[n, d_out]`.
    ///
    /// # Panics
    /// If the latents are of another SAE's number or rows.
    pub fn decode_for(&self, latents: &SparseLatents, x: Tensor<2>) -> Tensor<2> {
        let (_, scale) = self.config.normalization.normalize(x.clone());
        self.finish_decoding(self.decode_normalized(latents), x, scale)
    }

    /// What latents write.
    ///
    /// # Shapes
    /// `[n, d_out]`.
    ///
    /// # Panics
    /// If the latents are of another SAE's number, or what they write depends on the activation
    /// that they were encoded from (see [`decode_for`](Self::decode_for)).
    pub fn decode(&self, latents: &SparseLatents) -> Tensor<2> {
        assert!(
            !self.undoes_normalization() && self.weights.w_skip.is_none(),
            "what these latents write depends on the input: use decode_for"
        );
        self.decode_normalized(latents)
    }

    /// What one unit of each latent writes: the decoder rows, over their norms where latents are
    /// measured in those.
    ///
    /// # Shapes
    /// `[d_sae, d_in]`.
    ///
    /// # Panics
    /// If that depends on the activation, because each is normalised by itself; or this is a
    /// transcoder: it does not write where it reads, and who takes its rows from
    /// [`weights`](Self::weights) has to know where that is.
    pub fn directions(&self) -> Tensor<2> {
        assert!(self.config.transcodes_to.is_none(), "a transcoder writes at another point");
        assert!(
            !self.config.normalization.is_by_row(),
            "what a unit of a latent writes depends on the norm of the activation"
        );
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
    /// If `x` is not `d_in` wide, or this is a transcoder: it explains another activation.
    pub fn decompose(&self, x: Tensor<2>) -> Decomposition {
        assert!(self.config.transcodes_to.is_none(), "a transcoder does not decompose its input");
        let (latents, reconstruction) = self.run(x.clone());
        let error = x - reconstruction.clone();
        Decomposition { latents, reconstruction, error }
    }

    /// The latents of activations, and what they decode to.
    ///
    /// # Shapes
    /// `x`: `[n, d_in]`; the second result: `[n, d_out]`.
    ///
    /// # Panics
    /// If `x` is not `d_in` wide.
    pub fn run(&self, x: Tensor<2>) -> (SparseLatents, Tensor<2>) {
        let (normalized, scale) = self.config.normalization.normalize(x.clone());
        let latents = self.encode_normalized(normalized);
        let decoded = self.decode_normalized(&latents);
        (latents, self.finish_decoding(decoded, x, scale))
    }

    /// Whether what is decoded depends on the norm of the input.
    fn undoes_normalization(&self) -> bool {
        self.config.normalization.is_by_row() && self.config.transcodes_to.is_none()
    }

    fn decode_normalized(&self, latents: &SparseLatents) -> Tensor<2> {
        assert_eq!(latents.d_sae, self.config.d_sae, "latents of another SAE");
        let SparseLatents { indices, values, .. } = latents.clone();
        let values = match self.scale() {
            Some(scale) => values / sparse_gather(indices.clone(), scale),
            None => values,
        };
        let SaeWeights { w_dec, b_dec, .. } = self.weights.clone();
        let decoded = sparse_decode(indices, values, w_dec);
        match self.config.adds_b_dec() {
            true => decoded + b_dec.unsqueeze(),
            false => decoded,
        }
    }

    fn finish_decoding(
        &self,
        decoded: Tensor<2>,
        x: Tensor<2>,
        scale: Option<RowScale>,
    ) -> Tensor<2> {
        match (scale, self.weights.w_skip.clone()) {
            (Some(scale), _) if self.undoes_normalization() => scale.undo(decoded),
            (_, Some(w_skip)) => decoded + x.matmul(w_skip.transpose()),
            (_, None) => decoded,
        }
    }

    /// The norms that latents are measured in, if they are.
    fn scale(&self) -> Option<Tensor<1>> {
        self.config.activation.rescales_by_decoder_norm().then(|| self.decoder_norms())
    }
}

/// `‖rows[i]‖²`, `[n]`.
pub(crate) fn row_squares(rows: &Tensor<2>) -> Tensor<1> {
    let [n, _] = rows.dims();
    // A product of each row with itself reads the matrix once and writes nothing of its size.
    let itself = Tensor::<1, Int>::arange(0..n as i64, &rows.device()).unsqueeze_dim(1);
    sparse_dot(itself, rows.clone(), rows.clone()).squeeze_dim(1)
}

/// `‖rows[i]‖`, at least [`LEAST_NORM`].
pub(crate) fn row_norms(rows: Tensor<2>) -> Tensor<1> {
    row_squares(&rows).sqrt().clamp_min(LEAST_NORM)
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
        let weights = SaeWeights::new(
            Tensor::from_data([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], &device),
            Tensor::from_data([0.0, 0.5, 0.0], &device),
            Tensor::from_data([[2.0, 0.0], [0.0, 1.0], [0.3, 0.4]], &device),
            Tensor::from_data([1.0, 1.0], &device),
        );
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
    fn a_folded_input_scale_leaves_the_latents() {
        let sae = example(2, false);
        let scaled = sae.decompose(x().mul_scalar(4.0));
        let raw = sae.fold_input_scale(4.0).decompose(x());
        assert_close(raw.latents.to_dense(), scaled.latents.to_dense().into_data());
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
            let weights = SaeWeights::new(
                noise([d_in, d_sae], &mut random),
                noise([d_sae], &mut random),
                noise([d_sae, d_in], &mut random),
                noise([d_in], &mut random),
            );
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
        let SaeWeights { w_enc, b_enc, w_dec, b_dec, .. } = weights.clone();
        let Activation::TopK { k, rescale_by_decoder_norm } = config.activation else {
            panic!("{:?}", config.activation);
        };
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
