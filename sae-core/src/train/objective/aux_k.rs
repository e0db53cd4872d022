//! What dead latents make of the residual.

use burn::tensor::{IndexingUpdateOp, Int, Tensor, TensorData};
use kernels::Select;
use serde::{Deserialize, Serialize};

use super::pass::{Entries, Pass, globally, number, where_positive};
use super::{Term, not_negative, positive};
use crate::sae::row_squares;
use crate::train::error::TrainError;

/// With no more dead latents than so many times `k`, products with all of them beat those with the
/// `k` alone.
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
        let picked = pass.encode_among(&among, 1.0, by.zeros_like(), by, select);
        let dense = dead.len() <= DENSE_UP_TO * k;
        let squares = add_gradients(pass, &among, picked, error, scale, is_signed, dense);
        scale * squares
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

/// Adds the gradients of `scale · ‖z · w_dec + error‖²`; gives its squares.
fn add_gradients(
    pass: &mut Pass,
    among: &Tensor<1, Int>,
    picked: Entries,
    error: &Tensor<2>,
    scale: f64,
    is_signed: bool,
    dense: bool,
) -> f64 {
    if !dense {
        let latents = globally(among, picked);
        let error = pass.decode(&latents) + error.clone();
        pass.decoder_gradient(&latents, &error, scale);
        let gradient = pass.latent_gradient(&latents, &error, scale);
        let gradient = match is_signed {
            true => gradient,
            false => where_positive(gradient, latents.values.clone()),
        };
        pass.projection_gradient(latents.with(gradient));
        return number(row_squares(&error).sum());
    }
    let (Entries { indices, values }, [n_dead]) = (picked, among.dims());
    let spread = |values: Tensor<2>| {
        let zeros = Tensor::zeros([pass.n, n_dead], &values.device());
        zeros.scatter(1, indices.clone(), values, IndexingUpdateOp::Add)
    };
    let z = spread(values.clone());
    // A pre-activation of exactly zero has a gradient where it may have either sign.
    let passes = if is_signed { spread(values.ones_like()) } else { z.clone() };
    let rows = pass.parameters.w_dec().select(0, among.clone());
    let error = z.clone().matmul(rows.clone()) + error.clone();
    let by_rows = z.transpose().matmul(error.clone()).mul_scalar(2.0 * scale);
    pass.decoder_rows_gradient(among, by_rows);
    let by_z = error.clone().matmul(rows.transpose()).mul_scalar(2.0 * scale);
    pass.block_gradient(among, where_positive(by_z, passes));
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
        for is_signed in [true, false] {
            let gradient = |dense| {
                let mut pass = Pass::new(&objective, &parameters, &batch);
                let among = latents(&dead, &error);
                let zeros = Tensor::zeros([dead.len()], &Device::flex());
                let select = if is_signed { Select::TopKSigned(4) } else { Select::TopK(4) };
                let by = zeros.ones_like();
                let picked = pass.encode_among(&among, 1.0, zeros, by, select);
                // Something else for the sums to be added to.
                let other = globally(&among, picked.clone());
                pass.projection_gradient(other.clone());
                pass.decoder_gradient(&other, &error, 0.1);
                let squares =
                    add_gradients(&mut pass, &among, picked, &error, 0.3, is_signed, dense);
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
