//! Training sparse autoencoders by a config file, end to end.
//!
//! text → tokens (`text`) → activations (`stream`) → steps and checkpoints (`Fit`) → figures
//! (`outcome`) → a page (`page`).

mod objective;
mod options;
mod outcome;
mod page;
mod plot;
mod recipe;
mod signals;
mod stream;
mod text;

use std::fs::File;
use std::io::LineWriter;
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use sae_core::Sae;
use sae_core::format::saelens;
use sae_core::source::ActivationSource;
use sae_core::train::{
    CheckpointError, Checkpoints, Ended, Event, Fit, FitConfig, FitError, Run, TrainError, Trainer,
};

pub use objective::Objective;
pub use options::{KEYS, Options, Plan, SaePlan, StreamPlan, TextPlan};
pub use recipe::{
    AnnealPlan, BetasPlan, CentrePlan, DecayPlan, DecoderPlan, OptimizerPlan, ResamplingPlan,
    ResamplingRulePlan,
};

use self::outcome::{Results, Setting};
use self::signals::Stop;
use self::stream::{Chunking, Harvest};
use crate::assets::{Head, TextModel, load_text_model};
use crate::device::device;
use crate::progress::{bar, step, tell};
use crate::storage::write_whole;

/// How the program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All is done.
    Finished,
    /// A signal asked to stop, and everything is saved.
    Stopped,
}

/// Trains what the config says, or goes on with it, and tells what it does on the way.
///
/// # Errors
/// If something cannot be had, read or written, or does not fit.
pub fn run(options: &Options) -> Result<Outcome> {
    let plan = Plan::read(&options.config)?;
    let device = device(&options.device)?;
    let stop = Stop::on_signals()?;
    // First of all: a folder that cannot be had should not be found out after minutes.
    let out = &options.out;
    let checkpoints = Checkpoints::open(&out.join("checkpoints"))
        .map_err(|error| explained(out, error.into()))?;

    step("Loading the model");
    let head = if plan.preferences.is_some() { Head::Reward } else { Head::Language };
    let loaded = load_text_model(plan.locate_model()?, head, &device)?;
    let model = loaded.model.body();
    let config = model.config();
    tell(&format!("{}: {} blocks, d_model {}", loaded.name, config.n_layers, config.d_model));
    let preferences = outcome::read_preferences(&plan, &loaded)?;

    step("Reading text");
    let split = text::split(&plan.text, &loaded.tokenizer, config, plan.seed)?;
    let harvest = Harvest::new(model, &plan)?;
    let chunking = Chunking::new(&split.training, plan.stream.skip_positions);
    tell(&format!(
        "{} tokens to train on, {} held out",
        split.training.n_tokens(),
        split.held_out.n_tokens()
    ));

    let mut source = match plan.stream.store {
        None => {
            let n_passes = plan.text.n_passes;
            // The buffer may take a minute to be filled, and nothing can be saved meanwhile.
            let (stop, mut is_told) = (&stop, false);
            let tell_once = move || {
                if stop.is_asked() && !std::mem::replace(&mut is_told, true) {
                    tell("Stopping behind this step; a second signal stops at once");
                }
            };
            let live = stream::live(&harvest, &split.training, &chunking, n_passes, tell_once);
            stream::mixed(live, &plan)?
        }
        Some(_) => {
            step("Filling the store");
            let hash = &loaded.hash;
            match stream::stored(&harvest, &split.training, &chunking, hash, &plan, stop.flag())? {
                Some(source) => source,
                None => return Ok(stopped("the store")),
            }
        }
    };
    let mut held_out = harvest.in_memory(&split.held_out)?;

    step("Training");
    let runs = runs(&plan, &harvest)?;
    let kept = Kept { out, plan: &plan, loaded: &loaded, stop: &stop };
    let trained = kept.train(runs, &mut *source, &mut held_out, checkpoints)?;
    let Some(Trained { trainers, n_steps, n_left_out, checkpoints: _checkpoints }) = trained else {
        return Ok(stopped("the training"));
    };
    if n_left_out > 0 {
        let times = plan.stream.max_norm.unwrap_or_default();
        tell(&format!("left out {n_left_out} activations longer than {times} times the median"));
    }

    step("Measuring");
    let saes = outcome::saes(&trainers, &plan, &loaded)?;
    let setting = Setting {
        plan: &plan,
        loaded: &loaded,
        held_out: &split.held_out,
        preferences: preferences.as_deref(),
        n_tokens: split.training.n_tokens(),
        n_left_out,
        n_steps,
        stop: &stop,
    };
    let Some(results) = setting.measure(&saes)? else {
        return Ok(stopped("the training"));
    };
    write_results(out, &plan, &saes, &results).with_context(|| {
        format!("the training is saved: make room in {}, then run it again", out.display())
    })?;
    for line in outcome::summary(&results) {
        tell(&line);
    }
    let page = out.join("report.html");
    let page = page.canonicalize().with_context(|| format!("cannot find {}", page.display()))?;
    tell(&format!("Open {}", page.display()));
    Ok(Outcome::Finished)
}

/// The SAEs, the figures and the page.
fn write_results(out: &Path, plan: &Plan, saes: &[Sae], results: &Results) -> Result<()> {
    for (sae, plan) in saes.iter().zip(&plan.saes) {
        saelens::write(sae, &out.join(&plan.name))?;
    }
    let curves = page::read_curves(&out.join(METRICS), plan)?;
    let json = serde_json::to_string_pretty(results)?;
    write_whole(&out.join("evaluation.json"), json.as_bytes())?;
    let html = page::render(results, &curves)?;
    write_whole(&out.join("report.html"), html.as_bytes())
}

/// The events of the run, a line each.
const METRICS: &str = "metrics.jsonl";

/// One run of `Fit` for each SAE.
fn runs(plan: &Plan, harvest: &Harvest) -> Result<Vec<Run>> {
    let run = |sae: &SaePlan| {
        let (point, target) = (sae.point()?, sae.target()?);
        let (width, d_out) = (harvest.width(point), target.map(|target| harvest.width(target)));
        let config = sae.train_config(width, d_out).with_batch(plan.batch).with_seed(plan.seed);
        config.validate(width).with_context(|| {
            format!("{}, on activations {width} wide, cannot be trained so", sae.name)
        })?;
        ensure!(
            saelens::can_write(&config.sae(width)),
            "{}: there is no file format for {} as it is here: a transcoder can be batch_top_k, \
             matryoshka, jump_relu or standard, and nothing can be group_max",
            sae.name,
            sae.objective.label()
        );
        let run = Run::new(&sae.name, point.to_string(), config);
        Ok(match target {
            Some(target) => run.transcoding(target.to_string()),
            None => run,
        })
    };
    plan.saes.iter().map(run).collect()
}

/// A training run in its folder.
struct Kept<'a> {
    out: &'a Path,
    plan: &'a Plan,
    loaded: &'a TextModel,
    stop: &'a Stop,
}

/// What came of it.
struct Trained {
    trainers: Vec<Trainer>,
    n_steps: usize,
    /// Activations that were too long to be trained on.
    n_left_out: u64,
    /// Nobody else may begin in the folder before all is written.
    checkpoints: Option<Checkpoints>,
}

impl Kept<'_> {
    /// Starts, or goes on; gives nothing if it was stopped.
    fn train(
        &self,
        runs: Vec<Run>,
        source: &mut dyn ActivationSource,
        held_out: &mut dyn ActivationSource,
        checkpoints: Checkpoints,
    ) -> Result<Option<Trained>> {
        let Self { out, plan, loaded, stop } = self;
        let explained = |error| explained(out, error);
        let config = FitConfig::new()
            .with_n_steps(plan.n_steps)
            .with_checkpoint_every(plan.checkpoint_every)
            .with_evaluate_every(plan.evaluate_every)
            .with_max_skipped(plan.max_skipped)
            .with_max_norm(plan.stream.max_norm)
            .with_model(format!("{} {}", loaded.name, loaded.hash));
        let device = loaded.model.body().device();
        let fit = Fit::resume(runs, source, config, device, checkpoints).map_err(explained)?;
        if let Some(resumed) = fit.resumed() {
            for passed_over in &resumed.passed_over {
                tell(&format!("passed over {}: {}", passed_over.name, passed_over.error));
            }
            tell(&format!("going on behind step {} of {}", resumed.step, fit.n_steps()));
        }
        let path = out.join(METRICS);
        forget_after(&path, fit.steps_done()).context("the metrics")?;
        let metrics = File::options().create(true).append(true).open(&path);
        let metrics = metrics.with_context(|| format!("cannot write {}", path.display()))?;
        // Whole lines, so that a checkpoint is never ahead of the metrics.
        let mut metrics = LineWriter::new(metrics);
        let bar = bar("training", fit.n_steps() as u64);
        bar.set_position(fit.steps_done() as u64);
        bar.reset_eta();
        let mut fit =
            fit.evaluate_on(held_out)?.write_metrics_to(&mut metrics).stop_on(stop.flag());
        let ended = fit.run(|event| {
            match event {
                Event::Step(progress) => {
                    bar.set_position(progress.step as u64);
                    bar.set_message(format!("loss {:.1}", progress.loss));
                }
                Event::Evaluation(evaluation) => bar.suspend(|| {
                    tell(&format!(
                        "step {}, {}: L0 {:.1}, FVU {:.3}, dead {:.1} %",
                        evaluation.step,
                        plan.saes[evaluation.run_idx].name,
                        evaluation.l0,
                        evaluation.fvu,
                        100.0 * evaluation.dead_share
                    ));
                }),
                _ => {}
            }
            ControlFlow::Continue(())
        });
        bar.finish_and_clear();
        let ended = ended.map_err(explained)?;
        let (n_steps, n_left_out) = (fit.n_steps(), fit.n_left_out());
        let (trainers, checkpoints) = fit.into_parts();
        let trained = Trained { trainers, n_steps, n_left_out, checkpoints };
        Ok((ended == Ended::Finished).then_some(trained))
    }
}

/// An error with what to do about it.
fn explained(out: &Path, error: FitError) -> anyhow::Error {
    let out = out.display();
    let advice = match &error {
        FitError::Checkpoint(CheckpointError::OtherRun { .. }) => {
            format!("{out} has another run: choose another --out, or undo what differs")
        }
        FitError::Checkpoint(CheckpointError::Locked { .. }) => {
            format!("{out} is in use: wait for the other program, or choose another --out")
        }
        FitError::Checkpoint(CheckpointError::NoneUsable { .. }) => {
            format!("no checkpoint in {out} can be read: start anew with another --out")
        }
        FitError::Checkpoint(CheckpointError::Save { .. }) | FitError::Metrics { .. } => {
            format!("{out} cannot be written: make room, then run it again to go on")
        }
        FitError::Checkpoint(CheckpointError::Storage(_) | CheckpointError::Lock { .. }) => {
            format!("{out} cannot be used: choose an --out that can be read and written")
        }
        FitError::TooManySkipped { .. } => {
            format!("training diverges: lower learning_rate, with another --out than {out}")
        }
        FitError::Train(TrainError::TooFewRows { .. }) => {
            "there is too little text for a step: give more text, or lower batch".to_owned()
        }
        FitError::SourceEnded { .. } => {
            "the text ends before n_steps: lower it, or raise text.n_passes".to_owned()
        }
        _ => return anyhow!(error).context("while training"),
    };
    anyhow!(error).context(advice)
}

/// Drops the lines of steps that will be made again, and one that was cut.
fn forget_after(path: &Path, step: usize) -> Result<()> {
    let Ok(text) = std::fs::read_to_string(path) else {
        return Ok(());
    };
    let is_before = |line: &&str| {
        let value: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
        value["step"].as_u64().is_some_and(|of| of <= step as u64)
    };
    let kept: String = text.lines().filter(is_before).map(|line| line.to_owned() + "\n").collect();
    if kept != text {
        write_whole(path, kept.as_bytes())?;
    }
    Ok(())
}

fn stopped(what: &str) -> Outcome {
    tell(&format!("Stopped, and {what} is saved: run it again with the same --out to go on"));
    Outcome::Stopped
}
