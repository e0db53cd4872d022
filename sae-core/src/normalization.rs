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
pub(crate) struct RowScale {
    /// `[n, 1]`, added back after the scale.
    shift: Option<Tensor<2>>,
    /// `[n, 1]`: what each decoded row is multiplied by.
    scale: Tensor<2>,
}

impl Normalization {
    /// Whether each row is normalised by itself.
    pub fn is_by_row(self) -> bool {
        self != Self::None
    }

    /// Normalised rows, and what undoes it. Rows without a scale of their own, which are zero or
    /// all the same, become zero.
    ///
    /// # Shapes
    /// `x` and the rows: `[n, d_in]`.
    pub(crate) fn normalize(self, x: Tensor<2>) -> (Tensor<2>, Option<RowScale>) {
        let [_, d_in] = x.dims();
        match self {
            Self::None => (x, None),
            Self::ConstantNormRescale => {
                let (divisor, scale) = roots(x.clone().square().sum_dim(1).div_scalar(d_in as f64));
                (x / divisor, Some(RowScale { shift: None, scale }))
            }
            Self::LayerNorm => {
                let mean = x.clone().mean_dim(1);
                let centred = x - mean.clone();
                let n_free = (d_in - 1).max(1);
                let variance = centred.clone().square().sum_dim(1).div_scalar(n_free as f64);
                let (divisor, scale) = roots(variance);
                // SAELens undoes the deviation without what it adds to divide by.
                let rows = centred / divisor.add_scalar(LAYER_NORM_EPSILON);
                (rows, Some(RowScale { shift: Some(mean), scale }))
            }
        }
    }
}

/// Roots to divide by, 1 for zeros, and to multiply by. Zeros get no gradient: the root has none.
fn roots(squares: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
    let zeros = squares.clone().equal_elem(0.0);
    let divisor = squares.mask_fill(zeros.clone(), 1.0).sqrt();
    let scale = divisor.clone().mask_fill(zeros, 0.0);
    (divisor, scale)
}

impl RowScale {
    /// Brings decoded rows back to where the input was.
    pub(crate) fn undo(self, decoded: Tensor<2>) -> Tensor<2> {
        let scaled = decoded * self.scale;
        match self.shift {
            Some(shift) => scaled + shift,
            None => scaled,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, Tolerance};

    fn assert_close(actual: Tensor<2>, expected: [[f32; 2]; 3]) {
        actual.into_data().assert_approx_eq(&expected.into(), Tolerance::<f32>::default());
    }

    /// A row of norm 5, one of zeros, and one of two equal numbers.
    fn x() -> Tensor<2> {
        Tensor::from_data([[3.0, 4.0], [0.0, 0.0], [2.0, 2.0]], &Device::flex())
    }

    #[test]
    fn rows_are_scaled_to_the_root_of_their_width() {
        let (rows, scale) = Normalization::ConstantNormRescale.normalize(x());
        let root = 2f32.sqrt();
        assert_close(rows.clone(), [[0.6 * root, 0.8 * root], [0.0, 0.0], [1.0, 1.0]]);
        assert_close(scale.expect("by row").undo(rows), [[3.0, 4.0], [0.0, 0.0], [2.0, 2.0]]);
    }

    #[test]
    fn rows_are_brought_to_mean_0_and_deviation_1() {
        // Deviations from the mean ±0.5, their unbiased root mean square √0.5.
        let (rows, scale) = Normalization::LayerNorm.normalize(x());
        let half = 0.5f32.sqrt();
        assert_close(rows.clone(), [[-half, half], [0.0, 0.0], [0.0, 0.0]]);
        assert_close(scale.expect("by row").undo(rows), [[3.0, 4.0], [0.0, 0.0], [2.0, 2.0]]);
    }

    #[test]
    fn rows_without_a_scale_have_finite_gradients() {
        for normalization in [Normalization::ConstantNormRescale, Normalization::LayerNorm] {
            let x = x().autodiff().require_grad();
            let (rows, scale) = normalization.normalize(x.clone());
            let back = scale.expect("by row").undo(rows.square());
            let gradient = x.grad(&back.sum().backward()).expect("in the graph");
            let gradient: Vec<f32> = gradient.into_data().try_into_vec_as().expect("floats");
            assert!(gradient.iter().all(|g| g.is_finite()), "{normalization:?}: {gradient:?}");
        }
    }
}
