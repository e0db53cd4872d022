//! Every reader of SAEs, activations and training runs, and what is done with what it gives. The
//! tests beside this file and the targets in `fuzz/` all read through here.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::error::Error;
use std::fs;
use std::io::{Cursor, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use blobs::{Blob, Storage, StorageError, sha256};
use burn::tensor::{Device, Distribution, Tensor};
use sae_core::Sae;
use sae_core::format;
use sae_core::source::{ActivationSource, Chunks, Column, Mixing, MixingBuffer, Rows};
use sae_core::store::{ReadOrder, StoreSource};
use sae_core::train::{Checkpoints, Fit, FitConfig, Objective, Run, TrainConfig, Transcoder};
use tempfile::TempDir;
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

/// A reader of one kind of file.
pub struct Reader {
    /// The folder of its seeds, and the name of its fuzz target.
    pub name: &'static str,
    /// Reads the bytes of a file: what then uses the result, or the refusal.
    pub read: fn(&[u8]) -> Result<Use, String>,
}

/// Does with the result of a reader what a program would do next.
pub type Use = Box<dyn FnOnce()>;

/// All readers.
///
/// Where a format has two files, what is read is the configuration, a zero byte, and the weights.
pub const READERS: [Reader; 12] = [
    Reader { name: "sae_lens", read: |bytes| pair(bytes, ["cfg.json", "sae_weights.safetensors"]) },
    Reader { name: "sparsify", read: |bytes| pair(bytes, ["cfg.json", "sae.safetensors"]) },
    Reader {
        name: "dictionary_learning",
        read: |bytes| pair(bytes, ["config.json", "ae.safetensors"]),
    },
    Reader { name: "gemma_scope", read: |bytes| folder(&[("params.npz", bytes)]) },
    Reader { name: "gemma_scope_array", read: gemma_scope_array },
    Reader {
        name: "gemma_scope_2",
        read: |bytes| pair(bytes, ["config.json", "params.safetensors"]),
    },
    Reader {
        name: "llama_scope",
        read: |bytes| pair(bytes, ["hyperparams.json", "checkpoints/final.safetensors"]),
    },
    Reader { name: "openai", read: |bytes| folder(&[("autoencoder.pt", bytes)]) },
    Reader { name: "openai_pickle", read: openai_pickle },
    Reader { name: "store_manifest", read: store_manifest },
    Reader { name: "store_shard", read: store_shard },
    Reader { name: "checkpoint", read: checkpoint },
];

/// An error with its reasons.
fn refusal(error: &dyn Error) -> String {
    let (mut message, mut reason) = (error.to_string(), error.source());
    while let Some(error) = reason {
        message = format!("{message}: {error}");
        reason = error.source();
    }
    message
}

fn pair(bytes: &[u8], names: [&str; 2]) -> Result<Use, String> {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    let weights = bytes.get(end + 1..).unwrap_or_default();
    folder(&[(names[0], &bytes[..end]), (names[1], weights)])
}

/// Reads a folder of these files, or the one that is an SAE by itself.
fn folder(files: &[(&str, &[u8])]) -> Result<Use, String> {
    let names: Vec<&str> = files.iter().map(|(name, _)| *name).collect();
    let folder = folder_for(&names);
    for (name, bytes) in files {
        fs::write(folder.join(name), bytes).expect("written");
    }
    let path = match names[..] {
        [name] => folder.join(name),
        _ => folder,
    };
    let sae = format::read(&path, &Device::flex()).map_err(|error| {
        let message = error.to_string();
        // A refusal has to name the file.
        assert!(files.iter().any(|(name, _)| message.contains(name)), "{message}");
        refusal(&error)
    })?;
    Ok(Box::new(move || use_sae(&sae)))
}

/// A folder of this thread's own for files of these names, whose content is written anew each time:
/// making folders takes longer than reading them.
fn folder_for(names: &[&str]) -> PathBuf {
    thread_local! {
        static FOLDERS: RefCell<BTreeMap<String, TempDir>> = RefCell::default();
    }
    FOLDERS.with_borrow_mut(|folders| {
        let folder = folders.entry(names.concat()).or_insert_with(|| {
            let folder = tempfile::tempdir().expect("a folder");
            for name in names {
                let path = folder.path().join(name);
                fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            }
            folder
        });
        folder.path().to_owned()
    })
}

fn use_sae(sae: &Sae) {
    let shape = [2, sae.config().d_in];
    let x = Tensor::<2>::random(shape, Distribution::Default, &Device::flex());
    let parts = sae.encode(x.clone()).to_dense();
    assert_eq!(parts.dims(), [2, sae.config().d_sae]);
    let _ = sae.run(x).1.into_data();
}

fn stored_zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in entries {
        zip.start_file(*name, options).expect("an entry");
        zip.write_all(bytes).expect("written");
    }
    zip.finish().expect("an archive").into_inner()
}

/// `W_enc.npy`, in an archive whose checksums are right: damage to the archive itself hardly gets
/// past them.
fn gemma_scope_array(bytes: &[u8]) -> Result<Use, String> {
    let array = |shape: &str, n: usize| {
        let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n");
        let length = u16::try_from(header.len()).expect("a short header").to_le_bytes();
        [&b"\x93NUMPY\x01\x00"[..], &length[..], header.as_bytes(), &vec![0; 4 * n]].concat()
    };
    let (row, matrix, latents) = (array("(2,)", 2), array("(3, 2)", 6), array("(3,)", 3));
    let archive = stored_zip(&[
        ("W_enc.npy", bytes),
        ("W_dec.npy", &matrix),
        ("b_enc.npy", &latents),
        ("b_dec.npy", &row),
        ("threshold.npy", &latents),
    ]);
    folder(&[("params.npz", &archive)])
}

/// The pickle of a checkpoint of PyTorch's, in an archive whose checksums are right.
fn openai_pickle(bytes: &[u8]) -> Result<Use, String> {
    let floats = |n: usize| vec![0; 4 * n];
    let archive = stored_zip(&[
        ("archive/data.pkl", bytes),
        ("archive/byteorder", b"little"),
        ("archive/data/0", &floats(2)),
        ("archive/data/1", &floats(3)),
        ("archive/data/2", &floats(6)),
        ("archive/data/3", &floats(6)),
    ]);
    folder(&[("autoencoder.pt", &archive)])
}

/// Blobs in memory.
#[derive(Default)]
pub struct Memory(Mutex<BTreeMap<String, Vec<u8>>>);

impl Memory {
    fn of(blobs: &[(&str, &[u8])]) -> Self {
        let blobs = blobs.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec()));
        Self(Mutex::new(blobs.collect()))
    }

    fn blobs(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Vec<u8>>> {
        self.0.lock().expect("nobody panicked with it")
    }
}

impl Storage for Memory {
    fn list(&self) -> Result<Vec<String>, StorageError> {
        Ok(self.blobs().keys().cloned().collect())
    }

    fn get(&self, name: &str) -> Result<Blob, StorageError> {
        let missing =
            || StorageError::Missing { place: "memory".to_owned(), name: name.to_owned() };
        self.blobs().get(name).cloned().map(Blob::Owned).ok_or_else(missing)
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StorageError> {
        self.blobs().insert(name.to_owned(), bytes.to_vec());
        Ok(())
    }

    fn delete(&self, name: &str) -> Result<(), StorageError> {
        self.blobs().remove(name);
        Ok(())
    }
}

/// The same blobs, for two owners.
pub struct Shared(pub Arc<Memory>);

impl Storage for Shared {
    fn list(&self) -> Result<Vec<String>, StorageError> {
        self.0.list()
    }

    fn get(&self, name: &str) -> Result<Blob, StorageError> {
        self.0.get(name)
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StorageError> {
        self.0.put(name, bytes)
    }

    fn delete(&self, name: &str) -> Result<(), StorageError> {
        self.0.delete(name)
    }
}

/// The columns of the store and of the training run that the seeds are of.
pub fn columns() -> Vec<Column> {
    vec![Column::new("early", 2), Column::new("late", 3)]
}

/// Five rows of them.
pub fn rows() -> Rows {
    let values = |n: u16| (0..n).map(|i| f32::from(i * i % 7) - 3.0).collect();
    Rows::new(&columns(), vec![values(10), values(15)]).expect("whole rows")
}

/// The shard that `store_shard`'s seed is.
fn good_shard() -> &'static [u8] {
    include_bytes!("../../../fuzz/seeds/store_shard/two_columns.safetensors")
}

fn store_manifest(bytes: &[u8]) -> Result<Use, String> {
    read_store(bytes, good_shard())
}

fn store_shard(bytes: &[u8]) -> Result<Use, String> {
    let manifest = serde_json::json!({
        "version": 1, "dtype": "F32", "finished": true,
        "columns": [{"name": "early", "width": 2}, {"name": "late", "width": 3}],
        "shards": [{"n_rows": 5, "sha256": sha256([bytes])}],
    });
    read_store(manifest.to_string().as_bytes(), bytes)
}

fn read_store(manifest: &[u8], shard: &[u8]) -> Result<Use, String> {
    let blobs = [("w.manifest.json", manifest), ("w-00000000.safetensors", shard)];
    let order = ReadOrder { seed: 0, window: 4, n_passes: 2 };
    let source = StoreSource::open(Arc::new(Memory::of(&blobs)), order);
    let mut source = source.map_err(|error| refusal(&error))?;
    let mut rows = Rows::empty(source.columns());
    source.read(3, &mut rows).map_err(|error| refusal(&error))?;
    Ok(Box::new(move || {
        let position = source.position();
        let _ = source.read(100, &mut rows);
        let _ = (source.seek(&position), source.n_rows(), source.fingerprint());
    }))
}

/// Steps at which the seed of `checkpoint` was saved.
pub const SAVED_AT: usize = 2;

/// A run of three steps, kept in this storage, and what `with` makes of it or of the refusal.
pub fn fit<T>(
    checkpoints: Checkpoints,
    with: impl FnOnce(Result<Fit, sae_core::train::FitError>) -> T,
) -> T {
    let chunks =
        Chunks::new(columns(), "none", |chunk| Ok::<_, Infallible>((chunk < 3).then(rows)));
    let mixing = Mixing { capacity: 6, share: 0.5, seed: 0 };
    let mut source = MixingBuffer::new(chunks.with_n_rows(15), mixing).expect("possible");
    let config = TrainConfig::new(4, Objective::batch_top_k(2.0)).with_batch(4);
    let transcoder = Some(Transcoder { d_out: 3, skip: true });
    let objective = Objective { apply_b_dec_to_input: false, ..config.objective.clone() };
    let transcoder = TrainConfig { transcoder, objective, ..config.clone() };
    let runs =
        vec![Run::new("a", "late", config), Run::new("b", "early", transcoder).transcoding("late")];
    let options = FitConfig::new().with_checkpoint_every(SAVED_AT).with_model("none".to_owned());
    with(Fit::resume(runs, &mut source, options, &Device::flex(), checkpoints))
}

fn checkpoint(bytes: &[u8]) -> Result<Use, String> {
    let name = format!("step-{SAVED_AT:012}-{}.safetensors", sha256([bytes]));
    let bytes = bytes.to_vec();
    let kept = move || Checkpoints::without_lock(Box::new(Memory::of(&[(&name, &bytes)])));
    fit(kept(), |found| found.map(drop).map_err(|error| refusal(&error)))?;
    Ok(Box::new(move || {
        fit(kept(), |found| {
            let _ = found.expect("read before").run(|_| ControlFlow::Continue(()));
        });
    }))
}
