//! What steering costs while a model decodes, beside the same model left alone.
//!
//! The runs of all treatments take turns, so that what else the machine does meets all of them, and
//! the median token of each is compared.

use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::Result;
use burn::tensor::{Device, Tensor};
use examples::assets::locate_model;
use model_hooks::{GenerateConfig, Hook, HookPoint, LanguageModel, SharedPrefix, load, unobserved};
use sae_core::{Activation, Sae, SaeConfig, SaeWeights};
use serde::Serialize;
use steering::{
    Condition, Intervention, LatentEdit, LatentEdits, Over, Reading, Region, Remainder, Score,
    Steering, random_direction, residual_writers,
};

/// Tokens decoded in a run, after the first.
const N_DECODED: usize = 32;
/// Latents kept of a TopK autoencoder.
const K: usize = 32;
/// Prompts and new tokens of the comparison of batches with one at a time.
const N_PROMPTS: usize = 100;
const N_NEW: usize = 32;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// A GGUF file, a Hugging Face folder, or a hub id; SmolLM2-135M-Instruct unless given.
    #[arg(long)]
    model: Option<String>,
    /// The block after which to steer.
    #[arg(long, default_value_t = 12)]
    layer: usize,
    /// Latents of the autoencoder.
    #[arg(long, default_value_t = 4608)]
    d_sae: usize,
    /// Runs of each treatment.
    #[arg(long, default_value_t = 5)]
    n_runs: usize,
    /// Measures batches against one prompt at a time in place of the treatments.
    #[arg(long)]
    batches: bool,
}

#[derive(Serialize)]
struct Line<'a> {
    name: &'a str,
    tokens_per_s: f64,
    /// Of the tokens per second of the model left alone.
    share_of_plain: f64,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let device = Device::flex();
    let mut checkpoint = load::open(&locate_model(options.model.as_deref())?)?;
    let model = LanguageModel::load(checkpoint.config, checkpoint.tensors.as_mut(), &device)?;
    examples::allocator::keep_pages();
    match options.batches {
        true => batches(&model, options),
        false => treatments(&model, options),
    }
}

/// Latents that read and write random directions.
fn sae(d_in: usize, d_sae: usize, activation: Activation, device: &Device) -> Result<Sae> {
    let row = |i: usize| random_direction(d_in, 1.0, i as u64, device).unsqueeze::<2>();
    let w_dec = Tensor::cat((0..d_sae).map(row).collect(), 0);
    let w_enc = Tensor::from_data(w_dec.clone().transpose().into_data(), device);
    let zeros = |n: usize| Tensor::<1>::zeros([n], device);
    let mut weights = SaeWeights::new(w_enc, zeros(d_sae), w_dec, zeros(d_in));
    weights.threshold = (activation == Activation::JumpRelu).then(|| zeros(d_sae) + 1.0);
    Ok(Sae::new(SaeConfig::new(d_in, d_sae, activation), weights)?)
}

fn treatments(model: &LanguageModel, options: &Options) -> Result<()> {
    let (d_model, device) = (model.config().d_model, model.device());
    let point = HookPoint::resid_post(options.layer);
    let kind = |activation| sae(d_model, options.d_sae, activation, device);
    let (relu, jump) = (kind(Activation::Relu)?, kind(Activation::JumpRelu)?);
    let top_k = kind(Activation::TopK { k: K, rescale_by_decoder_norm: false })?;
    let latent = |sae, reading| {
        let (edits, remainder) = (vec![LatentEdit::clamp(7, 1.0)], Remainder::Keep);
        Intervention::Latents(LatentEdits { sae, edits, remainder, reading })
    };
    let direction = random_direction(d_model, 1.0, 99, device);
    let at_point =
        |intervention| Steering::new([point], intervention, Region::from_position(1)).map(Some);
    let add = || Intervention::Add { direction: direction.clone() };
    let ablate = || Intervention::Ablate { direction: direction.clone() };
    let condition = Condition {
        point,
        score: Score::Cosine { direction: direction.clone() },
        over: Over::LastPromptToken,
        threshold: -1.5,
        from_position: 1,
    };
    let everywhere =
        Steering::new(residual_writers(model.hook_points()), ablate(), Region::default())?;
    let mut hooks = [
        ("plain", None),
        ("add", at_point(add())?),
        ("add_on_condition", at_point(add())?.map(|s| s.when(condition)).transpose()?),
        ("ablate", at_point(ablate())?),
        ("ablate_at_every_writer", Some(everywhere)),
        ("clamp_relu_column", at_point(latent(&relu, Reading::Exact))?),
        ("clamp_jumprelu_column", at_point(latent(&jump, Reading::Exact))?),
        ("clamp_topk_threshold", at_point(latent(&top_k, Reading::Threshold(1.0)))?),
        ("clamp_topk_exact", at_point(latent(&top_k, Reading::Exact))?),
    ];
    let mut times = vec![Vec::new(); hooks.len()];
    for _ in 0..options.n_runs {
        for (times, (_, hook)) in times.iter_mut().zip(&mut hooks) {
            times.extend(decode(model, hook)?);
        }
    }
    let medians: Vec<f64> = times.into_iter().map(median).collect();
    for ((name, _), seconds) in hooks.iter().zip(&medians) {
        let (tokens_per_s, share_of_plain) = (1.0 / seconds, medians[0] / seconds);
        let line = Line { name, tokens_per_s, share_of_plain };
        println!("{}", serde_json::to_string(&line)?);
    }
    Ok(())
}

/// The seconds of each token but the first.
fn decode<H: Hook>(model: &LanguageModel, hook: &mut H) -> Result<Vec<f64>> {
    let mut stamps = Vec::with_capacity(N_DECODED + 1);
    let stamp = |_: model_hooks::NewToken<'_>| {
        stamps.push(Instant::now());
        ControlFlow::Continue(())
    };
    let prompt = prompt(0, model.config().d_vocab);
    let config = GenerateConfig::greedy(N_DECODED + 1, vec![]);
    model.generate(&[prompt], &SharedPrefix::default(), &config, hook, stamp)?;
    Ok(stamps.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect())
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_unstable_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// Any ids do; of 16 to 31 tokens.
fn prompt(index: usize, d_vocab: usize) -> Vec<u32> {
    (0..16 + index % 16).map(|i| ((index * 31 + i + 1) * 7919 % d_vocab) as u32).collect()
}

fn batches(model: &LanguageModel, options: &Options) -> Result<()> {
    let (d_model, device) = (model.config().d_model, model.device());
    let direction = random_direction(d_model, 1.0, 99, device);
    let point = HookPoint::resid_post(options.layer);
    let add = Intervention::Add { direction };
    let mut steering = Steering::new([point], add, Region::from_position(1))?;
    let prompts: Vec<_> = (0..N_PROMPTS).map(|i| prompt(i, model.config().d_vocab)).collect();
    let config = GenerateConfig::greedy(N_NEW, vec![]);
    let none = SharedPrefix::default();
    let start = Instant::now();
    model.generate(&prompts, &none, &config, &mut steering, unobserved)?;
    let together = start.elapsed().as_secs_f64();
    // A tenth of them tells how long one takes.
    let start = Instant::now();
    let alone = prompts.iter().step_by(10);
    for prompt in alone.clone() {
        model.generate(&[prompt], &none, &config, &mut steering, unobserved)?;
    }
    let each = start.elapsed().as_secs_f64() / alone.count() as f64;
    let line = serde_json::json!({
        "name": "batch_of_100",
        "tokens_per_s": (N_PROMPTS * N_NEW) as f64 / together,
        "one_at_a_time": N_NEW as f64 / each,
        "ratio": N_PROMPTS as f64 * each / together,
    });
    println!("{line}");
    Ok(())
}
