//! The training loop.

use std::ops::ControlFlow;

use burn::tensor::{Device, Tensor, TensorData};
use kernels::AdamConfig;
use serde::Serialize;

use super::activation_matrix::ActivationMatrix;
use super::config::TrainConfig;
use super::error::TrainError;
use super::fit::FitError;
use super::initial;
use super::matrix_source::MatrixSource;
use super::state::TrainState;
use crate::sae::Sae;
use crate::source::{ActivationSource, Position, Rows, column_idx};

/// Trains a TopK SAE.
///
/// ```no_run
/// # use std::ops::ControlFlow;
/// # use burn::tensor::Device;
/// # use sae_core::train::{ActivationMatrix, FitError, TrainConfig, Trainer};
/// # fn f(values: &[f32]) -> Result<sae_core::Sae, FitError> {
/// let activations = ActivationMatrix::new(values, 576)?;
/// let mut trainer = Trainer::new(TrainConfig::new(4608, 32), &activations, &Device::flex())?;
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
    /// The loss before this step, on inputs of norm `√d_in`: about `d_in` is nothing learnt.
    pub loss: f64,
    /// Latents above zero per activation.
    pub l0: f64,
    /// Latents that count as dead.
    pub n_dead: usize,
    /// Steps of this run that were skipped because the loss or the gradient was not finite.
    pub n_skipped: u64,
}

impl Trainer {
    /// A run on activations like these.
    ///
    /// # Errors
    /// If an option is out of its range, or the activations cannot be scaled.
    pub fn new(
        config: TrainConfig,
        activations: &ActivationMatrix,
        device: &Device,
    ) -> Result<Self, TrainError> {
        config.validate(activations.d_in())?;
        check_batch(&config, activations)?;
        // The state stays outside any graph; each step makes its own.
        let device = device.clone().without_autodiff();
        let state = initial::state(&config, activations, &device)?;
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
        let [d_sae, d_in] = state.parameters.w_dec.dims();
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
    /// or the loss or its gradient stops being a number.
    pub fn fit(
        &mut self,
        source: &mut impl ActivationSource,
        column: &str,
        n_steps: usize,
        mut progress: impl FnMut(&Progress) -> ControlFlow<()>,
    ) -> Result<(), FitError> {
        let column = column_idx(source.columns(), column)?;
        self.check_width(source.columns()[column].width)?;
        let batch = self.config.batch;
        let mut rows = Rows::empty(source.columns());
        while self.state.step < n_steps {
            let step = self.state.step;
            rows.clear();
            if source.read(batch, &mut rows)? < batch {
                return Err(FitError::SourceEnded { step, n_steps });
            }
            if progress(&self.step(rows.column(column), step, n_steps)?).is_break() {
                break;
            }
        }
        Ok(())
    }

    /// One step on a batch of raw activations, with the learning rate of `step`.
    pub(super) fn step(
        &mut self,
        values: &[f32],
        step: usize,
        n_steps: usize,
    ) -> Result<Progress, TrainError> {
        let TrainConfig { batch, k, clip_norm, dead_after, .. } = self.config;
        let [_, d_in] = self.state.parameters.w_dec.dims();
        let device = self.state.parameters.w_dec.device();
        let scale = self.state.input_scale as f32;
        let scaled: Vec<f32> = values.iter().map(|value| value * scale).collect();
        let x = Tensor::from_data(TensorData::new(scaled, [batch, d_in]), &device);
        let adam = AdamConfig::new(self.config.schedule.at(step, n_steps));
        let report = self.state.step(x, k, clip_norm, adam)?;
        Ok(Progress {
            run_idx: 0,
            step: step + 1,
            n_steps,
            loss: report.loss,
            l0: report.l0,
            n_dead: self.state.ages.n_dead(dead_after),
            n_skipped: 0,
        })
    }

    /// What the run is.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// Where it stands.
    pub fn state(&self) -> &TrainState {
        &self.state
    }

    /// The SAE as trained so far, for raw activations, with decoder rows of norm 1.
    pub fn sae(&self) -> Sae {
        let weights = self.state.parameters.to_weights();
        let [d_sae, d_in] = weights.w_dec.dims();
        debug_assert_eq!(d_sae, self.config.d_sae);
        Sae::new(self.config.sae(d_in), weights)
            .and_then(|sae| sae.fold_input_scale(self.state.input_scale).fold_decoder_norms())
            .expect("a validated configuration that ranks by decoder norms")
    }

    /// Checks that the SAE is for activations of this width.
    pub(super) fn check_width(&self, actual: usize) -> Result<(), TrainError> {
        let [_, expected] = self.state.parameters.w_dec.dims();
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
