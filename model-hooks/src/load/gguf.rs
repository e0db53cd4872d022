//! GGUF, llama.cpp's container: typed metadata, then named tensors.
//!
//! Follows the description in ggml's `docs/gguf.md`, versions 2 and 3, little-endian. Lengths,
//! counts and offsets are checked against the file's size before anything is allocated for them.

mod header;
mod llama;
mod metadata;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::element::Element;
use super::{Checkpoint, LoadError, RawTensor};
use crate::config::ModelConfig;
use crate::text::{ChatTemplate, Tokenizer};

pub use metadata::{Metadata, MetadataError, MetadataValue};

/// An opened GGUF file: its metadata, and its tensors under the file's own names.
#[derive(Debug)]
pub struct Gguf<R = File> {
    path: PathBuf,
    reader: R,
    metadata: Metadata,
    tensors: BTreeMap<String, TensorInfo>,
}

/// Where a tensor lies, checked to be inside the file.
#[derive(Debug)]
struct TensorInfo {
    shape: Vec<usize>,
    element: Element,
    /// From the start of the file.
    offset: u64,
}

impl Gguf {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// [`LoadError`] if the file cannot be read, is not GGUF, or its header is damaged.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let file =
            File::open(path).map_err(|source| LoadError::Io { path: path.into(), source })?;
        Self::read(file, path)
    }
}

impl<R: Read + Seek> Gguf<R> {
    /// Reads the header of what `reader` gives; `path` is for messages.
    ///
    /// # Errors
    /// As [`Gguf::open`].
    pub fn read(mut reader: R, path: &Path) -> Result<Self, LoadError> {
        let (metadata, tensors) = header::read(&mut reader, path)?;
        Ok(Self { path: path.into(), reader, metadata, tensors })
    }

    /// The metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Reads one tensor.
    ///
    /// # Errors
    /// [`LoadError`] if there is no such tensor, or the file fails.
    pub fn tensor(&mut self, name: &str) -> Result<RawTensor, LoadError> {
        let Some(info) = self.tensors.get(name) else {
            return Err(LoadError::MissingTensor { path: self.path.clone(), name: name.into() });
        };
        let io = |source| LoadError::Io { path: self.path.clone(), source };
        self.reader.seek(SeekFrom::Start(info.offset)).map_err(io)?;
        let n_values = info.shape.iter().product();
        let values = info.element.read(&mut self.reader, n_values).map_err(io)?;
        Ok(RawTensor { shape: info.shape.clone(), values })
    }

    /// The file, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Checkpoint {
    /// A GGUF file as a language model.
    ///
    /// # Errors
    /// [`LoadError`] if the file contradicts itself, or belongs to a model that is not built here.
    pub fn from_gguf<R: Read + Seek + 'static>(mut gguf: Gguf<R>) -> Result<Self, LoadError> {
        let path = gguf.path.clone();
        let evidence = llama::evidence(&mut gguf)?;
        let config = ModelConfig::from_gguf(&gguf.metadata, &evidence)
            .map_err(|source| LoadError::Config { path: path.clone(), source })?;

        let text = |source| LoadError::Text { path: path.clone(), source };
        let tokenizer = Tokenizer::from_gguf(&gguf.metadata).map_err(text)?;
        tokenizer.check_fits(&config).map_err(text)?;
        let chat_template = ChatTemplate::from_gguf(&gguf.metadata).map_err(text)?;
        Ok(Self {
            tensors: Box::new(llama::HfNames::new(gguf, &config)?),
            config,
            tokenizer: Some(tokenizer),
            chat_template,
        })
    }
}

#[cfg(test)]
mod tests;
