//! A Hugging Face folder: `config.json`, safetensors in one file or in shards, and the tokenizer.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{Checkpoint, LoadError, RawTensor, Safetensors, ShardIndex, TensorSource, read_text};
use crate::config::ModelConfig;
use crate::text::{ChatTemplate, TextError, Tokenizer};

pub(super) const CONFIG: &str = "config.json";
pub(super) const WEIGHTS: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
pub(super) const TOKENIZER: &str = "tokenizer.json";
pub(super) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
pub(super) const CHAT_TEMPLATE: &str = "chat_template.jinja";
pub(super) const GENERATION_CONFIG: &str = "generation_config.json";

/// Opens a folder as `transformers` saves it.
pub(super) fn open(folder: &Path) -> Result<Checkpoint, LoadError> {
    let Some(config) = read_if_there(folder, CONFIG)? else {
        return Err(LoadError::MissingFile { path: folder.into(), expected: "`config.json`" });
    };
    let generation = read_if_there(folder, GENERATION_CONFIG)?;
    let config = ModelConfig::from_hf(&config, generation.as_deref()).map_err(|source| {
        let name = match ModelConfig::from_hf(&config, None) {
            Ok(_) => GENERATION_CONFIG,
            Err(_) => CONFIG,
        };
        LoadError::Config { path: folder.join(name), source }
    })?;
    let tensors = open_weights(folder)?;

    let tokenizer = match folder.join(TOKENIZER) {
        path if path.exists() => {
            let tokenizer = Tokenizer::from_file(&path)?;
            tokenizer.check_fits(&config).map_err(|source| LoadError::Text { path, source })?;
            Some(tokenizer)
        }
        _ => None,
    };
    let tokenizer_config = read_if_there(folder, TOKENIZER_CONFIG)?;
    let jinja = read_if_there(folder, CHAT_TEMPLATE)?;
    let chat_template = ChatTemplate::from_hf(tokenizer_config.as_deref(), jinja.as_deref())
        .map_err(|source| {
            let name = match source {
                TextError::TokenizerConfigJson { .. } => TOKENIZER_CONFIG,
                _ if jinja.is_some() => CHAT_TEMPLATE,
                _ => TOKENIZER_CONFIG,
            };
            LoadError::Text { path: folder.join(name), source }
        })?;
    Ok(Checkpoint { config, tensors, tokenizer, chat_template })
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// [`LoadError`] if the file cannot be read, or describes no tokenizer.
    pub fn from_file(path: &Path) -> Result<Self, LoadError> {
        Self::from_json(&read_text(path)?)
            .map_err(|source| LoadError::Text { path: path.into(), source })
    }
}

fn read_if_there(folder: &Path, name: &str) -> Result<Option<Vec<u8>>, LoadError> {
    let path = folder.join(name);
    path.exists().then(|| read_text(&path)).transpose()
}

fn open_weights(folder: &Path) -> Result<Box<dyn TensorSource>, LoadError> {
    let (weights, index) = (folder.join(WEIGHTS), folder.join(INDEX));
    if weights.exists() {
        Ok(Box::new(Safetensors::open(&weights)?))
    } else if index.exists() {
        Ok(Box::new(Shards::open(folder, &index)?))
    } else {
        let expected = "`model.safetensors`, nor an index of its shards";
        Err(LoadError::MissingFile { path: folder.into(), expected })
    }
}

/// Checks that a shard is no link to another place.
///
/// The hub's cache is the one exception: its snapshots hold nothing but links to the `blobs` of
/// the same repository.
fn check_link(folder: &Path, shard: &Path) -> Result<(), LoadError> {
    let canonical = |path: &Path| {
        path.canonicalize().map_err(|source| LoadError::Io { path: path.into(), source })
    };
    let (folder, target) = (canonical(folder)?, canonical(shard)?);
    let blobs = match folder.parent() {
        Some(snapshots) if snapshots.ends_with("snapshots") => snapshots.with_file_name("blobs"),
        _ => folder.clone(),
    };
    match target.starts_with(&folder) || target.starts_with(&blobs) {
        true => Ok(()),
        false => Err(LoadError::ShardLink { path: shard.into(), target }),
    }
}

/// Weights that are spread over several files.
struct Shards {
    index: PathBuf,
    files: Vec<Safetensors>,
    /// The index in `files` of each tensor's shard.
    file_idx: BTreeMap<String, usize>,
}

impl Shards {
    fn open(folder: &Path, index: &Path) -> Result<Self, LoadError> {
        let mut files = Vec::new();
        let mut file_idx = BTreeMap::new();
        let stated = ShardIndex::open(index)?;
        for shard in stated.shards() {
            let path = folder.join(shard);
            check_link(folder, &path)?;
            let file = Safetensors::open(&path)?;
            for name in file.names() {
                if file_idx.insert(name.clone(), files.len()).is_some() {
                    return Err(LoadError::DuplicateTensor { path, name });
                }
            }
            files.push(file);
        }
        for (name, shard) in stated.tensors() {
            let found = file_idx.get(name).map(|&idx| files[idx].path());
            let expected = folder.join(shard);
            if found != Some(&expected) {
                return Err(LoadError::MissingTensor { path: expected, name: name.to_owned() });
            }
        }
        Ok(Self { index: index.into(), files, file_idx })
    }
}

impl TensorSource for Shards {
    fn names(&self) -> Vec<String> {
        self.file_idx.keys().cloned().collect()
    }

    fn tensor(&mut self, name: &str) -> Result<RawTensor, LoadError> {
        match self.file_idx.get(name) {
            Some(&idx) => self.files[idx].tensor(name),
            None => {
                Err(LoadError::MissingTensor { path: self.index.clone(), name: name.to_owned() })
            }
        }
    }

    fn path(&self) -> &Path {
        &self.index
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use safetensors::tensor::{Dtype, TensorView, serialize};
    use serde_json::json;
    use tempfile::TempDir;

    use super::*;

    /// A folder with the config of a Llama, and the given shards of one value each.
    fn folder(shards: &[(&str, &[(&str, f32)])]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        let config = json!({
            "hidden_act": "silu", "hidden_size": 8, "intermediate_size": 8, "vocab_size": 9,
            "max_position_embeddings": 8, "model_type": "llama", "num_attention_heads": 2,
            "num_hidden_layers": 1, "rms_norm_eps": 1e-5,
        });
        fs::write(folder.path().join(CONFIG), config.to_string()).unwrap();
        for (file, tensors) in shards {
            let tensors: Vec<_> =
                tensors.iter().map(|(name, x)| (*name, x.to_le_bytes())).collect();
            let views = tensors
                .iter()
                .map(|(name, bytes)| (*name, TensorView::new(Dtype::F32, vec![1], bytes).unwrap()));
            fs::write(folder.path().join(file), serialize(views, None).unwrap()).unwrap();
        }
        folder
    }

    fn write_index(folder: &TempDir, weight_map: serde_json::Value) {
        let index = json!({"metadata": {"total_size": 8}, "weight_map": weight_map});
        fs::write(folder.path().join(INDEX), index.to_string()).unwrap();
    }

    fn refusal(folder: &TempDir) -> String {
        open(folder.path()).unwrap_err().to_string()
    }

    #[test]
    fn opens_one_file_or_its_shards() {
        let single = folder(&[(WEIGHTS, &[("a", 1.0), ("b", 2.0)])]);
        let sharded = folder(&[("1.safetensors", &[("a", 1.0)]), ("2.safetensors", &[("b", 2.0)])]);
        write_index(&sharded, json!({"a": "1.safetensors", "b": "2.safetensors"}));
        for folder in [single, sharded] {
            let mut checkpoint = open(folder.path()).unwrap();
            assert_eq!(checkpoint.tensors.names(), ["a", "b"]);
            assert_eq!(checkpoint.tensors.tensor("b").unwrap().values, [2.0]);
            assert!(checkpoint.tensors.tensor("c").is_err());
            assert!(checkpoint.tokenizer.is_none() && checkpoint.chat_template.is_none());
        }
    }

    #[test]
    fn a_folder_without_a_model_says_what_it_lacks() {
        assert!(refusal(&tempfile::tempdir().unwrap()).contains("has no `config.json`"));
        assert!(refusal(&folder(&[])).contains("has no `model.safetensors`"));
    }

    #[test]
    fn an_index_must_agree_with_its_shards() {
        let shards: [(&str, &[(&str, f32)]); 2] =
            [("1.safetensors", &[("a", 1.0)]), ("2.safetensors", &[("b", 2.0)])];
        let disagreeing = folder(&shards);
        write_index(&disagreeing, json!({"a": "2.safetensors", "b": "1.safetensors"}));
        assert!(refusal(&disagreeing).contains("2.safetensors` has no tensor `a`"));

        let absent = folder(&shards);
        write_index(&absent, json!({"a": "1.safetensors", "b": "3.safetensors"}));
        assert!(refusal(&absent).contains("3.safetensors"));

        let twice = folder(&[shards[0], ("2.safetensors", &[("a", 2.0)])]);
        write_index(&twice, json!({"a": "1.safetensors", "b": "2.safetensors"}));
        assert!(refusal(&twice).contains("tensor `a` twice"));
    }

    #[cfg(unix)]
    #[test]
    fn links_may_stay_inside_or_lead_to_the_blobs_of_the_hub() {
        use std::os::unix::fs::symlink;

        let elsewhere = folder(&[("secret", &[("a", 1.0)])]);
        let leaving = folder(&[]);
        write_index(&leaving, json!({"a": "1.safetensors"}));
        symlink(elsewhere.path().join("secret"), leaving.path().join("1.safetensors")).unwrap();
        assert!(refusal(&leaving).contains("outside its folder"));

        let cache = tempfile::tempdir().unwrap();
        let snapshot = cache.path().join("snapshots/0123");
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir(cache.path().join("blobs")).unwrap();
        for (blob, name) in [(CONFIG, CONFIG), (INDEX, INDEX)] {
            fs::copy(leaving.path().join(blob), snapshot.join(name)).unwrap();
        }
        fs::copy(elsewhere.path().join("secret"), cache.path().join("blobs/abc")).unwrap();
        symlink("../../blobs/abc", snapshot.join("1.safetensors")).unwrap();
        assert_eq!(open(&snapshot).unwrap().tensors.names(), ["a"]);
    }

    #[test]
    fn a_tokenizer_of_another_model_is_refused() {
        let folder = folder(&[(WEIGHTS, &[("a", 1.0)])]);
        let tokenizer = |id: u32| {
            json!({"version": "1.0", "added_tokens": [], "model":
                {"type": "BPE", "vocab": {"a": 0, "b": id}, "merges": []}})
        };
        let path = folder.path().join(TOKENIZER);
        fs::write(&path, tokenizer(8).to_string()).unwrap();
        assert_eq!(open(folder.path()).unwrap().tokenizer.unwrap().n_vocab(), 9);
        fs::write(&path, tokenizer(9).to_string()).unwrap();
        assert!(refusal(&folder).contains("tokenizer.json` cannot be used"));
    }
}
