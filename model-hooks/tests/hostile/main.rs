//! Files that are damaged, or made to do harm: each is read, or refused with an error that says
//! what is wrong. None panics, and none takes more memory than its size warrants.

mod allocations;
mod claims;
mod folders;
mod mutations;
mod readers;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use model_hooks::ModelConfig;
use model_hooks::config::Architecture;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use allocations::{peak_of, turn};
use readers::{READERS, Reader};

/// The memory that a reader may take for a file.
fn memory_limit(file: &[u8]) -> usize {
    // A Unigram model takes most for a byte, 340: a node of a tree.
    const FOR_A_BYTE: usize = 400;
    // Tables, the regular expressions of our own, and what other tests allocate to make files.
    const FOR_ANY_FILE: usize = 16 << 20;
    // Half of it is the limit of the regex crate for one expression, whatever its length.
    const FOR_A_PATTERN: usize = 32 << 20;

    let n_patterns = file.windows(8).filter(|window| window == br#""Regex":"#).count();
    FOR_ANY_FILE + FOR_A_BYTE * file.len() + FOR_A_PATTERN * n_patterns.min(16)
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

/// The seeds of a reader: small valid files.
fn seeds(reader: &Reader) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(reader.name);
    let entries = fs::read_dir(folder).expect("a folder of seeds");
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

/// What damages files begins with these: a family without one would hardly be reached.
#[test]
fn every_architecture_has_a_seed() {
    let seeds = seeds(reader("config"));
    let read = seeds.iter().map(|seed| ModelConfig::from_hf(seed, None).expect("a good seed"));
    let read: Vec<Architecture> = read.map(|config| config.architecture).collect();
    for (name, architecture) in Architecture::NAMES {
        assert!(read.contains(&architecture), "fuzz/seeds/config has no {name}");
    }
}

#[test]
fn every_truncation_is_survived() {
    for_each_seed(|reader, seed| {
        for len in 0..seed.len() {
            let outcome = survive(reader, &seed[..len]);
            // A template is one at any length, and JSON may end with a line feed.
            let may_be_whole = reader.name == "chat_template" || len + 32 > seed.len();
            assert!(outcome.is_err() || may_be_whole, "{} at {len} bytes", reader.name);
        }
    });
}

#[test]
fn every_flipped_bit_is_survived() {
    for_each_seed(|reader, mut seed| {
        for place in 0..seed.len() {
            for bit in 0..8 {
                seed[place] ^= 1 << bit;
                let _ = survive(reader, &seed);
                seed[place] ^= 1 << bit;
            }
        }
    });
}

/// `FUZZ_ITERATIONS` files for each reader, and few where it is not set: a fuzzer without coverage,
/// for where there is no other.
#[test]
fn random_damage_is_survived() {
    let n_files = match std::env::var("FUZZ_ITERATIONS") {
        Ok(n_files) => n_files.parse().expect("FUZZ_ITERATIONS is a number"),
        Err(_) => 2_000,
    };
    for reader in &READERS {
        let seeds = seeds(reader);
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        for _ in 0..n_files {
            let _ = survive(reader, &mutations::damaged(&seeds, &mut rng));
        }
    }
}
