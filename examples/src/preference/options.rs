//! What the user can say.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use serde::Serialize;

/// Opens up a preference model: trains one on pairs whose preference is known, trains sparse
/// autoencoders on it, and reports which latents raise and lower its rewards, proven by ablation.
#[derive(Debug, Clone, Parser)]
#[command(name = "preference", version)]
pub struct Options {
    /// A GGUF file, a Hugging Face folder, or a hub id; SmolLM2-135M-Instruct by default. A
    /// sequence classifier is the preference model itself, a language model is given a head
    #[arg(long, value_name = "PATH|ID")]
    pub model: Option<String>,
    /// Pairs to learn from and to explain: .jsonl or .jsonl.gz of chosen and rejected, as HH-RLHF;
    /// pairs made from chats by known rules by default
    #[arg(long, value_name = "FILE")]
    pub pairs: Option<PathBuf>,
    /// How many of those pairs, drawn by what is in them; all by default
    #[arg(long, value_name = "N", requires = "pairs")]
    pub n_pairs: Option<usize>,
    /// Chats to make pairs of and to train autoencoders on: .txt, .md, .jsonl or .json files;
    /// human dialogues from the Python package index by default
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub chat: Vec<PathBuf>,
    /// How many chats to learn from, each of which makes five pairs; a fifth as many are measured on
    #[arg(long, value_name = "N", conflicts_with = "pairs")]
    pub n_chats: Option<usize>,
    /// How many pairs to explain
    #[arg(long, value_name = "N")]
    pub n_explained: Option<usize>,
    /// How many blocks from the top learn with the head; none by default
    #[arg(long, value_name = "BLOCKS")]
    pub tune: Option<usize>,
    /// The rank of what is added to their weights (LoRA); 8 by default, 0 adds any matrix
    #[arg(long, value_name = "R", requires = "tune")]
    pub rank: Option<usize>,
    /// A text to score and attribute: an answer, or a conversation with its turns marked
    #[arg(long, value_name = "TEXT")]
    pub text: Option<String>,
    /// The blocks after which to read: one autoencoder each
    #[arg(long, value_name = "BLOCK", value_delimiter = ',')]
    pub layers: Vec<usize>,
    /// Texts do not end with the token that ends a text
    #[arg(long)]
    pub without_end: bool,
    /// Latents are ablated on the last token too, which the reward is read at, as in the source work
    #[arg(long)]
    pub with_last: bool,
    /// Where report.html and results.json go
    #[arg(long, default_value = "target/preference", value_name = "DIR")]
    pub out: PathBuf,
    /// Smaller sets: minutes instead of twenty
    #[arg(long, conflicts_with = "full")]
    pub quick: bool,
    /// The sizes of the source work: six blocks, 300 + 300 latents on 25 pairs
    #[arg(long)]
    pub full: bool,
    /// The set-up of another work
    #[arg(long, value_enum, value_name = "NAME")]
    pub preset: Option<Preset>,
    /// Do everything anew, whatever an earlier run left in the cache
    #[arg(long)]
    pub retrain: bool,
    /// Also saves the preference model, as a sequence-classification checkpoint
    #[arg(long, value_name = "DIR")]
    pub save: Option<PathBuf>,
    /// The backend that computes
    #[arg(long, env = "BURN_DEVICE", default_value = "flex", value_name = "NAME")]
    pub device: String,
    /// Seed of every draw
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// The set-up of another work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    /// Riggs and Brinkmann, 2024: a GPT-J reward model, gated autoencoders with eight latents per
    /// dimension after blocks 2, 8, 12, 14, 16 and 20, ablated on the last token too
    GptjPm,
}

/// A kind of autoencoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SaeKind {
    /// A fixed number of latents on each token.
    TopK,
    /// Gates beside magnitudes, and a penalty on the gates.
    Gated,
}

/// How large everything is.
#[derive(Debug, Clone, PartialEq)]
pub struct Scale {
    /// Chats that the head learns from: each makes a pair for every planted rule.
    pub n_train_chats: usize,
    /// Chats that it is measured on.
    pub n_test_chats: usize,
    /// Tokens of either text of a pair that is learnt from or explained, at most. People's pairs are
    /// cross-validated at any length that the model can read.
    pub max_tokens: usize,
    /// Pairs that are attributed, of those measured on.
    pub n_attributed_pairs: usize,
    /// Of those, on how many latents are ablated.
    pub n_verified_pairs: usize,
    /// Latents that raise the reward most, and as many that lower it most, which are ablated.
    pub n_verified_latents: usize,
    /// Tokens of other chats that autoencoders are trained on, beside those of the pairs.
    pub n_chat_tokens: usize,
    /// Latents per dimension of the residual stream.
    pub expansion: usize,
    /// Times that an autoencoder sees every activation.
    pub n_passes: usize,
    /// Completions that phrases are inserted into.
    pub n_insertions: usize,
    /// What autoencoders are, in turn.
    pub kinds: Vec<SaeKind>,
    /// Where they read.
    pub read: Blocks,
}

/// After which blocks to read.
#[derive(Debug, Clone, PartialEq)]
pub enum Blocks {
    /// At these shares of the model's depth.
    Depths(Vec<f64>),
    /// After these.
    Layers(Vec<usize>),
}

impl Default for Scale {
    fn default() -> Self {
        Self {
            n_train_chats: 320,
            n_test_chats: 60,
            max_tokens: 256,
            n_attributed_pairs: 90,
            n_verified_pairs: 8,
            n_verified_latents: 40,
            n_chat_tokens: 60_000,
            expansion: 8,
            n_passes: 6,
            n_insertions: 40,
            kinds: vec![SaeKind::TopK, SaeKind::Gated],
            read: Blocks::Depths(vec![0.3, 0.5]),
        }
    }
}

impl Scale {
    /// Minutes on two cores.
    pub fn quick() -> Self {
        Self {
            n_train_chats: 280,
            n_test_chats: 20,
            n_attributed_pairs: 50,
            n_verified_pairs: 5,
            n_verified_latents: 20,
            n_chat_tokens: 12_000,
            expansion: 4,
            n_insertions: 20,
            ..Self::default()
        }
    }

    /// The sizes of the source work, on the default run's preference model.
    pub fn full() -> Self {
        Self {
            max_tokens: 500,
            n_attributed_pairs: 100,
            n_verified_pairs: 25,
            n_verified_latents: 300,
            n_chat_tokens: 120_000,
            n_insertions: 50,
            read: Blocks::Depths(vec![0.08, 0.28, 0.43, 0.5, 0.57, 0.71]),
            ..Self::default()
        }
    }
}

impl Options {
    /// The sizes of the run.
    pub fn scale(&self) -> Scale {
        let mut scale = match (self.quick, self.full) {
            (true, _) => Scale::quick(),
            (_, true) => Scale::full(),
            _ => Scale::default(),
        };
        if let Some(n) = self.n_chats {
            (scale.n_train_chats, scale.n_test_chats) = (n, n.div_ceil(5).max(2));
        }
        if let Some(n) = self.n_explained {
            scale.n_attributed_pairs = n.max(1);
        }
        match self.preset {
            None => scale,
            Some(Preset::GptjPm) => Scale {
                max_tokens: 500,
                expansion: 8,
                kinds: vec![SaeKind::Gated],
                read: Blocks::Layers(vec![2, 8, 12, 14, 16, 20]),
                ..scale
            },
        }
    }

    /// Whether the token that the reward is read at is changed as the others are.
    pub fn changes_last(&self) -> bool {
        self.with_last || self.preset == Some(Preset::GptjPm)
    }

    /// The blocks to read after, in a model of so many.
    ///
    /// # Errors
    /// If the model does not have one of them, or one comes twice.
    pub fn layers(&self, scale: &Scale, n_layers: usize) -> Result<Vec<usize>> {
        let layers = match (self.layers.as_slice(), &scale.read) {
            ([], Blocks::Layers(layers)) => layers.clone(),
            ([], Blocks::Depths(depths)) => {
                let mut layers: Vec<usize> =
                    depths.iter().map(|depth| (depth * n_layers as f64) as usize).collect();
                layers.dedup();
                layers
            }
            (layers, _) => layers.to_vec(),
        };
        for (at, &layer) in layers.iter().enumerate() {
            ensure!(layer < n_layers, "block {layer} was asked for, the model has {n_layers}");
            ensure!(!layers[..at].contains(&layer), "block {layer} was asked for twice");
        }
        Ok(layers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(words: &[&str]) -> Options {
        Options::try_parse_from([&["preference"], words].concat()).unwrap()
    }

    #[test]
    fn layers_are_those_asked_for() {
        let of = |words: &[&str], n_layers| {
            let options = options(words);
            options.layers(&options.scale(), n_layers).map_err(|error| error.to_string())
        };
        assert_eq!(of(&[], 30), Ok(vec![9, 15]));
        assert_eq!(of(&["--full"], 30), Ok(vec![2, 8, 12, 15, 17, 21]));
        assert_eq!(of(&["--preset", "gptj-pm"], 28), Ok(vec![2, 8, 12, 14, 16, 20]));
        assert_eq!(of(&["--preset", "gptj-pm", "--layers", "0,1"], 3), Ok(vec![0, 1]));
        // A shallow model has less to choose from.
        assert_eq!(of(&["--full"], 3), Ok(vec![0, 1, 2]));
        let error = of(&["--preset", "gptj-pm"], 12).unwrap_err();
        assert!(error.contains("block 12 was asked for, the model has 12"), "{error}");
        assert!(of(&["--layers", "1,1"], 3).unwrap_err().contains("twice"));
    }

    #[test]
    fn a_preset_says_what_not_how_much() {
        let scale = options(&["--preset", "gptj-pm", "--quick"]).scale();
        assert_eq!((scale.kinds, scale.expansion), (vec![SaeKind::Gated], 8));
        assert_eq!(scale.n_train_chats, Scale::quick().n_train_chats);
        assert!(Options::try_parse_from(["preference", "--quick", "--full"]).is_err());
    }
}
