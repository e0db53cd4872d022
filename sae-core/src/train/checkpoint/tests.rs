use std::path::PathBuf;

use blobs::{Blob, MakeBlob, StorageError};
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::source::{Behind, Column, Position, Rows};
use crate::train::{ActivationMatrix, Objective, TrainConfig, TrainState, Trainer};

fn device() -> Device {
    Device::flex()
}

/// A run on four activations, a few bytes long, with a row held in a buffer.
fn checkpoint(step: u64) -> Checkpoint {
    let values: Vec<f32> = (0..12).map(|i| (i as f32).sin()).collect();
    let matrix = ActivationMatrix::new(&values, 3).expect("whole rows");
    let config = TrainConfig::new(4, Objective::top_k(2)).with_batch(2).with_seed(step);
    let mut trainer = Trainer::new(config, &matrix, &device()).expect("valid");
    trainer.run(&matrix, |_| std::ops::ControlFlow::Continue(())).expect("trains");
    let held = Rows::new(&[Column::new("x", 2)], vec![vec![1.5, f32::NAN]]).expect("a row");
    let behind = Behind { position: Position::new(7, 8), held };
    let position = Position { part: 1, row: 2, behind: Some(Box::new(behind)) };
    let shape = RunShape::new("a".to_owned(), 3, trainer.config());
    let state = TrainState { step: step as usize, ..trainer.state().clone() };
    let runs = vec![RunState { shape, state }];
    let ahead = Rows::new(&[Column::new("x", 1)], vec![vec![0.5, -0.5]]).expect("two rows");
    Checkpoint {
        identity: json!({ "k": 2, "data": "x" }),
        step,
        position,
        ahead,
        outliers: None,
        runs,
    }
}

impl Checkpoint {
    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.write_to(&mut bytes).expect("there is memory");
        bytes
    }
}

fn open(folder: &Path) -> Checkpoints {
    Checkpoints::open(folder).expect("opens")
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let mut files: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    files.retain(|path| path.file_name().is_some_and(|name| name != "lock"));
    files.sort();
    files
}

#[test]
fn what_is_read_is_what_was_written() {
    let bytes = checkpoint(5).to_bytes();
    let read = Checkpoint::from_bytes("a", &bytes, &device()).expect("whole");
    assert_eq!(read.to_bytes(), bytes);
    assert_eq!((read.step, read.runs[0].state.step), (5, 5));
    let behind = read.position.behind.expect("a buffer");
    assert_eq!((behind.position, behind.held.n_rows()), (Position::new(7, 8), 1));
    assert_eq!(read.ahead, checkpoint(5).ahead);
    // Its place in the file is where safetensors itself would have put it.
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("whole");
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).expect("whole");
    let again = safetensors::serialize(file.tensors(), metadata.metadata().clone());
    assert_eq!(again.expect("the same tensors"), bytes);
}

#[test]
fn the_last_two_are_kept() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut checkpoints = open(folder.path());
    assert!(checkpoints.newest(&device()).expect("nothing there").is_none());
    for step in 1..=4 {
        let name = checkpoints.save(&checkpoint(step)).expect("saved");
        assert_eq!(checkpoints.save(&checkpoint(step)).expect("saved again"), name);
    }
    assert_eq!(files(folder.path()).len(), 2);
    drop(checkpoints);
    let found = open(folder.path()).newest(&device()).expect("readable").expect("there");
    assert_eq!((found.checkpoint.step, found.passed_over.len()), (4, 0));
}

#[test]
fn a_damaged_one_is_passed_over_and_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut checkpoints = open(folder.path());
    let first = checkpoints.save(&checkpoint(1)).expect("saved");
    let second = checkpoints.save(&checkpoint(2)).expect("saved");
    let path = folder.path().join(&second);
    let whole = std::fs::read(&path).expect("read");
    let mut damaged: Vec<Vec<u8>> = (0..whole.len()).map(|n| whole[..n].to_vec()).collect();
    damaged.extend((0..whole.len()).map(|n| {
        let mut flipped = whole.clone();
        flipped[n] ^= 1 << (n % 8);
        flipped
    }));
    for bytes in damaged {
        std::fs::write(&path, &bytes).expect("written");
        let found = checkpoints.newest(&device()).expect("one is good").expect("there");
        assert_eq!((&found.name, found.checkpoint.step), (&first, 1));
        let [PassedOver { name, error: CheckpointError::Damaged { .. } }] = &found.passed_over[..]
        else {
            panic!("{:?}", found.passed_over);
        };
        assert_eq!(name, &second);
    }
    // Going on from the first, the damaged one is replaced and the first is kept.
    let third = checkpoints.save(&checkpoint(3)).expect("saved");
    let left: Vec<_> = [&first, &third].map(|name| folder.path().join(name)).into();
    assert_eq!(files(folder.path()), left);
    for path in left {
        std::fs::write(path, "no").expect("written");
    }
    let Err(CheckpointError::NoneUsable { passed_over }) = checkpoints.newest(&device()) else {
        panic!("damaged checkpoints were used");
    };
    assert_eq!(passed_over.len(), 2);
}

#[test]
fn a_second_trainer_is_refused_until_the_first_is_gone() {
    let folder = tempfile::tempdir().expect("a folder");
    let first = open(folder.path());
    assert!(matches!(Checkpoints::open(folder.path()), Err(CheckpointError::Locked { .. })));
    drop(first);
    std::fs::write(folder.path().join(".writing.1.step-1"), "half").expect("written");
    open(folder.path());
    assert!(files(folder.path()).is_empty());
}

/// A folder on a disk that is full from some time on: a part of what is written gets there.
struct FullDisk(LocalFolder, std::sync::atomic::AtomicBool);

/// What is left of the disk.
struct Filling<'a> {
    out: &'a mut dyn Write,
    left: usize,
}

impl Write for Filling<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.left == 0 {
            return Err(std::io::ErrorKind::StorageFull.into());
        }
        let n = self.out.write(&bytes[..bytes.len().min(self.left)])?;
        self.left -= n;
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

impl Storage for &'static FullDisk {
    fn list(&self) -> Result<Vec<String>, StorageError> {
        self.0.list()
    }

    fn get(&self, name: &str) -> Result<Blob, StorageError> {
        self.0.get(name)
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StorageError> {
        self.0.put(name, bytes)
    }

    fn put_made(&self, make: &mut MakeBlob) -> Result<String, StorageError> {
        self.0.put_made(&mut |out| {
            let left =
                if self.1.load(std::sync::atomic::Ordering::Relaxed) { 500 } else { 1 << 20 };
            make(&mut Filling { out, left })
        })
    }

    fn delete(&self, name: &str) -> Result<(), StorageError> {
        self.0.delete(name)
    }
}

#[test]
fn a_full_disk_leaves_the_last_one() {
    let folder = tempfile::tempdir().expect("a folder");
    let local = LocalFolder::new(folder.path()).expect("made");
    let disk: &'static FullDisk = Box::leak(Box::new(FullDisk(local, false.into())));
    let mut checkpoints = Checkpoints::without_lock(Box::new(disk));
    let first = checkpoints.save(&checkpoint(1)).expect("saved");
    disk.1.store(true, std::sync::atomic::Ordering::Relaxed);
    let error = checkpoints.save(&checkpoint(2)).unwrap_err();
    assert_eq!(files(folder.path()).len(), 1, "scraps were left");
    assert!(error.to_string().ends_with(&format!("the run can go on from {first}")), "{error}");
    let found = open(folder.path()).newest(&device()).expect("readable").expect("there");
    assert_eq!((found.name, found.passed_over.len()), (first, 0));
}

/// Bytes that have the hash they claim, and are wrong all the same.
#[test]
fn forged_ones_are_refused() {
    let whole = checkpoint(5).to_bytes();
    let text = |from: &str, to: &str| {
        let at = whole.windows(from.len()).position(|w| w == from.as_bytes()).expect(from);
        let mut forged = whole.clone();
        forged[at..at + to.len()].copy_from_slice(to.as_bytes());
        Checkpoint::from_bytes("a", &forged, &device()).err().expect("refused").to_string()
    };
    let error = text(r#"\"version\":1"#, r#"\"version\":2"#);
    assert_eq!(error, "checkpoint a: version is 2, expected 1");
    let error = text(r#"\"d_sae\":4"#, r#"\"d_sae\":5"#);
    let tensor = "tensor runs.0.parameters.w_enc";
    assert_eq!(error, format!("checkpoint a: {tensor} is F32 [4, 3], expected F32 [5, 3]"));
    let error = text("runs.0.ages", "runs.0.agas");
    assert_eq!(error, "checkpoint a: tensor runs.0.ages is missing, expected U64 [4]");
    assert!(text(r#"\"step\""#, r#"\"stop\""#).ends_with("not a header"));
    for n in 0..whole.len() {
        assert!(Checkpoint::from_bytes("a", &whole[..n], &device()).is_err(), "{n} bytes");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn flipped_bits_never_panic(flips in prop::collection::vec(any::<prop::sample::Index>(), 1..4)) {
        let mut bytes = BYTES.with(Clone::clone);
        // The header is where damage can mislead.
        let n_bits = 8 * bytes.len().min(4096);
        for flip in flips {
            let bit = flip.index(n_bits);
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        if let Ok(checkpoint) = Checkpoint::from_bytes("a", &bytes, &device()) {
            let config = TrainConfig::new(4, Objective::top_k(2));
            let shape = RunShape::new("a".to_owned(), 3, &config);
            let _ = checkpoint.check_is_of("a", &json!({ "k": 2, "data": "x" }), &[shape]);
        }
    }
}

thread_local! {
    static BYTES: Vec<u8> = checkpoint(5).to_bytes();
}
