//! The bytes of a checkpoint.

use std::collections::HashMap;

use burn::tensor::Device;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::{CheckpointError, Difference};
use super::tensors::{Stored, Tensors, restore, store};
use crate::source::{Column, Position, Rows};
use crate::train::{ParameterName, TrainConfig, TrainState};

const VERSION: u32 = 1;
/// The key of the header among the metadata of the file.
const HEADER: &str = "checkpoint";

/// All of a training run between two steps.
pub(in crate::train) struct Checkpoint {
    /// What the run is; only the same one may go on.
    pub(in crate::train) identity: Value,
    /// Batches taken from the stream.
    pub(in crate::train) step: u64,
    /// Where the stream stands.
    pub(in crate::train) position: Position,
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
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut stored = Vec::new();
        let mut runs = Vec::new();
        for (idx, RunState { shape, state }) in self.runs.iter().enumerate() {
            runs.push(shape.clone());
            stored.extend(store(&run_prefix(idx), state));
        }
        let mut held = Vec::new();
        let mut position = &self.position;
        while let Some(behind) = position.behind.as_deref() {
            let (depth, rows) = (held.len(), &behind.held);
            let widths: Vec<usize> = (0..rows.n_columns()).map(|c| rows.width(c)).collect();
            for (column, &width) in widths.iter().enumerate() {
                let (name, shape) = (held_name(depth, column), vec![rows.n_rows(), width]);
                stored.push(Stored::floats(name, shape, rows.column(column)));
            }
            held.push(Held { n_rows: rows.n_rows(), widths });
            position = &behind.position;
        }
        let (identity, position) = (self.identity.clone(), self.position.clone());
        let header = Header { version: VERSION, identity, step: self.step, position, held, runs };
        let header = serde_json::to_string(&header).expect("plain values are JSON");
        let views = stored.iter().map(|Stored { name, dtype, shape, bytes }| {
            let view = TensorView::new(*dtype, shape.clone(), bytes);
            (name.as_str(), view.expect("the shape of its own values"))
        });
        let metadata = HashMap::from([(HEADER.to_owned(), header)]);
        safetensors::serialize(views, Some(metadata)).expect("views of whole tensors")
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
        let Header { version, identity, step, mut position, held, runs } = header;
        if version != VERSION {
            return Err(wrong("version", VERSION.to_string(), version.to_string()));
        }
        let file = SafeTensors::deserialize(bytes).map_err(not_safetensors)?;
        let mut tensors = Tensors { checkpoint: name, file, n_taken: 0 };
        let runs = runs.into_iter().enumerate().map(|(idx, shape)| {
            let state = restore(&run_prefix(idx), &shape, &mut tensors, device)?;
            Ok(RunState { shape, state })
        });
        let runs = runs.collect::<Result<_, CheckpointError>>()?;
        let n_held = held.len();
        let mut inner = Some(&mut position);
        for (depth, Held { n_rows, widths }) in held.into_iter().enumerate() {
            let Some(behind) = inner.take().and_then(|position| position.behind.as_mut()) else {
                return Err(wrong("held", format!("{depth} levels"), n_held.to_string()));
            };
            let columns: Vec<Column> =
                widths.iter().map(|&width| Column::new(String::new(), width)).collect();
            let values = widths.iter().enumerate().map(|(column, &width)| {
                tensors.floats(&held_name(depth, column), &[n_rows, width])
            });
            let values = values.collect::<Result<Vec<_>, _>>()?;
            behind.held = Rows::new(&columns, values)
                .map_err(|error| wrong("held", "whole rows".into(), error.to_string()))?;
            inner = Some(&mut behind.position);
        }
        if inner.is_some_and(|position| position.behind.is_some()) {
            return Err(wrong("held", "rows behind every level".into(), n_held.to_string()));
        }
        let (n_tensors, n_taken) = (tensors.file.len(), tensors.n_taken);
        if n_tensors != n_taken {
            return Err(wrong("tensors", n_taken.to_string(), n_tensors.to_string()));
        }
        Ok(Self { identity, step, position, runs })
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
        differ("", Some(&self.identity), Some(identity), &mut differences);
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
