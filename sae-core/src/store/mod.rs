//! Activations on disk, or wherever blobs can be kept.
//!
//! ```text
//! NAME.manifest.json        columns, and of each shard the number of rows and the SHA-256;
//!                           rewritten after every shard, and marked when the writer is done
//! NAME-00000000.safetensors a shard: one f32 tensor [rows, width] per column
//! NAME-00000001.safetensors …
//! ```
//!
//! Each writer has a `NAME` of its own, so several fill one store without knowing of each other. A
//! reader wants every writer done and all of them to agree about the columns, and takes the shards
//! in the order of their names: who was done first leaves no trace.

mod error;
mod manifest;
mod reader;
mod writer;

pub use error::StoreError;
pub use reader::{ReadOrder, StoreSource};
pub use writer::StoreWriter;

pub use blobs;
pub use blobs::{LocalFolder, Storage, StorageError};
