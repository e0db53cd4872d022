//! Where named blobs are kept.

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

    /// Removes a blob.
    ///
    /// # Errors
    /// If there is none, or it cannot be removed.
    fn delete(&self, name: &str) -> Result<(), StorageError>;
}

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
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
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
