//! Damages files at random, in the ways that find mistakes.

use rand::RngExt;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

/// What counts, sizes and numbers are most often wrong about.
const NUMBERS: [u64; 10] = [
    0,
    1,
    32,
    i32::MAX as u64,
    u32::MAX as u64,
    1 << 32,
    1 << 40,
    i64::MAX as u64,
    i64::MAX as u64 + 1,
    u64::MAX,
];

/// What JSON and templates are made of, and what they should not be.
const WORDS: [&str; 30] = [
    "null",
    "true",
    "-1",
    "0",
    "1e999",
    "-0.0",
    "18446744073709551616",
    "4294967295",
    "\"\"",
    "[]",
    "{}",
    "[[",
    "{\"\":",
    "\"type\":",
    "\\u0000",
    "\\ud800",
    "\"Regex\":",
    "(a*)*",
    "▁",
    "\u{10ffff}",
    "{{",
    "}}",
    "{%",
    "%}",
    " ~ ",
    " * 999999999999",
    "range(99999)",
    "|",
    "[::-1]",
    ".attribute",
];

/// A damaged copy of one of `seeds`.
pub fn damaged(seeds: &[Vec<u8>], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut file = seeds.choose(rng).expect("a seed").clone();
    for _ in 0..rng.random_range(1..=4) {
        damage(&mut file, seeds, rng);
    }
    file
}

fn damage(file: &mut Vec<u8>, seeds: &[Vec<u8>], rng: &mut ChaCha8Rng) {
    let at = rng.random_range(0..=file.len());
    let end = (at + 1 + rng.random_range(0..24)).min(file.len());
    match rng.random_range(0..8) {
        0 => file.truncate(at),
        1 => drop(file.drain(at..end)),
        2 => {
            let copy = file[at..end].to_vec();
            let to = rng.random_range(0..=file.len());
            file.splice(to..to, copy);
        }
        3 => {
            let other = seeds.choose(rng).expect("a seed");
            let from = rng.random_range(0..=other.len());
            file.truncate(at);
            file.extend(&other[from..]);
        }
        4 => {
            // In the place of a number, a name or a part of one, or between others.
            let is_word = |byte: &&u8| byte.is_ascii_alphanumeric() || **byte == b'.';
            let before = file[..at].iter().rev().take_while(is_word).count();
            let after = file[at..].iter().take_while(is_word).count();
            let word = WORDS.choose(rng).expect("a word");
            file.splice(at - before..at + after, word.bytes());
        }
        5 => {
            let bytes = NUMBERS.choose(rng).expect("a number").to_le_bytes();
            let n_bytes = (file.len() - at).min(*[1, 4, 8].choose(rng).expect("a width"));
            file[at..at + n_bytes].copy_from_slice(&bytes[..n_bytes]);
        }
        6 => file[at..end].fill(rng.random()),
        _ if at < file.len() => file[at] ^= 1 << rng.random_range(0..8),
        _ => file.push(rng.random()),
    }
}
