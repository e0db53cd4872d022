//! What is to be fitted to a stream, and whether it can be.

use serde_json::{Map, Value, json};

use super::{FitConfig, FitError};
use crate::source::{ActivationSource, column_idx};
use crate::train::{TrainConfig, TrainError};

/// One of the SAEs that are trained on a stream.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// What it is called in checkpoints.
    pub name: String,
    /// The column of the stream that it reads.
    pub column: String,
    /// The column that a transcoder reconstructs.
    pub target: Option<String>,
    /// What to train. Passes are the stream's matter: `n_passes` has to be 1.
    pub config: TrainConfig,
}

impl Run {
    /// An SAE on this column.
    pub fn new(name: impl Into<String>, column: impl Into<String>, config: TrainConfig) -> Self {
        Self { name: name.into(), column: column.into(), target: None, config }
    }

    /// A transcoder from one column to another.
    pub fn transcoding(self, target: impl Into<String>) -> Self {
        Self { target: Some(target.into()), ..self }
    }

    /// Where its columns stand in a stream.
    pub(super) fn columns(&self, source: &dyn ActivationSource) -> Result<Columns, FitError> {
        let idx = |name: &String| column_idx(source.columns(), name);
        Ok(Columns {
            read: idx(&self.column)?,
            reconstructed: self.target.as_ref().map(idx).transpose()?,
        })
    }
}

/// Where the columns of a run stand in the stream.
#[derive(Debug, Clone, Copy)]
pub(super) struct Columns {
    pub(super) read: usize,
    pub(super) reconstructed: Option<usize>,
}

/// The columns that runs are on.
pub(super) fn used(runs: &[Run], source: &dyn ActivationSource) -> Result<Vec<usize>, FitError> {
    let mut used = Vec::new();
    for run in runs {
        let Columns { read, reconstructed } = run.columns(source)?;
        used.extend([Some(read), reconstructed].into_iter().flatten());
    }
    Ok(used)
}

/// Checks that the runs can be made together on this stream, and gives their number of steps.
pub(super) fn check(
    runs: &[Run],
    source: &dyn ActivationSource,
    config: &FitConfig,
) -> Result<usize, FitError> {
    let expected = runs.first().ok_or(FitError::NoRuns)?.config.batch;
    for (option, actual) in [
        ("checkpoint_every", config.checkpoint_every),
        ("evaluate_every", config.evaluate_every),
        ("evaluate_rows", config.evaluate_rows),
    ] {
        if actual == 0 {
            let (expected, actual) = ("at least 1", 0.0);
            return Err(TrainError::Option { option, expected, actual }.into());
        }
    }
    if let Some(actual) = config.max_norm
        && !(actual.is_finite() && actual > 1.0)
    {
        let (option, expected) = ("max_norm", "a number above 1");
        return Err(TrainError::Option { option, expected, actual }.into());
    }
    for (idx, run) in runs.iter().enumerate() {
        let Run { name, config, .. } = run;
        config.validate(source.columns()[run.columns(source)?.read].width)?;
        if config.n_passes != 1 {
            let (option, expected) = ("n_passes", "1: passes over a stream are the stream's");
            return Err(
                TrainError::Option { option, expected, actual: config.n_passes as f64 }.into()
            );
        }
        if config.batch != expected {
            let (run, actual) = (name.clone(), config.batch);
            return Err(FitError::Batch { run, expected, actual });
        }
        if runs[..idx].iter().any(|run| run.name == *name) {
            return Err(FitError::SameName { name: name.clone() });
        }
    }
    let in_stream = source.n_rows().map(|n_rows| n_rows as usize / expected);
    let n_steps = config.n_steps.or(in_stream).ok_or(FitError::UnknownLength)?;
    if n_steps == 0 {
        let n_rows = source.n_rows().unwrap_or(0) as usize;
        return Err(TrainError::TooFewRows { n_rows, batch: expected }.into());
    }
    Ok(n_steps)
}

/// All that the bits of a run depend on.
pub(super) fn identity(
    runs: &[Run],
    source: &dyn ActivationSource,
    config: &FitConfig,
    n_steps: usize,
) -> Value {
    let columns = source.columns();
    let runs: Map<String, Value> = runs
        .iter()
        .map(|Run { name, column, target, config }| {
            let width = columns.iter().find(|c| c.name == *column).map(|c| c.width);
            let run =
                json!({ "column": column, "target": target, "d_in": width, "config": config });
            (name.clone(), run)
        })
        .collect();
    let order: Vec<&String> = runs.keys().collect();
    let mut identity = json!({
        "model": config.model,
        "data": source.fingerprint(),
        "dtype": "F32",
        "n_steps": n_steps,
        "order": order,
        "runs": runs,
    });
    // Absent where nothing is left out, as in checkpoints of before there was a choice.
    if let Some(max_norm) = config.max_norm {
        identity["max_norm"] = json!(max_norm);
    }
    identity
}
