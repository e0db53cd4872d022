//! A training run between two steps.

use burn::tensor::Tensor;
use kernels::AdamConfig;

use super::ages::Ages;
use super::error::TrainError;
use super::moments::Moments;
use super::parameters::{Differentiated, Parameters};

/// All that a run has to remember: with the configuration and the activations, the rest of the
/// run follows from it.
#[derive(Debug, Clone)]
pub struct TrainState {
    /// The weights, for inputs times `input_scale`.
    pub parameters: Parameters,
    /// What Adam remembers.
    pub moments: Moments,
    /// Steps done.
    pub step: usize,
    /// What activations are multiplied by.
    pub input_scale: f64,
    /// How long latents have been silent.
    pub ages: Ages,
}

/// What a step saw.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// The loss before the step.
    pub loss: f64,
    /// Latents above zero per activation.
    pub l0: f64,
}

impl TrainState {
    /// Before the first step.
    pub fn new(parameters: Parameters, input_scale: f64) -> Self {
        let [d_sae, _] = parameters.w_dec.dims();
        Self {
            moments: Moments::new(&parameters),
            parameters,
            step: 0,
            input_scale,
            ages: Ages::new(d_sae),
        }
    }

    /// One step of Adam on a batch of scaled activations.
    ///
    /// # Shapes
    /// `x`: `[n, d_in]`.
    ///
    /// # Errors
    /// If the loss or the gradient is not finite; the state is as it was.
    pub fn step(
        &mut self,
        x: Tensor<2>,
        k: usize,
        clip_norm: Option<f64>,
        adam: AdamConfig,
    ) -> Result<StepReport, TrainError> {
        let [n, _] = x.dims();
        let Differentiated { loss, gradient, latents } = self.parameters.differentiate(x, k);
        if !loss.is_finite() {
            return Err(TrainError::NonFiniteLoss { step: self.step, loss });
        }
        if !gradient.is_finite() {
            return Err(TrainError::NonFiniteGradient { step: self.step });
        }
        let gradient = match clip_norm {
            Some(limit) => clipped(gradient, limit),
            None => gradient,
        };
        self.step += 1;
        self.moments.update(&mut self.parameters, gradient, self.step, adam);
        let n_active = self.ages.update(&latents);
        Ok(StepReport { loss, l0: n_active as f64 / n as f64 })
    }
}

/// The gradient, at most `limit` long.
fn clipped(gradient: Parameters, limit: f64) -> Parameters {
    match gradient.norm() {
        norm if norm > limit => gradient.scaled(limit / norm),
        _ => gradient,
    }
}
