//! What a run has found so far, kept so that one that was killed goes on.
//!
//! A stage is a file under the fingerprint of everything that shaped it. It is written whole or not
//! at all, and what a run goes on with is what was read back, so that a run that was killed and one
//! that was not end alike, bit for bit.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use burn::tensor::Device;
use sae_core::Sae;
use sae_core::format::saelens;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::progress::tell;
use crate::storage::{hash_bytes, write_whole};

/// Raised when what is kept means something else.
const VERSION: u32 = 2;

/// The stages in a folder.
#[derive(Debug, Clone)]
pub(super) struct Stages {
    folder: PathBuf,
    /// What is kept is not looked at.
    anew: bool,
}

/// Everything that shaped a stage, in hex.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub(super) struct Fingerprint(String);

impl Fingerprint {
    pub(super) fn new(of: &Value) -> Self {
        let text = serde_json::json!({"version": VERSION, "of": of}).to_string();
        Self(hash_bytes(text.as_bytes())[..20].to_owned())
    }

    /// Of token ids, text by text.
    pub(super) fn of_texts(texts: &[impl AsRef<[u32]>]) -> Self {
        let bytes = texts.iter().map(AsRef::as_ref).flat_map(|text| {
            let length = (text.len() as u32).to_le_bytes();
            length.into_iter().chain(text.iter().flat_map(|id| id.to_le_bytes()))
        });
        Self(hash_bytes(&bytes.collect::<Vec<u8>>())[..20].to_owned())
    }
}

impl Stages {
    pub(super) fn new(folder: PathBuf, anew: bool) -> Self {
        Self { folder, anew }
    }

    fn path(&self, name: &str, key: &Fingerprint) -> PathBuf {
        self.folder.join(format!("{name}-{}", key.0))
    }

    /// What `compute` gives, or gave before.
    ///
    /// # Errors
    /// If it fails, or cannot be kept.
    pub(super) fn value<T: Serialize + DeserializeOwned>(
        &self,
        name: &str,
        key: &Fingerprint,
        compute: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let path = self.path(name, key).with_extension("json");
        if let Some(bytes) = self.kept(&path)? {
            match serde_json::from_slice(&bytes) {
                Ok(value) => return Ok(value),
                Err(error) => tell_damaged(&path, &error),
            }
        }
        let bytes = serde_json::to_vec(&compute()?)?;
        write_whole(&path, &bytes)?;
        Ok(serde_json::from_slice(&bytes)?)
    }

    /// Rows of numbers that `compute` gives, or gave before: `n` of `width` each.
    ///
    /// # Errors
    /// If it fails, or cannot be kept.
    pub(super) fn rows(
        &self,
        name: &str,
        key: &Fingerprint,
        [n, width]: [usize; 2],
        compute: impl FnOnce() -> Result<Vec<Vec<f32>>>,
    ) -> Result<Vec<Vec<f32>>> {
        let path = self.path(name, key).with_extension("f32");
        if let Some(bytes) = self.kept(&path)? {
            match parse_rows(&bytes, n, width) {
                Some(rows) => return Ok(rows),
                None => tell_damaged(&path, &format!("{} bytes", bytes.len())),
            }
        }
        let rows = compute()?;
        assert!(rows.len() == n && rows.iter().all(|row| row.len() == width), "rows as announced");
        let mut bytes: Vec<u8> = rows.iter().flatten().flat_map(|x| x.to_le_bytes()).collect();
        let hash = hash_bytes(&bytes);
        bytes.extend(hash.as_bytes());
        write_whole(&path, &bytes)?;
        Ok(rows)
    }

    /// An autoencoder with what is known of it, that `compute` gives or gave before.
    ///
    /// # Errors
    /// If it fails, or cannot be kept.
    pub(super) fn sae<T: Serialize + DeserializeOwned>(
        &self,
        name: &str,
        key: &Fingerprint,
        device: &Device,
        compute: impl FnOnce() -> Result<(Sae, T)>,
    ) -> Result<(Sae, T)> {
        let path = self.path(name, key);
        // The record is written last: where it is, the weights are.
        let record = path.with_extension("json");
        if let Some(bytes) = self.kept(&record)? {
            match (saelens::read(&path, device), serde_json::from_slice(&bytes)) {
                (Ok(sae), Ok(value)) => {
                    tell(&format!("trained before: {}", path.display()));
                    return Ok((sae, value));
                }
                (Err(error), _) => tell_damaged(&path, &error),
                (_, Err(error)) => tell_damaged(&record, &error),
            }
        }
        let (sae, value) = compute()?;
        fs::create_dir_all(&path)
            .with_context(|| format!("cannot make the folder {}", path.display()))?;
        saelens::write(&sae, &path).context("while keeping an autoencoder")?;
        let bytes = serde_json::to_vec(&value)?;
        write_whole(&record, &bytes)?;
        let sae = saelens::read(&path, device).context("while reading an autoencoder back")?;
        Ok((sae, serde_json::from_slice(&bytes)?))
    }

    /// Whether an autoencoder is there.
    pub(super) fn has_sae(&self, name: &str, key: &Fingerprint) -> bool {
        !self.anew && self.path(name, key).with_extension("json").is_file()
    }

    fn kept(&self, path: &Path) -> Result<Option<Vec<u8>>> {
        if self.anew {
            return Ok(None);
        }
        match fs::read(path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }
}

fn tell_damaged(path: &Path, why: &dyn std::fmt::Display) {
    tell(&format!("{} is damaged and will be made anew: {why}", path.display()));
}

/// Numbers, and behind them the SHA-256 of their bytes in hex.
fn parse_rows(bytes: &[u8], n: usize, width: usize) -> Option<Vec<Vec<f32>>> {
    let (values, hash) = bytes.split_at_checked(bytes.len().checked_sub(64)?)?;
    let fits = n.checked_mul(width)?.checked_mul(4)? == values.len();
    if !fits || hash_bytes(values).as_bytes() != hash {
        return None;
    }
    let float = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().expect("four bytes"));
    let row = |row: &[u8]| row.chunks_exact(4).map(float).collect();
    Some(values.chunks_exact(4 * width).map(row).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn stages(folder: &Path) -> Stages {
        Stages::new(folder.into(), false)
    }

    #[test]
    fn what_is_kept_is_not_computed_again() {
        let folder = tempfile::tempdir().unwrap();
        let (stages, key) = (stages(folder.path()), Fingerprint::new(&json!({"a": 1})));
        let third = 1.0 / 3.0;
        let first: Vec<f64> = stages.value("stage", &key, || Ok(vec![third])).unwrap();
        let again: Vec<f64> = stages.value("stage", &key, || panic!("it is kept")).unwrap();
        assert_eq!(first, again);
        let other = Fingerprint::new(&json!({"a": 2}));
        assert_eq!(stages.value("stage", &other, || Ok(5)).unwrap(), 5);
        let anew = Stages::new(folder.path().into(), true);
        assert_eq!(anew.value("stage", &other, || Ok(6)).unwrap(), 6);
    }

    #[test]
    fn what_is_damaged_is_computed_again() {
        let folder = tempfile::tempdir().unwrap();
        let (stages, key) = (stages(folder.path()), Fingerprint::new(&json!({})));
        let rows = vec![vec![1.5f32, -2.0], vec![0.25, f32::MIN]];
        let of =
            |compute: fn() -> Result<Vec<Vec<f32>>>| stages.rows("states", &key, [2, 2], compute);
        of(|| Ok(vec![vec![1.5, -2.0], vec![0.25, f32::MIN]])).unwrap();
        assert_eq!(of(|| panic!("they are kept")).unwrap(), rows);
        let path = stages.path("states", &key).with_extension("f32");
        let bytes = fs::read(&path).unwrap();
        for n in 0..bytes.len() {
            assert!(parse_rows(&bytes[..n], 2, 2).is_none(), "{n} bytes");
        }
        let mut flipped = bytes;
        flipped[3] ^= 1;
        fs::write(&path, flipped).unwrap();
        assert_eq!(of(|| Ok(vec![vec![7.0; 2]; 2])).unwrap(), [[7.0; 2]; 2]);
        fs::write(stages.path("stage", &key).with_extension("json"), "{").unwrap();
        assert_eq!(stages.value("stage", &key, || Ok(5)).unwrap(), 5);
    }
}
