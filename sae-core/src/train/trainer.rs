//! The training loop.

use std::ops::ControlFlow;

use burn::tensor::{Device, Tensor, TensorData};
use serde::Serialize;

use super::activation_matrix::ActivationMatrix;
use super::config::TrainConfig;
use super::error::TrainError;
use super::fit::FitError;
use super::matrix_source::MatrixSource;
use super::objective::Batch;
use super::state::{StepOutcome, TrainState};
use crate::sae::Sae;
use crate::source::{ActivationSource, Position, Rows, column_idx};

/// Trains an SAE.
///
/// ```no_run
/// # use std::ops::ControlFlow;
/// # use burn::tensor::Device;
/// # use sae_core::train::{ActivationMatrix, FitError, Objective, TrainConfig, Trainer};
/// # fn f(values: &[f32]) -> Result<sae_core::Sae, FitError> {
/// let activations = ActivationMatrix::new(values, 576)?;
/// let config = TrainConfig::new(4608, Objective::top_k(32));
/// let mut trainer = Trainer::new(config, &activations, &Device::flex())?;
/// trainer.run(&activations, |progress| ControlFlow::Continue(()))?;
/// # Ok(trainer.sae())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Trainer {
    config: TrainConfig,
    state: TrainState,
}

/// How far a run has come.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Progress {
    /// Which run, of those that [`Fit`](super::Fit) makes together.
    pub run_idx: usize,
    /// Steps done, this one included.
    pub step: usize,
    /// Steps of the run.
    pub n_steps: usize,
    /// The loss before this step. The squared error on inputs of norm `√d_in` is about `d_in` where
    /// nothing is learnt.
    pub loss: f64,
    /// Latents that are not zero, per activation.
    pub l0: f64,
    /// Latents that count as dead.
    pub n_dead: usize,
    /// Activations that [`Fit`](super::Fit) has left out so far because of their norms.
    pub n_left_out: u64,
    /// Steps of this run that were skipped because the loss or the gradient was not finite.
    pub n_skipped: usize,
}

impl Trainer {
    /// A run on activations like these, which are what it reconstructs.
    ///
    /// # Errors
    /// If an option is out of its range, or the activations cannot be scaled.
    pub fn new(
        config: TrainConfig,
        activations: &ActivationMatrix,
        device: &Device,
    ) -> Result<Self, TrainError> {
        Self::with_target(config, activations, None, device)
    }

    /// A run on activations like these, which reconstructs a target like this, if there is one.
    pub(super) fn with_target(
        config: TrainConfig,
        activations: &ActivationMatrix,
        target: Option<&ActivationMatrix>,
        device: &Device,
    ) -> Result<Self, TrainError> {
        config.validate(activations.d_in())?;
        check_batch(&config, activations)?;
        // The state stays outside any graph; each step makes its own.
        let device = device.clone().without_autodiff();
        let state = TrainState::initial(&config, activations, target, &device)?;
        Ok(Self { config, state })
    }

    /// A run that goes on from where another one stood.
    ///
    /// # Errors
    /// If an option is out of its range.
    ///
    /// # Panics
    /// If the state is that of an SAE of another size.
    pub fn resume(config: TrainConfig, state: TrainState) -> Result<Self, TrainError> {
        let (d_sae, d_in) = (state.parameters.d_sae(), state.parameters.d_in());
        config.validate(d_in)?;
        assert_eq!(config.d_sae, d_sae, "the state of another SAE");
        Ok(Self { config, state })
    }

    /// Trains to the end of the run, or until `progress`, called after every step, breaks off.
    /// Called again, it goes on from there.
    ///
    /// # Errors
    /// If the activations are too few or have another width, or the loss or its gradient stops
    /// being a number.
    pub fn run(
        &mut self,
        activations: &ActivationMatrix,
        progress: impl FnMut(&Progress) -> ControlFlow<()>,
    ) -> Result<(), FitError> {
        let TrainConfig { batch, seed, n_passes, .. } = self.config;
        let mut source = MatrixSource::new(*activations, seed, batch, n_passes)?;
        let n_done = (self.state.step * batch) as u64;
        let per_pass = (activations.n_rows() / batch * batch) as u64;
        source.seek(&Position::new(n_done / per_pass, n_done % per_pass))?;
        let n_steps = n_passes * (per_pass as usize / batch);
        self.fit(&mut source, MatrixSource::COLUMN, n_steps, progress)
    }

    /// Trains on a column of a stream from where it stands, until there have been `n_steps` steps
    /// in all or `progress`, called after every one, breaks off.
    ///
    /// # Errors
    /// If the column is not there or has another width, the stream cannot be read or ends before,
    /// the loss or its gradient stops being a number, or this is a transcoder, which
    /// [`Fit`](super::Fit) gives its targets.
    pub fn fit(
        &mut self,
        source: &mut impl ActivationSource,
        column: &str,
        n_steps: usize,
        mut progress: impl FnMut(&Progress) -> ControlFlow<()>,
    ) -> Result<(), FitError> {
        if self.config.transcoder.is_some() {
            let (option, with) = ("transcoder", "activations without a target");
            return Err(TrainError::Conflict { option, with }.into());
        }
        let column = column_idx(source.columns(), column)?;
        self.check_width(source.columns()[column].width)?;
        let batch = self.config.batch;
        let mut rows = Rows::empty(source.columns());
        while self.state.step < n_steps {
            rows.clear();
            if source.read(batch, &mut rows)? < batch {
                return Err(FitError::SourceEnded { step: self.state.step, n_steps });
            }
            let (seen, skipped) = self.step(rows.column(column), None, n_steps);
            if let Some(error) = skipped {
                return Err(error.into());
            }
            if progress(&seen).is_break() {
                break;
            }
        }
        Ok(())
    }

    /// One step on a batch of raw activations (and of what they are to become), and why it was
    /// skipped, if it was.
    pub(super) fn step(
        &mut self,
        values: &[f32],
        target: Option<&[f32]>,
        n_steps: usize,
    ) -> (Progress, Option<TrainError>) {
        let step = self.state.step;
        let (x, _) = self.config.input_scale.normalization().normalize(self.scaled(values));
        let batch = Batch { x, target: target.map(|target| self.scaled(target)) };
        let (loss, l0, skipped) = match self.state.step(batch, &self.config, n_steps) {
            StepOutcome::Taken(report) => (report.loss, report.l0, None),
            StepOutcome::Skipped { loss } if loss.is_finite() => {
                (loss, 0.0, Some(TrainError::NonFiniteGradient { step }))
            }
            StepOutcome::Skipped { loss } => {
                (loss, 0.0, Some(TrainError::NonFiniteLoss { step, loss }))
            }
        };
        let TrainState { ref ages, n_skipped, step, .. } = self.state;
        let n_dead = ages.n_dead(self.config.dead_after);
        let progress =
            Progress { run_idx: 0, step, n_steps, loss, l0, n_dead, n_left_out: 0, n_skipped };
        (progress, skipped)
    }

    /// A batch of inputs or targets, times the factor that all have in common.
    fn scaled(&self, values: &[f32]) -> Tensor<2> {
        let scale = self.state.input_scale as f32;
        let scaled: Vec<f32> = values.iter().map(|value| value * scale).collect();
        let n = self.config.batch;
        let data = TensorData::new(scaled, [n, values.len() / n]);
        Tensor::from_data(data, &self.state.parameters.w_dec().device())
    }

    /// What the run is.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// Where it stands.
    pub fn state(&self) -> &TrainState {
        &self.state
    }

    /// The SAE as trained so far, for raw activations: [`TrainState::sae`].
    pub fn sae(&self) -> Sae {
        self.state.sae(&self.config)
    }

    /// Checks that a transcoder is for targets of this width.
    pub(super) fn check_target_width(&self, actual: usize) -> Result<(), TrainError> {
        let expected = self.config.sae(self.state.parameters.d_in()).d_out();
        match actual == expected {
            true => Ok(()),
            false => Err(TrainError::Width { expected, actual }),
        }
    }

    /// Checks that the SAE is for activations of this width.
    pub(super) fn check_width(&self, actual: usize) -> Result<(), TrainError> {
        let expected = self.state.parameters.d_in();
        match actual == expected {
            true => Ok(()),
            false => Err(TrainError::Width { expected, actual }),
        }
    }
}

fn check_batch(config: &TrainConfig, activations: &ActivationMatrix) -> Result<(), TrainError> {
    let (n_rows, batch) = (activations.n_rows(), config.batch);
    match n_rows >= batch {
        true => Ok(()),
        false => Err(TrainError::TooFewRows { n_rows, batch }),
    }
}

#[cfg(test)]
mod tests;
