//! A gradient for dead latents by another activation.

use serde::{Deserialize, Serialize};

use super::pass::{Entries, Pass, number};
use super::{Term, aux_k::latents as latents_tensor, positive};
use crate::sae::row_squares;
use crate::train::error::TrainError;

/// Dead latents reconstruct the residual as if their activation were `exp(p)`, whose slope is zero
/// nowhere (Jermyn & Templeton, 2024).
///
/// ```text
/// r    = y − ŷ, held fixed
/// g    = exp(p_dead) · w_dec
/// s    = ‖r‖ / (2 ‖g‖) for each row, held fixed
/// loss = coefficient · c · Σ ‖s g − r‖²
/// ```
///
/// with `c` held fixed so that the sum counts as much as the error of the reconstruction does. All
/// dead latents take part, in dense products: AuxK, of the `k` largest, has taken its place.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GhostGradients {
    /// What the term counts, as a share of the error of the reconstruction.
    pub coefficient: f64,
}

impl GhostGradients {
    /// As much as the error of the reconstruction.
    pub fn new() -> Self {
        Self { coefficient: 1.0 }
    }

    /// Adds the term for what these latents leave over. It reaches decoder and encoder of the dead.
    pub(super) fn run(&self, pass: &mut Pass, latents: &Entries, dead: &[u32]) {
        if dead.is_empty() {
            return pass.term(Term::GhostGradients, 0.0);
        }
        let error = pass.error(latents);
        let error_squares = row_squares(&error);
        let value = self.coefficient * pass.error_scale() * number(error_squares.clone().sum());
        pass.term(Term::GhostGradients, value);

        let among = latents_tensor(dead, &error);
        let p = pass.pre_activations(&among);
        // What a row is multiplied by cancels in `s g`, and this way nothing overflows.
        let grown = (p.clone() - p.max_dim(1)).exp();
        let rows = pass.parameters.w_dec().select(0, among.clone());
        let ghost = grown.clone().matmul(rows.clone());
        let sizes = row_squares(&ghost).sqrt();
        let is_nothing = sizes.clone().equal_elem(0.0);
        let scale = (error_squares.sqrt().div_scalar(2.0) / sizes).mask_fill(is_nothing, 0.0);
        let scale = scale.unsqueeze_dim::<2>(1);
        let off = ghost * scale.clone() + error;
        let squares = number(row_squares(&off).sum());
        if squares == 0.0 {
            return;
        }
        let by_ghost = off * scale.mul_scalar(2.0 * value / squares);
        let by_rows = grown.clone().transpose().matmul(by_ghost.clone());
        pass.decoder_rows_gradient(&among, by_rows);
        pass.block_gradient(&among, by_ghost.matmul(rows.transpose()) * grown);
    }

    pub(super) fn validate(&self) -> Result<(), TrainError> {
        positive("ghost_gradients.coefficient", self.coefficient)
    }
}

impl Default for GhostGradients {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor, TensorData};

    use crate::SaeWeights;
    use crate::train::{Batch, GhostGradients, Objective, ParameterName, Parameters, Term};

    fn matrix<const N: usize, const M: usize>(rows: [[f32; M]; N]) -> Tensor<2> {
        Tensor::from_data(rows, &Device::flex())
    }

    /// Latent 0 reads and writes axis 0; latent 1, the dead one, reads axis 0 and writes axis 1.
    fn found(bias: f32, ghost_gradients: Option<GhostGradients>) -> crate::train::Differentiated {
        let device = Device::flex();
        let weights = SaeWeights::new(
            matrix([[1.0, 0.5], [0.0, 0.0]]),
            Tensor::from_data([0.0, bias], &device),
            matrix([[1.0, 0.0], [0.0, 1.0]]),
            Tensor::zeros([2], &device),
        );
        let objective = Objective { ghost_gradients, ..Objective::top_k(1) };
        let batch = Batch::from(matrix([[2.0, 3.0]]));
        objective.differentiate(&Parameters::from_weights(weights), &batch, &[1])
    }

    #[test]
    fn a_ghost_is_half_as_long_as_the_residual_whatever_its_pre_activation() {
        // The residual is (0, 3), the ghost (0, 1.5): s g − r = (0, −1.5), of square 2.25. To count
        // 9 it is taken 4 times, and the slope at the ghost is 2 · 4 · (−1.5) = −12; `s exp(p)` is
        // 1.5, so it is −18 at p, and at w_dec[1] as well.
        for bias in [-150.0, -1.0, 0.0, 0.9] {
            let ghost = found(bias, Some(GhostGradients::new()));
            assert_eq!(ghost.terms[1], (Term::GhostGradients, 9.0));
            assert_eq!(ghost.loss, 18.0);
            let plain = found(bias, None);
            let row = |found: &crate::train::Differentiated, name| -> TensorData {
                let tensor = found.gradient.get(name).expect("there").clone();
                match name {
                    ParameterName::BEnc => tensor.narrow(1, 1, 1).into_data(),
                    _ => tensor.narrow(0, 1, 1).into_data(),
                }
            };
            row(&plain, ParameterName::WDec).assert_eq(&TensorData::from([[0.0f32, 0.0]]), true);
            let tolerance = burn::tensor::Tolerance::<f32>::default();
            for (name, expected) in [
                (ParameterName::WDec, TensorData::from([[0.0f32, -18.0]])),
                (ParameterName::BEnc, TensorData::from([[-18.0f32]])),
                (ParameterName::WEnc, TensorData::from([[-36.0f32, -54.0]])),
            ] {
                row(&ghost, name).assert_approx_eq(&expected, tolerance);
            }
        }
    }
}
