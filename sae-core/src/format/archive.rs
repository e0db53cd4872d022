//! Zip archives of arrays, read within the memory that their own size warrants.

use std::io::{Cursor, Read};
use std::path::Path;

use zip::ZipArchive;

use super::error::FormatError;

/// How far weights can be compressed, and more: real ones hardly are.
const MOST_INFLATED: u64 = 16;
/// What small files may take all the same.
const ALLOWANCE: u64 = 1 << 20;

/// A zip archive in memory.
pub(super) struct Archive<'a> {
    path: &'a Path,
    zip: ZipArchive<Cursor<&'a [u8]>>,
    /// How many bytes may still be unpacked.
    budget: u64,
}

impl<'a> Archive<'a> {
    /// From the bytes of the file at `path`.
    pub(super) fn new(path: &'a Path, bytes: &'a [u8]) -> Result<Self, FormatError> {
        let zip = ZipArchive::new(Cursor::new(bytes))
            .map_err(|source| FormatError::Zip { path: path.to_owned(), source })?;
        let budget = (bytes.len() as u64).saturating_mul(MOST_INFLATED).saturating_add(ALLOWANCE);
        Ok(Self { path, zip, budget })
    }

    /// The files in it.
    pub(super) fn names(&self) -> Result<Vec<String>, FormatError> {
        let names = self.zip.file_names().map(|name| Ok(name.map_err(self.wrong())?.into_owned()));
        names.collect()
    }

    /// Unpacks a file.
    pub(super) fn read(&mut self, name: &str) -> Result<Vec<u8>, FormatError> {
        let wrong = self.wrong();
        let path = self.path;
        let entry = self.zip.by_name(name).map_err(wrong)?;
        let claimed = entry.size();
        let wrong_size = |expected| {
            let (path, entry) = (path.to_owned(), name.to_owned());
            FormatError::ZipEntry { path, entry, expected, claimed }
        };
        if claimed > self.budget {
            return Err(wrong_size(self.budget));
        }
        self.budget -= claimed;
        let mut bytes = Vec::new();
        entry.take(claimed + 1).read_to_end(&mut bytes).map_err(FormatError::io(path))?;
        match bytes.len() as u64 {
            actual if actual == claimed => Ok(bytes),
            actual => Err(wrong_size(actual)),
        }
    }

    fn wrong(&self) -> impl Fn(zip::result::ZipError) -> FormatError + use<'a> {
        let path = self.path;
        move |source| FormatError::Zip { path: path.to_owned(), source }
    }
}
