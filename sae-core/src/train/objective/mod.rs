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
mod ghost;
mod jump_relu;
mod matching_pursuit;
mod matryoshka;
mod pass;
mod selecting;
mod sparsity;
mod standard;

pub use aux_k::{AuxK, AuxKRule};
pub use gated::{Gated, GatedAuxiliary};
pub use ghost::GhostGradients;
pub use jump_relu::{JumpRelu, L0Loss, StraightThrough, ThresholdParameter};
pub use matching_pursuit::MatchingPursuit;
pub use matryoshka::{AuxKTarget, Group};
pub(super) use selecting::Smallest;
pub use selecting::{RunningThreshold, Selecting, Selection};
pub use sparsity::{Sparsity, SparsityNorm};
pub use standard::Standard;

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use self::pass::{Downstream, Pass};
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
    /// A gradient for dead latents of any kind with an encoder; AuxK is the one of those that
    /// select.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ghost_gradients: Option<GhostGradients>,
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
    /// Error of what dead latents make of the residual by another activation.
    GhostGradients,
    /// What comes of the reconstruction behind the SAE.
    Downstream,
}

/// A loss behind the reconstruction, and where it falls.
#[derive(Debug, Clone)]
pub struct Upstream {
    /// The loss.
    pub loss: f64,
    /// Its gradient at the reconstruction, `[n, d_out]`.
    pub gradient: Tensor<2>,
    /// What the error of the reconstruction still counts beside it: 0 leaves it out.
    pub error_weight: f64,
}

/// Activations of a step.
#[derive(Debug, Clone)]
pub struct Batch {
    /// What is encoded, `[n, d_in]`.
    pub x: Tensor<2>,
    /// What is to be reconstructed, `[n, d_out]`: of a transcoder alone, others reconstruct `x`.
    pub target: Option<Tensor<2>>,
}

impl Batch {
    /// Whether what is encoded holds no NaN and no infinity, as far as the loss does not tell: that of
    /// a transcoder measures the target alone.
    pub(in crate::train) fn hides_nothing(&self) -> bool {
        self.target.is_none() || self.x.clone().sum().into_scalar::<f32>().is_finite()
    }
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
        let error = ErrorMeasure::Squared;
        Self { kind, error, apply_b_dec_to_input: true, ghost_gradients: None }
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
    /// If a parameter that the kind needs is missing, the objective is not [valid](Self::validate)
    /// for the number of latents, the batch has no rows or another width than the parameters, or
    /// the dead latents are not in order or not there.
    pub fn differentiate(
        &self,
        parameters: &Parameters,
        batch: &Batch,
        dead: &[u32],
    ) -> Differentiated {
        if let Kind::MatchingPursuit(kind) = &self.kind {
            assert_fits(parameters, batch, dead);
            return kind.differentiate(self, parameters, batch);
        }
        self.run(parameters, batch, dead, None)
    }

    /// The same with a loss of what comes behind the reconstruction, which `downstream` is called
    /// with once: `[n, d_out]`, in the scale of the batch.
    ///
    /// # Errors
    /// What `downstream` fails with.
    ///
    /// # Panics
    /// As [`differentiate`](Self::differentiate), and for a matching pursuit, whose picks have no
    /// such gradient here.
    pub fn differentiate_with<E>(
        &self,
        parameters: &Parameters,
        batch: &Batch,
        dead: &[u32],
        mut downstream: impl FnMut(Tensor<2>) -> Result<Upstream, E>,
    ) -> Result<Differentiated, E> {
        let mut failed = None;
        let mut downstream = |reconstruction: Tensor<2>| {
            let gradient = reconstruction.zeros_like();
            downstream(reconstruction).unwrap_or_else(|error| {
                failed = Some(error);
                Upstream { loss: f64::NAN, gradient, error_weight: 1.0 }
            })
        };
        let found = self.run(parameters, batch, dead, Some(&mut downstream));
        match failed {
            Some(error) => Err(error),
            None => Ok(found),
        }
    }

    fn run<'a>(
        &self,
        parameters: &'a Parameters,
        batch: &Batch,
        dead: &[u32],
        downstream: Option<Downstream<'a>>,
    ) -> Differentiated {
        assert_fits(parameters, batch, dead);
        let mut pass = Pass::new(self, parameters, batch).before(downstream);
        let (latents, row_errors) = match &self.kind {
            Kind::Standard(kind) => kind.run(&mut pass),
            Kind::Gated(kind) => kind.run(&mut pass),
            Kind::Selecting(kind) => kind.run(&mut pass, dead),
            Kind::JumpRelu(kind) => kind.run(&mut pass, dead),
            Kind::MatchingPursuit(_) => panic!("a matching pursuit has no encoder"),
        };
        if let Some(ghost_gradients) = self.ghost_gradients {
            ghost_gradients.run(&mut pass, &latents, dead);
        }
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

    /// Where the trained parameter of thresholds starts, if there is one.
    pub(super) fn threshold_start(&self) -> Option<f64> {
        match &self.kind {
            Kind::JumpRelu(kind) => Some(kind.start()),
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
        if let Some(ghost_gradients) = self.ghost_gradients {
            ghost_gradients.validate()?;
            let conflict = |with| Err(TrainError::Conflict { option: "ghost_gradients", with });
            match &self.kind {
                Kind::MatchingPursuit(_) => {
                    return conflict("matching pursuit, without an encoder");
                }
                Kind::Selecting(Selecting { aux_k: Some(_), .. }) => {
                    return conflict("AuxK, which does the same");
                }
                _ => {}
            }
        }
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

/// Refuses what would otherwise be spread over the width, or fail somewhere within.
fn assert_fits(parameters: &Parameters, batch: &Batch, dead: &[u32]) {
    let ([n, width], d_in) = (batch.x.dims(), parameters.d_in());
    assert!(n > 0, "a batch without rows");
    assert_eq!(width, d_in, "activations of width {width}, the SAE reads {d_in}");
    let [d_sae, d_out] = parameters.w_dec().dims();
    let target = batch.target.as_ref().unwrap_or(&batch.x).dims();
    assert_eq!(target, [n, d_out], "a target of shape {target:?} for {n} rows of width {d_out}");
    let in_order = dead.windows(2).all(|pair| pair[0] < pair[1]);
    let there = dead.last().is_none_or(|&last| (last as usize) < d_sae);
    assert!(in_order && there, "dead latents {dead:?} of {d_sae}");
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
