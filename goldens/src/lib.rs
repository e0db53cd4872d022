//! Reference tensors for tests: what other implementations computed, and how to walk them.
//!
//! A golden test runs every case of a kind that it supports, says aloud which ones it skips, and
//! fails if it ran none. `GOLDENS` names another folder of the same layout to put through the same
//! tests.
//!
//! Beside them lie the configs that known models are published with (`configs/`), and [`checkpoint`]
//! makes weights for them.

pub mod checkpoint;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// The folder with the goldens: `GOLDENS` if set, else this crate's own.
pub fn folder() -> PathBuf {
    match std::env::var_os("GOLDENS") {
        Some(folder) => folder.into(),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")),
    }
}

/// A folder of this crate's own, whatever `GOLDENS` says: `models/llama_mha` and the like serve as
/// small models in tests of other things.
pub fn own(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Runs `check` on every case of a kind (`models`, `sae_lens`, …): a folder with
/// `golden.safetensors`. `check` gives the reason for which it skipped a case, if it did.
///
/// # Panics
/// If there are no cases, all were skipped, or a check panics.
#[expect(clippy::print_stderr, reason = "tests report what they skip")]
pub fn for_each_case(kind: &str, mut check: impl FnMut(&Case) -> Result<(), String>) {
    let root = folder().join(kind);
    let entries = fs::read_dir(&root).unwrap_or_else(|error| panic!("{}: {error}", root.display()));
    let mut cases: Vec<PathBuf> = entries
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.join("golden.safetensors").exists())
        .collect();
    cases.sort();
    let mut n_run = 0;
    for path in &cases {
        let case = Case::open(path);
        eprintln!("golden {kind}/{}", case.name());
        match check(&case) {
            Ok(()) => n_run += 1,
            Err(reason) => {
                // Straight to the stream: the test harness swallows what passing tests print.
                let line = format!("golden {kind}/{} SKIPPED: {reason}\n", case.name());
                let _ = std::io::stderr().write_all(line.as_bytes());
            }
        }
    }
    eprintln!("golden {kind}: {n_run} of {} cases run", cases.len());
    assert!(n_run > 0, "no case in {} was run", root.display());
}

/// One folder of reference files.
pub struct Case {
    folder: PathBuf,
    bytes: Vec<u8>,
}

impl Case {
    /// Opens a folder with `golden.safetensors`.
    ///
    /// # Panics
    /// If the file cannot be read.
    pub fn open(folder: &Path) -> Self {
        let path = folder.join("golden.safetensors");
        let bytes = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self { folder: folder.into(), bytes }
    }

    /// Where the files of the case are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The last part of the path.
    pub fn name(&self) -> String {
        self.folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).expect("a well-formed golden file")
    }

    /// Whether there is such a tensor.
    pub fn has(&self, name: &str) -> bool {
        self.tensors().tensor(name).is_ok()
    }

    /// A tensor of f32 or f64 with its shape.
    ///
    /// # Panics
    /// If there is none of that name and type.
    pub fn floats(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        let tensors = self.tensors();
        let tensor = tensors.tensor(name).unwrap_or_else(|_| panic!("no golden tensor {name}"));
        let bytes = tensor.data();
        let values = match tensor.dtype() {
            Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes(array(b))).collect(),
            Dtype::F64 => {
                bytes.chunks_exact(8).map(|b| f64::from_le_bytes(array(b)) as f32).collect()
            }
            other => panic!("golden tensor {name} is {other:?}, no float"),
        };
        (tensor.shape().to_vec(), values)
    }

    /// A tensor of i64 with its shape.
    ///
    /// # Panics
    /// If there is none of that name and type.
    pub fn ints(&self, name: &str) -> (Vec<usize>, Vec<i64>) {
        let tensors = self.tensors();
        let tensor = tensors.tensor(name).unwrap_or_else(|_| panic!("no golden tensor {name}"));
        assert_eq!(tensor.dtype(), Dtype::I64, "golden tensor {name}");
        let values = tensor.data().chunks_exact(8).map(|b| i64::from_le_bytes(array(b)));
        (tensor.shape().to_vec(), values.collect())
    }

    /// The rows of a two-dimensional tensor of token ids.
    ///
    /// # Panics
    /// If there is no such tensor.
    pub fn ids(&self, name: &str) -> Vec<Vec<u32>> {
        let (shape, ids) = self.ints(name);
        ids.chunks(shape[1]).map(|row| row.iter().map(|&id| id as u32).collect()).collect()
    }

    /// A JSON file of the case.
    ///
    /// # Panics
    /// If it cannot be read.
    pub fn json(&self, name: &str) -> Value {
        let path = self.folder.join(name);
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("chunks of the right size")
}

/// Fails unless all values agree within `tolerance`, absolutely.
///
/// # Panics
/// If they do not.
pub fn assert_close(what: &str, actual: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(actual.len(), expected.len(), "{what}: number of values");
    let differences = actual.iter().zip(expected).map(|(a, b)| (a - b).abs());
    let worst = differences.enumerate().max_by(|a, b| a.1.total_cmp(&b.1));
    if let Some((index, difference)) = worst {
        assert!(
            difference <= tolerance,
            "{what}: |{} − {}| = {difference:e} > {tolerance:e} at {index}",
            actual[index],
            expected[index]
        );
    }
}
