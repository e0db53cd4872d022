//! What can go wrong with stored activations.

use blobs::StorageError;

/// Why stored activations could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A blob could not be read or written.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// No writer has left anything.
    #[error("no activations are stored here")]
    Empty,
    /// A name of a writer that is none.
    #[error("{writer:?} is no name of a writer: expected letters, digits, '-' and '_'")]
    Writer {
        /// The name.
        writer: String,
    },
    /// A manifest is no JSON, or lacks a key, or has an unknown one.
    #[error("{manifest}: not a manifest")]
    Manifest {
        /// Its name.
        manifest: String,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A manifest of another version or type of values, or with impossible counts.
    #[error("{manifest}: {key} = {actual}, expected {expected}")]
    ManifestValue {
        /// Its name.
        manifest: String,
        /// What is wrong in it.
        key: &'static str,
        /// What is read.
        expected: String,
        /// What it says.
        actual: String,
    },
    /// A writer is still at work, or died.
    #[error("{manifest}: its writer is not done after {n_shards} shards")]
    Unfinished {
        /// The manifest.
        manifest: String,
        /// Shards it has written.
        n_shards: usize,
    },
    /// A writer that is done was to write more.
    #[error("{manifest}: its writer is done, there is nothing to add")]
    Finished {
        /// The manifest.
        manifest: String,
    },
    /// Writers do not agree about what a row holds.
    #[error("{manifest}: columns {actual}, expected {expected}")]
    Columns {
        /// The manifest.
        manifest: String,
        /// Those of the others, with their widths.
        expected: String,
        /// Those of this one.
        actual: String,
    },
    /// A shard that the manifest names is not there.
    #[error("shard {shard} is missing")]
    MissingShard {
        /// Its name.
        shard: String,
    },
    /// A shard is not the one that was written.
    #[error("shard {shard} is damaged: SHA-256 {actual}, expected {expected}")]
    Hash {
        /// Its name.
        shard: String,
        /// By the manifest.
        expected: String,
        /// Of the bytes that are there.
        actual: String,
    },
    /// A shard is no safetensors file.
    #[error("shard {shard}: not a safetensors file")]
    Safetensors {
        /// Its name.
        shard: String,
        /// Why.
        source: safetensors::SafeTensorError,
    },
    /// A shard has other tensors than columns.
    #[error("shard {shard}: tensors {actual:?}, expected {expected:?}")]
    Tensors {
        /// Its name.
        shard: String,
        /// The columns, sorted.
        expected: Vec<String>,
        /// The tensors, sorted.
        actual: Vec<String>,
    },
    /// A column of a shard is stored in another type.
    #[error("shard {shard}: column {column} is stored as {actual}, expected F32")]
    Dtype {
        /// The shard.
        shard: String,
        /// The column.
        column: String,
        /// Its type.
        actual: safetensors::Dtype,
    },
    /// A column of a shard has another width, or not as many rows as the manifest says.
    #[error("shard {shard}: column {column} has shape {actual:?}, expected {expected:?}")]
    Shape {
        /// The shard.
        shard: String,
        /// The column.
        column: String,
        /// By the manifest.
        expected: Vec<usize>,
        /// In the shard.
        actual: Vec<usize>,
    },
    /// Rows of other columns than the store's were to be written.
    #[error("rows that do not have the columns {expected}")]
    Rows {
        /// The store's columns, with their widths.
        expected: String,
    },
    /// An option is out of its range.
    #[error("{option} = {actual}, expected {expected}")]
    Option {
        /// Its name.
        option: &'static str,
        /// Its range.
        expected: &'static str,
        /// What was asked for.
        actual: u64,
    },
}
