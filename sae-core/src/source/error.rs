//! What can go wrong while activations are read.

use crate::store::StoreError;

/// Why a stream of activations could not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The store behind it is damaged or cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What makes the activations failed.
    #[error("chunk {chunk} of the activations could not be made")]
    Chunk {
        /// Its number.
        chunk: u64,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A column has no whole number of rows, or not as many as the first one.
    #[error("column {column} of width {width} has {actual} values, expected {expected}")]
    Values {
        /// Its name.
        column: String,
        /// Its width.
        width: usize,
        /// Values by the number of rows.
        expected: usize,
        /// Values given.
        actual: usize,
    },
    /// Rows of other columns than those that were announced.
    #[error("rows of the columns {actual}, expected {expected}")]
    Columns {
        /// Those announced, with their widths.
        expected: String,
        /// Those that came.
        actual: String,
    },
    /// There is no column of this name.
    #[error("no column {column:?} among {present}")]
    NoColumn {
        /// The name.
        column: String,
        /// Those that there are, with their widths.
        present: String,
    },
    /// There is no such place in this stream.
    #[error("row {row} of part {part} is no place in this stream: expected {expected}")]
    Position {
        /// The part.
        part: u64,
        /// The row in it.
        row: u64,
        /// What there is.
        expected: String,
    },
    /// A buffer that mixes nothing or never gives a row.
    #[error("a buffer of {capacity} rows cannot keep a share of {share}: expected {expected}")]
    Mixing {
        /// Rows it holds.
        capacity: usize,
        /// The share that it keeps when it is filled up.
        share: f64,
        /// What is possible.
        expected: &'static str,
    },
}
