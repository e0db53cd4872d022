//! A run's state as named tensors, and back. The only place that knows what a state consists of.

use std::io::{self, Write};

use burn::tensor::{Device, Tensor, TensorData};
use safetensors::{Dtype, SafeTensors};

use super::error::CheckpointError;
use super::file::RunShape;
use crate::train::{Ages, Moments, ParameterName, Parameters, TrainState};

const PARAMETERS: &str = "parameters";
const FIRST: &str = "moments.first";
const SECOND: &str = "moments.second";
const AGES: &str = "ages";
const STEP: &str = "step";
const N_SKIPPED: &str = "n_skipped";
const INPUT_SCALE: &str = "input_scale";
const THRESHOLD: &str = "threshold";

/// Numbers that are turned into bytes at a time.
const BLOCK: usize = 1 << 14;

/// A tensor that is to stand in the file. Its bytes are made when they are written, so that no two
/// tensors are there as bytes at once.
pub(super) struct Stored<'a> {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    values: Values<'a>,
}

/// What a tensor's bytes are made of.
enum Values<'a> {
    Tensor(&'a Tensor<2>),
    Floats(&'a [f32]),
    Bytes(Vec<u8>),
}

impl<'a> Stored<'a> {
    pub(super) fn floats(name: String, shape: Vec<usize>, values: &'a [f32]) -> Self {
        Self { name, dtype: Dtype::F32, shape, values: Values::Floats(values) }
    }

    /// Bytes in the file.
    pub(super) fn n_bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }

    pub(super) fn write_to(&self, out: &mut impl Write) -> io::Result<()> {
        match &self.values {
            Values::Tensor(tensor) => {
                write_floats(tensor.to_data().as_slice().expect("parameters are f32"), out)
            }
            Values::Floats(values) => write_floats(values, out),
            Values::Bytes(bytes) => out.write_all(bytes),
        }
    }
}

fn write_floats(values: &[f32], out: &mut impl Write) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(4 * BLOCK.min(values.len()));
    for values in values.chunks(BLOCK) {
        bytes.clear();
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        out.write_all(&bytes)?;
    }
    Ok(())
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

    fn has(&self, name: &str) -> bool {
        self.file.tensor(name).is_ok()
    }

    fn count(&mut self, name: &str) -> Result<usize, CheckpointError> {
        let bytes = self.take(name, Dtype::U64, &[])?;
        Ok(u64::from_le_bytes(bytes.try_into().expect("eight bytes")) as usize)
    }

    fn number(&mut self, name: &str) -> Result<f64, CheckpointError> {
        let bytes = self.take(name, Dtype::F64, &[])?;
        Ok(f64::from_le_bytes(bytes.try_into().expect("eight bytes")))
    }
}

/// All of a state, under names that begin with `prefix`.
pub(super) fn store<'a>(prefix: &str, state: &'a TrainState) -> Vec<Stored<'a>> {
    let TrainState { parameters, moments, step, n_skipped, input_scale, ages, threshold } = state;
    let name = |part: &str| format!("{prefix}.{part}");
    let mut stored = Vec::new();
    for (part, parameters) in
        [(PARAMETERS, parameters), (FIRST, &moments.first), (SECOND, &moments.second)]
    {
        stored.extend(parameters.named().map(|(parameter, tensor)| Stored {
            name: format!("{}.{}", name(part), parameter.as_str()),
            dtype: Dtype::F32,
            shape: tensor.dims().to_vec(),
            values: Values::Tensor(tensor),
        }));
    }
    let (ages, n_ages) = (ages.rows(), ages.rows().len());
    let bytes = ages.iter().flat_map(|age| age.to_le_bytes()).collect();
    let (dtype, shape, values) = (Dtype::U64, vec![n_ages], Values::Bytes(bytes));
    stored.push(Stored { name: name(AGES), dtype, shape, values });
    // As bits: JSON would round them.
    let scalars = [
        (STEP, Dtype::U64, Some((*step as u64).to_le_bytes())),
        (N_SKIPPED, Dtype::U64, Some((*n_skipped as u64).to_le_bytes())),
        (INPUT_SCALE, Dtype::F64, Some(input_scale.to_le_bytes())),
        (THRESHOLD, Dtype::F64, threshold.map(f64::to_le_bytes)),
    ];
    let scalars = scalars.into_iter().filter_map(|(part, dtype, bytes)| {
        let values = Values::Bytes(bytes?.to_vec());
        Some(Stored { name: name(part), dtype, shape: Vec::new(), values })
    });
    stored.extend(scalars);
    stored
}

/// A state back from its tensors.
pub(super) fn restore(
    prefix: &str,
    shape: &RunShape,
    tensors: &mut Tensors,
    device: &Device,
) -> Result<TrainState, CheckpointError> {
    let name = |part: &str| format!("{prefix}.{part}");
    let mut set = |part: &str, names: &[ParameterName]| {
        let tensors = names.iter().map(|&parameter| {
            let name = format!("{}.{}", name(part), parameter.as_str());
            let RunShape { d_sae, d_in, d_out, .. } = *shape;
            Ok((parameter, tensors.tensor(&name, parameter.shape(d_sae, d_in, d_out), device)?))
        });
        tensors.collect::<Result<Parameters, CheckpointError>>()
    };
    let names = &shape.parameters;
    let (parameters, first) = (set(PARAMETERS, names)?, set(FIRST, names)?);
    let second = set(SECOND, if shape.second_moments { names } else { &[] })?;
    let ages = tensors.take(&name(AGES), Dtype::U64, &[shape.d_sae])?;
    let ages = ages.as_chunks().0.iter().map(|age| u64::from_le_bytes(*age)).collect();
    let threshold = match tensors.has(&name(THRESHOLD)) {
        true => Some(tensors.number(&name(THRESHOLD))?),
        false => None,
    };
    Ok(TrainState {
        parameters,
        moments: Moments { first, second },
        step: tensors.count(&name(STEP))?,
        n_skipped: tensors.count(&name(N_SKIPPED))?,
        input_scale: tensors.number(&name(INPUT_SCALE))?,
        ages: Ages::from_rows(ages),
        threshold,
    })
}
