//! Blobs in a folder.

use std::fs::{self, File};
use std::io::{self, BufWriter, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::error::StorageError;
use super::storage::{Blob, MakeBlob, Storage, UNNAMED, check_name};

/// A folder, a file per blob.
///
/// A blob is written to a hidden file beside its place, synced, renamed, and the folder synced.
/// Blobs are read by mapping: once they are there, nobody may change their bytes in place.
#[derive(Debug, Clone)]
pub struct LocalFolder {
    folder: PathBuf,
}

/// What the names of half-written files begin with.
const UNFINISHED: &str = ".writing.";

impl LocalFolder {
    /// This folder, made if it is not there.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn new(folder: impl Into<PathBuf>) -> Result<Self, StorageError> {
        let this = Self { folder: folder.into() };
        let make = || {
            fs::create_dir_all(&this.folder)?;
            // The folder's own name has to last too.
            match this.folder.canonicalize()?.parent() {
                Some(parent) => File::open(parent)?.sync_all(),
                None => Ok(()),
            }
        };
        make().map_err(|e| this.error(".", "made", e))?;
        Ok(this)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// Removes what writers that were killed have left. Nobody may be writing.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn sweep(&self) -> Result<(), StorageError> {
        for name in self.names()?.iter().filter(|name| name.starts_with(UNFINISHED)) {
            fs::remove_file(self.folder.join(name)).map_err(|e| self.error(name, "removed", e))?;
        }
        Ok(())
    }

    fn names(&self) -> Result<Vec<String>, StorageError> {
        let listed = |e| self.error(".", "listed", e);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(listed)? {
            // Names that are no UTF-8 are none of ours.
            names.extend(entry.map_err(listed)?.file_name().into_string().ok());
        }
        Ok(names)
    }

    fn error(&self, name: &str, action: &'static str, source: io::Error) -> StorageError {
        let (place, name) = (self.folder.display().to_string(), name.to_owned());
        match source.kind() {
            ErrorKind::NotFound if action == "read" => StorageError::Missing { place, name },
            _ => StorageError::Io { place, name, action, source },
        }
    }

    /// Writes a file beside its place, and moves it there.
    fn write(&self, beside: &str, make: &mut MakeBlob) -> Result<String, StorageError> {
        let path = self.folder.join(beside);
        let mut named = None;
        let mut write = || -> io::Result<()> {
            let mut file = BufWriter::new(File::create(&path)?);
            let name = &*named.insert(make(&mut file)?);
            let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
            file.sync_all()?;
            check_name(name).map_err(|error| io::Error::new(ErrorKind::InvalidInput, error))?;
            fs::rename(&path, self.folder.join(name))?;
            File::open(&self.folder)?.sync_all()
        };
        let written = write();
        let name = named.unwrap_or_else(|| UNNAMED.to_owned());
        match written {
            Ok(()) => Ok(name),
            Err(error) => {
                // What went wrong matters more than whether the scraps could be swept up.
                let _ = fs::remove_file(&path);
                Err(self.error(&name, "written", error))
            }
        }
    }

    #[allow(unsafe_code)]
    fn map(&self, name: &str) -> io::Result<Blob> {
        let file = File::open(self.folder.join(name))?;
        // An empty range cannot be mapped.
        if file.metadata()?.len() == 0 {
            return Ok(Blob::Owned(Vec::new()));
        }
        // SAFETY: the bytes of a mapping must not change while they are borrowed. Files here are
        // only ever renamed into place or unlinked, neither of which touches the bytes of the file
        // that is mapped; that nobody else writes into them is what the type asks of its user.
        Ok(Blob::Mapped(unsafe { memmap2::Mmap::map(&file)? }))
    }
}

impl Storage for LocalFolder {
    fn list(&self) -> Result<Vec<String>, StorageError> {
        Ok(self.names()?.into_iter().filter(|name| check_name(name).is_ok()).collect())
    }

    fn get(&self, name: &str) -> Result<Blob, StorageError> {
        check_name(name)?;
        self.map(name).map_err(|e| self.error(name, "read", e))
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StorageError> {
        check_name(name)?;
        // Two processes may write the same blob: each does so beside the other.
        let beside = format!("{UNFINISHED}{}.{name}", std::process::id());
        self.write(&beside, &mut |file| {
            file.write_all(bytes)?;
            Ok(name.to_owned())
        })
        .map(drop)
    }

    fn put_made(&self, make: &mut MakeBlob) -> Result<String, StorageError> {
        static N_MADE: AtomicU64 = AtomicU64::new(0);
        // No blob's name begins with a dot, so none that is written meanwhile has this place.
        let nth = N_MADE.fetch_add(1, Ordering::Relaxed);
        self.write(&format!("{UNFINISHED}{}..{nth}", std::process::id()), make)
    }

    fn delete(&self, name: &str) -> Result<(), StorageError> {
        check_name(name)?;
        fs::remove_file(self.folder.join(name)).map_err(|e| self.error(name, "removed", e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blobs_are_replaced_and_removed_whole() {
        let parent = tempfile::tempdir().expect("a folder");
        let storage = LocalFolder::new(parent.path().join("deep/store")).expect("made");
        storage.put("a", b"one").expect("written");
        let before = storage.get("a").expect("read");
        storage.put("a", b"other").expect("replaced");
        storage.put("empty", b"").expect("written");
        // What was mapped before keeps its bytes.
        assert_eq!(
            (&before[..], &storage.get("a").expect("read")[..]),
            (&b"one"[..], &b"other"[..])
        );
        assert_eq!(storage.get("empty").expect("read").len(), 0);
        let mut names = storage.list().expect("listed");
        names.sort();
        assert_eq!(names, ["a", "empty"]);
        storage.delete("a").expect("removed");
        assert!(matches!(storage.get("a"), Err(StorageError::Missing { .. })));
        assert!(matches!(storage.delete("a"), Err(StorageError::Io { .. })));
        assert!(matches!(storage.put("../a", b""), Err(StorageError::Name { .. })));
    }

    #[test]
    fn a_blob_may_be_named_when_it_is_written() {
        let folder = tempfile::tempdir().expect("a folder");
        let storage = LocalFolder::new(folder.path()).expect("made");
        let made = |name: &str, fails: bool| {
            storage.put_made(&mut |file| {
                file.write_all(b"one")?;
                match fails {
                    true => Err(ErrorKind::StorageFull.into()),
                    false => Ok(name.to_owned()),
                }
            })
        };
        assert_eq!(made("a", false).expect("written"), "a");
        assert_eq!(&storage.get("a").expect("read")[..], b"one");
        for (name, fails) in [("b", true), ("../b", false), (".b", false)] {
            assert!(matches!(made(name, fails), Err(StorageError::Io { action: "written", .. })));
        }
        assert_eq!(fs::read_dir(folder.path()).expect("listed").count(), 1);
    }

    #[test]
    fn what_a_killed_writer_left_is_no_blob() {
        let folder = tempfile::tempdir().expect("a folder");
        let storage = LocalFolder::new(folder.path()).expect("made");
        let left = folder.path().join(format!("{UNFINISHED}7.a"));
        fs::write(&left, "half").expect("written");
        assert_eq!(storage.list().expect("listed"), [""; 0]);
        storage.sweep().expect("swept");
        assert!(!left.exists());
    }
}
