//! Files of SAEs, one foreign format a module. The only code here that touches files.
//!
//! [`read`] finds out by the files which format it is:
//!
//! | format | files | module |
//! |---|---|---|
//! | SAELens | `cfg.json`, `sae_weights.safetensors` | [`saelens`], which also writes |
//! | sparsify | `cfg.json`, `sae.safetensors` | [`sparsify`] |
//! | dictionary_learning | `config.json`, `ae.safetensors` or `ae.pt` | [`dictionary_learning`] |
//! | Gemma Scope | `params.npz` | [`gemma_scope`] |
//! | Gemma Scope 2 | `config.json`, `params.safetensors` | [`gemma_scope`] |
//! | Llama Scope | `hyperparams.json`, `checkpoints/final.safetensors` | [`llama_scope`] |
//! | OpenAI | a file `*.pt` | `openai` |
//!
//! Files that end in `.pt` are read with the feature `pt`, by a reader that executes nothing.

mod archive;
pub mod dictionary_learning;
mod error;
mod folder;
pub mod gemma_scope;
pub mod llama_scope;
mod npz;
#[cfg(feature = "pt")]
pub mod openai;
#[cfg(feature = "pt")]
mod pt;
pub mod saelens;
pub mod sparsify;
mod tensors;

use std::path::Path;

use burn::tensor::Device;

use crate::sae::Sae;
pub use error::FormatError;

/// The files that make a folder one of a format.
const FORMATS: [(Format, &[&str]); 7] = [
    (Format::SaeLens, &[saelens::CONFIG, saelens::WEIGHTS]),
    (Format::Sparsify, &[sparsify::CONFIG, sparsify::WEIGHTS]),
    (Format::Dictionary, &[dictionary_learning::CONFIG, dictionary_learning::WEIGHTS]),
    (Format::Dictionary, &[dictionary_learning::CONFIG, dictionary_learning::CHECKPOINT]),
    (Format::GemmaScope, &[gemma_scope::ARRAYS]),
    (Format::GemmaScope2, &[gemma_scope::CONFIG, gemma_scope::WEIGHTS]),
    (Format::LlamaScope, &[llama_scope::CONFIG, llama_scope::WEIGHTS]),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    SaeLens,
    Sparsify,
    Dictionary,
    GemmaScope,
    GemmaScope2,
    LlamaScope,
    OpenAi,
}

/// Reads the SAE in a folder, or in a file that is one by itself (`*.npz`, `*.pt`).
///
/// Where a format leaves a choice, it is the one that its own library makes by default; the
/// modules have it as an argument. An `npz` does not say whether it is an SAE or a transcoder, and
/// is taken for an SAE: see [`gemma_scope::Role`].
///
/// # Errors
/// If no format or two have such files, or as the module of the format says.
pub fn read(path: &Path, device: &Device) -> Result<Sae, FormatError> {
    match recognise(path)? {
        Format::SaeLens => saelens::read(path, device),
        Format::Sparsify => sparsify::read(path, device),
        Format::Dictionary => {
            dictionary_learning::read(path, dictionary_learning::Selection::default(), device)
        }
        Format::GemmaScope => {
            let folder = path.join(gemma_scope::ARRAYS);
            let file = if path.is_dir() { &folder } else { path };
            gemma_scope::read_npz(file, gemma_scope::Role::default(), device)
        }
        Format::GemmaScope2 => gemma_scope::read(path, device),
        Format::LlamaScope => llama_scope::read(path, device),
        #[cfg(feature = "pt")]
        Format::OpenAi => openai::read(path, device),
        #[cfg(not(feature = "pt"))]
        Format::OpenAi => Err(FormatError::NeedsFeature { path: path.to_owned(), feature: "pt" }),
    }
}

fn recognise(path: &Path) -> Result<Format, FormatError> {
    // A path that cannot be looked at says why, rather than that no format was found.
    let metadata = path.metadata().map_err(FormatError::io(path))?;
    if metadata.is_file() {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("npz") => return Ok(Format::GemmaScope),
            Some("pt") => return Ok(Format::OpenAi),
            _ => {}
        }
    }
    let names = |files: &[&str]| files.join(" and ");
    let mut found =
        FORMATS.iter().filter(|(_, files)| files.iter().all(|file| path.join(file).is_file()));
    let Some((format, files)) = found.next() else {
        return Err(FormatError::Unrecognised {
            path: path.to_owned(),
            looked_for: FORMATS.iter().map(|(_, files)| names(files)).collect(),
        });
    };
    match found.find(|(other, _)| other != format) {
        None => Ok(*format),
        Some((_, others)) => Err(FormatError::Ambiguous {
            path: path.to_owned(),
            first: names(files),
            second: names(others),
        }),
    }
}

#[cfg(test)]
mod tests;
