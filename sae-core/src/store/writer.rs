//! Filling a store.

use std::collections::HashMap;

use blobs::{Storage, StorageError, sha256};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::error::StoreError;
use super::manifest::{Manifest, Shard, manifest_name, shard_name};
use crate::source::{Column, Rows, in_words};

/// One of the writers of a store.
///
/// ```no_run
/// # use sae_core::source::{Column, Rows};
/// # use sae_core::store::{LocalFolder, StoreError, StoreWriter};
/// # fn f(rows: &Rows) -> Result<(), StoreError> {
/// let storage = LocalFolder::new("activations")?;
/// let columns = vec![Column::new("blocks.5.hook_resid_post", 576)];
/// let mut writer = StoreWriter::open(&storage, "first-half", columns, 1 << 16)?;
/// // After an interruption: go on behind what has been written.
/// let _already = writer.n_rows();
/// writer.write(rows)?;
/// writer.finish()
/// # }
/// ```
pub struct StoreWriter<'a> {
    storage: &'a dyn Storage,
    writer: String,
    rows_per_shard: usize,
    manifest: Manifest,
    /// Rows of the shard to come.
    pending: Rows,
}

impl<'a> StoreWriter<'a> {
    /// The writer of this name, behind what it has written before. Two processes must not write
    /// under one name at a time.
    ///
    /// # Errors
    /// If the name is none, the shards have no rows, this writer is done or has written other
    /// columns, or its manifest is damaged.
    pub fn open(
        storage: &'a dyn Storage,
        writer: &str,
        columns: Vec<Column>,
        rows_per_shard: usize,
    ) -> Result<Self, StoreError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if writer.is_empty() || !writer.chars().all(plain) {
            return Err(StoreError::Writer { writer: writer.to_owned() });
        }
        if rows_per_shard == 0 {
            let (option, expected) = ("rows_per_shard", "at least 1");
            return Err(StoreError::Option { option, expected, actual: 0 });
        }
        let pending = Rows::empty(&columns);
        let manifest = match Manifest::read(storage, writer) {
            Err(StoreError::Storage(StorageError::Missing { .. })) => Manifest::new(columns),
            manifest => {
                let (manifest, name) = (manifest?, manifest_name(writer));
                if manifest.finished {
                    return Err(StoreError::Finished { manifest: name });
                }
                if manifest.columns != columns {
                    return Err(StoreError::Columns {
                        manifest: name,
                        expected: in_words(&columns),
                        actual: in_words(&manifest.columns),
                    });
                }
                manifest
            }
        };
        // Readers have to see a writer that is at work, if it has not written a shard yet.
        manifest.write(storage, writer)?;
        Ok(Self { storage, writer: writer.to_owned(), rows_per_shard, manifest, pending })
    }

    /// Rows that are in the store for good.
    pub fn n_rows(&self) -> u64 {
        self.manifest.n_rows()
    }

    /// Adds rows, and writes the shards that they fill.
    ///
    /// # Errors
    /// If they have other columns, or cannot be written. How many of them were taken is not known
    /// then: [`open`](Self::open) the writer again, and go on behind its [`n_rows`](Self::n_rows).
    pub fn write(&mut self, rows: &Rows) -> Result<(), StoreError> {
        if !rows.fits(&self.manifest.columns) {
            return Err(StoreError::Rows { expected: in_words(&self.manifest.columns) });
        }
        let mut from = 0;
        while from < rows.n_rows() {
            let space = self.rows_per_shard - self.pending.n_rows();
            let to = rows.n_rows().min(from + space);
            self.pending.extend(rows, from..to);
            from = to;
            if self.pending.n_rows() == self.rows_per_shard {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Writes what is left, and says that this writer is done.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn finish(mut self) -> Result<(), StoreError> {
        if self.pending.n_rows() > 0 {
            self.flush()?;
        }
        self.manifest.finished = true;
        self.manifest.write(self.storage, &self.writer)
    }

    /// The shard first, then the manifest that names it.
    fn flush(&mut self) -> Result<(), StoreError> {
        let bytes = shard(&self.manifest.columns, &self.pending);
        let name = shard_name(&self.writer, self.manifest.shards.len());
        self.storage.put(&name, &bytes)?;
        let n_rows = self.pending.n_rows() as u64;
        self.manifest.shards.push(Shard { n_rows, sha256: sha256([&bytes]) });
        if let Err(error) = self.manifest.write(self.storage, &self.writer) {
            // What is still pending would be listed twice, once it is written after all.
            self.manifest.shards.pop();
            return Err(error);
        }
        self.pending.clear();
        Ok(())
    }
}

fn shard(columns: &[Column], rows: &Rows) -> Vec<u8> {
    let bytes: Vec<Vec<u8>> = (0..columns.len())
        .map(|column| rows.column(column).iter().flat_map(|value| value.to_le_bytes()).collect())
        .collect();
    let views = columns.iter().zip(&bytes).map(|(column, bytes)| {
        let shape = vec![rows.n_rows(), column.width];
        let view = TensorView::new(Dtype::F32, shape, bytes).expect("the shape of its own values");
        (column.name.as_str(), view)
    });
    safetensors::serialize(views, None::<HashMap<String, String>>).expect("views of whole tensors")
}
