//! What holds the norms of decoder rows.

use burn::config::Config;
use burn::tensor::Tensor;
use kernels::project_rows;

use super::parameters::{ParameterName, Parameters};
use crate::sae::row_norms;

/// Whether decoder rows are held at a norm.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum DecoderNorm {
    /// They are not; norms are folded into encoder and biases at the end, where that is allowed.
    Free,
    /// They have norm 1: the gradient loses what it has along a row, and rows are brought back to
    /// their norm after each step (dictionary_learning, sparsify).
    Unit,
}

impl DecoderNorm {
    /// The gradient without what would change the norms of rows.
    pub fn project(self, parameters: &Parameters, mut gradient: Parameters) -> Parameters {
        if self == Self::Unit {
            let of_rows = gradient.take(ParameterName::WDec).expect("decoders have a gradient");
            gradient.insert(ParameterName::WDec, project_rows(of_rows, parameters.w_dec()));
        }
        gradient
    }

    /// Whether the rows of a parameter are held at norm 1.
    pub(super) fn holds(self, name: ParameterName) -> bool {
        self == Self::Unit && name == ParameterName::WDec
    }
}

/// Rows brought to norm 1, unless they are zero.
pub(super) fn unit_rows(rows: Tensor<2>) -> Tensor<2> {
    let norms = row_norms(rows.clone()).unsqueeze_dim::<2>(1);
    let is_zero = norms.clone().equal_elem(0.0);
    rows / norms.mask_fill(is_zero, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData, Tolerance};

    fn parameters(w_dec: [[f32; 2]; 2]) -> Parameters {
        let device = Device::flex();
        Parameters::tied(Tensor::from_data(w_dec, &device), Tensor::zeros([2], &device))
    }

    fn assert_w_dec(actual: &Parameters, expected: [[f32; 2]; 2]) {
        let tolerance = Tolerance::<f32>::absolute(1e-6);
        actual.w_dec().into_data().assert_approx_eq(&TensorData::from(expected), tolerance);
    }

    #[test]
    fn what_lies_along_a_row_is_taken_out() {
        let (rows, gradient) = (parameters([[2.0, 0.0], [0.6, 0.8]]), parameters([[5.0, 7.0]; 2]));
        // Along (.6, .8): 8.6, of which (5.16, 6.88) go.
        let projected = DecoderNorm::Unit.project(&rows, gradient.clone());
        assert_w_dec(&projected, [[0.0, 7.0], [-0.16, 0.12]]);
        assert_w_dec(&DecoderNorm::Free.project(&rows, gradient), [[5.0, 7.0]; 2]);
    }

    #[test]
    fn rows_are_brought_to_norm_1() {
        let rows = parameters([[3.0, 4.0], [0.0, 0.0]]);
        let unit = Parameters::tied(unit_rows(rows.w_dec()), Tensor::zeros([2], &Device::flex()));
        assert_w_dec(&unit, [[0.6, 0.8], [0.0, 0.0]]);
    }
}
