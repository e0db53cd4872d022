//! What can go wrong with blobs.

/// Why a blob could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// There is no such blob.
    #[error("{place}: no {name}")]
    Missing {
        /// Where it was looked for.
        place: String,
        /// Its name.
        name: String,
    },
    /// A name that could lead elsewhere, or is kept for blobs that are being written.
    #[error("{name:?} is no name of a blob: expected letters, digits, '-', '_' and inner dots")]
    Name {
        /// The name.
        name: String,
    },
    /// The system refused.
    #[error("{place}: {name} cannot be {action}")]
    Io {
        /// Where.
        place: String,
        /// What.
        name: String,
        /// What was to be done with it.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}
