//! Tensors of a file, each checked before it is believed.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{DType, Device, Tensor, TensorData};
use safetensors::SafeTensors;

use super::error::FormatError;

/// The tensors of a file, by name.
pub(super) struct Tensors<'a> {
    path: &'a Path,
    tensors: BTreeMap<String, Stored<'a>>,
}

/// A tensor as it lies in a file.
pub(super) struct Stored<'a> {
    pub(super) element: Element,
    pub(super) shape: Vec<usize>,
    /// Little-endian, in row-major order, as many as the shape says.
    pub(super) bytes: Cow<'a, [u8]>,
}

/// The type of a tensor's elements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Element {
    F64,
    F32,
    F16,
    BF16,
    I64,
    I32,
    /// One that no SAE has, under the name that its file has for it.
    Other(String),
}

impl Element {
    /// How it is called, in safetensors files and here.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::I64 => "I64",
            Self::I32 => "I32",
            Self::Other(name) => name,
        }
    }

    /// Bytes of one, where they are read.
    pub(super) fn size(&self) -> Option<usize> {
        match self {
            Self::F64 | Self::I64 => Some(8),
            Self::F32 | Self::I32 => Some(4),
            Self::F16 | Self::BF16 => Some(2),
            Self::Other(_) => None,
        }
    }

    fn of_safetensors(dtype: safetensors::Dtype) -> Self {
        match dtype {
            safetensors::Dtype::F64 => Self::F64,
            safetensors::Dtype::F32 => Self::F32,
            safetensors::Dtype::F16 => Self::F16,
            safetensors::Dtype::BF16 => Self::BF16,
            safetensors::Dtype::I64 => Self::I64,
            safetensors::Dtype::I32 => Self::I32,
            other => Self::Other(format!("{other:?}")),
        }
    }
}

impl<'a> Tensors<'a> {
    /// From the bytes of the safetensors file at `path`.
    pub(super) fn of_safetensors(path: &'a Path, bytes: &'a [u8]) -> Result<Self, FormatError> {
        let file = SafeTensors::deserialize(bytes)
            .map_err(|source| FormatError::Safetensors { path: path.to_owned(), source })?;
        let stored = |(name, view): (String, safetensors::tensor::TensorView<'a>)| {
            let element = Element::of_safetensors(view.dtype());
            let (shape, bytes) = (view.shape().to_vec(), view.data().into());
            (name, Stored { element, shape, bytes })
        };
        Ok(Self { path, tensors: file.tensors().into_iter().map(stored).collect() })
    }

    /// Tensors out of the file at `path`.
    pub(super) fn new(path: &'a Path, tensors: BTreeMap<String, Stored<'a>>) -> Self {
        Self { path, tensors }
    }

    /// The names, in order.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is such a tensor.
    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Checks that the file has no tensors but these.
    pub(super) fn only(&self, names: &[&str]) -> Result<(), FormatError> {
        match self.names().find(|name| !names.contains(name)) {
            None => Ok(()),
            Some(tensor) => Err(FormatError::UnexpectedTensor {
                path: self.path.to_owned(),
                tensor: tensor.to_owned(),
            }),
        }
    }

    /// The shape of a matrix that nothing else says.
    pub(super) fn matrix_shape(&self, tensor: &'static str) -> Result<[usize; 2], FormatError> {
        let shape = &self.stored(tensor)?.shape;
        shape[..].try_into().map_err(|_| FormatError::Rank {
            path: self.path.to_owned(),
            tensor,
            expected: 2,
            actual: shape.clone(),
        })
    }

    /// A tensor of the expected shape, as `f32`, all finite.
    pub(super) fn floats<const D: usize>(
        &self,
        tensor: &'static str,
        expected: [usize; D],
        device: &Device,
    ) -> Result<Tensor<D>, FormatError> {
        let values = self.values(tensor, &expected)?;
        Ok(Tensor::from_data(TensorData::new(values, expected), device))
    }

    /// A matrix that lies transposed.
    ///
    /// # Shapes
    /// `[expected[1], expected[0]]` in the file, `expected` given back.
    pub(super) fn transposed(
        &self,
        tensor: &'static str,
        expected: [usize; 2],
        device: &Device,
    ) -> Result<Tensor<2>, FormatError> {
        let [rows, columns] = expected;
        let values = self.values(tensor, &[columns, rows])?;
        // Laid out here, once: a kernel that met a view of it would lay it out each time.
        let row = |row| values.iter().skip(row).step_by(rows).copied();
        let values: Vec<f32> = (0..rows).flat_map(row).collect();
        Ok(Tensor::from_data(TensorData::new(values, expected), device))
    }

    /// The number of a tensor that has one, of shape `[]` or `[1]`.
    pub(super) fn number(&self, tensor: &'static str) -> Result<f32, FormatError> {
        let shape = &self.stored(tensor)?.shape;
        let expected: &[usize] = if shape[..] == [1] { &[1] } else { &[] };
        Ok(self.values(tensor, expected)?[0])
    }

    /// The whole number of a tensor that has one.
    pub(super) fn integer(&self, tensor: &'static str) -> Result<i64, FormatError> {
        let stored = self.stored(tensor)?;
        self.check_shape(tensor, stored, &[])?;
        let bytes = &stored.bytes[..];
        match stored.element {
            Element::I64 => Ok(i64::from_le_bytes(bytes.try_into().expect("eight bytes"))),
            Element::I32 => Ok(i32::from_le_bytes(bytes.try_into().expect("four bytes")).into()),
            _ => Err(self.wrong_element(tensor, stored, "I32 or I64")),
        }
    }

    /// Whether a tensor has such a shape.
    pub(super) fn has_shape(&self, tensor: &str, shape: &[usize]) -> bool {
        self.tensors.get(tensor).is_some_and(|stored| stored.shape == shape)
    }

    fn stored(&self, tensor: &'static str) -> Result<&Stored<'a>, FormatError> {
        let missing = || FormatError::MissingTensor { path: self.path.to_owned(), tensor };
        self.tensors.get(tensor).ok_or_else(missing)
    }

    fn check_shape(
        &self,
        tensor: &'static str,
        stored: &Stored,
        expected: &[usize],
    ) -> Result<(), FormatError> {
        if stored.shape == expected {
            return Ok(());
        }
        let (expected, actual) = (expected.to_vec(), stored.shape.clone());
        Err(FormatError::Shape { path: self.path.to_owned(), tensor, expected, actual })
    }

    fn wrong_element(
        &self,
        tensor: &'static str,
        stored: &Stored,
        expected: &'static str,
    ) -> FormatError {
        let (path, actual) = (self.path.to_owned(), stored.element.name().to_owned());
        FormatError::Dtype { path, tensor, expected, actual }
    }

    fn values(&self, tensor: &'static str, expected: &[usize]) -> Result<Vec<f32>, FormatError> {
        let stored = self.stored(tensor)?;
        self.check_shape(tensor, stored, expected)?;
        let values = floats(stored)
            .ok_or_else(|| self.wrong_element(tensor, stored, "F64, F32, BF16 or F16"))?;
        match infinite(&values) {
            None => Ok(values),
            Some(index) => Err(self.not_finite(tensor, index)),
        }
    }

    /// What was made of a tensor, all finite too.
    pub(super) fn check_finite(
        &self,
        tensor: &'static str,
        made: Tensor<1>,
    ) -> Result<Tensor<1>, FormatError> {
        let values: Vec<f32> = made.to_data().try_into_vec_as().expect("numbers are numbers");
        match infinite(&values) {
            None => Ok(made),
            Some(index) => Err(self.not_finite(tensor, index)),
        }
    }

    fn not_finite(&self, tensor: &'static str, index: usize) -> FormatError {
        FormatError::NotFinite { path: self.path.to_owned(), tensor, index }
    }
}

/// The first element that is no finite number.
fn infinite(values: &[f32]) -> Option<usize> {
    values.iter().position(|value| !value.is_finite())
}

/// The elements of an array in row-major order, which lie `strides` elements apart from `offset` on.
/// None if there are not so many.
pub(super) fn row_major(
    bytes: &[u8],
    size: usize,
    offset: usize,
    shape: &[usize],
    strides: &[usize],
) -> Option<Vec<u8>> {
    let n = shape.iter().try_fold(1usize, |n, &axis| n.checked_mul(axis))?;
    // What repeats elements takes more memory than the file warrants.
    if n > bytes.len() / size || shape.len() != strides.len() {
        return None;
    }
    if n == 0 {
        return Some(Vec::new());
    }
    let last = shape.iter().zip(strides).try_fold(offset, |last, (&axis, &stride)| {
        last.checked_add((axis - 1).checked_mul(stride)?)
    })?;
    if last >= bytes.len() / size {
        return None;
    }
    let mut out = Vec::with_capacity(n * size);
    let mut index = vec![0; shape.len()];
    for _ in 0..n {
        let at: usize =
            offset + index.iter().zip(strides).map(|(i, stride)| i * stride).sum::<usize>();
        out.extend_from_slice(&bytes[at * size..][..size]);
        for (i, &axis) in index.iter_mut().zip(shape).rev() {
            *i += 1;
            if *i < axis {
                break;
            }
            *i = 0;
        }
    }
    Some(out)
}

/// The elements as `f32`, if they are floats.
fn floats(stored: &Stored) -> Option<Vec<f32>> {
    let bytes = &stored.bytes[..];
    let half = |dtype| {
        let data = TensorData::from_bytes_vec(bytes.to_vec(), stored.shape.clone(), dtype);
        data.try_into_vec_as().expect("halves convert to floats")
    };
    match stored.element {
        Element::F64 => Some(
            bytes
                .chunks_exact(8)
                .map(|b| f64::from_le_bytes(b.try_into().expect("eight bytes")) as f32)
                .collect(),
        ),
        Element::F32 => Some(
            bytes
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes(b.try_into().expect("four bytes")))
                .collect(),
        ),
        Element::BF16 => Some(half(DType::BF16)),
        Element::F16 => Some(half(DType::F16)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_are_followed() {
        let bytes = [0, 1, 2, 3, 4, 5];
        let read = |offset, shape: &[usize], strides: &[usize]| {
            row_major(&bytes, 1, offset, shape, strides)
        };
        assert_eq!(read(0, &[2, 3], &[3, 1]), Some(vec![0, 1, 2, 3, 4, 5]));
        assert_eq!(read(0, &[3, 2], &[1, 3]), Some(vec![0, 3, 1, 4, 2, 5]));
        assert_eq!(read(4, &[2], &[1]), Some(vec![4, 5]));
        assert_eq!(read(5, &[], &[]), Some(vec![5]));
        assert_eq!(read(0, &[0, 3], &[3, 1]), Some(vec![]));
        assert_eq!(row_major(&bytes, 2, 0, &[3], &[1]), Some(bytes.to_vec()));
    }

    #[test]
    fn what_is_not_there_is_not_read() {
        let bytes = [0; 6];
        let read = |offset, shape: &[usize], strides: &[usize]| {
            row_major(&bytes, 1, offset, shape, strides)
        };
        assert_eq!(read(1, &[2, 3], &[3, 1]), None);
        assert_eq!(read(0, &[2], &[6]), None);
        assert_eq!(read(0, &[7], &[0]), None);
        assert_eq!(read(0, &[2], &[1, 1]), None);
        assert_eq!(read(0, &[usize::MAX, 2], &[1, 1]), None);
        assert_eq!(read(0, &[2], &[usize::MAX]), None);
        assert_eq!(read(usize::MAX, &[2], &[1]), None);
        assert_eq!(read(6, &[], &[]), None);
    }
}
