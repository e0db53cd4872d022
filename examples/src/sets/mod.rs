//! Published sets of prompts and questions, read from paths in their own formats.
//!
//! | set | reader |
//! |---|---|
//! | XSTest's prompts, and its completions with what people made of them | [`prompts::xstest`], [`completions::read`] |
//! | HarmBench, AdvBench and others as JSON | [`prompts::harmful`] |
//! | pairs of requests to learn a condition from | [`prompts::condition`] |
//! | MMLU, TruthfulQA (MC1), CommonsenseQA | [`questions`] |
//! | GSM8K, and what a model makes of it | [`arithmetic`] |
//! | beginnings of refusing and complying answers | [`behavior::read`] |
//! | dialogues of several turns in HH-RLHF's format | [`dialogues::hh`] |
//!
//! None of them is part of this repository.

pub mod arithmetic;
pub mod behavior;
pub mod completions;
pub mod dialogues;
pub mod prompts;
pub mod questions;
pub mod sample;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::preference::pairs::PairsError;

/// The most that is read of a file: the largest of these sets take a hundredth of it.
const MAX_BYTES: u64 = 1 << 28;

/// Why a set cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetError {
    /// The operating system refused.
    #[error("cannot read `{}`", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What it says.
        source: io::Error,
    },
    /// A file larger than any set.
    #[error("`{}` has {actual} bytes; at most {limit} are read", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// What is read at most.
        limit: u64,
        /// Its size.
        actual: u64,
    },
    /// A file that is not UTF-8.
    #[error("`{}` is not UTF-8", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Where not.
        source: std::string::FromUtf8Error,
    },
    /// A table that lacks a column, or a row of another shape.
    #[error("`{}` is not the table that it should be", path.display())]
    Csv {
        /// The file.
        path: PathBuf,
        /// Where and what.
        source: csv::Error,
    },
    /// JSON of another shape.
    #[error("line {line} of `{}` is not the JSON that it should be", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Which line of it, from 1; where all of it is one document, the line of the error.
        line: usize,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// A value that a row cannot have.
    #[error("row {row} of `{}`: {field} is {actual:?}, expected {expected}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// Which row, from 0.
        row: usize,
        /// What it is of the row.
        field: &'static str,
        /// What it should be.
        expected: String,
        /// What it is.
        actual: String,
    },
    /// Pairs of dialogues that cannot be read.
    #[error(transparent)]
    Pairs(#[from] PairsError),
    /// A set of nothing.
    #[error("`{}` holds nothing", path.display())]
    Empty {
        /// The file or folder.
        path: PathBuf,
    },
}

fn read_text(path: &Path) -> Result<String, SetError> {
    let io = |source| SetError::Io { path: path.into(), source };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(io)?;
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
    let actual = bytes.len() as u64;
    if actual > MAX_BYTES {
        return Err(SetError::TooLarge { path: path.into(), limit: MAX_BYTES, actual });
    }
    let text = String::from_utf8(bytes);
    let text = text.map_err(|source| SetError::NotUtf8 { path: path.into(), source })?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

/// The rows of a table with a header.
fn read_csv<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, SetError> {
    let text = read_text(path)?;
    let rows = csv::Reader::from_reader(text.as_bytes()).into_deserialize();
    let rows: Result<Vec<T>, csv::Error> = rows.collect();
    not_empty(path, rows.map_err(|source| SetError::Csv { path: path.into(), source })?)
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, SetError> {
    let parsed = serde_json::from_str(&read_text(path)?);
    parsed.map_err(|source| SetError::Json { path: path.into(), line: source.line(), source })
}

/// A document on each line that is not empty.
fn read_json_lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, SetError> {
    let text = read_text(path)?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let rows = lines.map(|(index, line)| {
        serde_json::from_str(line).map_err(|source| SetError::Json {
            path: path.into(),
            line: index + 1,
            source,
        })
    });
    not_empty(path, rows.collect::<Result<_, _>>()?)
}

fn not_empty<T>(path: &Path, rows: Vec<T>) -> Result<Vec<T>, SetError> {
    if rows.is_empty() { Err(SetError::Empty { path: path.into() }) } else { Ok(rows) }
}

/// A text that has to have words.
fn words(path: &Path, row: usize, field: &'static str, text: &str) -> Result<String, SetError> {
    match text.trim() {
        "" => {
            let (expected, actual) = ("a text".to_owned(), text.to_owned());
            Err(SetError::Value { path: path.into(), row, field, expected, actual })
        }
        text => Ok(text.to_owned()),
    }
}
