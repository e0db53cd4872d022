//! What dead latents make of the residual.

use burn::tensor::{Int, Tensor, TensorData};
use kernels::Select;
use serde::{Deserialize, Serialize};

use super::pass::{Pass, number, row_squares, where_positive};
use super::{Term, not_negative, positive};
use crate::train::error::TrainError;

/// Lets the dead latents with the largest pre-activations reconstruct what the live ones leave over
/// (Gao et al., 2024): they get a gradient though nothing selects them.
///
/// ```text
/// r    = y − ŷ, held fixed
/// loss = coefficient · scale · ‖z_dead · w_dec − r‖²
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuxK {
    /// The weight of the term: 1 in SAELens, 1/32 elsewhere.
    pub coefficient: f64,
    /// Dead latents per row, at most; half the width of what is reconstructed unless given.
    pub k: Option<usize>,
    /// Whose rule it is.
    pub rule: AuxKRule,
}

/// What the latents are, and how the error is scaled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuxKRule {
    /// Pre-activations of either sign; the error counts as that of the reconstruction does, times
    /// the number of dead latents over `k` where they are fewer.
    SaeLens,
    /// The same, of `relu(p)`.
    Sparsify,
    /// `relu(p)`; the error counts as a share of the residual's variance over the batch, and however
    /// few latents are dead (OpenAI, dictionary_learning).
    OpenAi,
}

/// How the selection that AuxK goes with ranks latents.
pub(super) struct Ranking {
    /// `[d_sae]`
    pub(super) scale: Tensor<1>,
    pub(super) by_magnitude: bool,
}

impl AuxK {
    /// SAELens' rule, with its coefficient.
    pub fn new() -> Self {
        Self { coefficient: 1.0, k: None, rule: AuxKRule::SaeLens }
    }

    /// Adds the term for the error of a reconstruction. It reaches decoder and encoder.
    pub(super) fn run(
        &self,
        pass: &mut Pass,
        ranking: &Ranking,
        dead: &[u32],
        error: &Tensor<2>,
    ) -> f64 {
        if dead.is_empty() || self.coefficient == 0.0 {
            return 0.0;
        }
        let [_, d_out] = error.dims();
        let k = self.k.unwrap_or(d_out / 2).max(1);
        let few = (dead.len() as f64 / k as f64).min(1.0);
        let scale = self.coefficient
            * match self.rule {
                AuxKRule::SaeLens | AuxKRule::Sparsify => few * pass.error_scale(),
                AuxKRule::OpenAi => {
                    let centred = error.clone() - error.clone().mean_dim(0);
                    match number(row_squares(&centred).sum()) {
                        0.0 => return 0.0,
                        variance => 1.0 / variance,
                    }
                }
            };
        let k = k.min(dead.len());
        let is_signed = ranking.by_magnitude || self.rule == AuxKRule::SaeLens;
        let select = match (ranking.by_magnitude, is_signed) {
            (true, _) => Select::TopKMagnitude(k),
            (false, true) => Select::TopKSigned(k),
            (false, false) => Select::TopK(k),
        };
        let among = latents(dead, error);
        let by = ranking.scale.clone().select(0, among.clone());
        let latents = pass.encode_among(&among, 1.0, by.zeros_like(), by, select);
        let error = pass.decode(&latents) + error.clone();
        pass.decoder_gradient(&latents, &error, scale);
        let gradient = pass.latent_gradient(&latents, &error, scale);
        let gradient = match is_signed {
            true => gradient,
            false => where_positive(gradient, latents.values.clone()),
        };
        pass.projection_gradient(latents.with(gradient));
        scale * number(row_squares(&error).sum())
    }

    pub(super) fn validate(&self) -> Result<(), TrainError> {
        not_negative("aux_k.coefficient", self.coefficient)?;
        positive("aux_k.k", self.k.unwrap_or(1) as f64)
    }

    /// The term of several errors, each with its own dead latents.
    pub(super) fn run_all<'a>(
        &self,
        pass: &mut Pass,
        ranking: &Ranking,
        parts: impl Iterator<Item = (&'a [u32], &'a Tensor<2>)>,
    ) {
        let value = parts.map(|(dead, error)| self.run(pass, ranking, dead, error)).sum();
        pass.term(Term::AuxK, value);
    }
}

impl Default for AuxK {
    fn default() -> Self {
        Self::new()
    }
}

/// Latents as a tensor, where `like` is.
pub(super) fn latents(latents: &[u32], like: &Tensor<2>) -> Tensor<1, Int> {
    let indices: Vec<i32> = latents.iter().map(|&latent| latent as i32).collect();
    let n = indices.len();
    Tensor::from_data(TensorData::new(indices, [n]), &like.device())
}
