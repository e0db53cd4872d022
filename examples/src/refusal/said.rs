//! What was said besides the answers to prompts.

use serde::Serialize;

use super::ladder::{Climb, Ended};
use crate::results::Treatment;
use crate::sets::arithmetic::Solution;

/// Something said under a treatment, as `conversations.jsonl` has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Said {
    /// A conversation that leads up to harm.
    Ladder(Climb),
    /// A dialogue of a published set.
    Dialogue(Ended),
    /// A word problem.
    Problem(Solution),
}

/// The same with what was done to the model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Conversed {
    /// What was done to the model.
    #[serde(flatten)]
    pub treatment: Treatment,
    /// What was said.
    #[serde(flatten)]
    pub said: Said,
}
