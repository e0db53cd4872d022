//! Training runs on disk, between two steps.
//!
//! ```text
//! lock                                held by the trainer that works on the folder
//! step-000000001000-SHA256.safetensors
//! step-000000002000-SHA256.safetensors
//! ```
//!
//! A checkpoint is one safetensors file: the tensors of every run, the rows that a buffer holds,
//! and a header with the rest. Its name has the hash of its bytes. It is written beside its place,
//! synced and renamed; only then are older ones removed, but for the last one that is known to be
//! good. So whatever happens, there is one to go on from.

mod error;
mod file;
mod tensors;

pub use error::{CheckpointError, Difference, PassedOver};

pub(super) use file::{Checkpoint, RunShape, RunState};

use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::Path;

use blobs::{Hashing, LocalFolder, Storage, StorageError, sha256};
use burn::tensor::Device;

const PREFIX: &str = "step-";
const SUFFIX: &str = ".safetensors";

/// The checkpoints of a training run.
pub struct Checkpoints {
    storage: Box<dyn Storage>,
    /// The last one that was read or written whole.
    good: Option<String>,
    /// Held as long as this lives, and let go by the system if the process dies.
    _lock: Option<File>,
}

/// What was found to go on from.
pub(super) struct Found {
    pub(super) name: String,
    pub(super) checkpoint: Checkpoint,
    pub(super) passed_over: Vec<PassedOver>,
}

impl Checkpoints {
    /// Those in a folder, which is made if it is not there and is this trainer's alone as long as
    /// this lives.
    ///
    /// # Errors
    /// If another trainer works on the folder, or it cannot be made or written.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let storage = LocalFolder::new(folder)?;
        let path = || folder.to_owned();
        let io = |source| CheckpointError::Lock { folder: path(), source };
        let lock = File::options().create(true).append(true).open(folder.join("lock"));
        let lock = lock.map_err(io)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(CheckpointError::Locked { folder: path() });
            }
            Err(TryLockError::Error(source)) => return Err(io(source)),
        }
        storage.sweep()?;
        Ok(Self { storage: Box::new(storage), good: None, _lock: Some(lock) })
    }

    /// Those in a storage. It has no lock: that no second trainer works on it is up to the caller.
    pub fn without_lock(storage: Box<dyn Storage>) -> Self {
        Self { storage, good: None, _lock: None }
    }

    /// Writes one, and then removes all others but for the last good one. Gives its name.
    ///
    /// In a folder, this takes the memory of no more than one of the run's tensors; other storages
    /// may want the whole file.
    pub(super) fn save(&mut self, checkpoint: &Checkpoint) -> Result<String, CheckpointError> {
        let step = checkpoint.step;
        let saved = self.storage.put_made(&mut |out: &mut dyn Write| {
            let mut out = Hashing::new(out);
            checkpoint.write_to(&mut out)?;
            Ok(format!("{PREFIX}{step:012}-{}{SUFFIX}", out.finish()))
        });
        let name = saved.map_err(|source| {
            let kept = self.good.clone().unwrap_or_else(|| "no checkpoint".to_owned());
            CheckpointError::Save { step, kept, source }
        })?;
        if self.good.as_ref() == Some(&name) {
            return Ok(name);
        }
        let previous = self.good.replace(name.clone());
        for (old_step, old) in self.names()? {
            // Of two of one step, the older one would be taken for as new.
            let is_previous = previous.as_ref() == Some(&old) && old_step != step;
            if old != name && !is_previous {
                match self.storage.delete(&old) {
                    // Somebody else tidied up.
                    Ok(()) | Err(StorageError::Missing { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(name)
    }

    /// The newest one that is whole, and what is wrong with those that are newer still.
    pub(super) fn newest(&mut self, device: &Device) -> Result<Option<Found>, CheckpointError> {
        let mut names = self.names()?;
        names.sort_by(|a, b| b.cmp(a));
        let mut passed_over = Vec::new();
        for (step, name) in names {
            match self.read(step, &name, device) {
                Ok(checkpoint) => {
                    self.good = Some(name.clone());
                    return Ok(Some(Found { name, checkpoint, passed_over }));
                }
                Err(error) => passed_over.push(PassedOver { name, error }),
            }
        }
        match passed_over.is_empty() {
            true => Ok(None),
            false => Err(CheckpointError::NoneUsable { passed_over }),
        }
    }

    fn read(&self, step: u64, name: &str, device: &Device) -> Result<Checkpoint, CheckpointError> {
        let bytes = self.storage.get(name)?;
        let actual = sha256([&bytes[..]]);
        if !name.ends_with(&format!("-{actual}{SUFFIX}")) {
            return Err(CheckpointError::Damaged { name: name.to_owned(), actual });
        }
        let checkpoint = Checkpoint::from_bytes(name, &bytes, device)?;
        match checkpoint.step == step {
            true => Ok(checkpoint),
            false => Err(CheckpointError::Value {
                name: name.to_owned(),
                key: "step".to_owned(),
                expected: step.to_string(),
                actual: checkpoint.step.to_string(),
            }),
        }
    }

    /// Step and name of every checkpoint. Other blobs are none of ours.
    fn names(&self) -> Result<Vec<(u64, String)>, CheckpointError> {
        let step = |name: &str| {
            let (step, _) = name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?.split_once('-')?;
            step.parse().ok()
        };
        let names = self.storage.list()?;
        Ok(names.into_iter().filter_map(|name| Some((step(&name)?, name))).collect())
    }
}

#[cfg(test)]
mod tests;
