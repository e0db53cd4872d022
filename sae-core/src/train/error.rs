//! What can go wrong in training.

use crate::config::ConfigError;

/// Why a training run cannot start, or had to stop.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The configuration describes no SAE.
    #[error(transparent)]
    Sae(#[from] ConfigError),
    /// An option is out of its range.
    #[error("{option} = {actual} is not {expected}")]
    Option {
        /// Its name.
        option: &'static str,
        /// Its range.
        expected: &'static str,
        /// What was asked for.
        actual: f64,
    },
    /// An option has no effect or no meaning beside another one.
    #[error("{option} does not go with {with}")]
    Conflict {
        /// Its name.
        option: &'static str,
        /// What it does not go with.
        with: &'static str,
    },
    /// A selection over the batch leaves nothing behind that could select single activations.
    #[error("a selection over the batch needs a running threshold")]
    NoThreshold,
    /// The activations are no whole number of rows.
    #[error("{n_values} values make no whole rows of {d_in}")]
    Ragged {
        /// Values given.
        n_values: usize,
        /// Width of a row.
        d_in: usize,
    },
    /// There are fewer activations than a batch takes.
    #[error("{n_rows} activations do not fill a batch of {batch}")]
    TooFewRows {
        /// Activations given.
        n_rows: usize,
        /// Activations a batch takes.
        batch: usize,
    },
    /// The activations have another width than the SAE in training.
    #[error("the SAE in training works on width {expected}, the activations have {actual}")]
    Width {
        /// Width of the SAE.
        expected: usize,
        /// Width of the activations.
        actual: usize,
    },
    /// The activations cannot be scaled to a norm: all zero, or not finite.
    #[error("activations of mean norm {mean_norm} cannot be scaled")]
    MeanNorm {
        /// Mean norm of a sample of them.
        mean_norm: f64,
    },
    /// The loss stopped being a number. The parameters are those before the step.
    #[error("the loss is {loss} at step {step}")]
    NonFiniteLoss {
        /// The step, from 0.
        step: usize,
        /// The loss.
        loss: f64,
    },
    /// The gradient stopped being a number. The parameters are those before the step.
    #[error("the gradient is not finite at step {step}")]
    NonFiniteGradient {
        /// The step, from 0.
        step: usize,
    },
}
