//! Why a checkpoint cannot be loaded.

use std::io;
use std::path::PathBuf;
use std::str::Utf8Error;

use burn::tensor::DType;
use hf_hub::api::sync::ApiError;
use thiserror::Error;

use crate::config::ConfigError;
use crate::text::TextError;

/// Why a checkpoint cannot be loaded. Every variant names the file.
#[derive(Debug, Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the fields are named for what the message says of them")]
pub enum LoadError {
    /// The operating system refused.
    #[error("cannot read `{}`", path.display())]
    Io { path: PathBuf, source: io::Error },
    /// A file that is not GGUF, given as a model.
    #[error(
        "`{}` is not a GGUF file: it begins with {actual:02x?}; pass a `.gguf` file, or the folder \
         of a model with `config.json` and safetensors", path.display()
    )]
    NotGguf { path: PathBuf, actual: [u8; 4] },
    /// A folder without a file that every model has.
    #[error(
        "`{}` has no {expected}; pass a folder as transformers saves it, or a `.gguf` file",
        path.display()
    )]
    MissingFile { path: PathBuf, expected: &'static str },
    /// Weights in a precision that the device does not have.
    #[error("the device {device} has no {dtype:?}; load the weights as WeightDtype::F32")]
    Dtype { dtype: DType, device: String },
    /// A version of GGUF that is not read here.
    #[error(
        "`{}` is GGUF version {actual}; versions 2 and 3 (little-endian) are read",
        path.display()
    )]
    GgufVersion { path: PathBuf, actual: u32 },
    /// Something claims more bytes than the file has left.
    #[error(
        "`{}` is truncated or damaged: {what} takes {expected} bytes, and {actual} are left; \
         fetch the file again", path.display()
    )]
    Truncated { path: PathBuf, what: String, expected: u64, actual: u64 },
    /// Something is larger than any sane file makes it.
    #[error("`{}`: {what} has size {actual}; at most {limit} is read", path.display())]
    TooLarge { path: PathBuf, what: String, limit: u64, actual: u64 },
    /// A string that is not UTF-8.
    #[error("`{}`: {what} is not UTF-8", path.display())]
    NotUtf8 { path: PathBuf, what: String, source: Utf8Error },
    /// A metadata value of no known type, or a boolean that is neither 0 nor 1.
    #[error("`{}`: metadata `{key}` has an unknown {what} {actual}", path.display())]
    MetadataEncoding { path: PathBuf, key: String, what: &'static str, actual: u32 },
    /// A metadata key that stands twice.
    #[error("`{}` gives metadata `{key}` twice", path.display())]
    DuplicateKey { path: PathBuf, key: String },
    /// An alignment that is not a power of two.
    #[error(
        "`{}` aligns its tensors to {actual} bytes, which is not a power of two",
        path.display()
    )]
    Alignment { path: PathBuf, actual: u64 },
    /// JSON that is not what it should be.
    #[error("`{}` is not the JSON that it should be", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    /// A model that cannot be built.
    #[error("the model `{}` cannot be used", path.display())]
    Config { path: PathBuf, source: ConfigError },
    /// A tokenizer or chat template that cannot be used.
    #[error("the tokenizer or chat template of `{}` cannot be used", path.display())]
    Text { path: PathBuf, source: TextError },
    /// A tensor that stands twice.
    #[error("`{}` has the tensor `{name}` twice", path.display())]
    DuplicateTensor { path: PathBuf, name: String },
    /// A tensor that is not there.
    #[error("`{}` has no tensor `{name}`", path.display())]
    MissingTensor { path: PathBuf, name: String },
    /// Values encoded in a way that is not read here.
    #[error(
        "`{}`: tensor `{name}` is encoded as {actual}; {supported} are read", path.display()
    )]
    TensorEncoding { path: PathBuf, name: String, supported: &'static str, actual: String },
    /// A tensor of no dimensions, or of more than any model has.
    #[error(
        "`{}`: tensor `{name}` has {actual} dimensions, and should have 1 to {limit}",
        path.display()
    )]
    TensorRank { path: PathBuf, name: String, limit: u32, actual: u32 },
    /// A shape that a tensor cannot have.
    #[error(
        "`{}`: tensor `{name}` has shape {actual:?}, and should have {expected}",
        path.display()
    )]
    TensorShape { path: PathBuf, name: String, expected: String, actual: Vec<u64> },
    /// A weight that is NaN or infinite.
    #[error(
        "`{}`: tensor `{name}` holds a value that is not finite; fetch the file again",
        path.display()
    )]
    NonFinite { path: PathBuf, name: String },
    /// Tensors that the architecture has no use for: the model would not be the file's.
    #[error(
        "`{}` has tensors that this architecture does not use: {}",
        path.display(), names.join(", ")
    )]
    UnexpectedTensors { path: PathBuf, names: Vec<String> },
    /// A tensor whose bytes are more or fewer than its shape needs.
    #[error("`{}`: tensor `{name}` needs {expected} bytes, and has {actual}", path.display())]
    TensorBytes { path: PathBuf, name: String, expected: u64, actual: u64 },
    /// A tensor that begins where it should not.
    #[error(
        "`{}`: tensor `{name}` begins at byte {actual}, and should at {expected}",
        path.display()
    )]
    TensorOffset { path: PathBuf, name: String, expected: String, actual: u64 },
    /// A shard that is not the name of a file in the folder.
    #[error(
        "`{}` names the shard {name:?}, which is not the name of a file in its folder",
        path.display()
    )]
    ShardName { path: PathBuf, name: String },
    /// A shard that is a link to somewhere else.
    #[error("`{}` is a link to `{}`, outside its folder", path.display(), target.display())]
    ShardLink { path: PathBuf, target: PathBuf },
    /// Something that cannot name a repository of the hub, or a file in one.
    #[error("{actual:?} is not `owner/name`, nor `owner/name:file.gguf`")]
    HubName { actual: String },
    /// The hub did not answer.
    #[error(
        "no answer from {endpoint} within {seconds} s; check the network, set HF_ENDPOINT to a \
         mirror, or pass the path of a local copy"
    )]
    HubUnreachable { endpoint: String, seconds: u64, source: io::Error },
    /// The hub refused, or the download failed.
    #[error("cannot fetch `{file}` of `{repo}` from the hub (a gated model needs HF_TOKEN)")]
    HubRequest { repo: String, file: String, source: Box<ApiError> },
}
