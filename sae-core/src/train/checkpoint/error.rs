//! What can go wrong with checkpoints.

use std::path::PathBuf;

use blobs::StorageError;

/// Why a training run could not be saved or gone on with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The checkpoints cannot be listed, read or removed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A checkpoint could not be written: the disk is full, for one.
    #[error("the checkpoint of step {step} could not be written; the run can go on from {kept}")]
    Save {
        /// Steps that were done.
        step: u64,
        /// The last good one, which is still there.
        kept: String,
        /// Why.
        source: StorageError,
    },
    /// Another trainer works on this folder.
    #[error("{}: another trainer is at work here", folder.display())]
    Locked {
        /// The folder.
        folder: PathBuf,
    },
    /// The folder cannot be locked.
    #[error("{}: cannot be locked", folder.display())]
    Lock {
        /// The folder.
        folder: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A checkpoint is not as it was written: its name has another hash.
    #[error("checkpoint {name} is damaged: its bytes have SHA-256 {actual}")]
    Damaged {
        /// Its name, with the hash that is expected.
        name: String,
        /// The hash of its bytes.
        actual: String,
    },
    /// A checkpoint is no safetensors file.
    #[error("checkpoint {name}: not a safetensors file")]
    Safetensors {
        /// Its name.
        name: String,
        /// Why.
        source: safetensors::SafeTensorError,
    },
    /// A checkpoint's header is no JSON, or lacks a key, or has an unknown one.
    #[error("checkpoint {name}: not a header")]
    Header {
        /// Its name.
        name: String,
        /// Where and why.
        source: serde_json::Error,
    },
    /// Something in a checkpoint is not there, or not as such a run would have it.
    #[error("checkpoint {name}: {key} is {actual}, expected {expected}")]
    Value {
        /// Its name.
        name: String,
        /// What is wrong in it.
        key: String,
        /// What would be right.
        expected: String,
        /// What it has.
        actual: String,
    },
    /// There are checkpoints, and none can be read. Starting anew is for the caller to decide.
    #[error("none of {} checkpoints can be read: {}", passed_over.len(), in_words(passed_over))]
    NoneUsable {
        /// What is wrong with each, newest first.
        passed_over: Vec<PassedOver>,
    },
    /// The checkpoint is of another run.
    #[error("checkpoint {name} is of another run: {}", in_words(differences))]
    OtherRun {
        /// Its name.
        name: String,
        /// All that differs.
        differences: Vec<Difference>,
    },
}

/// Something that differs between the run of a checkpoint and the one that was to go on from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// What: `runs.NAME.config.k`, for one.
    pub field: String,
    /// In the checkpoint.
    pub expected: String,
    /// In the run that was to go on.
    pub actual: String,
}

/// A checkpoint that could not be used.
#[derive(Debug)]
pub struct PassedOver {
    /// Its name.
    pub name: String,
    /// Why.
    pub error: CheckpointError,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Self { field, expected, actual } = self;
        write!(f, "{field} is {actual}, expected {expected}")
    }
}

impl std::fmt::Display for PassedOver {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        self.error.fmt(f)
    }
}

fn in_words<T: ToString>(all: &[T]) -> String {
    let words: Vec<String> = all.iter().map(T::to_string).collect();
    words.join("; ")
}
