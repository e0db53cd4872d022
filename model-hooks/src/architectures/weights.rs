//! Takes tensors out of a checkpoint by name, with the shape that the model needs.

use std::collections::BTreeSet;

use burn::tensor::{Device, Tensor, TensorData};

use crate::layers::Linear;
use crate::load::{LoadError, TensorSource};

/// A checkpoint from which each tensor is taken once.
pub(crate) struct Weights<'a> {
    tensors: &'a mut dyn TensorSource,
    left: BTreeSet<String>,
    device: &'a Device,
}

impl<'a> Weights<'a> {
    pub(crate) fn new(tensors: &'a mut dyn TensorSource, device: &'a Device) -> Self {
        let left = tensors.names().into_iter().collect();
        Self { tensors, left, device }
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

    /// A linear layer: the file's `{name}.weight` is `[d_out, d_in]`, ours `[d_in, d_out]`.
    pub(crate) fn linear(
        &mut self,
        name: &str,
        [d_in, d_out]: [usize; 2],
        bias: bool,
    ) -> Result<Linear, LoadError> {
        let values = self.values(&format!("{name}.weight"), &[d_out, d_in])?;
        let weight = TensorData::new(transposed(&values, d_out, d_in), [d_in, d_out]);
        let bias = bias.then(|| self.take(&format!("{name}.bias"), [d_out])).transpose()?;
        Ok(Linear { weight: Tensor::from_data(weight, self.device), bias })
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
        // Derived from the config; old checkpoints carry it all the same.
        let derived = |name: &String| name.ends_with("rotary_emb.inv_freq");
        let left: Vec<String> = self.left.into_iter().filter(|name| !derived(name)).collect();
        if left.is_empty() {
            return Ok(());
        }
        Err(LoadError::UnexpectedTensors { path: self.tensors.path().to_owned(), names: left })
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
