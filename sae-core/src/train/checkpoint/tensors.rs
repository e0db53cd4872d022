//! A run's state as named tensors, and back. The only place that knows what a state consists of.

use burn::tensor::{Device, Tensor, TensorData};
use safetensors::{Dtype, SafeTensors};

use super::error::CheckpointError;
use super::file::RunShape;
use crate::train::{Ages, Moments, Parameters, TrainState};

/// A tensor as it stands in the file.
pub(super) struct Stored {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Vec<u8>,
}

impl Stored {
    pub(super) fn floats(name: String, shape: Vec<usize>, values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { name, dtype: Dtype::F32, shape, bytes }
    }
}

/// The tensors of a checkpoint, checked as they are taken out.
pub(super) struct Tensors<'a> {
    pub(super) checkpoint: &'a str,
    pub(super) file: SafeTensors<'a>,
    /// How many have been taken: in the end it has to be all.
    pub(super) n_taken: usize,
}

impl Tensors<'_> {
    /// The bytes of a tensor.
    pub(super) fn take(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
    ) -> Result<&[u8], CheckpointError> {
        let wrong = |actual: String| CheckpointError::Value {
            name: self.checkpoint.to_owned(),
            key: format!("tensor {name}"),
            expected: format!("{dtype} {shape:?}"),
            actual,
        };
        let view = self.file.tensor(name).map_err(|_| wrong("missing".to_owned()))?;
        if view.dtype() != dtype || view.shape() != shape {
            return Err(wrong(format!("{} {:?}", view.dtype(), view.shape())));
        }
        self.n_taken += 1;
        Ok(view.data())
    }

    pub(super) fn floats(
        &mut self,
        name: &str,
        shape: &[usize],
    ) -> Result<Vec<f32>, CheckpointError> {
        let bytes = self.take(name, Dtype::F32, shape)?;
        Ok(bytes.as_chunks().0.iter().map(|value| f32::from_le_bytes(*value)).collect())
    }

    fn tensor<const D: usize>(
        &mut self,
        name: &str,
        shape: [usize; D],
        device: &Device,
    ) -> Result<Tensor<D>, CheckpointError> {
        let values = self.floats(name, &shape)?;
        Ok(Tensor::from_data(TensorData::new(values, shape), device))
    }

    fn count(&mut self, name: &str) -> Result<u64, CheckpointError> {
        let bytes = self.take(name, Dtype::U64, &[])?;
        Ok(u64::from_le_bytes(bytes.try_into().expect("eight bytes")))
    }
}

/// All of a state, under names that begin with `prefix`.
pub(super) fn store(prefix: &str, state: &TrainState) -> Vec<Stored> {
    let TrainState { parameters, moments, step, input_scale, ages } = state;
    let name = |part: &str| format!("{prefix}.{part}");
    let mut stored = Vec::new();
    for (part, parameters) in [
        ("parameters", parameters),
        ("moments.first", &moments.first),
        ("moments.second", &moments.second),
    ] {
        let Parameters { w_enc, b_enc, w_dec, b_dec } = parameters;
        stored.push(of(name(&format!("{part}.w_enc")), w_enc));
        stored.push(of(name(&format!("{part}.b_enc")), b_enc));
        stored.push(of(name(&format!("{part}.w_dec")), w_dec));
        stored.push(of(name(&format!("{part}.b_dec")), b_dec));
    }
    let (ages, n_ages) = (ages.rows(), ages.rows().len());
    let bytes = ages.iter().flat_map(|age| age.to_le_bytes()).collect();
    stored.push(Stored { name: name("ages"), dtype: Dtype::U64, shape: vec![n_ages], bytes });
    // As bits: JSON would round it.
    let scalars = [
        ("step", Dtype::U64, (*step as u64).to_le_bytes()),
        ("input_scale", Dtype::F64, input_scale.to_le_bytes()),
    ];
    stored.extend(scalars.map(|(part, dtype, bytes)| Stored {
        name: name(part),
        dtype,
        shape: Vec::new(),
        bytes: bytes.to_vec(),
    }));
    stored
}

/// A state back from its tensors.
pub(super) fn restore(
    prefix: &str,
    &RunShape { d_sae, d_in, .. }: &RunShape,
    tensors: &mut Tensors,
    device: &Device,
) -> Result<TrainState, CheckpointError> {
    let name = |part: &str| format!("{prefix}.{part}");
    let mut parameters = |part: &str| {
        Ok::<_, CheckpointError>(Parameters {
            w_enc: tensors.tensor(&name(&format!("{part}.w_enc")), [d_sae, d_in], device)?,
            b_enc: tensors.tensor(&name(&format!("{part}.b_enc")), [d_sae], device)?,
            w_dec: tensors.tensor(&name(&format!("{part}.w_dec")), [d_sae, d_in], device)?,
            b_dec: tensors.tensor(&name(&format!("{part}.b_dec")), [d_in], device)?,
        })
    };
    let (weights, first) = (parameters("parameters")?, parameters("moments.first")?);
    let second = parameters("moments.second")?;
    let ages = tensors.take(&name("ages"), Dtype::U64, &[d_sae])?;
    let ages = ages.as_chunks().0.iter().map(|age| u64::from_le_bytes(*age)).collect();
    let input_scale = tensors.take(&name("input_scale"), Dtype::F64, &[])?;
    let input_scale = f64::from_le_bytes(input_scale.try_into().expect("eight bytes"));
    Ok(TrainState {
        parameters: weights,
        moments: Moments { first, second },
        step: tensors.count(&name("step"))? as usize,
        input_scale,
        ages: Ages::from_rows(ages),
    })
}

fn of<const D: usize>(name: String, tensor: &Tensor<D>) -> Stored {
    let values: Vec<f32> = tensor.to_data().try_into_vec_as().expect("parameters are f32");
    Stored::floats(name, tensor.dims().to_vec(), &values)
}
