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
    /// A folder of published sets to test on and to learn a condition from: harmful/, xstest/,
    /// activation-steering/, mmlu/, truthfulqa/, commonsenseqa/, gsm8k/, hh-rlhf/
    #[arg(long, value_name = "DIR")]
    pub sets: Option<PathBuf>,
    /// A published set-up: smollm2 or phi3-mini
    #[arg(long, default_value = "smollm2", value_name = "NAME")]
    pub preset: String,
    /// The block after which to read and steer, if not the preset's
    #[arg(long, value_name = "BLOCK")]
    pub layer: Option<usize>,
    /// Where report.html, results.json, generations.jsonl and plans go, and what an interrupted run
    /// goes on from
    #[arg(long, default_value = "target/refusal", value_name = "DIR")]
    pub out: PathBuf,
    /// Smaller sets and fewer rows: minutes instead of twenty
    #[arg(long)]
    pub quick: bool,
    /// The published sets (--sets) at full size: an hour or two
    #[arg(long)]
    pub full: bool,
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

/// A model with the place and the autoencoder that somebody steered it by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preset {
    /// Its name.
    pub name: &'static str,
    /// The model's hub id; none for the one that is the default everywhere.
    pub model: Option<&'static str>,
    /// The block after which it is read and steered.
    pub layer: usize,
    /// Latents active on a token.
    pub k: usize,
    /// Latents per input dimension.
    pub expansion: usize,
}

impl Preset {
    /// All there are: this project's own, and that of O'Brien et al. (2024).
    pub const ALL: [Self; 2] = [
        Self { name: "smollm2", model: None, layer: 12, k: 32, expansion: 8 },
        Self {
            name: "phi3-mini",
            model: Some("microsoft/Phi-3-mini-4k-instruct"),
            layer: 6,
            k: 32,
            expansion: 8,
        },
    ];
}

/// How large everything is.
#[derive(Debug, Clone, PartialEq)]
pub struct Scale {
    /// How the autoencoder is trained.
    pub training: TrainingScale,
    /// Latents active on a token.
    pub k: usize,
    /// Prompts of each kind in the test, where they are the authors' or given as files.
    pub n_test_prompts: usize,
    /// Prompts of each published set in the test.
    pub n_published_prompts: usize,
    /// Of the prompts of each set, how many are asked in the six-shot arm, which shows which way
    /// refusals move and not how much it costs.
    pub n_six_shot_prompts: usize,
    /// Prompts of each kind to choose latents and strengths on.
    pub n_selection_prompts: usize,
    /// Requests of each kind that a condition is learnt from, of a published set.
    pub n_lessons: usize,
    /// Pairs of requests that it is learnt from, of the authors'.
    pub n_contrasts: usize,
    /// Candidates whose effect on the log-odds is measured.
    pub n_candidates: usize,
    /// Of those, how many are tried by generating answers.
    pub n_finalists: usize,
    /// Latents of the bundle, at most.
    pub bundle: usize,
    /// Vectors that are tried to find the targeted direction.
    pub n_trial_vectors: usize,
    /// Tokens of an answer.
    pub max_new_tokens: usize,
    /// Tokens of held-out text for perplexities.
    pub n_perplexity_tokens: usize,
    /// Prompts on which log-odds and divergences are measured.
    pub n_measured_prompts: usize,
    /// Questions of MMLU, or of the authors' in place of all published sets.
    pub n_questions: usize,
    /// Questions of TruthfulQA and CommonsenseQA each.
    pub n_other_questions: usize,
    /// Word problems.
    pub n_problems: usize,
    /// Tokens of the answer to a word problem.
    pub problem_tokens: usize,
    /// Conversations that lead up to harm.
    pub n_ladders: usize,
    /// Dialogues of a published set.
    pub n_dialogues: usize,
    /// Multiples of the largest activation to clamp one latent to.
    pub strengths: Vec<f64>,
    /// The same for the latents of a bundle, which add up.
    pub bundle_strengths: Vec<f64>,
    /// How many times the mean difference is added.
    pub mean_difference_strengths: Vec<f64>,
    /// How far latents are turned down in the six-shot arm, in multiples of their largest
    /// activation; at 0 they are ablated.
    pub ablation_strengths: Vec<f64>,
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
    /// If a strength is not a finite number above zero, the preset is not known, or what was asked
    /// for excludes itself.
    pub fn scale(&self) -> Result<Scale> {
        let mut scale = match (self.quick, self.full) {
            (true, true) => bail!("--quick and --full exclude each other"),
            (true, false) => Scale::quick(),
            (false, true) => Scale::full(),
            (false, false) => Scale::default(),
        };
        if self.full && self.sets.is_none() {
            bail!("--full takes the published sets: say with --sets in which folder they are");
        }
        let preset = self.preset()?;
        scale.k = preset.k;
        scale.training.expansion = preset.expansion;
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

    /// The preset of that name.
    ///
    /// # Errors
    /// If there is none.
    pub fn preset(&self) -> Result<Preset> {
        let names = Preset::ALL.map(|preset| preset.name);
        match Preset::ALL.into_iter().find(|preset| preset.name == self.preset) {
            Some(preset) => Ok(preset),
            None => {
                bail!("--preset: there is no {:?}; there are {}", self.preset, names.join(", "))
            }
        }
    }
}

impl Default for Scale {
    fn default() -> Self {
        Self {
            training: TrainingScale { n_tokens: 220_000, n_passes: 4, expansion: 8, batch: 1024 },
            k: 32,
            n_test_prompts: 80,
            n_published_prompts: 60,
            n_six_shot_prompts: 24,
            n_selection_prompts: 24,
            n_lessons: 300,
            n_contrasts: 500,
            n_candidates: 24,
            n_finalists: 10,
            bundle: 5,
            n_trial_vectors: 256,
            max_new_tokens: 24,
            n_perplexity_tokens: 2_000,
            n_measured_prompts: 24,
            n_questions: 40,
            n_other_questions: 40,
            n_problems: 16,
            problem_tokens: 48,
            n_ladders: 15,
            n_dialogues: 40,
            strengths: vec![0.5, 1.0, 1.5, 2.0],
            bundle_strengths: vec![0.4, 0.6, 0.8, 1.0],
            mean_difference_strengths: vec![1.0, 2.0],
            ablation_strengths: vec![0.0, 0.5, 1.0],
        }
    }
}

impl Scale {
    /// For CI: minutes on two cores, and still strong enough to show the effect.
    pub fn quick() -> Self {
        Self {
            training: TrainingScale { n_tokens: 60_000, ..Self::default().training },
            n_test_prompts: 20,
            n_published_prompts: 20,
            n_selection_prompts: 12,
            n_lessons: 100,
            n_contrasts: 120,
            n_finalists: 10,
            n_trial_vectors: 64,
            max_new_tokens: 18,
            n_perplexity_tokens: 200,
            n_measured_prompts: 6,
            n_questions: 8,
            n_problems: 2,
            problem_tokens: 16,
            n_ladders: 2,
            strengths: vec![1.0, 2.0],
            bundle_strengths: vec![0.4, 0.6],
            mean_difference_strengths: vec![2.0],
            ablation_strengths: vec![1.0],
            ..Self::default()
        }
    }

    /// The published sets, whole or as large as the claims need, with capability beside. The
    /// autoencoder is the default's.
    pub fn full() -> Self {
        Self {
            n_published_prompts: 450,
            n_six_shot_prompts: 60,
            n_selection_prompts: 40,
            n_lessons: 1_500,
            n_contrasts: 1_000,
            n_candidates: 48,
            n_trial_vectors: 512,
            max_new_tokens: 32,
            n_perplexity_tokens: 20_000,
            n_measured_prompts: 100,
            n_questions: 400,
            n_other_questions: 200,
            n_problems: 50,
            problem_tokens: 160,
            n_dialogues: 60,
            bundle_strengths: vec![0.4, 0.6, 1.0],
            ..Self::default()
        }
    }

    /// Latents of the autoencoder of a model of this width.
    pub fn d_sae(&self, d_model: usize) -> usize {
        self.training.expansion * d_model
    }
}
