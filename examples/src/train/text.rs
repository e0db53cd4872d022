//! Text as the pieces that the model reads.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use model_hooks::ModelConfig;
use model_hooks::text::Tokenizer;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::options::TextPlan;
use crate::assets::load_texts;

/// Token ids of texts, cut into pieces that fit a row. A piece is known by its number: the order is
/// the same whenever the same text is read with the same seed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pieces {
    ids: Vec<u32>,
    /// Where each piece begins, and where the last one ends.
    starts: Vec<usize>,
}

/// Text to train on, and text to evaluate on.
pub(super) struct Split {
    pub(super) training: Pieces,
    pub(super) held_out: Pieces,
}

impl Pieces {
    fn empty() -> Self {
        Self { ids: Vec::new(), starts: vec![0] }
    }

    fn push(&mut self, ids: &[u32], bos: Option<u32>, row_tokens: usize) {
        for piece in ids.chunks(row_tokens - usize::from(bos.is_some())) {
            self.ids.extend(bos);
            self.ids.extend(piece);
            // Nothing follows a single token, and nothing comes before it.
            match self.ids.len() - self.starts[self.starts.len() - 1] {
                1 => drop(self.ids.pop()),
                _ => self.starts.push(self.ids.len()),
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        self.starts.len() - 1
    }

    pub(super) fn n_tokens(&self) -> usize {
        self.ids.len()
    }

    pub(super) fn get(&self, piece: usize) -> &[u32] {
        &self.ids[self.starts[piece]..self.starts[piece + 1]]
    }

    pub(super) fn range(&self, pieces: Range<usize>) -> Vec<&[u32]> {
        pieces.map(|piece| self.get(piece)).collect()
    }

    /// SHA-256 of the ids and of where they are cut, in hex.
    pub(super) fn hash(&self) -> String {
        let mut hash = Sha256::new();
        hash.update((self.ids.len() as u64).to_le_bytes());
        self.ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
        self.starts.iter().for_each(|&start| hash.update((start as u64).to_le_bytes()));
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Reads the text, shuffles its documents, and takes the held-out part from the front.
pub(super) fn split(
    plan: &TextPlan,
    tokenizer: &Tokenizer,
    model: &ModelConfig,
    seed: u64,
) -> Result<Split> {
    ensure!(
        plan.row_tokens <= model.n_ctx,
        "text.row_tokens is {}, and the model's context {}: make rows shorter",
        plan.row_tokens,
        model.n_ctx
    );
    let bos = match plan.bos {
        true => Some(model.special_tokens.bos.context(
            "text.bos is true, and the model has no token for the beginning of a text: leave it out",
        )?),
        false => None,
    };
    let mut documents = documents(plan)?;
    documents.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    let mut split = Split { training: Pieces::empty(), held_out: Pieces::empty() };
    let n_tokens = plan.n_tokens.unwrap_or(usize::MAX);
    for document in documents {
        let ids = tokenizer.encode(&document)?;
        if split.held_out.n_tokens() < plan.held_out_tokens {
            split.held_out.push(&ids, bos, plan.row_tokens);
        } else if split.training.n_tokens() < n_tokens {
            let room = n_tokens - split.training.n_tokens();
            split.training.push(&ids[..ids.len().min(room)], bos, plan.row_tokens);
        } else {
            break;
        }
    }
    ensure!(
        split.training.len() > 0,
        "the text has {} tokens, all of which text.held_out_tokens = {} holds out: give more text, \
         or hold out less",
        split.held_out.n_tokens(),
        plan.held_out_tokens
    );
    Ok(split)
}

fn documents(plan: &TextPlan) -> Result<Vec<String>> {
    if plan.paths.is_empty() {
        let dialogues = load_texts(&[])?;
        return Ok(dialogues.into_iter().map(|dialogue| dialogue.turns.join("\n")).collect());
    }
    let mut files = Vec::new();
    for path in &plan.paths {
        match path.is_dir() {
            true => find(path, &mut files)?,
            false => files.push(path.clone()),
        }
    }
    let mut documents = Vec::new();
    for file in files {
        read(&file, &plan.field, &mut documents)
            .with_context(|| format!("the text {}", file.display()))?;
    }
    ensure!(
        !documents.is_empty(),
        "text.paths hold no text in .txt, .md or .jsonl files: name some that do"
    );
    Ok(documents)
}

/// The files of text in a folder and those below, in the order of their names.
fn find(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let place = || format!("the folder {}", folder.display());
    let entries = fs::read_dir(folder).with_context(place)?;
    let mut paths: Vec<PathBuf> =
        entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>().with_context(place)?;
    paths.sort();
    for path in paths {
        let extension = path.extension().and_then(|extension| extension.to_str());
        if path.is_dir() {
            find(&path, files)?;
        } else if matches!(extension, Some("txt" | "md" | "jsonl")) {
            files.push(path);
        }
    }
    Ok(())
}

fn read(file: &Path, field: &str, documents: &mut Vec<String>) -> Result<()> {
    let text = String::from_utf8(fs::read(file)?).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        anyhow!("byte {at} is no UTF-8: convert it, or leave it out of text.paths")
    })?;
    let mut push = |document: &str| {
        if !document.trim().is_empty() {
            documents.push(document.trim().to_owned());
        }
    };
    match file.extension().and_then(|extension| extension.to_str()) {
        Some("txt" | "md") => push(&text),
        Some("jsonl") => {
            for (number, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
                let value: Value = serde_json::from_str(line)
                    .with_context(|| format!("line {} is no JSON", number + 1))?;
                push(value[field].as_str().with_context(|| {
                    format!("line {} has no text {field:?}: set text.field", number + 1)
                })?);
            }
        }
        _ => anyhow::bail!("expected .txt, .md or .jsonl"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_to_rows() {
        let mut pieces = Pieces::empty();
        pieces.push(&[1, 2, 3, 4, 5, 6, 7], None, 3);
        pieces.push(&[8], None, 3);
        pieces.push(&[8, 9], None, 3);
        assert_eq!(pieces.range(0..pieces.len()), [&[1, 2, 3][..], &[4, 5, 6], &[8, 9]]);
        let mut pieces = Pieces::empty();
        pieces.push(&[1, 2, 3], Some(0), 3);
        pieces.push(&[], Some(0), 3);
        assert_eq!(pieces.range(0..pieces.len()), [&[0, 1, 2][..], &[0, 3]]);
    }
}
