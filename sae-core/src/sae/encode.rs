//! From activations to latents, one activation function after the other.

use burn::tensor::activation::relu;
use burn::tensor::{Int, Tensor};
use kernels::{Select, sparse_encode, sparse_gather};

use super::{Magnitude, Sae, pursuit};
use crate::activation::Activation;
use crate::latents::SparseLatents;

impl Sae {
    /// The latents of normalised activations.
    pub(super) fn encode_normalized(&self, x: Tensor<2>) -> SparseLatents {
        let x = match self.config.apply_b_dec_to_input {
            true => x - self.weights.b_dec.clone().unsqueeze(),
            false => x,
        };
        let zeros = || self.weights.b_enc.zeros_like();
        let (values, indices) = match self.config.activation {
            Activation::Relu => self.select(x, zeros(), Select::Above),
            Activation::JumpRelu => {
                let threshold = self.weights.threshold.clone().expect("checked when made");
                self.select(x, threshold, Select::Above)
            }
            Activation::TopK { k, .. } => self.ranked(x, Select::TopK(k)),
            Activation::AbsTopK { k, .. } => self.ranked(x, Select::TopKMagnitude(k)),
            Activation::GroupMax { k } => self.select(x, zeros(), Select::GroupMax(k)),
            Activation::Gated => {
                let (gates, indices) = self.select(x, zeros(), Select::Above);
                (self.magnitudes(gates, &indices), indices)
            }
            Activation::MatchingPursuit {
                residual_threshold,
                max_iterations,
                stop_on_duplicate_support,
            } => {
                let limits = pursuit::Limits {
                    residual_threshold,
                    max_iterations,
                    stop_on_duplicate_support,
                };
                let (w_enc, w_dec) = (self.weights.w_enc.clone(), self.weights.w_dec.clone());
                return pursuit::pursue(x, w_enc, w_dec, limits);
            }
        };
        SparseLatents::new(indices, values, self.config.d_sae)
    }

    fn select(&self, x: Tensor<2>, by: Tensor<1>, select: Select) -> (Tensor<2>, Tensor<2, Int>) {
        sparse_encode(x, self.weights.w_enc.clone(), self.weights.b_enc.clone(), by, select)
    }

    /// Ranked and measured in decoder norms, if the activation says so.
    fn ranked(&self, x: Tensor<2>, select: Select) -> (Tensor<2>, Tensor<2, Int>) {
        match self.scale() {
            Some(scale) => {
                let (values, indices) = self.select(x, scale.clone(), select);
                (values * sparse_gather(indices.clone(), scale), indices)
            }
            None => self.select(x, self.weights.b_enc.ones_like(), select),
        }
    }

    /// What open gates let through, out of the gates' pre-activations.
    fn magnitudes(&self, gates: Tensor<2>, indices: &Tensor<2, Int>) -> Tensor<2> {
        let Magnitude { r_mag, b_mag } = self.weights.magnitude.clone().expect("checked when made");
        let fills_up = gates.clone().lower_equal_elem(0.0);
        let at = |vector| sparse_gather(indices.clone(), vector);
        let projected = gates - at(self.weights.b_enc.clone());
        let pre = projected * at(r_mag).exp() + at(b_mag);
        relu(pre).mask_fill(fills_up, 0.0)
    }
}
