//! Where named blobs are kept.

use std::io::{self, Write};
use std::ops::Deref;

use sha2::{Digest, Sha256};

use super::error::StorageError;

/// A place for named blobs, flat: a folder, a bucket.
pub trait Storage: Send + Sync {
    /// The names of all blobs, in any order.
    ///
    /// # Errors
    /// If they cannot be listed.
    fn list(&self) -> Result<Vec<String>, StorageError>;

    /// A blob.
    ///
    /// # Errors
    /// If there is none of this name, or it cannot be read.
    fn get(&self, name: &str) -> Result<Blob, StorageError>;

    /// Writes a blob, in place of one of this name if there is one. When this returns it outlasts a
    /// crash; when it fails, or the process dies in it, what was there before is there still.
    ///
    /// # Errors
    /// If it cannot be written.
    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StorageError>;

    /// Writes a blob that is made while it is written, and that gets its name, which this returns,
    /// at the end: by its hash, for one. Else as [`put`](Self::put).
    ///
    /// Where nothing better is known, the blob is made in memory first.
    ///
    /// # Errors
    /// If it cannot be made or written.
    fn put_made(&self, make: &mut MakeBlob) -> Result<String, StorageError> {
        let mut bytes = Vec::new();
        let name = make(&mut bytes).map_err(|source| StorageError::Io {
            place: "memory".to_owned(),
            name: UNNAMED.to_owned(),
            action: "made",
            source,
        })?;
        self.put(&name, &bytes)?;
        Ok(name)
    }

    /// Removes a blob.
    ///
    /// # Errors
    /// If there is none, or it cannot be removed.
    fn delete(&self, name: &str) -> Result<(), StorageError>;
}

/// Writes the bytes of a blob, and says its name.
pub type MakeBlob<'a> = dyn FnMut(&mut dyn Write) -> io::Result<String> + 'a;

/// What a blob is called in errors before it has a name.
pub(super) const UNNAMED: &str = "a new blob";

/// The bytes of a blob.
#[derive(Debug)]
#[non_exhaustive]
pub enum Blob {
    /// In memory.
    Owned(Vec<u8>),
    /// A file, mapped: its pages come and go as they are needed.
    Mapped(memmap2::Mmap),
}

impl Deref for Blob {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Owned(bytes) => bytes,
            Self::Mapped(bytes) => bytes,
        }
    }
}

/// The SHA-256 of some bytes, which may come in parts, in hex.
pub fn sha256(parts: impl IntoIterator<Item: AsRef<[u8]>>) -> String {
    let mut hash = Sha256::new();
    parts.into_iter().for_each(|part| hash.update(part));
    hex(hash)
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Hands bytes on, and takes their SHA-256 on the way.
#[derive(Debug)]
pub struct Hashing<W> {
    to: W,
    hash: Sha256,
}

impl<W: Write> Hashing<W> {
    /// Nothing has been written yet.
    pub fn new(to: W) -> Self {
        Self { to, hash: Sha256::new() }
    }

    /// The hash of all that was written, in hex.
    pub fn finish(self) -> String {
        hex(self.hash)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.to.write(bytes)?;
        self.hash.update(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// Checks that a blob's name leads nowhere but into its place. A leading dot is kept for blobs that
/// are being written.
pub(super) fn check_name(name: &str) -> Result<(), StorageError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    match !name.is_empty() && !name.starts_with('.') && name.chars().all(plain) {
        true => Ok(()),
        false => Err(StorageError::Name { name: name.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_that_of_the_standard() {
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256(["a", "bc"]), expected);
        // Of what has been taken, where no more than a byte is taken at a time.
        struct Slow(Vec<u8>);
        impl Write for Slow {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.extend(bytes.first());
                Ok(bytes.len().min(1))
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut slow = Slow(Vec::new());
        let mut hashing = Hashing::new(&mut slow);
        hashing.write_all(b"abc").expect("taken");
        assert_eq!(hashing.finish(), expected);
        assert_eq!(slow.0, b"abc");
    }

    #[test]
    fn names_lead_nowhere_else() {
        for name in ["a", "w-0.safetensors", "A_1"] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        for name in ["", ".", "..", "../a", "a/b", ".a", "a b", "a\\b", "ä"] {
            assert!(matches!(check_name(name), Err(StorageError::Name { .. })), "{name}");
        }
    }
}
