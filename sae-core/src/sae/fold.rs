//! The same function in other weights.

use super::{Magnitude, Sae, SaeError, SaeWeights, row_norms};
use crate::activation::Activation;

impl Sae {
    /// The same function with decoder rows of norm 1, so that no norms are needed any more
    /// (SAELens' `fold_W_dec_norm`).
    ///
    /// # Errors
    /// If the SAE chooses its latents without their norms, and would choose others with them.
    pub fn fold_decoder_norms(self) -> Result<Self, SaeError> {
        let Self { mut config, weights, decoder_norms: norms } = self;
        match &mut config.activation {
            Activation::TopK { rescale_by_decoder_norm: rescales, .. }
            | Activation::AbsTopK { rescale_by_decoder_norm: rescales, .. }
                if *rescales =>
            {
                *rescales = false;
            }
            Activation::Relu | Activation::JumpRelu | Activation::Gated => {}
            _ => return Err(SaeError::RanksWithoutNorms),
        }
        let SaeWeights { w_enc, b_enc, w_dec, b_dec, threshold, magnitude, w_skip } = weights;
        let weights = SaeWeights {
            w_enc: w_enc * norms.clone().unsqueeze(),
            b_enc: b_enc * norms.clone(),
            w_dec: w_dec / norms.clone().unsqueeze_dim(1),
            b_dec,
            threshold: threshold.map(|threshold| threshold * norms.clone()),
            // The encoder's columns carry the norms: the scale on top of them stays.
            magnitude: magnitude
                .map(|Magnitude { r_mag, b_mag }| Magnitude { r_mag, b_mag: b_mag * norms }),
            w_skip,
        };
        Self::new(config, weights)
    }

    /// The SAE on `x` that does what this one does on `scale · x`, reconstructing `x` itself (or,
    /// of a transcoder, what is to be multiplied by `scale` too).
    ///
    /// The latents keep their values, except that they shrink by `scale` where they have the units
    /// of the input: where the activation rescales by decoder norms, and of a matching pursuit.
    ///
    /// # Panics
    /// If `scale` is not a positive number, or each activation is normalised by itself, which
    /// leaves no scale to fold.
    pub fn fold_input_scale(mut self, scale: f64) -> Self {
        assert!(scale.is_finite() && scale > 0.0, "input scale {scale}");
        let Self { config, weights, .. } = &mut self;
        assert!(!config.normalization.is_by_row(), "a scale before each row's own");
        weights.b_dec = weights.b_dec.clone().div_scalar(scale);
        if let Activation::MatchingPursuit { residual_threshold, .. } = &mut config.activation {
            // Its encoder is its decoder: there is no scale between them to move.
            *residual_threshold /= scale;
        } else {
            weights.w_enc = weights.w_enc.clone().mul_scalar(scale);
            weights.w_dec = weights.w_dec.clone().div_scalar(scale);
            self.decoder_norms = row_norms(self.weights.w_dec.clone());
        }
        self
    }
}
