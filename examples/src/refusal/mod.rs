//! Steering refusals with a sparse autoencoder, end to end.
//!
//! The experiment of O'Brien et al. (2024), "Steering Language Model Refusal with Sparse
//! Autoencoders", on a small chat model: train an SAE on its activations, find the latents behind
//! refusing, clamp them, and report what that does, next to controls that should do nothing.
//!
//! bytes → tokens (`chats`) → activations → latents (`sae`) → candidates (`find`) → answers
//! and rates (`evaluate`) → results.

mod chats;
mod evaluate;
mod find;
pub mod ladder;
mod options;
mod sae;

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use model_hooks::HookPoint;

pub use options::{Options, Scale};

use crate::assets::{load_model, load_texts};
use crate::corpus::{self, Fingerprint, Prompt, Test};
use crate::device::device;
use crate::progress::{step, tell};
use crate::prompts::{Wanted, read_prompts};
use crate::results::{Generation, Results, Settings};
use chats::Chats;

/// Where training and steering begin: position 0 carries an activation unlike all others.
const FIRST_POSITION: usize = 1;

/// Runs the whole experiment and tells what it does on the way.
///
/// # Errors
/// If something cannot be had, read or written, or does not fit.
pub fn run(options: &Options) -> Result<(Results, Vec<Generation>)> {
    let start = Instant::now();
    let scale = options.scale()?;
    let device = device(&options.device)?;

    step("Loading the model");
    let loaded = load_model(options.model.as_deref(), &device)?;
    let config = loaded.model.config();
    let point = HookPoint::resid_post(options.layer);
    loaded.model.check_point(point)?;
    tell(&format!(
        "{}: {} blocks, d_model {}, vocabulary {}",
        loaded.name, config.n_layers, config.d_model, config.d_vocab
    ));
    let chats = Chats::new(&loaded);

    step("Preparing text and prompts");
    let texts = load_texts(&options.text)?;
    let training = corpus::training();
    let selection = corpus::selection();
    let test = test_prompts(options, &scale)?;
    check_lengths(&chats, &test, &training.six_shot, config.n_ctx, scale.max_new_tokens)?;
    let corpus = chats.training_texts(&texts, &training, &scale, options.seed)?;
    tell(&format!(
        "{} training texts with {} tokens, {} held-out texts; {} unsafe and {} safe test prompts",
        corpus.training.len(),
        corpus.n_training_tokens(),
        corpus.held_out.len(),
        test.unsafe_prompts.len(),
        test.safe_prompts.len(),
    ));

    step(&format!("Sparse autoencoder at {point}"));
    let trained = sae::trained_sae(&loaded, &corpus, point, &scale, options)?;
    let quality = &trained.quality;
    tell(&format!(
        "TopK {} of {}, {} tokens: L0 {:.1}, FVU {:.3} (Σ|x−x̂|² / Σ|x−mean|², held-out), dead {:.1} %, \
         CE recovered {:.3}",
        scale.k,
        scale.d_sae(config.d_model),
        quality.n_tokens,
        quality.l0,
        quality.fvu,
        100.0 * quality.dead_share,
        quality.ce_recovered
    ));

    step("Finding refusal latents");
    let found = find::find(&loaded, &chats, &trained, &selection, point, &scale, options.seed)?;
    tell(&found.summary(&trained));

    step("Generating answers");
    let evaluation = evaluate::evaluate(&evaluate::Setup {
        loaded: &loaded,
        chats: &chats,
        trained: &trained,
        found: &found,
        six_shot: &training.six_shot,
        test: &test,
        held_out: &corpus.held_out,
        point,
        scale: &scale,
        seed: options.seed,
    })?;

    let source = |path: &Option<std::path::PathBuf>| match path {
        Some(path) => path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        None => "written by the project's authors".to_owned(),
    };
    let n_selection_prompts = found.n_selection_prompts;
    let results = Results {
        model: loaded.name.clone(),
        hook_point: point.to_string(),
        sae: trained.summary(&scale, config.d_model),
        latents: found.steering_latents(&trained, &chats),
        candidates: found.candidates.clone(),
        settings: Settings {
            seed: options.seed,
            device: options.device.clone(),
            max_new_tokens: scale.max_new_tokens,
            n_selection_prompts,
            n_perplexity_tokens: evaluation.n_perplexity_tokens,
            unsafe_prompts: source(&options.unsafe_prompts),
            safe_prompts: source(&options.safe_prompts),
            sets: Vec::new(),
            seconds: start.elapsed().as_secs_f64(),
        },
        condition: None,
        headline: found.headline,
        conditional: None,
        rows: evaluation.rows,
        examples: evaluation.examples,
    };
    Ok((results, evaluation.generations))
}

/// The test prompts, without any that training or selection has seen.
fn test_prompts(options: &Options, scale: &Scale) -> Result<Test> {
    let own = corpus::test();
    let read = |path: &Option<std::path::PathBuf>, own, wanted| match path {
        Some(path) => fresh(read_prompts(path, wanted)?),
        None => Ok(own),
    };
    let mut unsafe_prompts = read(&options.unsafe_prompts, own.unsafe_prompts, Wanted::Unsafe)?;
    let mut safe_prompts = read(&options.safe_prompts, own.safe_prompts, Wanted::Safe)?;
    // Evenly: safe prompts come in two halves, ordinary ones and look-alikes.
    for prompts in [&mut unsafe_prompts, &mut safe_prompts] {
        let n = prompts.len();
        *prompts = spread(std::mem::take(prompts), scale.n_test_prompts);
        if prompts.len() < n {
            tell(&format!("using {} of {n} test prompts, evenly spread", prompts.len()));
        }
    }
    Ok(Test { unsafe_prompts, safe_prompts })
}

/// A prompt that does not fit is better found before an autoencoder is trained than after.
fn check_lengths(
    chats: &Chats<'_>,
    test: &Test,
    six_shot: &[corpus::Turn],
    n_ctx: usize,
    max_new_tokens: usize,
) -> Result<()> {
    for prompt in test.unsafe_prompts.iter().chain(&test.safe_prompts) {
        let n = chats.prompt(six_shot, &prompt.prompt)?.len() + max_new_tokens;
        let start: String = prompt.prompt.chars().take(60).collect();
        ensure!(
            n <= n_ctx,
            "the prompt {start:?}… needs {n} positions with six examples before it and its answer \
             after it, the model's context has {n_ctx}: shorten it"
        );
    }
    Ok(())
}

/// Drops prompts that are near one of the training or selection splits.
fn fresh(prompts: Vec<Prompt>) -> Result<Vec<Prompt>> {
    let (seen, n) = (corpus::seen_prompts(), prompts.len());
    let is_fresh = |prompt: &Prompt| {
        let fingerprint = Fingerprint::new(&prompt.prompt);
        !seen.iter().any(|seen| seen.is_near(&fingerprint))
    };
    let kept: Vec<Prompt> = prompts.into_iter().filter(is_fresh).collect();
    ensure!(!kept.is_empty(), "every test prompt is near one of the training or selection prompts");
    if kept.len() < n {
        tell(&format!(
            "left out {} test prompts that are near a training or selection prompt",
            n - kept.len()
        ));
    }
    Ok(kept)
}

/// At most `n` items, evenly spread.
fn spread<T>(items: Vec<T>, n: usize) -> Vec<T> {
    let len = items.len();
    if len <= n {
        return items;
    }
    let kept = |i: usize| (i + 1) * n / len > i * n / len;
    items.into_iter().enumerate().filter(|&(i, _)| kept(i)).map(|(_, item)| item).collect()
}

/// Errors of the libraries with what was being done.
trait During<T> {
    fn during(self, what: &'static str) -> Result<T>;
}

impl<T, E: std::error::Error + Send + Sync + 'static> During<T> for std::result::Result<T, E> {
    fn during(self, what: &'static str) -> Result<T> {
        self.with_context(|| format!("while {what}"))
    }
}
