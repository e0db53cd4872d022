//! What dead latents make of the residual.

use burn::tensor::{Int, Tensor, TensorData};
use kernels::Select;
use serde::{Deserialize, Serialize};

use super::pass::{Pass, globally, number, where_positive};
use super::{Term, not_negative, positive};
use crate::sae::row_squares;
use crate::train::error::TrainError;

/// With no more dead latents than so many times `k`, products with all of them in the cache beat
/// those with the `k` alone.
const DENSE_UP_TO: usize = 8;

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
        let k = self.k(d_out);
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
        let squares = match self.takes_all(dead, d_out) {
            true => pass.fit(dead, by, select, error, scale),
            false => fit_sparsely(pass, &among, by, select, error, scale),
        };
        scale * squares
    }

    fn k(&self, d_out: usize) -> usize {
        self.k.unwrap_or(d_out / 2).max(1)
    }

    /// Whether so few latents are dead that pre-activations of all of them are wanted.
    pub(super) fn takes_all(&self, dead: &[u32], d_out: usize) -> bool {
        self.coefficient != 0.0 && dead.len() <= DENSE_UP_TO * self.k(d_out)
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

/// The same as [`Pass::fit`], by the entries alone.
fn fit_sparsely(
    pass: &mut Pass,
    among: &Tensor<1, Int>,
    by: Tensor<1>,
    select: Select,
    error: &Tensor<2>,
    scale: f64,
) -> f64 {
    let picked = pass.encode_among(among, 1.0, by.zeros_like(), by, select);
    let latents = globally(among, picked);
    let error = pass.decode(&latents) + error.clone();
    pass.decoder_gradient(&latents, &error, scale);
    let gradient = pass.latent_gradient(&latents, &error, scale);
    // A pre-activation of exactly zero has a gradient where it may have either sign.
    let gradient = match select {
        Select::TopK(_) => where_positive(gradient, latents.values.clone()),
        _ => gradient,
    };
    pass.projection_gradient(latents.with(gradient));
    number(row_squares(&error).sum())
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

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution};

    use super::*;
    use crate::SaeWeights;
    use crate::train::{Batch, Objective, ParameterName, Parameters};

    fn noise<const D: usize>(shape: [usize; D]) -> Tensor<D> {
        Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Device::flex())
    }

    #[test]
    fn sparse_products_and_dense_ones_are_the_same() {
        let (n, d_in, d_sae, dead) = (9, 6, 40, [1, 3, 4, 17, 30, 39]);
        let [w_enc, w_dec] = [noise([d_in, d_sae]), noise([d_sae, d_in])];
        let weights = SaeWeights::new(w_enc, noise([d_sae]), w_dec, noise([d_in]));
        let parameters = Parameters::from_weights(weights);
        let (objective, batch) = (Objective::top_k(3), Batch::from(noise([n, d_in])));
        let error = noise([n, d_in]);
        for select in [Select::TopKSigned(4), Select::TopK(4), Select::TopKMagnitude(4)] {
            let gradient = |dense| {
                let mut pass = Pass::new(&objective, &parameters, &batch);
                let among = latents(&dead, &error);
                let by = Tensor::ones([dead.len()], &Device::flex());
                // Something else for the sums to be added to.
                let other =
                    pass.encode_among(&among, 1.0, by.zeros_like(), by.clone(), Select::TopK(2));
                let other = globally(&among, other);
                pass.projection_gradient(other.clone());
                pass.decoder_gradient(&other, &error, 0.1);
                let squares = match dense {
                    true => pass.fit(&dead, by, select, &error, 0.3),
                    false => fit_sparsely(&mut pass, &among, by, select, &error, 0.3),
                };
                (squares, pass.finish().1)
            };
            let ((sparse, by_sparse), (dense, by_dense)) = (gradient(false), gradient(true));
            assert!((sparse - dense).abs() < 1e-3 && sparse > 1.0, "{sparse} for {dense}");
            for (name, tensor) in by_sparse.named() {
                let tolerance = burn::tensor::Tolerance::<f32>::rel_abs(1e-4, 1e-4);
                let other = by_dense.get(name).expect("the same names").to_data();
                tensor.to_data().assert_approx_eq(&other, tolerance);
            }
            assert!(by_dense.get(ParameterName::WEnc).is_some());
        }
    }
}
