//! What the user can say.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Parser;

/// Trains a sparse autoencoder on a chat model's activations, finds the latents behind refusing,
/// steers with them, and reports what that does next to controls.
#[derive(Debug, Clone, Parser)]
#[command(name = "refusal", version)]
pub struct Options {
    /// A GGUF file, a Hugging Face folder, or a hub id; SmolLM2-135M-Instruct by default
    #[arg(long, value_name = "PATH|ID")]
    pub model: Option<String>,
    /// Text to train on: .txt, .md, .jsonl or .json files
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub text: Vec<PathBuf>,
    /// Unsafe test prompts: .json, .jsonl, .csv or lines
    #[arg(long = "unsafe", value_name = "PATH")]
    pub unsafe_prompts: Option<PathBuf>,
    /// Safe test prompts: .json, .jsonl, .csv or lines
    #[arg(long = "safe", value_name = "PATH")]
    pub safe_prompts: Option<PathBuf>,
    /// The block after which to read and steer
    #[arg(long, default_value_t = 12, value_name = "BLOCK")]
    pub layer: usize,
    /// Where report.html, results.json and generations.jsonl go
    #[arg(long, default_value = "target/refusal", value_name = "DIR")]
    pub out: PathBuf,
    /// Smaller sets and fewer rows: minutes instead of twenty
    #[arg(long)]
    pub quick: bool,
    /// Strengths to clamp latents to, as multiples of their largest activation in training
    #[arg(long, value_name = "X", num_args = 1.., value_delimiter = ',')]
    pub strengths: Vec<f64>,
    /// Train the autoencoder anew even if it is in the cache
    #[arg(long)]
    pub retrain: bool,
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
    /// How the autoencoder is trained.
    pub training: TrainingScale,
    /// Latents active on a token.
    pub k: usize,
    /// Prompts of each kind in the test.
    pub n_test_prompts: usize,
    /// Prompts of each kind to choose latents and strengths on.
    pub n_selection_prompts: usize,
    /// Candidates whose effect on the log-odds is measured.
    pub n_candidates: usize,
    /// Of those, how many are tried by generating answers.
    pub n_finalists: usize,
    /// Latents of the bundle.
    pub bundle: usize,
    /// Tokens of an answer.
    pub max_new_tokens: usize,
    /// Tokens of held-out text for perplexities.
    pub n_perplexity_tokens: usize,
    /// Multiples of the largest activation to clamp one latent to.
    pub strengths: Vec<f64>,
    /// The same for the latents of a bundle, which add up.
    pub bundle_strengths: Vec<f64>,
    /// How many times the mean difference is added.
    pub mean_difference_strengths: Vec<f64>,
}

/// How large the training of the autoencoder is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainingScale {
    /// Tokens of the texts, the system prompt of each counted; it is harvested once.
    pub n_tokens: usize,
    /// Passes over them.
    pub n_passes: usize,
    /// Latents per input dimension.
    pub expansion: usize,
    /// Activations per step.
    pub batch: usize,
}

impl Options {
    /// The sizes of the run.
    ///
    /// # Errors
    /// If a strength is not a finite number above zero.
    pub fn scale(&self) -> Result<Scale> {
        let mut scale = if self.quick { Scale::quick() } else { Scale::default() };
        let fits = |strength: &f64| (*strength as f32).is_finite() && *strength > 0.0;
        if let Some(bad) = self.strengths.iter().find(|strength| !fits(strength)) {
            bail!("--strengths: {bad} is not a finite number above zero");
        }
        if !self.strengths.is_empty() {
            let mut strengths = self.strengths.clone();
            strengths.sort_by(f64::total_cmp);
            strengths.dedup();
            scale.strengths.clone_from(&strengths);
            scale.bundle_strengths = strengths;
        }
        Ok(scale)
    }
}

impl Default for Scale {
    fn default() -> Self {
        Self {
            training: TrainingScale { n_tokens: 220_000, n_passes: 4, expansion: 8, batch: 1024 },
            k: 32,
            n_test_prompts: 80,
            n_selection_prompts: 24,
            n_candidates: 24,
            n_finalists: 12,
            bundle: 5,
            max_new_tokens: 24,
            n_perplexity_tokens: 2_000,
            strengths: vec![0.5, 1.0, 1.5, 2.0],
            bundle_strengths: vec![0.4, 0.6, 0.8, 1.0],
            mean_difference_strengths: vec![1.0, 2.0],
        }
    }
}

impl Scale {
    /// For CI: minutes on two cores, and still strong enough to show the effect.
    pub fn quick() -> Self {
        Self {
            training: TrainingScale { n_tokens: 60_000, ..Self::default().training },
            n_test_prompts: 20,
            n_selection_prompts: 12,
            n_finalists: 10,
            max_new_tokens: 18,
            n_perplexity_tokens: 200,
            strengths: vec![1.0, 2.0],
            bundle_strengths: vec![0.4, 0.6],
            mean_difference_strengths: vec![2.0],
            ..Self::default()
        }
    }

    /// Latents of the autoencoder of a model of this width.
    pub fn d_sae(&self, d_model: usize) -> usize {
        self.training.expansion * d_model
    }
}
