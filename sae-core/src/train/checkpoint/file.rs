//! The bytes of a checkpoint.

use std::collections::HashMap;
use std::io::{self, Write};

use burn::tensor::Device;
use safetensors::SafeTensors;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::{CheckpointError, Difference};
use super::tensors::{Stored, Tensors, restore, store};
use crate::source::{Column, Position, Rows};
use crate::train::fit::Outliers;
use crate::train::{ParameterName, TrainConfig, TrainState};

const VERSION: u32 = 1;
/// The key of the header among the metadata of the file.
const HEADER: &str = "checkpoint";
/// What the first tensor's place in the file is a multiple of.
const ALIGNMENT: usize = 8;

/// All of a training run between two steps.
pub(in crate::train) struct Checkpoint {
    /// What the run is; only the same one may go on.
    pub(in crate::train) identity: Value,
    /// Batches taken from the stream.
    pub(in crate::train) step: u64,
    /// Where the stream stands.
    pub(in crate::train) position: Position,
    /// Rows that were taken from the stream before that, and come first.
    pub(in crate::train) ahead: Rows,
    /// What is left out, if anything is.
    pub(in crate::train) outliers: Option<Outliers>,
    pub(in crate::train) runs: Vec<RunState>,
}

/// One of the SAEs in training.
pub(in crate::train) struct RunState {
    pub(in crate::train) shape: RunShape,
    pub(in crate::train) state: TrainState,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    version: u32,
    identity: Value,
    step: u64,
    position: Position,
    /// Rows held behind each source that reads ahead, from the outermost inwards.
    held: Vec<Held>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ahead: Option<Held>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    outliers: Option<Outliers>,
    runs: Vec<RunShape>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Held {
    n_rows: usize,
    widths: Vec<usize>,
}

/// What a run is called, how large it is, and what it remembers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::train) struct RunShape {
    pub(in crate::train) name: String,
    pub(in crate::train) d_sae: usize,
    pub(in crate::train) d_in: usize,
    pub(in crate::train) d_out: usize,
    pub(in crate::train) parameters: Vec<ParameterName>,
    pub(in crate::train) second_moments: bool,
}

impl RunShape {
    pub(in crate::train) fn new(name: String, d_in: usize, config: &TrainConfig) -> Self {
        Self {
            name,
            d_sae: config.d_sae,
            d_in,
            d_out: config.sae(d_in).d_out(),
            parameters: config.parameters(),
            second_moments: config.optimizer.has_second_moments(),
        }
    }
}

impl Checkpoint {
    /// Writes the file, one tensor after the other: as safetensors has them, the widest types first
    /// and then by name.
    pub(super) fn write_to(&self, out: &mut impl Write) -> io::Result<()> {
        let mut stored = Vec::new();
        let mut runs = Vec::new();
        for (idx, RunState { shape, state }) in self.runs.iter().enumerate() {
            runs.push(shape.clone());
            stored.extend(store(&run_prefix(idx), state));
        }
        let mut held = Vec::new();
        let mut position = &self.position;
        while let Some(behind) = position.behind.as_deref() {
            let depth = held.len();
            held.push(store_rows(&behind.held, |column| held_name(depth, column), &mut stored));
            position = &behind.position;
        }
        let ahead = match self.ahead.n_rows() {
            0 => None,
            _ => Some(store_rows(&self.ahead, ahead_name, &mut stored)),
        };
        let header = Header {
            version: VERSION,
            identity: self.identity.clone(),
            step: self.step,
            position: self.position.clone(),
            held,
            ahead,
            outliers: self.outliers.clone(),
            runs,
        };
        let header = serde_json::to_string(&header)?;
        stored.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
        let mut end = 0;
        let infos = stored.iter().map(|tensor| {
            let begin = end;
            end += tensor.n_bytes();
            let (dtype, shape) = (tensor.dtype, tensor.shape.clone());
            (tensor.name.clone(), TensorInfo { dtype, shape, data_offsets: (begin, end) })
        });
        let metadata = Some(HashMap::from([(HEADER.to_owned(), header)]));
        let metadata = Metadata::new(metadata, infos.collect()).map_err(io::Error::other)?;
        let mut metadata = serde_json::to_vec(&metadata)?;
        metadata.resize(metadata.len().next_multiple_of(ALIGNMENT), b' ');
        out.write_all(&(metadata.len() as u64).to_le_bytes())?;
        out.write_all(&metadata)?;
        stored.iter().try_for_each(|tensor| tensor.write_to(out))
    }

    pub(super) fn from_bytes(
        name: &str,
        bytes: &[u8],
        device: &Device,
    ) -> Result<Self, CheckpointError> {
        let not_safetensors =
            |source| CheckpointError::Safetensors { name: name.to_owned(), source };
        let wrong = |key: &str, expected: String, actual: String| CheckpointError::Value {
            name: name.to_owned(),
            key: key.to_owned(),
            expected,
            actual,
        };
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(not_safetensors)?;
        let header = metadata.metadata().as_ref().and_then(|metadata| metadata.get(HEADER));
        let header = header.ok_or_else(|| wrong("header", "one".into(), "missing".into()))?;
        let header: Header = serde_json::from_str(header)
            .map_err(|source| CheckpointError::Header { name: name.to_owned(), source })?;
        let Header { version, identity, step, mut position, held, ahead, outliers, runs } = header;
        if version != VERSION {
            return Err(wrong("version", VERSION.to_string(), version.to_string()));
        }
        let file = SafeTensors::deserialize(bytes).map_err(not_safetensors)?;
        let mut tensors = Tensors { checkpoint: name, file, n_taken: 0 };
        let runs = runs.into_iter().enumerate().map(|(idx, shape)| {
            let state = restore(&run_prefix(idx), &shape, &mut tensors, device)?;
            let counts = (state.step as u64, state.n_skipped <= state.step);
            if counts != (step, true) {
                let expected = format!("{step} of them, some skipped");
                let actual = format!("{}, {} skipped", state.step, state.n_skipped);
                return Err(wrong(&format!("{}.step", run_prefix(idx)), expected, actual));
            }
            Ok(RunState { shape, state })
        });
        let runs = runs.collect::<Result<_, CheckpointError>>()?;
        let n_held = held.len();
        let mut inner = Some(&mut position);
        for (depth, rows) in held.into_iter().enumerate() {
            let Some(behind) = inner.take().and_then(|position| position.behind.as_mut()) else {
                return Err(wrong("held", format!("{depth} levels"), n_held.to_string()));
            };
            let names = |column| held_name(depth, column);
            behind.held = restore_rows(rows, names, &mut tensors)?;
            inner = Some(&mut behind.position);
        }
        if inner.is_some_and(|position| position.behind.is_some()) {
            return Err(wrong("held", "rows behind every level".into(), n_held.to_string()));
        }
        let ahead = match ahead {
            Some(rows) => restore_rows(rows, ahead_name, &mut tensors)?,
            None => Rows::default(),
        };
        let (n_tensors, n_taken) = (tensors.file.len(), tensors.n_taken);
        if n_tensors != n_taken {
            return Err(wrong("tensors", n_taken.to_string(), n_tensors.to_string()));
        }
        Ok(Self { identity, step, position, ahead, outliers, runs })
    }

    /// Checks that this is a checkpoint of the run with that identity, and of such SAEs.
    pub(in crate::train) fn check_is_of(
        &self,
        name: &str,
        identity: &Value,
        expected: &[RunShape],
    ) -> Result<(), CheckpointError> {
        let name = name.to_owned();
        let mut differences = Vec::new();
        // Through text once, as the checkpoint's: reading may round numbers.
        let identity = serde_json::from_str(&identity.to_string()).expect("our own JSON");
        differ("", Some(&self.identity), Some(&identity), &mut differences);
        if !differences.is_empty() {
            return Err(CheckpointError::OtherRun { name, differences });
        }
        let actual: Vec<&RunShape> = self.runs.iter().map(|run| &run.shape).collect();
        if !actual.iter().copied().eq(expected) {
            let (key, expected) = ("runs".to_owned(), format!("{expected:?}"));
            let actual = format!("{actual:?}");
            return Err(CheckpointError::Value { name, key, expected, actual });
        }
        Ok(())
    }
}

fn run_prefix(idx: usize) -> String {
    format!("runs.{idx}")
}

/// The tensors of some rows, and how many and how wide they are.
fn store_rows<'a>(
    rows: &'a Rows,
    name: impl Fn(usize) -> String,
    stored: &mut Vec<Stored<'a>>,
) -> Held {
    let n_rows = rows.n_rows();
    let widths: Vec<usize> = (0..rows.n_columns()).map(|column| rows.width(column)).collect();
    stored.extend(widths.iter().enumerate().map(|(column, &width)| {
        Stored::floats(name(column), vec![n_rows, width], rows.column(column))
    }));
    Held { n_rows, widths }
}

/// Rows back from their tensors.
fn restore_rows(
    Held { n_rows, widths }: Held,
    name: impl Fn(usize) -> String,
    tensors: &mut Tensors,
) -> Result<Rows, CheckpointError> {
    let columns: Vec<Column> =
        widths.iter().map(|&width| Column::new(String::new(), width)).collect();
    let values = widths
        .iter()
        .enumerate()
        .map(|(column, &width)| tensors.floats(&name(column), &[n_rows, width]));
    let values = values.collect::<Result<Vec<_>, _>>()?;
    Rows::new(&columns, values).map_err(|error| CheckpointError::Value {
        name: tensors.checkpoint.to_owned(),
        key: "rows".to_owned(),
        expected: "whole rows".to_owned(),
        actual: error.to_string(),
    })
}

fn ahead_name(column: usize) -> String {
    format!("ahead.{column}")
}

fn held_name(depth: usize, column: usize) -> String {
    format!("held.{depth}.{column}")
}

/// Collects the leaves in which two values differ.
fn differ(
    field: &str,
    expected: Option<&Value>,
    actual: Option<&Value>,
    differences: &mut Vec<Difference>,
) {
    if let (Some(Value::Object(expected)), Some(Value::Object(actual))) = (expected, actual) {
        let new = actual.keys().filter(|key| !expected.contains_key(*key));
        for key in expected.keys().chain(new) {
            let field = if field.is_empty() { key.clone() } else { format!("{field}.{key}") };
            differ(&field, expected.get(key), actual.get(key), differences);
        }
    } else if expected != actual {
        let words = |value: Option<&Value>| value.map_or("absent".to_owned(), Value::to_string);
        let (expected, actual) = (words(expected), words(actual));
        differences.push(Difference { field: field.to_owned(), expected, actual });
    }
}
