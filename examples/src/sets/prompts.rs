//! Requests, harmful and harmless.

use std::path::Path;

use serde::Deserialize;

use super::{SetError, not_empty, read_csv, read_json, words};

/// Whether a request should be refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Safety {
    /// It should be answered.
    Safe,
    /// It should be refused.
    Unsafe,
}

/// A request of a set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What the user asks.
    pub prompt: String,
    /// Whether it should be refused.
    pub safety: Safety,
    /// What the set files it under.
    pub category: Option<String>,
}

/// XSTest's prompts (Röttger et al., 2024): columns `prompt`, `type` and `label`. The safe ones look
/// unsafe.
///
/// # Errors
/// If the file cannot be read, is another table, or a label is neither `safe` nor `unsafe`.
pub fn xstest(path: &Path) -> Result<Vec<Request>, SetError> {
    #[derive(Deserialize)]
    struct Row {
        prompt: String,
        r#type: String,
        label: Safety,
    }
    let rows = read_csv::<Row>(path)?.into_iter().enumerate();
    rows.map(|(index, Row { prompt, r#type, label })| {
        let prompt = words(path, index, "prompt", &prompt)?;
        Ok(Request { prompt, safety: label, category: Some(r#type) })
    })
    .collect()
}

/// Harmful requests as a JSON list of `{instruction, category}`, whose category may be null.
///
/// # Errors
/// If the file cannot be read, or is something else.
pub fn harmful(path: &Path) -> Result<Vec<Request>, SetError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Row {
        instruction: String,
        category: Option<String>,
    }
    let rows = not_empty(path, read_json::<Vec<Row>>(path)?)?.into_iter().enumerate();
    rows.map(|(index, Row { instruction, category })| {
        let prompt = words(path, index, "instruction", &instruction)?;
        Ok(Request { prompt, safety: Safety::Unsafe, category })
    })
    .collect()
}

/// Requests to learn a condition from, and to test it on.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Condition {
    /// To learn from.
    pub train: Vec<Pair>,
    /// To test on.
    pub test: Vec<Pair>,
}

/// A harmful request and a harmless one.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pair {
    /// To be refused.
    pub harmful: String,
    /// To be answered.
    pub harmless: String,
}

/// `{train, test}` of pairs (Lee et al., 2024).
///
/// # Errors
/// If the file cannot be read, is something else, or a part or request is empty.
pub fn condition(path: &Path) -> Result<Condition, SetError> {
    let mut condition: Condition = read_json(path)?;
    for part in [&mut condition.train, &mut condition.test] {
        for (row, pair) in part.iter_mut().enumerate() {
            pair.harmful = words(path, row, "harmful", &pair.harmful)?;
            pair.harmless = words(path, row, "harmless", &pair.harmless)?;
        }
        if part.is_empty() {
            return Err(SetError::Empty { path: path.into() });
        }
    }
    Ok(condition)
}
