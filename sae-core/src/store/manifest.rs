//! What a writer has written.

use blobs::Storage;
use serde::{Deserialize, Serialize};

use super::error::StoreError;
use crate::source::Column;

const VERSION: u32 = 1;
const DTYPE: &str = "F32";
const SUFFIX: &str = ".manifest.json";

/// The list of a writer's shards.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    version: u32,
    dtype: String,
    pub(super) columns: Vec<Column>,
    pub(super) shards: Vec<Shard>,
    /// Whether the writer is done.
    pub(super) finished: bool,
}

/// A shard as it was written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Shard {
    pub(super) n_rows: u64,
    pub(super) sha256: String,
}

/// What a manifest of this writer is called.
pub(super) fn manifest_name(writer: &str) -> String {
    format!("{writer}{SUFFIX}")
}

/// What a shard of this writer is called.
pub(super) fn shard_name(writer: &str, idx: usize) -> String {
    format!("{writer}-{idx:08}.safetensors")
}

/// The names of all writers of a store, sorted.
pub(super) fn writers(storage: &dyn Storage) -> Result<Vec<String>, StoreError> {
    let names = storage.list()?;
    let mut writers: Vec<String> =
        names.iter().filter_map(|name| name.strip_suffix(SUFFIX)).map(str::to_owned).collect();
    writers.sort();
    Ok(writers)
}

impl Manifest {
    pub(super) fn new(columns: Vec<Column>) -> Self {
        let dtype = DTYPE.to_owned();
        Self { version: VERSION, dtype, columns, shards: Vec::new(), finished: false }
    }

    pub(super) fn read(storage: &dyn Storage, writer: &str) -> Result<Self, StoreError> {
        let name = manifest_name(writer);
        let parsed = serde_json::from_slice(&storage.get(&name)?);
        let this: Self =
            parsed.map_err(|source| StoreError::Manifest { manifest: name.clone(), source })?;
        let check = |holds, key, expected: &str, actual: String| match holds {
            true => Ok(()),
            false => {
                let (manifest, expected) = (name.clone(), expected.to_owned());
                Err(StoreError::ManifestValue { manifest, key, expected, actual })
            }
        };
        let expected = VERSION.to_string();
        check(this.version == VERSION, "version", &expected, this.version.to_string())?;
        check(this.dtype == DTYPE, "dtype", DTYPE, this.dtype.clone())?;
        let widths = this.columns.iter().all(|column| column.width > 0);
        check(widths, "width", "at least 1", "0".to_owned())?;
        for (idx, column) in this.columns.iter().enumerate() {
            let first = this.columns[..idx].iter().all(|other| other.name != column.name);
            check(first, "columns", "different names", column.name.clone())?;
        }
        let total = this.shards.iter().try_fold(0u64, |sum, shard| sum.checked_add(shard.n_rows));
        let countable = total.is_some_and(|total| total < 1 << 48);
        check(countable, "n_rows", "less than 2^48 in all", format!("{total:?}"))?;
        Ok(this)
    }

    pub(super) fn write(&self, storage: &dyn Storage, writer: &str) -> Result<(), StoreError> {
        let json = serde_json::to_vec_pretty(self).expect("plain values are JSON");
        Ok(storage.put(&manifest_name(writer), &json)?)
    }

    pub(super) fn n_rows(&self) -> u64 {
        self.shards.iter().map(|shard| shard.n_rows).sum()
    }
}
