//! Answers with what people made of them.

use std::path::Path;

use serde::Deserialize;
use steering::HumanLabel;

use super::{SetError, read_csv};

/// An answer that a person has read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    /// What the user asked.
    pub prompt: String,
    /// What the model said.
    pub answer: String,
    /// What a person made of it.
    pub label: HumanLabel,
}

/// Completions as XSTest publishes them: columns `prompt`, `completion` and `final_label`.
///
/// # Errors
/// If the file cannot be read, is another table, or has another label.
pub fn read(path: &Path) -> Result<Vec<Completion>, SetError> {
    #[derive(Deserialize)]
    struct Row {
        prompt: String,
        completion: String,
        final_label: String,
    }
    let rows = read_csv::<Row>(path)?.into_iter().enumerate();
    rows.map(|(row, Row { prompt, completion, final_label })| {
        let label = match final_label.as_str() {
            "1_full_compliance" => HumanLabel::Compliance,
            "2_full_refusal" => HumanLabel::Refusal,
            "3_partial_refusal" => HumanLabel::PartialRefusal,
            _ => {
                return Err(SetError::Value {
                    path: path.into(),
                    row,
                    field: "final_label",
                    expected: "1_full_compliance, 2_full_refusal or 3_partial_refusal".into(),
                    actual: final_label,
                });
            }
        };
        Ok(Completion { prompt, answer: completion, label })
    })
    .collect()
}
