//! Named blobs, in a folder or in an object store: what shards of activations and checkpoints are
//! kept in.
//!
//! A blob is written whole or not at all, and outlasts a crash once it is written. Knows nothing of
//! tensors, so that a check of the object store does not compile them.

mod error;
mod local;
#[cfg(feature = "object-store")]
mod object;
mod storage;

pub use error::StorageError;
pub use local::LocalFolder;
#[cfg(feature = "object-store")]
pub use object::ObjectStorage;
pub use storage::{Blob, Hashing, MakeBlob, Storage, sha256};
