//! `y = x · w + b`.

use burn::tensor::Tensor;

/// A linear layer with its weight as `[d_in, d_out]`.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    pub(crate) weight: Tensor<2>,
    pub(crate) bias: Option<Tensor<1>>,
    /// The checkpoint's tensor that is the weight, transposed; none where the file has it otherwise.
    pub(crate) tensor: Option<String>,
}

impl Linear {
    /// # Shapes
    /// `x`: `[n, d_in]`; result: `[n, d_out]`. Products stay two-dimensional: batched ones with
    /// few rows are ten times slower on the CPU backend.
    pub(crate) fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let y = kernels::linear(x, self.weight.clone());
        match &self.bias {
            Some(bias) => y + bias.clone().unsqueeze(),
            None => y,
        }
    }
}
