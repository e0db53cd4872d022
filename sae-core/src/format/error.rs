//! What can be wrong with a file.

use std::path::PathBuf;

use crate::activation::Activation;
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
    /// The weights are no zip archive: cut off, for one.
    #[error("{}: not a zip archive", path.display())]
    Zip {
        /// The file.
        path: PathBuf,
        /// Why.
        source: zip::result::ZipError,
    },
    /// A file in a zip archive claims a size that the archive does not warrant, or has another.
    #[error("{}: {entry} claims {claimed} bytes, expected {expected}", path.display())]
    ZipEntry {
        /// The file.
        path: PathBuf,
        /// The file in it.
        entry: String,
        /// How long it should be, or may be at most.
        expected: u64,
        /// How long it says it is.
        claimed: u64,
    },
    /// An array of NumPy's has a header that is not understood.
    #[error("{}: {entry} is no NumPy array, expected {expected}", path.display())]
    Npy {
        /// The file.
        path: PathBuf,
        /// The array in it.
        entry: String,
        /// What should have come.
        expected: &'static str,
    },
    /// A checkpoint of PyTorch's is more than tensors and plain values, or cut off.
    #[error("{}: byte {offset} of {entry}: {found}, expected {expected}", path.display())]
    Pickle {
        /// The file.
        path: PathBuf,
        /// The file in it.
        entry: String,
        /// Where.
        offset: usize,
        /// What may stand there.
        expected: &'static str,
        /// What does.
        found: String,
    },
    /// No format has such files.
    #[error("{}: no SAE; a folder with {} would be one", path.display(), looked_for.join(", or "))]
    Unrecognised {
        /// The file or folder.
        path: PathBuf,
        /// The files that would have been read.
        looked_for: Vec<String>,
    },
    /// There are files of two formats.
    #[error("{}: holds {first} and {second}: read the one that is meant", path.display())]
    Ambiguous {
        /// The folder.
        path: PathBuf,
        /// The files of one format.
        first: String,
        /// The files of the other.
        second: String,
    },
    /// The format is one that this program was built without.
    #[error("{}: needs the feature {feature} of sae-core", path.display())]
    NeedsFeature {
        /// The file.
        path: PathBuf,
        /// The feature.
        feature: &'static str,
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
    /// A tensor has another number of axes, where its shape is what says the SAE's.
    #[error("{}: tensor {tensor} has shape {actual:?}, expected {expected} axes", path.display())]
    Rank {
        /// The file.
        path: PathBuf,
        /// Its name.
        tensor: &'static str,
        /// How many axes it should have.
        expected: usize,
        /// The shape in the file.
        actual: Vec<usize>,
    },
    /// A tensor is stored in a type that is not read.
    #[error("{}: tensor {tensor} is stored as {actual}, expected {expected}", path.display())]
    Dtype {
        /// The file.
        path: PathBuf,
        /// Its name.
        tensor: &'static str,
        /// The types that are read.
        expected: &'static str,
        /// The type in the file.
        actual: String,
    },
    /// A tensor has a number that contradicts the configuration.
    #[error("{}: tensor {tensor} is {actual}, the configuration says {expected}", path.display())]
    Contradiction {
        /// The file.
        path: PathBuf,
        /// Its name.
        tensor: &'static str,
        /// The number by the configuration.
        expected: i64,
        /// The number in the file.
        actual: i64,
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
    /// The format to write has no name for such an SAE.
    #[error(
        "{}: no architecture for {activation:?}{}",
        path.display(), if *transcodes { " in a transcoder" } else { "" }
    )]
    NoArchitecture {
        /// The file.
        path: PathBuf,
        /// What makes the latents sparse.
        activation: Activation,
        /// Whether it is a transcoder.
        transcodes: bool,
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
