//! How answers begin.

use std::path::Path;

use serde::Deserialize;

use super::{SetError, read_json, words};

/// Beginnings of answers of either kind, to learn a direction from (Lee et al., 2024).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Behavior {
    /// Beginnings of answers that comply.
    #[serde(rename = "compliant_responses")]
    pub complying: Vec<String>,
    /// Beginnings of answers that refuse.
    #[serde(rename = "non_compliant_responses")]
    pub refusing: Vec<String>,
}

/// `{compliant_responses, non_compliant_responses}`, lists of texts that break off.
///
/// # Errors
/// If the file cannot be read, is something else, or a list or a text is empty.
pub fn read(path: &Path) -> Result<Behavior, SetError> {
    let mut behavior: Behavior = read_json(path)?;
    let lists = [
        ("compliant_responses", &mut behavior.complying),
        ("non_compliant_responses", &mut behavior.refusing),
    ];
    for (field, list) in lists {
        for (row, text) in list.iter_mut().enumerate() {
            *text = words(path, row, field, text)?;
        }
        if list.is_empty() {
            return Err(SetError::Empty { path: path.into() });
        }
    }
    Ok(behavior)
}
