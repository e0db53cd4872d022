//! Streams of activations, with a position that can be saved and gone back to.
//!
//! A row is what one token has: an activation for each [`Column`]. Several hook points harvested in
//! one pass are several columns, and so are the input of a transcoder and what it has to predict;
//! whatever happens to the order of the rows, the columns of a row stay together.
//!
//! | rows from | source |
//! |---|---|
//! | memory | [`MatrixSource`](crate::train::MatrixSource) |
//! | files | [`StoreSource`](crate::store::StoreSource) |
//! | a model that runs meanwhile, or anything else | [`Chunks`] |
//! | another source, mixed over a longer distance | [`MixingBuffer`] |

mod buffer;
mod chunks;
mod error;
mod rows;

pub use buffer::{Mixing, MixingBuffer};
pub use chunks::Chunks;
pub use error::SourceError;
pub use rows::{Column, Rows};

pub(crate) use rows::{column_idx, in_words};

use serde::{Deserialize, Serialize};

/// A stream of rows. What it gives is determined by where it stands: a source that is sought to a
/// position of another one with the same [`fingerprint`](Self::fingerprint) goes on like that one,
/// bit for bit.
pub trait ActivationSource {
    /// What a row holds.
    fn columns(&self) -> &[Column];

    /// Rows of the whole stream, all passes, if that is known.
    fn n_rows(&self) -> Option<u64>;

    /// What tells this stream from others: rows, order and all. It may be expensive.
    fn fingerprint(&self) -> String;

    /// Appends the next `n` rows, fewer only at the end, and says how many.
    ///
    /// # Errors
    /// If they cannot be had. What has been appended then, and where the stream stands, is open
    /// until the next [`seek`](Self::seek).
    ///
    /// # Panics
    /// If `rows` has other columns.
    fn read(&mut self, n: usize, rows: &mut Rows) -> Result<usize, SourceError>;

    /// Where the stream stands.
    fn position(&self) -> Position;

    /// Goes where a stream like this one stood.
    ///
    /// # Errors
    /// If this stream has no such place.
    fn seek(&mut self, position: &Position) -> Result<(), SourceError>;
}

/// Where a stream stands: with the stream, all that determines what is read next.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// The part of the stream: a pass, a chunk, a filling of a buffer.
    pub part: u64,
    /// Rows of that part that have been given.
    pub row: u64,
    /// Of a source that reads ahead of what it gives: where the one behind it stands, and what is
    /// held between the two.
    pub behind: Option<Box<Behind>>,
}

/// What stands behind a source that reads ahead.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Behind {
    /// Where the source behind stands.
    pub position: Position,
    /// Rows read from there and not yet given. Kept apart from the numbers in a checkpoint.
    #[serde(skip)]
    pub held: Rows,
}

impl Position {
    /// At some row of some part.
    pub fn new(part: u64, row: u64) -> Self {
        Self { part, row, behind: None }
    }

    /// Checks that this is a row of one of so many passes, or the end of the last.
    pub(crate) fn check_in_passes(&self, n_passes: u64, n_rows: u64) -> Result<(), SourceError> {
        let Self { part, row, behind } = self;
        let there = (*part < n_passes && *row < n_rows) || (*part == n_passes && *row == 0);
        match behind.is_none() && there {
            true => Ok(()),
            false => Err(self.refused(format!("{n_passes} passes of {n_rows} rows"))),
        }
    }

    pub(crate) fn refused(&self, expected: impl Into<String>) -> SourceError {
        SourceError::Position { part: self.part, row: self.row, expected: expected.into() }
    }
}

impl<S: ActivationSource + ?Sized> ActivationSource for &mut S {
    fn columns(&self) -> &[Column] {
        (**self).columns()
    }

    fn n_rows(&self) -> Option<u64> {
        (**self).n_rows()
    }

    fn fingerprint(&self) -> String {
        (**self).fingerprint()
    }

    fn read(&mut self, n: usize, rows: &mut Rows) -> Result<usize, SourceError> {
        (**self).read(n, rows)
    }

    fn position(&self) -> Position {
        (**self).position()
    }

    fn seek(&mut self, position: &Position) -> Result<(), SourceError> {
        (**self).seek(position)
    }
}
