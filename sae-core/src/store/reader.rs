//! Reading a store in an order of its own.

use std::fmt::Write as _;
use std::sync::Arc;

use blobs::{Blob, Storage, StorageError, sha256};
use rand::seq::SliceRandom;
use safetensors::{Dtype, SafeTensors};

use super::error::StoreError;
use super::manifest::{Manifest, manifest_name, shard_name, writers};
use crate::source::{ActivationSource, Column, Position, Rows, SourceError, in_words};
use crate::train::random_stream;

/// In which order a store is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadOrder {
    /// Decides it.
    pub seed: u64,
    /// Rows that are shuffled among each other, at least: whole shards are taken until there are
    /// as many. It bounds memory where the storage does not map its blobs.
    pub window: u64,
    /// Times that every row is read.
    pub n_passes: u64,
}

/// The rows of a store.
///
/// In each pass the shards are shuffled, and then the rows within each window of them. The order
/// depends on the seed and on what is stored, not on who wrote it when.
#[derive(Clone)]
pub struct StoreSource {
    storage: Arc<dyn Storage>,
    order: ReadOrder,
    columns: Vec<Column>,
    /// By name.
    shards: Vec<NamedShard>,
    rows_per_pass: u64,
    position: Position,
    /// The shards of `position.part`, shuffled.
    pass: Option<Pass>,
    window: Option<Arc<Window>>,
}

#[derive(Debug, Clone)]
struct NamedShard {
    name: String,
    n_rows: u64,
    sha256: String,
}

#[derive(Clone)]
struct Pass {
    pass: u64,
    shards: Vec<usize>,
}

/// Shards that are shuffled among each other, in memory or mapped.
struct Window {
    pass: u64,
    /// Its rows within the pass.
    start: u64,
    shards: Vec<OpenShard>,
    /// Shard and row of each row.
    order: Vec<(u32, u32)>,
}

struct OpenShard {
    bytes: Blob,
    /// Where each column begins in `bytes`.
    starts: Vec<usize>,
}

impl StoreSource {
    /// What all writers have left in this storage.
    ///
    /// # Errors
    /// If there is nothing, a writer is not done, writers disagree, a manifest is damaged, or the
    /// order is none.
    pub fn open(storage: Arc<dyn Storage>, order: ReadOrder) -> Result<Self, StoreError> {
        for (option, actual) in [("window", order.window), ("n_passes", order.n_passes)] {
            if actual == 0 {
                return Err(StoreError::Option { option, expected: "at least 1", actual });
            }
        }
        let mut columns: Option<Vec<Column>> = None;
        let mut shards = Vec::new();
        for writer in writers(&*storage)? {
            let (manifest, name) = (Manifest::read(&*storage, &writer)?, manifest_name(&writer));
            if !manifest.finished {
                let n_shards = manifest.shards.len();
                return Err(StoreError::Unfinished { manifest: name, n_shards });
            }
            let expected = columns.get_or_insert_with(|| manifest.columns.clone());
            if *expected != manifest.columns {
                return Err(StoreError::Columns {
                    manifest: name,
                    expected: in_words(expected),
                    actual: in_words(&manifest.columns),
                });
            }
            shards.extend(manifest.shards.into_iter().enumerate().map(|(idx, shard)| NamedShard {
                name: shard_name(&writer, idx),
                n_rows: shard.n_rows,
                sha256: shard.sha256,
            }));
        }
        let rows_per_pass = shards.iter().map(|shard| shard.n_rows).sum();
        let columns = columns.filter(|_| rows_per_pass > 0).ok_or(StoreError::Empty)?;
        let position = Position::default();
        let (pass, window) = (None, None);
        Ok(Self { storage, order, columns, shards, rows_per_pass, position, pass, window })
    }

    /// The window that the position is in.
    fn window(&mut self) -> Result<Arc<Window>, StoreError> {
        let Position { part, row, .. } = self.position;
        if let Some(window) = &self.window
            && window.pass == part
            && (window.start..window.start + window.order.len() as u64).contains(&row)
        {
            return Ok(window.clone());
        }
        // Before the next one is opened, so that there is never more than one.
        self.window = None;
        if self.pass.as_ref().is_none_or(|pass| pass.pass != part) {
            let mut shards: Vec<usize> = (0..self.shards.len()).collect();
            shards.shuffle(&mut random_stream(self.order.seed, stream(part, 0)));
            self.pass = Some(Pass { pass: part, shards });
        }
        let shuffled = &self.pass.as_ref().expect("it has just been made").shards;
        let (mut start, mut number, mut shards) = (0, 0, &shuffled[..]);
        let window = loop {
            let mut n_rows = 0;
            let n_shards = shards.iter().take_while(|&&shard| {
                let more = n_rows < self.order.window;
                n_rows += if more { self.shards[shard].n_rows } else { 0 };
                more
            });
            let (window, rest) = shards.split_at(n_shards.count());
            number += 1;
            if row < start + n_rows {
                break window;
            }
            (start, shards) = (start + n_rows, rest);
        };
        let shards: Vec<OpenShard> = window
            .iter()
            .map(|&shard| self.open_shard(&self.shards[shard]))
            .collect::<Result<_, _>>()?;
        let mut order: Vec<(u32, u32)> = Vec::new();
        for (idx, &shard) in window.iter().enumerate() {
            // Opened, a shard has the rows that the manifest says.
            order.extend((0..self.shards[shard].n_rows as u32).map(|row| (idx as u32, row)));
        }
        order.shuffle(&mut random_stream(self.order.seed, stream(part, number)));
        let window = Arc::new(Window { pass: part, start, shards, order });
        self.window = Some(window.clone());
        Ok(window)
    }

    fn open_shard(&self, shard: &NamedShard) -> Result<OpenShard, StoreError> {
        let name = || shard.name.clone();
        let bytes = self.storage.get(&shard.name).map_err(|error| match error {
            StorageError::Missing { .. } => StoreError::MissingShard { shard: name() },
            error => error.into(),
        })?;
        let actual = sha256([&bytes[..]]);
        if actual != shard.sha256 {
            let expected = shard.sha256.clone();
            return Err(StoreError::Hash { shard: name(), expected, actual });
        }
        let file = SafeTensors::deserialize(&bytes)
            .map_err(|source| StoreError::Safetensors { shard: name(), source })?;
        let mut actual: Vec<String> = file.names().into_iter().map(str::to_owned).collect();
        let mut expected: Vec<String> = self.columns.iter().map(|c| c.name.clone()).collect();
        actual.sort();
        expected.sort();
        if actual != expected {
            return Err(StoreError::Tensors { shard: name(), expected, actual });
        }
        let mut starts = Vec::with_capacity(self.columns.len());
        for column in &self.columns {
            let view = file.tensor(&column.name).expect("names have been compared");
            let column_name = || column.name.clone();
            if view.dtype() != Dtype::F32 {
                let actual = view.dtype();
                return Err(StoreError::Dtype { shard: name(), column: column_name(), actual });
            }
            let n_rows = u32::try_from(shard.n_rows).map_or(usize::MAX, |n| n as usize);
            let expected = vec![n_rows, column.width];
            if view.shape() != expected {
                let actual = view.shape().to_vec();
                let (shard, column) = (name(), column_name());
                return Err(StoreError::Shape { shard, column, expected, actual });
            }
            starts.push(view.data().as_ptr() as usize - bytes.as_ptr() as usize);
        }
        drop(file);
        Ok(OpenShard { bytes, starts })
    }
}

/// Random numbers of a pass (0) and of its windows (from 1).
fn stream(pass: u64, number: u64) -> u64 {
    (pass + 1) << 32 | number
}

impl ActivationSource for StoreSource {
    fn columns(&self) -> &[Column] {
        &self.columns
    }

    fn n_rows(&self) -> Option<u64> {
        self.rows_per_pass.checked_mul(self.order.n_passes)
    }

    fn fingerprint(&self) -> String {
        let mut content = in_words(&self.columns);
        for NamedShard { name, n_rows, sha256 } in &self.shards {
            write!(content, "\n{name} {n_rows} {sha256}").expect("memory can be written to");
        }
        let ReadOrder { seed, window, n_passes } = self.order;
        let stored = sha256([content]);
        format!("store {stored}, {n_passes} passes in windows of {window} rows with seed {seed}")
    }

    fn read(&mut self, n: usize, rows: &mut Rows) -> Result<usize, SourceError> {
        let mut n_read = 0;
        while n_read < n && self.position.part < self.order.n_passes {
            let window = self.window()?;
            let from = (self.position.row - window.start) as usize;
            let order = &window.order[from..];
            let order = &order[..order.len().min(n - n_read)];
            for &(shard, row) in order {
                let OpenShard { bytes, starts } = &window.shards[shard as usize];
                rows.push_with(|column, values| {
                    let n_bytes = 4 * self.columns[column].width;
                    let row = &bytes[starts[column] + row as usize * n_bytes..][..n_bytes];
                    values.extend(row.as_chunks().0.iter().map(|value| f32::from_le_bytes(*value)));
                });
            }
            n_read += order.len();
            self.position.row += order.len() as u64;
            if self.position.row == self.rows_per_pass {
                self.position = Position::new(self.position.part + 1, 0);
            }
        }
        Ok(n_read)
    }

    fn position(&self) -> Position {
        self.position.clone()
    }

    fn seek(&mut self, position: &Position) -> Result<(), SourceError> {
        position.check_in_passes(self.order.n_passes, self.rows_per_pass)?;
        self.position = position.clone();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
