//! Which tokens are steered.

use std::collections::BTreeMap;

use model_hooks::Positions;
use serde::{Deserialize, Serialize};

/// Prompts, answers, or both.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Every token.
    #[default]
    All,
    /// What the model was given: the tokens of the first pass, and of a shared prefix.
    Prompt,
    /// What it said.
    Answer,
}

/// The tokens of a conversation that are steered, by their absolute positions.
///
/// Autoencoders trained without position 0 should leave it alone: its activation is unlike all
/// others.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Region {
    /// The first position.
    pub from_position: usize,
    /// The first position that is left alone again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_position: Option<usize>,
    /// Prompts, answers, or both.
    #[serde(default)]
    pub part: Part,
    /// A token from which on a conversation is steered, itself included: the first of its kind,
    /// whether it was given or generated. A conversation without it is left alone. The tokens of a
    /// [`SharedPrefix`](model_hooks::SharedPrefix) count if it was run with the same hook.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub marker: Option<u32>,
}

impl Region {
    /// Every position from this one on.
    pub fn from_position(position: usize) -> Self {
        Self { from_position: position, ..Self::default() }
    }

    /// Prompts or answers only.
    #[must_use]
    pub fn part(mut self, part: Part) -> Self {
        self.part = part;
        self
    }

    pub(crate) fn contains(&self, position: usize, is_generated: bool) -> bool {
        let is_part = match self.part {
            Part::All => true,
            Part::Prompt => !is_generated,
            Part::Answer => is_generated,
        };
        is_part
            && position >= self.from_position
            && self.to_position.is_none_or(|to_position| position < to_position)
    }
}

/// What is known of the prompts of a pass, by their numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Prompts {
    /// The first position steered of each; `None` leaves it alone.
    pub(crate) starts: Option<Vec<Option<usize>>>,
    /// Tokens of each prompt, where a pass holds more than it.
    pub(crate) lengths: Option<Vec<usize>>,
}

impl Prompts {
    /// Whether a token belongs to the answer.
    pub(crate) fn is_generated(&self, positions: &Positions, row: usize, column: usize) -> bool {
        let Some(lengths) = &self.lengths else { return positions.is_generated(column) };
        let length = lengths.get(positions.prompt(row));
        length.is_some_and(|&n| positions.get(row, column).is_some_and(|position| position >= n))
    }

    /// The number of a prompt of the pass that there should be something known of and is not, with
    /// how many there are.
    pub(crate) fn unknown(&self, positions: &Positions) -> Option<(usize, usize)> {
        if positions.is_prefix() {
            return None;
        }
        let known = match (&self.starts, &self.lengths) {
            (Some(starts), Some(lengths)) => starts.len().min(lengths.len()),
            (Some(starts), None) => starts.len(),
            (None, Some(lengths)) => lengths.len(),
            (None, None) => return None,
        };
        let rows = 0..positions.n_rows();
        rows.map(|row| positions.prompt(row)).find(|&p| p >= known).map(|p| (known, p))
    }
}

/// Where the conversations of a generation came by a marker first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Markers {
    marker: u32,
    /// Absolute positions, by prompt and text within it.
    found: BTreeMap<(usize, usize), usize>,
    /// In the prefix that the conversations share, if it was run with the same hook.
    in_prefix: Option<usize>,
    /// Earlier columns and columns of the pass whose tokens were told last.
    told: Option<(usize, usize)>,
}

impl Markers {
    pub(crate) fn new(marker: u32) -> Self {
        Self { marker, found: BTreeMap::new(), in_prefix: None, told: None }
    }

    /// Looks through the tokens of a pass.
    pub(crate) fn look(&mut self, ids: &[u32], positions: &Positions) {
        let n = positions.n_columns();
        self.told = Some((positions.n_past(), n));
        if positions.n_past() == 0 {
            self.found.clear();
        }
        if positions.is_prefix() {
            self.in_prefix = None;
        }
        for (row, ids) in ids.chunks_exact(n).enumerate() {
            for column in (0..n).filter(|&column| ids[column] == self.marker) {
                let Some(position) = positions.get(row, column) else { continue };
                if positions.is_prefix() {
                    self.in_prefix.get_or_insert(position);
                    continue;
                }
                let conversation = positions.conversation(row, column).unwrap_or(0);
                self.found.entry((positions.prompt(row), conversation)).or_insert(position);
            }
        }
    }

    /// Whether this pass told its tokens.
    pub(crate) fn knows(&self, positions: &Positions) -> bool {
        self.told == Some((positions.n_past(), positions.n_columns()))
    }

    /// The position of the first marker of a column's conversation so far.
    pub(crate) fn position(
        &self,
        positions: &Positions,
        row: usize,
        column: usize,
    ) -> Option<usize> {
        let conversation = positions.conversation(row, column)?;
        let has_prefix = positions.is_prefix() || positions.n_prefix() > 0;
        let own = || self.found.get(&(positions.prompt(row), conversation)).copied();
        self.in_prefix.filter(|_| has_prefix).or_else(own)
    }

    /// The next pass has to tell its tokens anew.
    pub(crate) fn forget_pass(&mut self) {
        self.told = None;
    }
}
