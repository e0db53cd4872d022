//! Gates and magnitudes.

use burn::tensor::Tensor;
use burn::tensor::activation::relu;
use kernels::Select;
use serde::{Deserialize, Serialize};

use super::Term;
use super::pass::{Entries, Pass, number, where_positive};
use super::sparsity::Sparsity;
use crate::sae::row_squares;
use crate::train::parameters::ParameterName;

/// With `π = (x − b_dec) · w_encᵀ`: the gate `p = π + b_enc` opens where it is above zero, and lets
/// `z = relu(π · exp(r_mag) + b_mag)` through. The loss adds a penalty on `relu(p)`, and the error
/// of what `relu(p)` would reconstruct. No gradient passes through the opening itself.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gated {
    /// The penalty on gates.
    pub sparsity: Sparsity,
    /// What the error of the gates' reconstruction trains.
    pub auxiliary: GatedAuxiliary,
}

/// Whether the reconstruction by gates trains the decoder too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GatedAuxiliary {
    /// It does not: the paper, dictionary_learning.
    DetachedDecoder,
    /// It does: SAELens.
    UndetachedDecoder,
}

impl Gated {
    pub(super) fn run(&self, pass: &mut Pass) -> (Entries, Tensor<1>) {
        let vector = |name| pass.parameters.vector(name);
        let b_gate = vector(ParameterName::BEnc);
        let (r_mag, b_mag) = (vector(ParameterName::RMag), vector(ParameterName::BMag));
        let gates = pass.encode(b_gate.zeros_like(), Select::Above, 0.0);
        let open = gates.values.clone();
        let projected = open.clone() - gates.gather(b_gate);
        let growth = gates.gather(r_mag).exp();
        let magnitudes = projected.clone() * growth.clone() + gates.gather(b_mag);
        let latents = gates.with(where_positive(relu(magnitudes), open.clone()));

        let (by_latent, _, row_errors) = pass.reconstruct(Term::Reconstruction, &latents, 1.0);
        let by_magnitude = where_positive(by_latent, latents.values.clone());
        let grown = by_magnitude.clone() * growth;
        let by_r_mag = pass.by_latent(&gates, grown.clone() * projected);
        pass.vector_gradient(ParameterName::RMag, by_r_mag);
        let by_b_mag = pass.by_latent(&gates, by_magnitude);
        pass.vector_gradient(ParameterName::BMag, by_b_mag);

        let by_gate = self.sparsity.run(pass, &gates) + self.auxiliary(pass, &gates);
        let by_gate = where_positive(by_gate, open);
        let by_b_gate = pass.by_latent(&gates, by_gate.clone());
        pass.vector_gradient(ParameterName::BEnc, by_b_gate);
        pass.projection_gradient(gates.with(by_gate + grown));
        (latents, row_errors)
    }

    /// The error of what the gates reconstruct; gives its gradient at them.
    fn auxiliary(&self, pass: &mut Pass, gates: &Entries) -> Tensor<2> {
        let (error, scale) = (pass.error(gates), pass.error_scale());
        pass.term(Term::Gates, scale * number(row_squares(&error).sum()));
        if self.auxiliary == GatedAuxiliary::UndetachedDecoder {
            pass.decoder_gradient(gates, &error, scale);
            pass.output_gradient(&error, scale);
        }
        pass.latent_gradient(gates, &error, scale)
    }
}
