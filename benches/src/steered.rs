//! What steering costs while a model decodes, beside the same model left alone.
//!
//! All treatments take turns within one generation, token by token, so that what else the machine does
//! meets all of them, and the median token of each is compared.

use std::cell::Cell;
use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::{Result, bail};
use burn::tensor::Tensor;
use model_hooks::{
    GenerateConfig, Hook, HookError, HookPoint, LanguageModel, Positions, SharedPrefix, unobserved,
};
use sae_core::Activation;
use serde::Serialize;
use steering::{
    Condition, Intervention, LatentEdit, LatentEdits, Over, Reading, Region, Remainder, Score,
    Steering, random_direction, residual_writers,
};

use crate::subject;

/// Latents kept of a TopK autoencoder.
const K: usize = 32;
/// Prompts and new tokens of the comparison of batches with one at a time.
const N_PROMPTS: usize = 100;
const N_NEW: usize = 32;
/// Of these prompts so many are asked one at a time.
const N_ALONE: usize = 10;

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
    /// Tokens of each treatment; of batches, runs of either kind.
    #[arg(long)]
    n_rounds: Option<usize>,
    /// Only these treatments, beside the model left alone.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Measures batches against one prompt at a time in place of the treatments.
    #[arg(long)]
    batches: bool,
}

#[derive(Serialize)]
struct Line<'a> {
    name: &'a str,
    tokens_per_s: f64,
    /// Of the tokens per second of the model left alone, by the medians.
    share_of_plain: f64,
    /// The same by the fastest tenth, which the rest of the machine disturbs least.
    share_of_plain_at_best: f64,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let model = subject::model(options.model.as_deref())?;
    match options.batches {
        true => batches(&model, options),
        false => treatments(&model, options),
    }
}

fn treatments(model: &LanguageModel, options: &Options) -> Result<()> {
    let (d_model, device) = (model.config().d_model, model.device());
    let point = HookPoint::resid_post(options.layer);
    let kind = |activation| subject::sae(d_model, options.d_sae, activation, device);
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
    let hooks = [
        ("plain", None),
        // Nothing as well: what differs is the machine.
        ("plain_again", None),
        ("add", at_point(add())?),
        ("add_on_condition", at_point(add())?.map(|s| s.when(condition)).transpose()?),
        ("ablate", at_point(ablate())?),
        ("ablate_at_every_writer", Some(everywhere)),
        ("clamp_relu_column", at_point(latent(&relu, Reading::Exact))?),
        ("clamp_jumprelu_column", at_point(latent(&jump, Reading::Exact))?),
        ("clamp_topk_threshold", at_point(latent(&top_k, Reading::Threshold(1.0)))?),
        ("clamp_topk_exact", at_point(latent(&top_k, Reading::Exact))?),
    ];
    let known = hooks.each_ref().map(|(name, _)| *name);
    if let Some(name) = options.only.iter().find(|name| !known.contains(&name.as_str())) {
        bail!("no treatment {name:?}: expected some of {}", known.join(", "));
    }
    let is_wanted = |name: &str| {
        let only = &options.only;
        only.is_empty() || name == known[0] || only.iter().any(|wanted| wanted == name)
    };
    let (names, mut hooks): (Vec<_>, Vec<_>) =
        hooks.into_iter().filter(|(name, _)| is_wanted(name)).unzip();
    let times = take_turns(model, &mut hooks, options.n_rounds.unwrap_or(40))?;
    let at = |share: f64| -> Vec<f64> {
        times.iter().map(|times| quantile(times.clone(), share)).collect()
    };
    let (medians, fast) = (at(0.5), at(0.1));
    for (index, name) in names.into_iter().enumerate() {
        let line = Line {
            name,
            tokens_per_s: 1.0 / medians[index],
            share_of_plain: medians[0] / medians[index],
            share_of_plain_at_best: fast[0] / fast[index],
        };
        println!("{}", serde_json::to_string(&line)?);
    }
    Ok(())
}

/// Hooks of which one at a time is at work, and all of them at the prompt: conditions are decided there.
struct Turns<'a, H> {
    hooks: &'a mut [H],
    turn: &'a Cell<usize>,
}

impl<H: Hook> Hook for Turns<'_, H> {
    fn wants(&self, point: HookPoint) -> bool {
        match self.hooks.get(self.turn.get()) {
            Some(hook) => hook.wants(point),
            None => self.hooks.iter().any(|hook| hook.wants(point)),
        }
    }

    fn at<const D: usize>(
        &mut self,
        point: HookPoint,
        x: Tensor<D>,
        positions: &Positions,
    ) -> Tensor<D> {
        if let Some(hook) = self.hooks.get_mut(self.turn.get()) {
            return hook.at(point, x, positions);
        }
        let wanting = self.hooks.iter_mut().filter(|hook| hook.wants(point));
        wanting.fold(x, |x, hook| hook.at(point, x, positions))
    }

    fn finish(&mut self) -> Result<(), HookError> {
        self.hooks.iter_mut().try_for_each(Hook::finish)
    }
}

/// The seconds of `n_rounds` tokens under each hook, every other round in reverse.
fn take_turns<H: Hook>(
    model: &LanguageModel,
    hooks: &mut [H],
    n_rounds: usize,
) -> Result<Vec<Vec<f64>>> {
    let n = hooks.len();
    let whose = |step: usize| match (step / n).is_multiple_of(2) {
        true => step % n,
        false => n - 1 - step % n,
    };
    // Nobody's: the prompt, then the first round, for what is allocated once.
    let turn = Cell::new(n);
    let mut times = vec![Vec::with_capacity(n_rounds); n];
    let mut started = Instant::now();
    let observe = |new: model_hooks::NewToken<'_>| {
        let seconds = started.elapsed().as_secs_f64();
        let step = new.answer.len() - 1;
        if step > n {
            times[turn.get()].push(seconds);
        }
        turn.set(whose(step));
        started = Instant::now();
        ControlFlow::Continue(())
    };
    let prompt = prompt(0, model.config().d_vocab);
    let config = GenerateConfig::greedy((n_rounds + 1) * n + 1, vec![]);
    let mut hook = Turns { hooks, turn: &turn };
    model.generate(&[prompt], &SharedPrefix::default(), &config, &mut hook, observe)?;
    Ok(times)
}

fn quantile(mut seconds: Vec<f64>, share: f64) -> f64 {
    seconds.sort_unstable_by(f64::total_cmp);
    seconds[(seconds.len() as f64 * share) as usize]
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
    let (mut together, mut alone) = (Vec::new(), Vec::new());
    for _ in 0..options.n_rounds.unwrap_or(2) {
        let start = Instant::now();
        model.generate(&prompts, &none, &config, &mut steering, unobserved)?;
        together.push(start.elapsed().as_secs_f64());
        for prompt in prompts.iter().step_by(N_PROMPTS / N_ALONE) {
            let start = Instant::now();
            model.generate(&[prompt], &none, &config, &mut steering, unobserved)?;
            alone.push(start.elapsed().as_secs_f64());
        }
    }
    let (together, each) = (quantile(together, 0.5), quantile(alone, 0.5));
    let line = serde_json::json!({
        "name": "batch_of_100",
        "tokens_per_s": (N_PROMPTS * N_NEW) as f64 / together,
        "one_at_a_time": N_NEW as f64 / each,
        "ratio": N_PROMPTS as f64 * each / together,
    });
    println!("{line}");
    Ok(())
}
