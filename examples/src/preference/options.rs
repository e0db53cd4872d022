//! What the user can say.

use std::path::PathBuf;

use clap::Parser;

/// Opens up a preference model: trains one on pairs whose preference is known, trains sparse
/// autoencoders on it, and reports which latents raise and lower its rewards, proven by ablation.
#[derive(Debug, Clone, Parser)]
#[command(name = "preference", version)]
pub struct Options {
    /// A GGUF file, a Hugging Face folder, or a hub id; SmolLM2-135M-Instruct by default
    #[arg(long, value_name = "PATH|ID")]
    pub model: Option<String>,
    /// A text to score and attribute: an answer, or a conversation with its turns marked
    #[arg(long, value_name = "TEXT")]
    pub text: Option<String>,
    /// The blocks after which to read: one autoencoder each, TopK and Gated in turn
    #[arg(long, value_name = "BLOCK", value_delimiter = ',')]
    pub layers: Vec<usize>,
    /// Where report.html and results.json go
    #[arg(long, default_value = "target/preference", value_name = "DIR")]
    pub out: PathBuf,
    /// Smaller sets: minutes instead of twenty
    #[arg(long)]
    pub quick: bool,
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

/// How large everything is.
#[derive(Debug, Clone, PartialEq)]
pub struct Scale {
    /// Pairs that the head is trained on.
    pub n_train_pairs: usize,
    /// Pairs that it is measured on.
    pub n_test_pairs: usize,
    /// Of those, how many are attributed.
    pub n_attributed_pairs: usize,
    /// Of those, on how many latents are ablated.
    pub n_verified_pairs: usize,
    /// Latents that raise the reward most, and as many that lower it most, which are ablated.
    pub n_verified_latents: usize,
    /// Latents per dimension of the residual stream.
    pub expansion: usize,
    /// Times that an autoencoder sees every activation.
    pub n_passes: usize,
    /// Completions that phrases are inserted into.
    pub n_insertions: usize,
    /// Blocks, as shares of the model's depth.
    pub depths: Vec<f64>,
}

impl Default for Scale {
    fn default() -> Self {
        Self {
            n_train_pairs: 1200,
            n_test_pairs: 300,
            n_attributed_pairs: 50,
            n_verified_pairs: 8,
            n_verified_latents: 40,
            expansion: 8,
            n_passes: 6,
            n_insertions: 20,
            depths: vec![0.4, 0.66],
        }
    }
}

impl Scale {
    /// Minutes on two cores.
    pub fn quick() -> Self {
        Self {
            n_train_pairs: 500,
            n_test_pairs: 100,
            n_attributed_pairs: 20,
            n_verified_pairs: 5,
            n_verified_latents: 20,
            expansion: 4,
            n_insertions: 10,
            ..Self::default()
        }
    }
}

impl Options {
    /// The sizes of the run.
    pub fn scale(&self) -> Scale {
        if self.quick { Scale::quick() } else { Scale::default() }
    }

    /// The blocks to read after, in a model of so many.
    pub fn layers(&self, scale: &Scale, n_layers: usize) -> Vec<usize> {
        match self.layers.as_slice() {
            [] => scale.depths.iter().map(|depth| (depth * n_layers as f64) as usize).collect(),
            layers => layers.to_vec(),
        }
    }
}
