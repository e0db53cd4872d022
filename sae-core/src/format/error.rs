//! What can be wrong with a file.

use std::path::PathBuf;

use crate::config::ConfigError;

/// Why an SAE could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The system refused.
    #[error("{}: cannot be read or written", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// The configuration is no JSON, or lacks a key, or has one of another type.
    #[error("{}: not a configuration", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The weights are no safetensors file: cut off, for one.
    #[error("{}: not a safetensors file", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// Why.
        source: safetensors::SafeTensorError,
    },
    /// A tensor is not there.
    #[error("{}: no tensor {tensor}", path.display())]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// Its name.
        tensor: &'static str,
    },
    /// A tensor is there that such an SAE does not have, so the file means something else.
    #[error("{}: tensor {tensor} does not belong to this architecture", path.display())]
    UnexpectedTensor {
        /// The file.
        path: PathBuf,
        /// Its name.
        tensor: String,
    },
    /// A tensor does not have the shape that the configuration says.
    #[error("{}: tensor {tensor} has shape {actual:?}, expected {expected:?}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// Its name.
        tensor: &'static str,
        /// The shape by the configuration.
        expected: Vec<usize>,
        /// The shape in the file.
        actual: Vec<usize>,
    },
    /// A tensor is stored in a type that is not read.
    #[error("{}: tensor {tensor} is stored as {actual}, expected F32, BF16 or F16", path.display())]
    Dtype {
        /// The file.
        path: PathBuf,
        /// Its name.
        tensor: &'static str,
        /// The type in the file.
        actual: safetensors::Dtype,
    },
    /// A tensor holds a NaN or an infinity.
    #[error("{}: tensor {tensor} is not finite at element {index}", path.display())]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// Its name.
        tensor: &'static str,
        /// The first such element, in row-major order.
        index: usize,
    },
    /// No architecture that we have heard of.
    #[error("{}: unknown architecture {architecture:?}", path.display())]
    UnknownArchitecture {
        /// The file.
        path: PathBuf,
        /// Its name.
        architecture: String,
    },
    /// An architecture that the format has and this crate does not run.
    #[error("{}: architecture {architecture:?} is not supported", path.display())]
    UnsupportedArchitecture {
        /// The file.
        path: PathBuf,
        /// Its name.
        architecture: String,
    },
    /// An option whose value this crate does not know or not follow.
    #[error("{}: {key} = {actual:?} is not supported, expected {expected}", path.display())]
    UnsupportedOption {
        /// The file.
        path: PathBuf,
        /// The option.
        key: &'static str,
        /// What is supported.
        expected: &'static str,
        /// What the file says.
        actual: String,
    },
    /// The configuration describes no SAE.
    #[error("{}: impossible SAE", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ConfigError,
    },
    /// The folder to write holds something that is not an SAE's, which replacing it would lose.
    #[error("{}: will not be replaced, it holds {entry:?}", path.display())]
    Occupied {
        /// The folder.
        path: PathBuf,
        /// What it holds.
        entry: String,
    },
}

impl FormatError {
    /// For `map_err` on what the system says about `path`.
    pub(super) fn io(path: &std::path::Path) -> impl Fn(std::io::Error) -> Self + '_ {
        |source| Self::Io { path: path.to_owned(), source }
    }
}
