//! Files of SAEs, activations and training runs that are damaged, or made to do harm: each is read,
//! or refused with an error that says what is wrong. None panics, and none takes more memory than
//! its size warrants.

#[path = "../../../model-hooks/tests/hostile/allocations.rs"]
mod allocations;
mod claims;
#[path = "../../../model-hooks/tests/hostile/mutations.rs"]
mod mutations;
mod readers;

use std::fs;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blobs::Storage;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use sae_core::store::StoreWriter;
use sae_core::train::Checkpoints;

use allocations::{peak_of, turn};
use readers::{Memory, READERS, Reader, SAVED_AT, Shared, columns, fit, rows};

/// The memory that a reader may take for a file.
fn memory_limit(file: &[u8]) -> usize {
    // A pickle takes most for a byte, some fifty; what a zip archive unpacks to is bounded at
    // sixteen, and is there twice more in f32.
    const FOR_A_BYTE: usize = 128;
    // What a zip archive of any size may unpack to, twice over in f32, tables, and what other tests
    // allocate to make files.
    const FOR_ANY_FILE: usize = 16 << 20;
    FOR_ANY_FILE + FOR_A_BYTE * file.len()
}

/// Reads and uses a file, within the bounds of memory.
fn survive(reader: &Reader, file: &[u8]) -> Result<(), String> {
    let turn = turn();
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let (read, peak) = peak_of(&turn, || (reader.read)(file));
        let limit = memory_limit(file);
        assert!(peak <= limit, "takes {peak} bytes, and {limit} are allowed");
        read.map(|use_it| use_it())
    }));
    outcome.unwrap_or_else(|_| {
        let shown = &file[..file.len().min(4096)];
        panic!("{} does not survive {:?}", reader.name, shown.escape_ascii().to_string())
    })
}

fn reader(name: &str) -> &'static Reader {
    READERS.iter().find(|reader| reader.name == name).expect("a reader of that name")
}

fn folder_of_seeds(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(name)
}

/// The seeds of a reader: small valid files.
fn seeds(reader: &Reader) -> Vec<Vec<u8>> {
    let entries = fs::read_dir(folder_of_seeds(reader.name)).expect("a folder of seeds");
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("a seed").path()).collect();
    paths.sort_unstable();
    paths.iter().map(|path| fs::read(path).expect("a readable seed")).collect()
}

fn for_each_seed(mut check: impl FnMut(&Reader, Vec<u8>)) {
    for reader in &READERS {
        seeds(reader).into_iter().for_each(|seed| check(reader, seed));
    }
}

#[test]
fn seeds_are_read() {
    for_each_seed(|reader, seed| {
        survive(reader, &seed).unwrap_or_else(|error| panic!("{}: {error}", reader.name));
    });
}

#[test]
fn every_truncation_is_survived() {
    for_each_seed(|reader, seed| {
        for len in 0..seed.len() {
            let outcome = survive(reader, &seed[..len]);
            // JSON may end with a line feed.
            let may_be_whole = reader.name == "store_manifest" && len + 1 == seed.len();
            assert!(outcome.is_err() || may_be_whole, "{} at {len} bytes", reader.name);
        }
    });
}

/// One bit of each byte, another each time.
#[test]
fn flipped_bits_are_survived() {
    for_each_seed(|reader, mut seed| {
        for place in 0..seed.len() {
            seed[place] ^= 1 << (place % 8);
            let _ = survive(reader, &seed);
            seed[place] ^= 1 << (place % 8);
        }
    });
}

/// `FUZZ_ITERATIONS` files for each reader, and few where it is not set: a fuzzer without coverage,
/// for where there is no other.
#[test]
fn random_damage_is_survived() {
    let n_files = match std::env::var("FUZZ_ITERATIONS") {
        Ok(n_files) => n_files.parse().expect("FUZZ_ITERATIONS is a number"),
        Err(_) => 1_000,
    };
    for reader in &READERS {
        let seeds = seeds(reader);
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        for _ in 0..n_files {
            let _ = survive(reader, &mutations::damaged(&seeds, &mut rng));
        }
    }
}

/// Writes the seeds that no other library could: `cargo test --workspace --test hostile -- --ignored`
/// after a change of what is written.
#[test]
#[ignore = "writes into the source tree"]
fn write_our_own_seeds() {
    let write = |name: &str, file: &str, bytes: &[u8]| {
        let folder = folder_of_seeds(name);
        fs::create_dir_all(&folder).expect("a folder");
        fs::write(folder.join(file), bytes).expect("written");
    };
    let memory = Arc::new(Memory::default());
    let mut writer = StoreWriter::open(&*memory, "w", columns(), 5).expect("opens");
    writer.write(&rows()).expect("written");
    writer.finish().expect("written");
    let shard = memory.get("w-00000000.safetensors").expect("a shard");
    write("store_shard", "two_columns.safetensors", &shard);
    let manifest = memory.get("w.manifest.json").expect("a manifest");
    write("store_manifest", "one_shard.json", &manifest);

    let memory = Arc::new(Memory::default());
    let checkpoints = Checkpoints::without_lock(Box::new(Shared(memory.clone())));
    fit(checkpoints, |fit| {
        let mut n_steps = 0;
        let at = |event: &sae_core::train::Event| {
            n_steps += usize::from(matches!(event, sae_core::train::Event::Checkpoint { .. }));
            if n_steps > 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        fit.expect("starts").run(at).expect("runs");
    });
    let names = memory.list().expect("a list");
    let prefix = format!("step-{SAVED_AT:012}");
    let name = names.iter().find(|name| name.starts_with(&prefix)).expect("a checkpoint");
    let checkpoint = memory.get(name).expect("a checkpoint");
    write("checkpoint", "batch_top_k_and_transcoder.safetensors", &checkpoint);
}
