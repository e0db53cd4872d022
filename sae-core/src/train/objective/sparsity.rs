//! A penalty on the sizes of latents.

use serde::{Deserialize, Serialize};

use super::pass::{Entries, Pass, number, where_positive};
use super::{Term, not_negative, positive};
use crate::train::error::TrainError;
use burn::tensor::Tensor;

/// `coefficient · mean over the rows of ‖z ⊙ w‖`, with some norm and some weights.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sparsity {
    /// The weight of the term.
    pub coefficient: f64,
    /// What is taken of each row.
    pub norm: SparsityNorm,
    /// Whether latents count as much as they write, `w = ‖w_dec[i]‖` (SAELens, Anthropic's update of
    /// April 2024): without it (dictionary_learning's `standard` and `gated`) the decoder's rows
    /// need a norm held fixed.
    pub weighted_by_decoder_norms: bool,
}

/// The norm of a row of latents.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SparsityNorm {
    /// `(Σ zᵖ)^(1/p)` (SAELens' `lp_norm`).
    Lp {
        /// Above zero.
        p: f64,
    },
    /// `Σ zᵖ` (dictionary_learning's p-annealing).
    LpToTheP {
        /// Above zero.
        p: f64,
    },
}

impl SparsityNorm {
    pub(super) fn p(self) -> f64 {
        match self {
            Self::Lp { p } | Self::LpToTheP { p } => p,
        }
    }

    pub(super) fn set_p(&mut self, to: f64) {
        match self {
            Self::Lp { p } | Self::LpToTheP { p } => *p = to,
        }
    }
}

impl Sparsity {
    /// SAELens' penalty: L1 of what latents write.
    pub fn new(coefficient: f64) -> Self {
        let norm = SparsityNorm::Lp { p: 1.0 };
        Self { coefficient, norm, weighted_by_decoder_norms: true }
    }

    /// Adds the term; gives its gradient at the latents, which are not below zero.
    pub(super) fn run(&self, pass: &mut Pass, latents: &Entries) -> Tensor<2> {
        let scale = self.coefficient / pass.n as f64;
        let weights = self.weighted_by_decoder_norms.then(|| latents.gather(pass.norms()));
        let z = latents.values.clone();
        let weighted = match &weights {
            Some(weights) => z.clone() * weights.clone(),
            None => z.clone(),
        };
        let (value, slope) = match self.norm {
            SparsityNorm::Lp { p: 1.0 } | SparsityNorm::LpToTheP { p: 1.0 } => {
                (number(weighted.sum()), z.ones_like())
            }
            norm => by_powers(norm, weighted),
        };
        pass.term(Term::Sparsity, scale * value);
        let slope = where_positive(slope.mul_scalar(scale), z.clone());
        match weights {
            Some(weights) => {
                let by_norm = pass.by_latent(latents, slope.clone() * z);
                pass.norm_gradient(by_norm);
                slope * weights
            }
            None => slope,
        }
    }

    pub(super) fn validate(&self) -> Result<(), TrainError> {
        not_negative("sparsity.coefficient", self.coefficient)?;
        positive("sparsity.p", self.norm.p())
    }
}

/// The sum of the rows' norms, and its slope at each entry above zero.
fn by_powers(norm: SparsityNorm, values: Tensor<2>) -> (f64, Tensor<2>) {
    // A power of zero may have no slope; zeros stay out of it.
    let some = values.clone().mask_fill(values.clone().lower_equal_elem(0.0), 1.0);
    let power = |p: f64| some.clone().powf_scalar(p);
    let sums = where_positive(power(norm.p()), values).sum_dim(1);
    match norm {
        SparsityNorm::LpToTheP { p } => (number(sums.sum()), power(p - 1.0).mul_scalar(p)),
        SparsityNorm::Lp { p } => {
            let filled = sums.clone().mask_fill(sums.clone().lower_equal_elem(0.0), 1.0);
            let slope = power(p - 1.0) * filled.powf_scalar(1.0 / p - 1.0);
            (number(sums.powf_scalar(1.0 / p).sum()), slope)
        }
    }
}
