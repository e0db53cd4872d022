//! Why a checkpoint's description of its model cannot be used.

use thiserror::Error;

use crate::load::MetadataError;

/// Why a checkpoint's description of its model cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// `config.json` is not the JSON that it should be.
    #[error("the config is not valid JSON of a model's config")]
    Json {
        /// What is wrong with it, and where.
        #[source]
        source: serde_json::Error,
    },
    /// A metadata key is absent, or of another type than it should be.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// A field that has no default is absent.
    #[error("the config lacks `{field}`")]
    MissingField {
        /// The field, as the file would call it.
        field: &'static str,
    },
    /// A model of a family that is not built here.
    #[error("unknown architecture `{actual}`; {} are supported", supported.join(", "))]
    UnknownArchitecture {
        /// The name in the file.
        actual: String,
        /// The names that are known.
        supported: Vec<&'static str>,
    },
    /// An activation function that is not built here.
    #[error("unknown activation `{actual}`; silu, gelu, gelu_new and relu are supported")]
    UnknownActivation {
        /// The name in the file.
        actual: String,
    },
    /// A kind of rotary scaling that is not built here.
    #[error(
        "unknown rope type `{actual}`; default, linear, llama3, yarn and longrope are supported"
    )]
    UnknownRope {
        /// The name in the file.
        actual: String,
    },
    /// An option that would change what the model computes, and is not built here.
    #[error("the config sets `{field}` to {actual}, which is not supported")]
    Unsupported {
        /// The option, as the file calls it.
        field: String,
        /// Its value.
        actual: String,
    },
    /// A value that no model can have.
    #[error("`{field}` is {actual}, and should be {expected}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// What it should be.
        expected: &'static str,
        /// What it is.
        actual: String,
    },
}
