//! What training minimises: the kinds of SAE, their losses, and their gradients.
//!
//! ```text
//! p = (x − b_dec) · w_encᵀ + b_enc        at some entries only, by `kernels::sparse_encode`
//! z = f(p)                                by kind
//! e = z · w_dec + b_dec (+ w_skip · x) − y
//! loss = mean ‖e‖² + what the kind adds
//! ```
//!
//! Gradients are written out by hand: they live on the same few entries, and `e` is the only
//! matrix of the batch's size that is ever made. [`Pass`](pass::Pass) has what all kinds share, and
//! each family's file what its own terms add.

mod aux_k;
mod gated;
mod jump_relu;
mod matching_pursuit;
mod matryoshka;
mod pass;
mod selecting;
mod sparsity;
mod standard;

pub use aux_k::{AuxK, AuxKRule};
pub use gated::{Gated, GatedAuxiliary};
pub use jump_relu::{JumpRelu, L0Loss, StraightThrough, ThresholdParameter};
pub use matching_pursuit::MatchingPursuit;
pub use matryoshka::{AuxKTarget, Group};
pub use selecting::{RunningThreshold, Selecting, Selection};
pub use sparsity::{Sparsity, SparsityNorm};
pub use standard::Standard;

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use self::pass::Pass;
use super::error::TrainError;
use super::parameters::{ParameterName, Parameters};
use crate::activation::Activation;
use crate::latents::SparseLatents;

/// What a run minimises.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Objective {
    /// The kind of SAE, with its own terms.
    pub kind: Kind,
    /// How the error of the reconstruction is counted.
    pub error: ErrorMeasure,
    /// Whether `b_dec` is subtracted from the input before encoding.
    pub apply_b_dec_to_input: bool,
}

/// A kind of SAE, and what its loss has besides the error of the reconstruction.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Kind {
    /// `z = relu(p)`, with a penalty on `z`.
    Standard(Standard),
    /// Gates and magnitudes (Rajamanoharan et al., 2024a).
    Gated(Gated),
    /// The largest `p`: TopK and its kin.
    Selecting(Selecting),
    /// `z = p` where `p` exceeds a trained threshold (Rajamanoharan et al., 2024b).
    JumpRelu(JumpRelu),
    /// The decoder's own rows, picked one by one (Costa et al., 2025).
    MatchingPursuit(MatchingPursuit),
}

/// How the error `e` of a reconstruction is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorMeasure {
    /// `mean ‖eᵢ‖²`: summed over the width, averaged over the rows (SAELens, dictionary_learning).
    Squared,
    /// `Σ ‖eᵢ‖² / Σ ‖yᵢ − mean y‖²`: the share of the batch's variance left over (sparsify).
    Fvu,
}

/// A term of a loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Term {
    /// Error of the reconstruction.
    Reconstruction,
    /// Error of what the first latents of a Matryoshka SAE reconstruct.
    Inner {
        /// How many.
        width: usize,
    },
    /// Penalty on latents: their sizes or their number.
    Sparsity,
    /// Error of what the gates reconstruct.
    Gates,
    /// Error of what dead latents make of the residual.
    AuxK,
    /// How far dead latents stay below their thresholds.
    PreActivation,
    /// Error of what more latents reconstruct.
    MultiTopK,
}

/// Activations of a step.
#[derive(Debug, Clone)]
pub struct Batch {
    /// What is encoded, `[n, d_in]`.
    pub x: Tensor<2>,
    /// What is to be reconstructed, `[n, d_out]`: of a transcoder alone, others reconstruct `x`.
    pub target: Option<Tensor<2>>,
}

impl From<Tensor<2>> for Batch {
    fn from(x: Tensor<2>) -> Self {
        Self { x, target: None }
    }
}

/// The loss on a batch, how it came about, and where it falls.
#[derive(Debug, Clone)]
pub struct Differentiated {
    /// The sum of the terms.
    pub loss: f64,
    /// The terms, with their coefficients.
    pub terms: Vec<(Term, f64)>,
    /// The gradient of the loss, for every parameter.
    pub gradient: Parameters,
    /// The latents, not rescaled by their decoder norms.
    pub latents: SparseLatents,
    /// Squared error of the reconstruction of each row, `[n]`.
    pub row_errors: Tensor<1>,
}

impl Objective {
    /// Of a kind, with the squared error and a centred input.
    pub fn new(kind: Kind) -> Self {
        Self { kind, error: ErrorMeasure::Squared, apply_b_dec_to_input: true }
    }

    /// TopK with latents ranked by what they write, as SAELens trains it, without AuxK.
    pub fn top_k(k: usize) -> Self {
        Self::new(Kind::Selecting(Selecting::new(Selection::TopK { k })))
    }

    /// BatchTopK with latents ranked by what they write and SAELens' running threshold.
    pub fn batch_top_k(k: f64) -> Self {
        let threshold = Some(RunningThreshold::SaeLens { rate: 0.01 });
        let selecting = Selecting::new(Selection::BatchTopK { k });
        Self::new(Kind::Selecting(Selecting { threshold, ..selecting }))
    }

    /// The loss on a batch and its gradient.
    ///
    /// `dead` are the latents that count as dead, in rising order.
    ///
    /// # Shapes
    /// `batch.x`: `[n, d_in]`, `batch.target`: `[n, d_out]`.
    ///
    /// # Panics
    /// If a parameter that the kind needs is missing, or the objective is not
    /// [valid](Self::validate) for the number of latents.
    pub fn differentiate(
        &self,
        parameters: &Parameters,
        batch: &Batch,
        dead: &[u32],
    ) -> Differentiated {
        if let Kind::MatchingPursuit(kind) = &self.kind {
            return kind.differentiate(self, parameters, batch);
        }
        let mut pass = Pass::new(self, parameters, batch);
        let (latents, row_errors) = match &self.kind {
            Kind::Standard(kind) => kind.run(&mut pass),
            Kind::Gated(kind) => kind.run(&mut pass),
            Kind::Selecting(kind) => kind.run(&mut pass, dead),
            Kind::JumpRelu(kind) => kind.run(&mut pass, dead),
            Kind::MatchingPursuit(_) => unreachable!("done above"),
        };
        let d_sae = parameters.d_sae();
        let (terms, gradient) = pass.finish();
        Differentiated {
            loss: terms.iter().map(|(_, value)| value).sum(),
            terms,
            gradient,
            latents: SparseLatents::new(latents.indices, latents.values, d_sae),
            row_errors,
        }
    }

    /// Brings back what a step may have moved out of its range: a threshold below zero would let
    /// negative pre-activations through. (Between steps, not in the loss, where it would take away
    /// the gradient that leads back.)
    pub(super) fn project(&self, parameters: &mut Parameters) {
        if let Some(threshold) = parameters.get_mut(ParameterName::Threshold) {
            *threshold = threshold.extract().clamp_min(0.0);
        }
    }

    /// The activation of the SAE that comes of it. A selection over the batch ends as a threshold.
    pub fn activation(&self) -> Activation {
        match &self.kind {
            Kind::Standard(_) => Activation::Relu,
            Kind::Gated(_) => Activation::Gated,
            Kind::JumpRelu(_) => Activation::JumpRelu,
            Kind::Selecting(kind) => kind.activation(),
            Kind::MatchingPursuit(kind) => kind.activation(),
        }
    }

    /// How the threshold of inference is found, where it is no parameter.
    pub fn running_threshold(&self) -> Option<RunningThreshold> {
        match &self.kind {
            Kind::Selecting(kind) => kind.threshold,
            _ => None,
        }
    }

    /// The number that [`Anneal`](super::Anneal) moves: `k` of a selection, `p` of a penalty.
    pub(super) fn annealed(&self) -> Option<f64> {
        match &self.kind {
            Kind::Standard(Standard { sparsity }) | Kind::Gated(Gated { sparsity, .. }) => {
                Some(sparsity.norm.p())
            }
            Kind::Selecting(kind) => Some(kind.selection.k()),
            Kind::JumpRelu(_) | Kind::MatchingPursuit(_) => None,
        }
    }

    /// The same objective with that number.
    pub(super) fn with_annealed(mut self, to: f64) -> Self {
        match &mut self.kind {
            Kind::Standard(Standard { sparsity }) | Kind::Gated(Gated { sparsity, .. }) => {
                sparsity.norm.set_p(to);
            }
            Kind::Selecting(kind) => kind.selection.set_k(to),
            Kind::JumpRelu(_) | Kind::MatchingPursuit(_) => {}
        }
        self
    }

    /// The same objective with the coefficient of its sparsity times `factor`.
    pub(super) fn with_sparsity_scaled(mut self, factor: f64) -> Self {
        match &mut self.kind {
            Kind::Standard(Standard { sparsity }) | Kind::Gated(Gated { sparsity, .. }) => {
                sparsity.coefficient *= factor;
            }
            Kind::JumpRelu(kind) => kind.l0_coefficient *= factor,
            Kind::Selecting(_) | Kind::MatchingPursuit(_) => {}
        }
        self
    }

    /// Checks the options of the kind.
    ///
    /// # Errors
    /// If one is out of its range.
    pub fn validate(&self, d_sae: usize) -> Result<(), TrainError> {
        match &self.kind {
            Kind::Standard(Standard { sparsity }) | Kind::Gated(Gated { sparsity, .. }) => {
                sparsity.validate()
            }
            Kind::Selecting(kind) => kind.validate(d_sae),
            Kind::JumpRelu(kind) => kind.validate(d_sae),
            Kind::MatchingPursuit(kind) => kind.validate(),
        }
    }
}

/// An error unless the number is above zero.
fn positive(option: &'static str, actual: f64) -> Result<(), TrainError> {
    check(option, "a number above zero", actual, actual.is_finite() && actual > 0.0)
}

/// An error unless the number is zero or above.
fn not_negative(option: &'static str, actual: f64) -> Result<(), TrainError> {
    check(option, "a number of at least zero", actual, actual.is_finite() && actual >= 0.0)
}

fn check(
    option: &'static str,
    expected: &'static str,
    actual: f64,
    holds: bool,
) -> Result<(), TrainError> {
    match holds {
        true => Ok(()),
        false => Err(TrainError::Option { option, expected, actual }),
    }
}
