//! ReLU with a penalty.

use burn::tensor::Tensor;
use kernels::Select;
use serde::{Deserialize, Serialize};

use super::Term;
use super::pass::{Entries, Pass, where_positive};
use super::sparsity::Sparsity;
use crate::train::parameters::ParameterName;

/// `z = relu(p)`; the loss adds a penalty on `z`.
///
/// With [`Sparsity::new`] it is SAELens' `standard` and dictionary_learning's April update; with
/// unweighted L1 and unit rows dictionary_learning's `standard`; with
/// [`LpToTheP`](super::SparsityNorm::LpToTheP) and an annealed `p` its p-annealing.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Standard {
    /// The penalty.
    pub sparsity: Sparsity,
}

impl Standard {
    pub(super) fn run(&self, pass: &mut Pass) -> (Entries, Tensor<1>) {
        let zeros = pass.parameters.vector(ParameterName::BEnc).zeros_like();
        let latents = pass.encode(zeros, Select::Above, 0.0);
        let (gradient, _, row_errors) = pass.reconstruct(Term::Reconstruction, &latents, 1.0);
        let gradient = gradient + self.sparsity.run(pass, &latents);
        let gradient = where_positive(gradient, latents.values.clone());
        pass.projection_gradient(latents.with(gradient));
        (latents, row_errors)
    }
}
