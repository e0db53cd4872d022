//! Tensors of a safetensors file, each checked before it is believed.

use std::path::Path;

use burn::tensor::{DType, Device, Tensor, TensorData};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::error::FormatError;

/// The tensors of a file.
pub(super) struct Tensors<'a> {
    path: &'a Path,
    file: SafeTensors<'a>,
}

impl<'a> Tensors<'a> {
    /// From the bytes of the file at `path`.
    pub(super) fn new(path: &'a Path, bytes: &'a [u8]) -> Result<Self, FormatError> {
        let file = SafeTensors::deserialize(bytes)
            .map_err(|source| FormatError::Safetensors { path: path.to_owned(), source })?;
        Ok(Self { path, file })
    }

    /// Checks that the file has no tensors but these.
    pub(super) fn only(&self, names: &[&str]) -> Result<(), FormatError> {
        let mut present = self.file.names();
        present.sort_unstable();
        match present.into_iter().find(|name| !names.contains(name)) {
            None => Ok(()),
            Some(tensor) => Err(FormatError::UnexpectedTensor {
                path: self.path.to_owned(),
                tensor: tensor.to_owned(),
            }),
        }
    }

    /// A tensor of the expected shape, as `f32`, all finite.
    pub(super) fn floats<const D: usize>(
        &self,
        tensor: &'static str,
        expected: [usize; D],
        device: &Device,
    ) -> Result<Tensor<D>, FormatError> {
        let path = || self.path.to_owned();
        let view = self.file.tensor(tensor);
        let view = view.map_err(|_| FormatError::MissingTensor { path: path(), tensor })?;
        if view.shape() != expected {
            let (expected, actual) = (expected.to_vec(), view.shape().to_vec());
            return Err(FormatError::Shape { path: path(), tensor, expected, actual });
        }
        let values = values(&view).ok_or_else(|| FormatError::Dtype {
            path: path(),
            tensor,
            actual: view.dtype(),
        })?;
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            return Err(FormatError::NotFinite { path: path(), tensor, index });
        }
        Ok(Tensor::from_data(TensorData::new(values, expected), device))
    }
}

/// The elements as `f32`, if they are of a type that is read.
fn values(view: &TensorView) -> Option<Vec<f32>> {
    let bytes = view.data();
    let half = |dtype| {
        let data = TensorData::from_bytes_vec(bytes.to_vec(), view.shape().to_vec(), dtype);
        data.try_into_vec_as().expect("halves convert to floats")
    };
    match view.dtype() {
        Dtype::F32 => Some(
            bytes
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes(b.try_into().expect("four bytes")))
                .collect(),
        ),
        Dtype::BF16 => Some(half(DType::BF16)),
        Dtype::F16 => Some(half(DType::F16)),
        _ => None,
    }
}
