//! Pairs of conversations, one of which is preferred: files of the HH-RLHF format, and which of
//! their pairs can be used.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use model_hooks::text::{TextError, Tokenizer};
use serde::{Deserialize, Serialize};

/// What a human turn begins with.
pub const HUMAN: &str = "\n\nHuman: ";
/// What a turn of the assistant begins with.
pub const ASSISTANT: &str = "\n\nAssistant: ";

/// Bytes of a line, at most: the longest of the published sets has a hundredth.
const MAX_LINE_BYTES: u64 = 1 << 24;
/// Bytes of a file once it is unpacked, at most.
const MAX_FILE_BYTES: u64 = 1 << 32;

/// Two conversations that begin alike; the first is preferred.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreferencePair {
    /// The preferred one, with its turns marked ([`HUMAN`], [`ASSISTANT`]).
    pub chosen: String,
    /// The other one.
    pub rejected: String,
}

/// A pair as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenPair {
    /// Ids of the preferred one.
    pub chosen: Vec<u32>,
    /// Ids of the other one.
    pub rejected: Vec<u32>,
    /// The first position at which they differ.
    pub divergence: usize,
}

/// Which pairs are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PairFilter {
    /// Tokens of either text, at most, the one that ends it included.
    pub max_tokens: usize,
    /// What ends a text, if the model was trained to see it.
    pub end: Option<u32>,
}

/// Pairs that were left out, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    /// A text is too long.
    pub too_long: usize,
    /// The texts are the same.
    pub alike: usize,
    /// A text does not begin with a human turn, or has no turn of the assistant.
    pub no_dialogue: usize,
}

/// Why a file of pairs cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PairsError {
    /// The file cannot be read or unpacked.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The name does not say what is in it.
    #[error("{path}: expected a file of name *.jsonl or *.jsonl.gz")]
    Name {
        /// The file.
        path: PathBuf,
    },
    /// A line is no pair.
    #[error(
        "line {line} of {path}: expected an object with strings `chosen` and `rejected`: {source}"
    )]
    Line {
        /// The file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A line or the file is larger than any of its kind.
    #[error("{path} has more than {limit} bytes at line {line}")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// The most that is read.
        limit: u64,
    },
    /// There is no pair.
    #[error("{path} holds no pairs")]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// Reads a `.jsonl` or `.jsonl.gz` file of objects with `chosen` and `rejected`; other fields are
/// left alone.
///
/// # Errors
/// If the file cannot be read, a line is no pair, or there is none.
pub fn read_pairs(path: &Path) -> Result<Vec<PreferencePair>, PairsError> {
    let io = |source| PairsError::Io { path: path.into(), source };
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let packed = name.ends_with(".jsonl.gz");
    if !packed && !name.ends_with(".jsonl") {
        return Err(PairsError::Name { path: path.into() });
    }
    let file = File::open(path).map_err(io)?;
    if packed {
        read_lines(BufReader::new(MultiGzDecoder::new(file)), path)
    } else {
        read_lines(BufReader::new(file), path)
    }
}

fn read_lines(mut reader: impl BufRead, path: &Path) -> Result<Vec<PreferencePair>, PairsError> {
    let io = |source| PairsError::Io { path: path.into(), source };
    let (mut pairs, mut bytes, mut total) = (Vec::new(), Vec::new(), 0);
    for line in 1.. {
        bytes.clear();
        let n = reader.by_ref().take(MAX_LINE_BYTES + 1).read_until(b'\n', &mut bytes);
        let n = n.map_err(io)? as u64;
        total += n;
        for (actual, limit) in [(n, MAX_LINE_BYTES), (total, MAX_FILE_BYTES)] {
            if actual > limit {
                return Err(PairsError::TooLarge { path: path.into(), line, limit });
            }
        }
        if n == 0 {
            break;
        }
        if bytes.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let pair = serde_json::from_slice(&bytes);
        pairs.push(pair.map_err(|source| PairsError::Line { path: path.into(), line, source })?);
    }
    if pairs.is_empty() {
        return Err(PairsError::Empty { path: path.into() });
    }
    Ok(pairs)
}

impl PreferencePair {
    /// The same texts, the other one preferred.
    #[must_use]
    pub fn swapped(self) -> Self {
        Self { chosen: self.rejected, rejected: self.chosen }
    }

    /// Whether both texts begin with a human turn and have one of the assistant.
    pub fn is_dialogue(&self) -> bool {
        let is_dialogue =
            |text: &str| text.starts_with(HUMAN.trim_end()) && text.contains(ASSISTANT.trim_end());
        is_dialogue(&self.chosen) && is_dialogue(&self.rejected)
    }
}

impl TokenPair {
    /// The tokens of both texts, each ended if the filter says how.
    ///
    /// # Errors
    /// If a text cannot be turned into tokens.
    pub fn new(
        pair: &PreferencePair,
        tokenizer: &Tokenizer,
        end: Option<u32>,
    ) -> Result<Self, TextError> {
        let encode = |text: &str| {
            tokenizer.encode(text).map(|mut ids| {
                ids.extend(end);
                ids
            })
        };
        let (chosen, rejected) = (encode(&pair.chosen)?, encode(&pair.rejected)?);
        let divergence = divergence(&chosen, &rejected);
        Ok(Self { chosen, rejected, divergence })
    }

    /// Both texts, the preferred one first.
    pub fn texts(&self) -> [&[u32]; 2] {
        [&self.chosen, &self.rejected]
    }
}

/// The first position at which two texts differ: the length of the shorter, where the other goes
/// on from there.
pub fn divergence(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl PairFilter {
    /// The pairs that are kept, with their index, and why the others are not.
    ///
    /// # Errors
    /// If a text cannot be turned into tokens.
    pub fn keep(
        &self,
        pairs: &[PreferencePair],
        tokenizer: &Tokenizer,
    ) -> Result<(Vec<(usize, TokenPair)>, LeftOut), TextError> {
        let (mut kept, mut left_out) = (Vec::new(), LeftOut::default());
        for (index, pair) in pairs.iter().enumerate() {
            if !pair.is_dialogue() {
                left_out.no_dialogue += 1;
                continue;
            }
            let pair = TokenPair::new(pair, tokenizer, self.end)?;
            if pair.chosen == pair.rejected {
                left_out.alike += 1;
            } else if pair.texts().iter().any(|text| text.len() > self.max_tokens) {
                left_out.too_long += 1;
            } else {
                kept.push((index, pair));
            }
        }
        Ok((kept, left_out))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    const LINES: &str = concat!(
        r#"{"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: Go."}"#,
        "\n\n",
        r#"{"rejected": "b", "chosen": "a", "source": "x"}"#,
    );

    fn read(name: &str, bytes: &[u8]) -> Result<Vec<PreferencePair>, PairsError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        read_pairs(&path)
    }

    fn packed(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn packed_or_not_the_pairs_are_the_same() {
        let pairs = read("a.jsonl", LINES.as_bytes()).unwrap();
        assert_eq!(pairs.len(), 2);
        assert_eq!((pairs[1].chosen.as_str(), pairs[1].rejected.as_str()), ("a", "b"));
        assert!(pairs[0].is_dialogue() && !pairs[1].is_dialogue());
        assert_eq!(read("a.jsonl.gz", &packed(LINES.as_bytes())).unwrap(), pairs);
        // Files may be put together out of several.
        let twice = [packed(LINES.as_bytes()), packed(b"\n"), packed(LINES.as_bytes())].concat();
        assert_eq!(read("A.JSONL.GZ", &twice).unwrap().len(), 4);
        let swapped = pairs[1].clone().swapped();
        assert_eq!((swapped.chosen.as_str(), swapped.rejected.as_str()), ("b", "a"));
    }

    #[test]
    fn what_is_no_pair_is_an_error_that_names_its_line() {
        for bad in ["{}", "[]", "{", r#"{"chosen": "a"}"#, r#"{"chosen": 1, "rejected": "b"}"#] {
            let lines = format!("{LINES}\n{bad}\n");
            let error = read("a.jsonl", lines.as_bytes()).unwrap_err();
            assert!(matches!(error, PairsError::Line { line: 4, .. }), "{bad}: {error}");
        }
        assert!(matches!(read("a.jsonl", &[0xff, 0xfe]), Err(PairsError::Line { .. })));
        assert!(matches!(read("a.jsonl", b"\n"), Err(PairsError::Empty { .. })));
        assert!(matches!(read("a.txt", b"x"), Err(PairsError::Name { .. })));
        assert!(matches!(read("a.jsonl.gz", LINES.as_bytes()), Err(PairsError::Io { .. })));
        let mut cut = packed(LINES.as_bytes());
        cut.truncate(cut.len() - 9);
        assert!(matches!(read("a.jsonl.gz", &cut), Err(PairsError::Io { .. })));
    }

    #[test]
    fn a_line_without_end_is_given_up() {
        let bomb = packed(&vec![b'a'; MAX_LINE_BYTES as usize + 2]);
        assert!(bomb.len() < 200_000);
        let error = read("a.jsonl.gz", &bomb).unwrap_err();
        assert!(matches!(error, PairsError::TooLarge { line: 1, .. }), "{error}");
    }

    #[test]
    fn texts_diverge_where_they_first_differ() {
        assert_eq!(divergence(&[1, 2, 3], &[1, 2, 4]), 2);
        assert_eq!(divergence(&[1, 2], &[1, 2, 4]), 2);
        assert_eq!(divergence(&[5], &[6]), 0);
        assert_eq!(divergence(&[5, 6], &[5, 6]), 2);
    }
}
