//! What was made before: answers and measurements, kept line by line as they are made, so that a
//! run that was interrupted goes on where it stopped.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::storage::hash_bytes;

/// A file of what was made under the settings that its name stands for.
///
/// Each line has a key, the hash of all that shaped the value. A last line that was cut by a crash
/// is dropped; what it held is made again.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    inner: Mutex<Inner>,
    n_read: usize,
    n_reused: AtomicUsize,
}

#[derive(Debug)]
struct Inner {
    file: File,
    kept: HashMap<String, Kept>,
}

#[derive(Debug)]
struct Kept {
    value: Value,
    /// Whether an earlier run made it.
    is_from_before: bool,
}

#[derive(Serialize, Deserialize)]
struct Line {
    key: String,
    value: Value,
}

/// The key of what is made of this.
pub(super) fn key(of: &Value) -> String {
    hash_bytes(of.to_string().as_bytes())[..24].to_owned()
}

/// How many journals there are in the folder beside this one.
pub(super) fn others(folder: &Path, own: &Path) -> Result<usize> {
    let mut n = 0;
    for entry in fs::read_dir(folder).with_context(|| format!("{}", folder.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        n += usize::from(name.starts_with("journal-") && path != own);
    }
    Ok(n)
}

impl Journal {
    /// The journal of a run with these settings: a file of its own in the folder, which other
    /// settings leave alone.
    ///
    /// # Errors
    /// If it cannot be read and written, another run holds it, or it is damaged other than by a
    /// crash.
    pub(super) fn open(folder: &Path, settings: &Value) -> Result<Self> {
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot make the folder {}", folder.display()))?;
        let path = folder.join(format!("journal-{}.jsonl", &key(settings)[..12]));
        let place = || format!("the journal {}", path.display());
        let mut options = OpenOptions::new();
        let mut file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .with_context(place)?;
        if file.try_lock().is_err() {
            bail!("another run writes to {}: wait for it, or pass another --out", path.display());
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).with_context(place)?;
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        file.set_len(whole as u64).with_context(place)?;
        file.seek(SeekFrom::Start(whole as u64)).with_context(place)?;
        let mut kept = HashMap::new();
        for (number, line) in bytes[..whole].split(|&byte| byte == b'\n').enumerate() {
            if line.is_empty() {
                continue;
            }
            let Line { key, value } = serde_json::from_slice(line).with_context(|| {
                format!(
                    "line {} of {} is damaged: remove the file to begin anew",
                    number + 1,
                    path.display()
                )
            })?;
            kept.insert(key, Kept { value, is_from_before: true });
        }
        let n_read = kept.len();
        let inner = Mutex::new(Inner { file, kept });
        Ok(Self { path, inner, n_read, n_reused: AtomicUsize::new(0) })
    }

    /// What a thread that panicked had kept is whole.
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where it lies.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Entries that a run before this one has left.
    pub(super) fn n_read(&self) -> usize {
        self.n_read
    }

    /// How often something was taken from what an earlier run had made.
    pub(super) fn n_reused(&self) -> usize {
        self.n_reused.load(Ordering::Relaxed)
    }

    /// What was kept under a key.
    pub(super) fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        let inner = self.inner();
        let Some(Kept { value, is_from_before }) = inner.kept.get(key) else { return Ok(None) };
        let value = T::deserialize(value).with_context(|| {
            format!(
                "the entry {key} of {} is not what it should be: remove the file to begin anew",
                self.path.display()
            )
        })?;
        self.n_reused.fetch_add(usize::from(*is_from_before), Ordering::Relaxed);
        Ok(Some(value))
    }

    /// Keeps some values, all or none, and gives them as they will be read back: a number may come
    /// back with another last bit, and a run that goes on is to have the same results.
    pub(super) fn keep<T: Serialize + DeserializeOwned>(
        &self,
        entries: impl IntoIterator<Item = (String, T)>,
    ) -> Result<Vec<T>> {
        let mut inner = self.inner();
        let mut text = String::new();
        let mut values = Vec::new();
        for (key, value) in entries {
            let line = serde_json::to_string(&Line { key, value: serde_json::to_value(value)? })?;
            let Line { key, value } = serde_json::from_str(&line)?;
            values.push(T::deserialize(&value)?);
            inner.kept.insert(key, Kept { value, is_from_before: false });
            text += &line;
            text.push('\n');
        }
        let file = &mut inner.file;
        file.write_all(text.as_bytes())
            .and_then(|()| file.flush())
            .with_context(|| format!("cannot write {}", self.path.display()))?;
        Ok(values)
    }

    /// What was kept under a key, or else is made, and kept.
    pub(super) fn once<T: Serialize + DeserializeOwned>(
        &self,
        key: &str,
        make: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        if let Some(value) = self.get(key)? {
            return Ok(value);
        }
        let mut values = self.keep([(key.to_owned(), make()?)])?;
        Ok(values.pop().expect("one was kept"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_was_kept_is_there_again_and_a_torn_line_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let settings = json!({ "model": "m" });
        let journal = Journal::open(folder.path(), &settings).unwrap();
        let value: f64 = journal.once("a", || Ok(0.1 + 0.2)).unwrap();
        journal.keep([("b".to_owned(), "text"), ("c".to_owned(), "more")].map(owned)).unwrap();
        let path = journal.path().to_owned();
        drop(journal);
        let mut bytes = fs::read(&path).unwrap();
        bytes.extend_from_slice(b"{\"key\":\"d\",\"val");
        fs::write(&path, &bytes).unwrap();

        let journal = Journal::open(folder.path(), &settings).unwrap();
        assert_eq!((journal.n_read(), journal.n_reused()), (3, 0));
        let again: f64 = journal.once("a", || panic!("it is there")).unwrap();
        assert_eq!(again.to_bits(), value.to_bits());
        assert_eq!(journal.get::<String>("c").unwrap().as_deref(), Some("more"));
        assert_eq!(journal.get::<String>("d").unwrap(), None);
        // A line begins where the torn one did.
        journal.keep([("d".to_owned(), 1)]).unwrap();
        assert_eq!(journal.get("d").unwrap(), Some(1));
        assert_eq!(journal.n_reused(), 2, "what this run made is not from before");
        drop(journal);
        assert_eq!(Journal::open(folder.path(), &settings).unwrap().n_read(), 4);
    }

    fn owned((key, value): (String, &str)) -> (String, String) {
        (key, value.to_owned())
    }

    #[test]
    fn others_are_left_alone_and_damage_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(folder.path(), &json!(1)).unwrap();
        let held = Journal::open(folder.path(), &json!(1)).unwrap_err();
        assert!(held.to_string().contains("another run"), "{held:#}");
        let other = Journal::open(folder.path(), &json!(2)).unwrap();
        assert_ne!(journal.path(), other.path());
        let path = other.path().to_owned();
        drop(other);
        fs::write(&path, "{\"key\":\"a\",\"value\":1}\nnonsense\n").unwrap();
        let damaged = Journal::open(folder.path(), &json!(2)).unwrap_err();
        assert!(damaged.to_string().starts_with("line 2 of "), "{damaged:#}");
    }
}
