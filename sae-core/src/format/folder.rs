//! Files that are read whole, and folders that appear whole or not at all.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use super::error::FormatError;

/// The bytes of a file.
pub(super) fn load(path: &Path) -> Result<Vec<u8>, FormatError> {
    fs::read(path).map_err(FormatError::io(path))
}

/// The bytes of a file that may not be there.
pub(super) fn load_if_there(path: &Path) -> Result<Option<Vec<u8>>, FormatError> {
    match fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        bytes => bytes.map(Some).map_err(FormatError::io(path)),
    }
}

/// What a JSON file says.
pub(super) fn load_json<T: DeserializeOwned>(path: &Path) -> Result<T, FormatError> {
    serde_json::from_slice(&load(path)?)
        .map_err(|source| FormatError::Json { path: path.to_owned(), source })
}

/// Writes a folder of these files, in place of one that held the same names if there is one.
///
/// The files are written and synced in a folder beside it, which then takes its name: a crash
/// leaves the old folder, the new one, or (between two renames) the old one under another name,
/// never a mixture.
pub(super) fn write(folder: &Path, files: &[(&str, Vec<u8>)]) -> Result<(), FormatError> {
    let names: Vec<&str> = files.iter().map(|(name, _)| *name).collect();
    check_replaceable(folder, &names)?;
    let parent = match folder.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent).map_err(FormatError::io(parent))?;
    let new = beside(folder, "new");
    let written = fill(&new, files).and_then(|()| replace(folder, &new));
    if written.is_err() {
        // What went wrong matters more than whether the scraps could be swept up.
        let _ = fs::remove_dir_all(&new);
    }
    written?;
    sync(parent)
}

/// Replacing a folder removes what it holds, so that has to be an older version of the same.
fn check_replaceable(folder: &Path, names: &[&str]) -> Result<(), FormatError> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(FormatError::io(folder))?,
    };
    for entry in entries {
        let entry = entry.map_err(FormatError::io(folder))?.file_name();
        if !names.iter().any(|name| entry == *name) {
            let (path, entry) = (folder.to_owned(), entry.to_string_lossy().into_owned());
            return Err(FormatError::Occupied { path, entry });
        }
    }
    Ok(())
}

fn fill(folder: &Path, files: &[(&str, Vec<u8>)]) -> Result<(), FormatError> {
    fs::create_dir(folder).map_err(FormatError::io(folder))?;
    for (name, bytes) in files {
        let path = folder.join(name);
        let write = || {
            let mut file = File::create_new(&path)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().map_err(FormatError::io(&path))?;
    }
    sync(folder)
}

fn replace(folder: &Path, new: &Path) -> Result<(), FormatError> {
    let io = FormatError::io(folder);
    if !folder.exists() {
        return fs::rename(new, folder).map_err(io);
    }
    let old = beside(folder, "old");
    fs::rename(folder, &old).map_err(&io)?;
    if let Err(error) = fs::rename(new, folder) {
        fs::rename(&old, folder).map_err(&io)?;
        return Err(io(error));
    }
    fs::remove_dir_all(&old).map_err(FormatError::io(&old))
}

/// A hidden name in the same parent, so that renaming stays within one file system.
fn beside(folder: &Path, role: &str) -> PathBuf {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    folder.with_file_name(format!(".{name}.{role}.{}", std::process::id()))
}

/// Makes the names in a folder durable, not only the bytes behind them.
fn sync(folder: &Path) -> Result<(), FormatError> {
    File::open(folder).and_then(|f| f.sync_all()).map_err(FormatError::io(folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).expect("a folder");
        let name = |entry: std::io::Result<fs::DirEntry>| {
            entry.expect("an entry").file_name().to_string_lossy().into_owned()
        };
        let mut names: Vec<_> = entries.map(name).collect();
        names.sort();
        names
    }

    #[test]
    fn a_folder_is_replaced_and_nothing_is_left_beside_it() {
        let parent = tempfile::tempdir().expect("a folder");
        let folder = parent.path().join("deep").join("sae");
        write(&folder, &[("a", b"1".to_vec()), ("b", b"2".to_vec())]).expect("written");
        write(&folder, &[("a", b"3".to_vec()), ("b", b"4".to_vec())]).expect("replaced");
        assert_eq!(fs::read(folder.join("a")).expect("read"), b"3");
        assert_eq!(names(&folder), ["a", "b"]);
        assert_eq!(names(&parent.path().join("deep")), ["sae"]);
    }

    #[test]
    fn other_files_are_not_lost() {
        let parent = tempfile::tempdir().expect("a folder");
        fs::write(parent.path().join("notes.txt"), "mine").expect("written");
        let error = write(parent.path(), &[("a", Vec::new())]).unwrap_err();
        assert!(matches!(error, FormatError::Occupied { entry, .. } if entry == "notes.txt"));
        assert_eq!(names(parent.path()), ["notes.txt"]);
    }

    #[test]
    fn a_failed_write_leaves_nothing() {
        let parent = tempfile::tempdir().expect("a folder");
        let folder = parent.path().join("sae");
        let error = write(&folder, &[("a", Vec::new()), ("no/such/folder", Vec::new())]);
        assert!(matches!(error, Err(FormatError::Io { .. })));
        assert!(names(parent.path()).is_empty());
    }
}
