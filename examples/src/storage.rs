//! The programs' cache folder, and files that are either whole or not there.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use sha2::{Digest, Sha256};

/// Our folder in the user's cache: `$XDG_CACHE_HOME` or `~/.cache`.
///
/// # Errors
/// If neither `XDG_CACHE_HOME` nor `HOME` is set, or the folder cannot be made.
pub fn cache_folder() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CACHE_HOME")
        .or_else(|| set("HOME").map(|home| home.join(".cache")))
        .ok_or_else(|| anyhow!("no cache folder: set XDG_CACHE_HOME or HOME"))?;
    let folder = base.join("burn-sae");
    fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make the cache folder {}", folder.display()))?;
    Ok(folder)
}

/// Writes a file beside its place and renames it there, so that nobody sees half of it.
///
/// # Errors
/// If the folder cannot be written.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> Result<()> {
        let folder = path.parent().ok_or_else(|| anyhow!("it has no folder"))?;
        fs::create_dir_all(folder)?;
        let mut builder = tempfile::Builder::new();
        // Temporary files are private by default; these are to be read by others too.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644));
        let mut file = builder.tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// The SHA-256 of a file's bytes, or of all the files in a folder with their names, in hex.
///
/// # Errors
/// If something cannot be read.
pub fn hash_path(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let read = |file: &Path, hash: &mut Sha256| -> Result<()> {
        let mut file = fs::File::open(file)?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(()),
                n => hash.update(&buffer[..n]),
            }
        }
    };
    let mut walk = || -> Result<()> {
        if path.is_dir() {
            let mut files: Vec<PathBuf> =
                fs::read_dir(path)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
            files.retain(|file| file.is_file());
            files.sort();
            for file in files {
                hash.update(file.file_name().unwrap_or_default().as_encoded_bytes());
                read(&file, &mut hash)?;
            }
            Ok(())
        } else {
            read(path, &mut hash)
        }
    };
    walk().with_context(|| format!("cannot read {}", path.display()))?;
    Ok(hex(&hash.finalize()))
}

/// The SHA-256 of some bytes, in hex.
pub fn hash_bytes(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
