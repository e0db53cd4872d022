//! Takes tensors out of a checkpoint by name, with the shape that the model needs.

use std::collections::BTreeSet;

use burn::tensor::{DType, Device, Tensor, TensorData, bf16};

use crate::layers::{Linear, Norm};
use crate::load::{LoadError, TensorSource};

/// How matrices of weights are kept in memory. Norms and biases, and all arithmetic, are f32.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WeightDtype {
    /// Four bytes a weight: what the file says, or is widened to.
    #[default]
    F32,
    /// Two bytes a weight, rounded to eight bits of mantissa: half the memory, and up to twice the
    /// speed where reading weights is what takes the time, as in decoding.
    Bf16,
}

impl WeightDtype {
    fn matrix(self, values: Vec<f32>, shape: [usize; 2], device: &Device) -> Tensor<2> {
        match self {
            Self::F32 => Tensor::from_data(TensorData::new(values, shape), device),
            Self::Bf16 => {
                let values: Vec<bf16> = values.into_iter().map(bf16::from_f32).collect();
                Tensor::from_data(TensorData::new(values, shape), (device, DType::BF16))
            }
        }
    }
}

/// A checkpoint from which each tensor is taken once.
pub(crate) struct Weights<'a> {
    tensors: &'a mut dyn TensorSource,
    left: BTreeSet<String>,
    dtype: WeightDtype,
    device: &'a Device,
}

impl<'a> Weights<'a> {
    pub(crate) fn new(
        tensors: &'a mut dyn TensorSource,
        dtype: WeightDtype,
        device: &'a Device,
    ) -> Result<Self, LoadError> {
        if dtype == WeightDtype::Bf16 && !device.supports_dtype(DType::BF16) {
            return Err(LoadError::Dtype { dtype: DType::BF16, device: format!("{device:?}") });
        }
        let left = tensors.names().into_iter().collect();
        Ok(Self { tensors, left, dtype, device })
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.left.contains(name)
    }

    /// A tensor as it is in the file.
    pub(crate) fn take<const D: usize>(
        &mut self,
        name: &str,
        shape: [usize; D],
    ) -> Result<Tensor<D>, LoadError> {
        let values = self.values(name, &shape)?;
        Ok(Tensor::from_data(TensorData::new(values, shape), self.device))
    }

    /// A matrix as it is in the file.
    pub(crate) fn matrix(&mut self, name: &str, shape: [usize; 2]) -> Result<Tensor<2>, LoadError> {
        let values = self.values(name, &shape)?;
        Ok(self.dtype.matrix(values, shape, self.device))
    }

    /// As [`take`](Self::take), of as many rows of this width as the file has.
    pub(crate) fn take_rows(&mut self, name: &str, width: usize) -> Result<Tensor<2>, LoadError> {
        let shape = self.tensors.tensor(name)?.shape;
        let n = shape.first().copied().unwrap_or(1).max(1);
        self.take(name, [n, width])
    }

    /// A linear layer: the file's `{name}.weight` is `[d_out, d_in]`, ours `[d_in, d_out]`.
    pub(crate) fn linear(
        &mut self,
        name: &str,
        [d_in, d_out]: [usize; 2],
        bias: bool,
    ) -> Result<Linear, LoadError> {
        let linear = self.fused(name, [d_in, d_out], bias)?.linear(0..d_out);
        Ok(Linear { tensor: Some(format!("{name}.weight")), ..linear })
    }

    /// A linear layer whose file has it as `[d_in, d_out]`, with a bias.
    pub(crate) fn linear_columns(
        &mut self,
        name: &str,
        widths @ [_, d_out]: [usize; 2],
    ) -> Result<Linear, LoadError> {
        Ok(self.fused_columns(name, widths)?.linear(0..d_out))
    }

    /// Several linear layers that the file has as one, `{name}.weight` as `[d_out, d_in]`.
    pub(crate) fn fused(
        &mut self,
        name: &str,
        [d_in, d_out]: [usize; 2],
        bias: bool,
    ) -> Result<Fused<'a>, LoadError> {
        let weight = self.values(&format!("{name}.weight"), &[d_out, d_in])?;
        let bias = bias.then(|| self.values(&format!("{name}.bias"), &[d_out])).transpose()?;
        Ok(Fused { weight, bias, d_in, dtype: self.dtype, device: self.device })
    }

    /// As [`fused`](Self::fused), for a file that has the weight as `[d_in, d_out]`; with a bias.
    pub(crate) fn fused_columns(
        &mut self,
        name: &str,
        [d_in, d_out]: [usize; 2],
    ) -> Result<Fused<'a>, LoadError> {
        let weight = self.values(&format!("{name}.weight"), &[d_in, d_out])?;
        let bias = Some(self.values(&format!("{name}.bias"), &[d_out])?);
        let weight = transposed(&weight, d_in, d_out);
        Ok(Fused { weight, bias, d_in, dtype: self.dtype, device: self.device })
    }

    /// A root-mean-square norm.
    pub(crate) fn rms_norm(
        &mut self,
        name: &str,
        width: usize,
        epsilon: f64,
    ) -> Result<Norm, LoadError> {
        let gain = self.take(&format!("{name}.weight"), [width])?;
        Ok(Norm { gain, bias: None, epsilon })
    }

    /// A layer norm.
    pub(crate) fn layer_norm(
        &mut self,
        name: &str,
        width: usize,
        epsilon: f64,
    ) -> Result<Norm, LoadError> {
        let gain = self.take(&format!("{name}.weight"), [width])?;
        let bias = Some(self.take(&format!("{name}.bias"), [width])?);
        Ok(Norm { gain, bias, epsilon })
    }

    fn values(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, LoadError> {
        let tensor = self.tensors.tensor(name)?;
        if tensor.shape != shape {
            return Err(LoadError::TensorShape {
                path: self.tensors.path().to_owned(),
                name: name.to_owned(),
                expected: format!("{shape:?}"),
                actual: tensor.shape.iter().map(|&n| n as u64).collect(),
            });
        }
        if tensor.values.iter().any(|x| !x.is_finite()) {
            return Err(LoadError::NonFinite {
                path: self.tensors.path().to_owned(),
                name: name.to_owned(),
            });
        }
        self.left.remove(name);
        Ok(tensor.values)
    }

    /// Fails if the checkpoint holds tensors that nobody took: the model would not be the file's.
    pub(crate) fn finish(self) -> Result<(), LoadError> {
        // Derived from the config, or the causal mask; old checkpoints carry them all the same.
        let derived = |name: &String| {
            const BUFFERS: [&str; 5] = [
                ".rotary_emb.inv_freq",
                ".attn.bias",
                ".attn.masked_bias",
                ".attention.bias",
                ".attention.masked_bias",
            ];
            BUFFERS.iter().any(|buffer| name.ends_with(buffer))
        };
        let left: Vec<String> = self.left.into_iter().filter(|name| !derived(name)).collect();
        if left.is_empty() {
            return Ok(());
        }
        Err(LoadError::UnexpectedTensors { path: self.tensors.path().to_owned(), names: left })
    }
}

/// Linear layers that a file has as one.
pub(crate) struct Fused<'a> {
    /// `[d_out, d_in]`.
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    d_in: usize,
    dtype: WeightDtype,
    device: &'a Device,
}

impl Fused<'_> {
    /// The layer of these of its outputs.
    pub(crate) fn linear(&self, outputs: impl Iterator<Item = usize> + Clone) -> Linear {
        let d_in = self.d_in;
        let rows = outputs.clone().flat_map(|i| &self.weight[i * d_in..(i + 1) * d_in]);
        let rows: Vec<f32> = rows.copied().collect();
        let d_out = rows.len() / d_in;
        let weight = transposed(&rows, d_out, d_in);
        let weight = self.dtype.matrix(weight, [d_in, d_out], self.device);
        let bias = self.bias.as_ref().map(|bias| {
            let bias: Vec<f32> = outputs.map(|i| bias[i]).collect();
            Tensor::from_data(TensorData::new(bias, [d_out]), self.device)
        });
        Linear { weight, bias, tensor: None }
    }
}

/// `[rows, columns]` to `[columns, rows]`, in blocks that fit the cache.
pub(crate) fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    const BLOCK: usize = 32;
    let mut out = vec![0f32; values.len()];
    for row_block in (0..rows).step_by(BLOCK) {
        for column_block in (0..columns).step_by(BLOCK) {
            for row in row_block..(row_block + BLOCK).min(rows) {
                for column in column_block..(column_block + BLOCK).min(columns) {
                    out[column * rows + row] = values[row * columns + column];
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposed_swaps_rows_and_columns() {
        let (rows, columns) = (37, 65);
        let values: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
        let out = transposed(&values, rows, columns);
        for row in 0..rows {
            for column in 0..columns {
                assert_eq!(out[column * rows + row], values[row * columns + column]);
            }
        }
    }
}
