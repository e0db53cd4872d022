//! Several SAEs on one stream.

mod config;
mod error;
mod evaluation;
mod outliers;
mod run;

pub(super) use outliers::Outliers;

pub use config::FitConfig;
pub use error::FitError;
pub use evaluation::HeldOutFigures;
pub use run::Run;

use std::io::Write;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::Device;
use serde::Serialize;
use serde_json::Value;

use self::evaluation::HeldOut;
use self::run::{Columns, check, identity, used};
use super::activation_matrix::ActivationMatrix;
use super::checkpoint::{Checkpoint, CheckpointError, Checkpoints, PassedOver, RunShape, RunState};
use super::trainer::{Progress, Trainer};
use crate::source::{ActivationSource, Rows, in_words};

/// Rows from the stream's beginning that scale and centre of the inputs are taken over. The streams
/// of tests are short.
const SAMPLE: usize = if cfg!(test) { 40 } else { 1 << 14 };

/// Trains SAEs on one stream, all of them on every batch.
///
/// With [`Checkpoints`], a run that was killed at any point goes on from the newest one, and ends
/// with the same bits as if nothing had happened.
///
/// ```no_run
/// # use std::ops::ControlFlow;
/// # use burn::tensor::Device;
/// # use sae_core::source::ActivationSource;
/// # use sae_core::train::{Checkpoints, Fit, FitConfig, FitError, Objective, Run, TrainConfig};
/// # fn f(source: &mut dyn ActivationSource) -> Result<sae_core::Sae, FitError> {
/// let point = "blocks.5.hook_resid_post";
/// let config = |k| TrainConfig::new(4608, Objective::top_k(k));
/// let runs = [16, 32].map(|k| Run::new(format!("k{k}"), point, config(k)));
/// let checkpoints = Checkpoints::open("checkpoints".as_ref())?;
/// let mut fit =
///     Fit::resume(runs.to_vec(), source, FitConfig::new(), &Device::flex(), checkpoints)?;
/// fit.run(|event| ControlFlow::Continue(()))?;
/// # Ok(fit.trainer("k32").expect("one of them").sae())
/// # }
/// ```
pub struct Fit<'a> {
    source: &'a mut dyn ActivationSource,
    /// Rows that have been taken from the source already, and come first.
    ahead: Rows,
    /// What is left out of the stream, if anything is.
    outliers: Option<Outliers>,
    config: FitConfig,
    members: Vec<Member>,
    step: usize,
    n_steps: usize,
    checkpoints: Option<Kept>,
    resumed: Option<Resumed>,
    held_out: Option<HeldOut<'a>>,
    /// Steps done when it was last evaluated.
    evaluated: Option<usize>,
    metrics: Option<&'a mut dyn Write>,
    stop: Option<&'a AtomicBool>,
    /// Whether the stream failed within a step: then only a checkpoint knows where to go on.
    interrupted: bool,
}

/// A run under way.
struct Member {
    run: Run,
    columns: Columns,
    trainer: Trainer,
}

/// Where a run is kept, and as what.
struct Kept {
    checkpoints: Checkpoints,
    identity: Value,
    /// Steps done when it was last saved or read.
    saved: Option<usize>,
}

/// What a run goes on from.
#[derive(Debug)]
pub struct Resumed {
    /// The name of the checkpoint.
    pub checkpoint: String,
    /// Steps that were done.
    pub step: usize,
    /// Newer checkpoints that could not be used, newest first.
    pub passed_over: Vec<PassedOver>,
}

/// Something that happened in a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Event {
    /// One of the SAEs made a step, or skipped it: then its loss may be no number.
    Step(Progress),
    /// One of the SAEs was evaluated.
    Evaluation(HeldOutFigures),
    /// The run was saved.
    Checkpoint {
        /// Under this name.
        name: String,
        /// After this many steps.
        step: usize,
    },
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// All steps are done.
    Finished,
    /// The flag or the callback asked for it; the rest can be done later.
    Stopped,
}

impl<'a> Fit<'a> {
    /// A run from the beginning that is not kept anywhere. The scale and centre of the inputs are
    /// taken from the first rows of the stream, which are kept for the first steps: to make them
    /// may have been expensive.
    ///
    /// # Errors
    /// If the runs do not fit each other or the stream, or the stream fails.
    pub fn new(
        runs: Vec<Run>,
        source: &'a mut dyn ActivationSource,
        config: FitConfig,
        device: &Device,
    ) -> Result<Self, FitError> {
        let n_steps = check(&runs, source, &config)?;
        let batch = runs[0].config.batch;
        let n_sampled = SAMPLE.max(batch);
        let mut sample = Rows::empty(source.columns());
        // Of a shorter run, some would be lost to whoever reads on behind it.
        let is_kept = n_sampled <= n_steps.saturating_mul(batch);
        let start = (!is_kept).then(|| source.position());
        source.read(n_sampled, &mut sample)?;
        let mut outliers = match config.max_norm {
            Some(max_norm) => Some(Outliers::new(&sample, &used(&runs, source)?, max_norm)),
            None => None,
        };
        if let Some(outliers) = &mut outliers {
            outliers.leave_out(&mut sample, 0);
            // A batch is needed, and there may be one.
            while sample.n_rows() < batch {
                let from = sample.n_rows();
                if source.read(batch - from, &mut sample)? == 0 {
                    break;
                }
                outliers.leave_out(&mut sample, from);
            }
        }
        let members = runs.into_iter().map(|run| {
            let columns = run.columns(source)?;
            let rows = |column| ActivationMatrix::new(sample.column(column), sample.width(column));
            let target = columns.reconstructed.map(rows).transpose()?;
            let (config, read) = (run.config.clone(), rows(columns.read)?);
            let trainer = Trainer::with_target(config, &read, target.as_ref(), device)?;
            Ok(Member { run, columns, trainer })
        });
        let members = members.collect::<Result<_, FitError>>()?;
        if let Some(start) = start {
            source.seek(&start)?;
            sample.clear();
            outliers.iter_mut().for_each(|outliers| outliers.n_left_out = 0);
        }
        Ok(Self {
            source,
            ahead: sample,
            outliers,
            config,
            members,
            step: 0,
            n_steps,
            checkpoints: None,
            resumed: None,
            held_out: None,
            evaluated: None,
            metrics: None,
            stop: None,
            interrupted: false,
        })
    }

    /// A run that is kept: it goes on from the newest checkpoint that can be used, or starts if
    /// there is none.
    ///
    /// # Errors
    /// As [`new`](Self::new); if there are checkpoints and none can be read; or if the newest one
    /// is of another run: another width, `k`, seed, model, stream or anything else of
    /// [`TrainConfig`](super::TrainConfig). All that differs is named.
    pub fn resume(
        runs: Vec<Run>,
        source: &'a mut dyn ActivationSource,
        config: FitConfig,
        device: &Device,
        mut checkpoints: Checkpoints,
    ) -> Result<Self, FitError> {
        let n_steps = check(&runs, source, &config)?;
        let identity = identity(&runs, source, &config, n_steps);
        let device = device.clone().without_autodiff();
        let Some(found) = checkpoints.newest(&device)? else {
            let kept = Some(Kept { checkpoints, identity, saved: None });
            return Ok(Self { checkpoints: kept, ..Self::new(runs, source, config, &device)? });
        };
        let expected: Vec<RunShape> = runs
            .iter()
            .map(|run| {
                let d_in = source.columns()[run.columns(source)?.read].width;
                Ok(RunShape::new(run.name.clone(), d_in, &run.config))
            })
            .collect::<Result<_, FitError>>()?;
        found.checkpoint.check_is_of(&found.name, &identity, &expected)?;
        let Checkpoint { step, position, ahead, outliers, runs: states, .. } = found.checkpoint;
        let n_columns = source.columns().len();
        if outliers.is_some() != config.max_norm.is_some()
            || outliers.as_ref().is_some_and(|outliers| !outliers.fits(n_columns))
        {
            return Err(FitError::Checkpoint(CheckpointError::Value {
                name: found.name,
                key: "outliers".to_owned(),
                expected: format!("limits for {n_columns} columns, as max_norm says"),
                actual: format!("{outliers:?}"),
            }));
        }
        if ahead.n_rows() > 0 && !ahead.fits(source.columns()) {
            let widths: Vec<_> = (0..ahead.n_columns()).map(|c| ahead.width(c)).collect();
            return Err(FitError::Checkpoint(CheckpointError::Value {
                name: found.name,
                key: "ahead".to_owned(),
                expected: format!("rows of {}", in_words(source.columns())),
                actual: format!("of widths {widths:?}"),
            }));
        }
        source.seek(&position)?;
        let step = step as usize;
        let has_ended = outliers.as_ref().is_some_and(|outliers| outliers.has_ended);
        let n_steps = if has_ended { step } else { n_steps };
        let members = runs.into_iter().zip(states).map(|(run, RunState { state, .. })| {
            let columns = run.columns(source)?;
            let trainer = Trainer::resume(run.config.clone(), state)?;
            Ok(Member { run, columns, trainer })
        });
        let members = members.collect::<Result<_, FitError>>()?;
        let (checkpoint, passed_over) = (found.name, found.passed_over);
        let evaluate_every = config.evaluate_every;
        Ok(Self {
            source,
            ahead,
            outliers,
            config,
            members,
            step,
            n_steps,
            checkpoints: Some(Kept { checkpoints, identity, saved: Some(step) }),
            resumed: Some(Resumed { checkpoint, step, passed_over }),
            held_out: None,
            // It was, before it was saved.
            evaluated: (step == n_steps || step.is_multiple_of(evaluate_every)).then_some(step),
            metrics: None,
            stop: None,
            interrupted: false,
        })
    }

    /// Evaluates on this stream too, always from where it stands now.
    ///
    /// # Errors
    /// If it lacks a column that a run is on, or has it in another width.
    pub fn evaluate_on(mut self, held_out: &'a mut dyn ActivationSource) -> Result<Self, FitError> {
        for Member { run, trainer, .. } in &self.members {
            let Columns { read, reconstructed } = run.columns(held_out)?;
            trainer.check_width(held_out.columns()[read].width)?;
            if let Some(target) = reconstructed {
                trainer.check_target_width(held_out.columns()[target].width)?;
            }
        }
        self.held_out = Some(HeldOut::new(held_out));
        Ok(self)
    }

    /// Writes every event as a line of JSON, and flushes before a checkpoint is written. A run that
    /// goes on after it was killed repeats the lines since its checkpoint.
    pub fn write_metrics_to(mut self, metrics: &'a mut dyn Write) -> Self {
        self.metrics = Some(metrics);
        self
    }

    /// Saves and ends when this is set: by a handler of signals, for one.
    pub fn stop_on(mut self, flag: &'a AtomicBool) -> Self {
        self.stop = Some(flag);
        self
    }

    /// Trains to the end, or until the flag or `progress`, called after every event, asks to stop.
    /// Called again, it goes on from there. A run that is kept is saved in any case.
    ///
    /// # Errors
    /// If the stream fails or ends before, something cannot be written, or too many steps had no
    /// finite loss.
    pub fn run(
        &mut self,
        mut progress: impl FnMut(&Event) -> ControlFlow<()>,
    ) -> Result<Ended, FitError> {
        if self.interrupted {
            return Err(FitError::Interrupted { step: self.step });
        }
        let mut rows = Rows::empty(self.source.columns());
        while self.step < self.n_steps {
            let asked = self.stop.is_some_and(|stop| stop.load(Ordering::Relaxed));
            if asked || self.step(&mut rows, &mut progress)?.is_break() {
                break;
            }
        }
        // The run ends whatever is said to this. What failed at its end before is made up for.
        let _ = match self.step < self.n_steps {
            true => self.save(&mut progress)?,
            false => self.finish_step(&mut progress)?,
        };
        Ok(if self.step < self.n_steps { Ended::Stopped } else { Ended::Finished })
    }

    /// A step of every run, and what is due after it; the end, if the stream has no batch left.
    fn step(
        &mut self,
        rows: &mut Rows,
        progress: &mut impl FnMut(&Event) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, FitError> {
        let (step, n_steps, batch) = (self.step, self.n_steps, self.members[0].run.config.batch);
        rows.clear();
        // Until the step is done, the stream stands elsewhere than the SAEs.
        self.interrupted = true;
        if !self.read_batch(rows, batch)? {
            let is_by_length = self.config.n_steps.is_none();
            let Some(outliers) = self.outliers.as_mut().filter(|_| is_by_length && step > 0) else {
                return Err(FitError::SourceEnded { step, n_steps });
            };
            outliers.has_ended = true;
            self.n_steps = step;
            // What is saved of this step does not say so yet.
            self.checkpoints.iter_mut().for_each(|kept| kept.saved = None);
            self.interrupted = false;
            return self.finish_step(progress);
        }
        let mut given_up = None;
        let mut events = Vec::new();
        let n_left_out = self.n_left_out();
        for (run_idx, member) in self.members.iter_mut().enumerate() {
            let Columns { read, reconstructed } = member.columns;
            let target = reconstructed.map(|column| rows.column(column));
            let (report, skipped) = member.trainer.step(rows.column(read), target, n_steps);
            let n_skipped = report.n_skipped;
            events.push(Event::Step(Progress { run_idx, n_left_out, ..report }));
            if let Some(source) = skipped
                && n_skipped > self.config.max_skipped
            {
                let (run, limit) = (member.run.name.clone(), self.config.max_skipped);
                given_up = Some(FitError::TooManySkipped { run, n_skipped, limit, source });
            }
        }
        self.step += 1;
        self.interrupted = false;
        let told = self.tell(&events, progress);
        if let Some(error) = given_up {
            let _ = self.save(progress)?;
            return Err(error);
        }
        Ok(either(told?, self.finish_step(progress)?))
    }

    /// Reads a batch without outliers, and says whether there was one left.
    fn read_batch(&mut self, rows: &mut Rows, batch: usize) -> Result<bool, FitError> {
        loop {
            let n_missing = batch - rows.n_rows();
            let n_ahead = self.ahead.move_to(rows, n_missing);
            let from = rows.n_rows();
            let n_read = n_ahead + self.source.read(n_missing - n_ahead, rows)?;
            if let Some(outliers) = &mut self.outliers {
                outliers.leave_out(rows, from);
            }
            if rows.n_rows() == batch || n_read < n_missing {
                return Ok(rows.n_rows() == batch);
            }
        }
    }

    /// What is due after a step.
    fn finish_step(
        &mut self,
        progress: &mut impl FnMut(&Event) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, FitError> {
        let (n_steps, mut flow) = (self.n_steps, ControlFlow::Continue(()));
        let due = |every: usize| self.step == n_steps || self.step.is_multiple_of(every);
        let (evaluate, save) = (due(self.config.evaluate_every), due(self.config.checkpoint_every));
        let evaluate = evaluate && self.evaluated != Some(self.step);
        let evaluated = if evaluate { self.evaluate(progress) } else { Ok(flow) };
        // What cannot be evaluated can be saved.
        if save {
            flow = self.save(progress)?;
        }
        Ok(either(evaluated?, flow))
    }

    /// Evaluates on the held-out stream, if there is one.
    fn evaluate(
        &mut self,
        progress: &mut impl FnMut(&Event) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, FitError> {
        let Some(held_out) = &mut self.held_out else {
            return Ok(ControlFlow::Continue(()));
        };
        let n_rows = self.config.evaluate_rows;
        let evaluations =
            held_out.evaluate(&self.members, self.step, n_rows, self.outliers.as_ref())?;
        self.evaluated = Some(self.step);
        let events: Vec<_> = evaluations.into_iter().map(Event::Evaluation).collect();
        self.tell(&events, progress)
    }

    /// Saves the run, if it is kept.
    fn save(
        &mut self,
        progress: &mut impl FnMut(&Event) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, FitError> {
        let step = self.step;
        let Some(kept) = self.checkpoints.as_mut().filter(|kept| kept.saved != Some(step)) else {
            return Ok(ControlFlow::Continue(()));
        };
        if let Some(metrics) = &mut self.metrics {
            metrics.flush().map_err(|source| FitError::Metrics { source })?;
        }
        let runs = self.members.iter().map(|member| {
            let (state, name) = (member.trainer.state().clone(), member.run.name.clone());
            let shape = RunShape::new(name, state.parameters.d_in(), &member.run.config);
            RunState { shape, state }
        });
        let checkpoint = Checkpoint {
            identity: kept.identity.clone(),
            step: step as u64,
            position: self.source.position(),
            ahead: std::mem::take(&mut self.ahead),
            outliers: self.outliers.clone(),
            runs: runs.collect(),
        };
        let saved = kept.checkpoints.save(&checkpoint);
        self.ahead = checkpoint.ahead;
        let name = saved?;
        kept.saved = Some(step);
        self.tell(&[Event::Checkpoint { name, step }], progress)
    }

    fn tell(
        &mut self,
        events: &[Event],
        progress: &mut impl FnMut(&Event) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, FitError> {
        let mut flow = ControlFlow::Continue(());
        for event in events {
            if let Some(metrics) = &mut self.metrics {
                let line = serde_json::to_string(event).expect("plain values are JSON");
                writeln!(metrics, "{line}").map_err(|source| FitError::Metrics { source })?;
            }
            flow = either(flow, progress(event));
        }
        Ok(flow)
    }

    /// What the run went on from, if it did.
    pub fn resumed(&self) -> Option<&Resumed> {
        self.resumed.as_ref()
    }

    /// Rows that have been left out for their norm.
    pub fn n_left_out(&self) -> u64 {
        self.outliers.as_ref().map_or(0, |outliers| outliers.n_left_out)
    }

    /// Steps of the run: fewer, once the stream has ended before for what was left out.
    pub fn n_steps(&self) -> usize {
        self.n_steps
    }

    /// Steps done.
    pub fn steps_done(&self) -> usize {
        self.step
    }

    /// The trainer of the run of this name.
    pub fn trainer(&self, name: &str) -> Option<&Trainer> {
        self.members.iter().find(|member| member.run.name == name).map(|member| &member.trainer)
    }

    /// The trainers, in the order of the runs.
    pub fn into_trainers(self) -> Vec<Trainer> {
        self.into_parts().0
    }

    /// The trainers, and the checkpoints of a run that is kept: as long as they live, their folder
    /// is in use.
    pub fn into_parts(self) -> (Vec<Trainer>, Option<Checkpoints>) {
        let trainers = self.members.into_iter().map(|member| member.trainer).collect();
        (trainers, self.checkpoints.map(|kept| kept.checkpoints))
    }
}

fn either(a: ControlFlow<()>, b: ControlFlow<()>) -> ControlFlow<()> {
    if a.is_break() { a } else { b }
}

#[cfg(test)]
mod tests;
