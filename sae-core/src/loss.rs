//! Losses.

use burn::tensor::Tensor;

/// `mean_i ‖x̂ᵢ − xᵢ‖²`: summed over the width, averaged over the rows (SAELens' `mse_loss`).
///
/// # Shapes
/// `reconstruction` and `x`: `[n, d_in]`; result: `[1]`.
///
/// # Panics
/// If the shapes differ.
pub fn mse(reconstruction: Tensor<2>, x: Tensor<2>) -> Tensor<1> {
    assert_eq!(reconstruction.dims(), x.dims(), "mse: reconstruction does not fit x");
    let [n, _] = x.dims();
    (reconstruction - x).square().sum().div_scalar(n as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn mse_sums_over_the_width_and_averages_over_rows() {
        let device = Device::flex();
        let x = Tensor::from_data([[1.0, 2.0], [3.0, 4.0]], &device);
        let reconstruction = Tensor::from_data([[0.0, 2.0], [3.0, 1.0]], &device);
        // (1 + 0) and (0 + 9), over two rows.
        assert_eq!(mse(reconstruction, x).into_scalar::<f32>(), 5.0);
    }
}
