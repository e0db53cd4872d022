//! The training loop.

use std::ops::ControlFlow;

use burn::tensor::Device;

use super::activation_matrix::ActivationMatrix;
use super::config::TrainConfig;
use super::error::TrainError;
use super::initial;
use super::row_order::RowOrder;
use super::state::{StepOutcome, TrainState};
use crate::sae::Sae;

/// Trains an SAE.
///
/// ```no_run
/// # use std::ops::ControlFlow;
/// # use burn::tensor::Device;
/// # use sae_core::train::{ActivationMatrix, Objective, TrainConfig, TrainError, Trainer};
/// # fn f(values: &[f32]) -> Result<sae_core::Sae, TrainError> {
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
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Progress {
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
        let (d_sae, d_in) = (state.parameters.d_sae(), state.parameters.d_in());
        config.validate(d_in)?;
        assert_eq!(config.d_sae, d_sae, "the state of another SAE");
        Ok(Self { config, state })
    }

    /// Trains to the end of the run, or until `progress`, called after every step, breaks off.
    /// Called again, it goes on from there.
    ///
    /// # Errors
    /// If the activations are too few or have another width, or the loss stops being a number.
    pub fn run(
        &mut self,
        activations: &ActivationMatrix,
        mut progress: impl FnMut(&Progress) -> ControlFlow<()>,
    ) -> Result<(), TrainError> {
        let TrainConfig { batch, seed, .. } = self.config;
        self.check_width(activations)?;
        check_batch(&self.config, activations)?;
        let device = self.state.parameters.w_dec().device();
        let scale = self.state.input_scale as f32;
        let mut order = RowOrder::new(seed, activations.n_rows(), batch);
        let n_steps = self.config.n_passes * order.steps_per_pass();
        while self.state.step < n_steps {
            let step = self.state.step;
            let x = activations.gather(order.batch(step), scale, &device);
            let report = match self.state.step(x, &self.config, n_steps) {
                StepOutcome::Taken(report) => report,
                StepOutcome::Skipped { loss } => {
                    return Err(TrainError::NonFiniteLoss { step, loss });
                }
            };
            let seen = Progress {
                step: self.state.step,
                n_steps,
                loss: report.loss,
                l0: report.l0,
                n_dead: self.state.ages.n_dead(self.config.dead_after),
            };
            if progress(&seen).is_break() {
                break;
            }
        }
        Ok(())
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

    fn check_width(&self, activations: &ActivationMatrix) -> Result<(), TrainError> {
        let expected = self.state.parameters.d_in();
        match activations.d_in() {
            actual if actual == expected => Ok(()),
            actual => Err(TrainError::Width { expected, actual }),
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
