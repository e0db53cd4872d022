//! Opens checkpoints: nothing silently missing, nothing trusted.
//!
//! A checkpoint is a GGUF file or a folder as `transformers` saves it. Either gives the same four
//! things: a [`ModelConfig`], the weights under their Hugging Face names, a [`Tokenizer`] and a
//! [`ChatTemplate`]. Headers are checked against the size of their file before anything is
//! allocated, and weights are read one tensor at a time.

mod element;
mod error;
mod folder;
mod gguf;
pub mod hub;
mod safetensors;
mod shard_index;

use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use crate::config::ModelConfig;
use crate::text::{ChatTemplate, Tokenizer};

pub use error::LoadError;
pub use gguf::{Gguf, Metadata, MetadataError, MetadataValue};
pub use safetensors::Safetensors;
pub use shard_index::ShardIndex;

/// One tensor of a checkpoint, widened to f32, row-major, outermost dimension first.
#[derive(Clone, Debug, PartialEq)]
pub struct RawTensor {
    /// The size of each dimension.
    pub shape: Vec<usize>,
    /// The values, as many as the product of `shape`.
    pub values: Vec<f32>,
}

/// Where weights come from. Names are the Hugging Face names
/// (`model.layers.0.self_attn.q_proj.weight`), and weights lie as that library lays them out,
/// whatever the file.
pub trait TensorSource {
    /// Every tensor there is, sorted.
    fn names(&self) -> Vec<String>;

    /// Reads one tensor.
    ///
    /// # Errors
    /// [`LoadError`] if there is no such tensor, its encoding is unknown, or the file fails.
    fn tensor(&mut self, name: &str) -> Result<RawTensor, LoadError>;

    /// The file or folder, for messages.
    fn path(&self) -> &Path;
}

/// An opened model, its weights not yet read.
pub struct Checkpoint {
    /// The shape of the model.
    pub config: ModelConfig,
    /// The weights.
    pub tensors: Box<dyn TensorSource>,
    /// The tokenizer; a folder may be without one.
    pub tokenizer: Option<Tokenizer>,
    /// The layout of a conversation; base models have none.
    pub chat_template: Option<ChatTemplate>,
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint")
            .field("path", &self.tensors.path())
            .field("config", &self.config)
            .field("has_tokenizer", &self.tokenizer.is_some())
            .field("has_chat_template", &self.chat_template.is_some())
            .finish()
    }
}

/// Opens a GGUF file or a Hugging Face folder.
///
/// # Errors
/// [`LoadError`] if the path is neither, or anything in it is damaged, contradicts itself, or
/// belongs to a model that is not built here.
pub fn open(path: &Path) -> Result<Checkpoint, LoadError> {
    let kind = fs::metadata(path).map_err(|source| LoadError::Io { path: path.into(), source })?;
    match kind.is_dir() {
        true => folder::open(path),
        false => Checkpoint::from_gguf(Gguf::open(path)?),
    }
}

/// The most that is read of a file of text. The largest tokenizers known take a tenth of it.
const MAX_TEXT_BYTES: u64 = 1 << 28;

/// Reads a whole file of JSON or of a template, if it has a sane size.
fn read_text(path: &Path) -> Result<Vec<u8>, LoadError> {
    let io = |source| LoadError::Io { path: path.into(), source };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(io)?;
    file.take(MAX_TEXT_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
    let actual = bytes.len() as u64;
    if actual > MAX_TEXT_BYTES {
        let what = "the text of the file".to_owned();
        return Err(LoadError::TooLarge { path: path.into(), what, limit: MAX_TEXT_BYTES, actual });
    }
    Ok(bytes)
}
