//! What is done to activations before an SAE sees them, and undone to what it decodes.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

/// Added to the standard deviation of a row (SAELens).
const LAYER_NORM_EPSILON: f64 = 1e-5;

/// How activations are normalised, under SAELens' names.
///
/// A scale that is the same for all activations (`expected_average_only_in`) is no part of an SAE:
/// it is folded into the weights ([`Sae::fold_input_scale`](crate::Sae::fold_input_scale)).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Normalization {
    /// Not at all.
    #[default]
    None,
    /// Each row is scaled to norm `√d_in`, and what is decoded scaled back.
    ConstantNormRescale,
    /// Each row is brought to mean 0 and (unbiased) standard deviation 1, and what is decoded
    /// brought back.
    LayerNorm,
}

/// What was done to each row.
#[derive(Debug, Clone)]
pub struct RowScale {
    /// `[n, 1]`, added back after the scale.
    shift: Option<Tensor<2>>,
    /// `[n, 1]`: what each row was divided by.
    divisor: Tensor<2>,
}

impl Normalization {
    /// Whether each row is normalised by itself.
    pub fn is_by_row(self) -> bool {
        self != Self::None
    }

    /// Normalised rows, and what undoes it.
    ///
    /// # Shapes
    /// `x` and the rows: `[n, d_in]`.
    pub(crate) fn normalize(self, x: Tensor<2>) -> (Tensor<2>, Option<RowScale>) {
        let [_, d_in] = x.dims();
        match self {
            Self::None => (x, None),
            Self::ConstantNormRescale => {
                let norm = x.clone().square().sum_dim(1).sqrt();
                let divisor = norm.div_scalar((d_in as f64).sqrt());
                (x / divisor.clone(), Some(RowScale { shift: None, divisor }))
            }
            Self::LayerNorm => {
                let mean = x.clone().mean_dim(1);
                let centred = x - mean.clone();
                let variance = centred.clone().square().sum_dim(1).div_scalar((d_in - 1) as f64);
                let divisor = variance.sqrt().add_scalar(LAYER_NORM_EPSILON);
                (centred / divisor.clone(), Some(RowScale { shift: Some(mean), divisor }))
            }
        }
    }
}

impl RowScale {
    /// Brings decoded rows back to where the input was.
    pub(crate) fn undo(self, decoded: Tensor<2>) -> Tensor<2> {
        let scaled = decoded * self.divisor;
        match self.shift {
            Some(shift) => scaled + shift,
            None => scaled,
        }
    }
}
