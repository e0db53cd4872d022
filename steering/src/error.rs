//! Why steering cannot be set up.

use model_hooks::HookPoint;

/// Why an intervention or a condition cannot be made.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SteeringError {
    /// A latent that the autoencoder does not have.
    #[error("latent {latent} is out of range: the autoencoder has {d_sae} latents")]
    NoSuchLatent {
        /// The latent asked for.
        latent: usize,
        /// Latents of the autoencoder.
        d_sae: usize,
    },
    /// A latent that is to be changed twice.
    #[error("latent {latent} is changed twice")]
    DuplicateLatent {
        /// The latent.
        latent: usize,
    },
    /// A value that is not a number, or infinite.
    #[error("the strength of {name} is {value}: expected a finite number")]
    NotFinite {
        /// What it was to steer.
        name: String,
        /// The value.
        value: f64,
    },
    /// Nothing to steer by.
    #[error("{name} is zero or empty: there is nothing to steer by")]
    Nothing {
        /// What was empty.
        name: String,
    },
    /// Two tensors that are to be of one width.
    #[error("{name} is {actual} wide, expected {expected}")]
    Width {
        /// What has the wrong width.
        name: String,
        /// The width of what it goes with.
        expected: usize,
        /// Its own width.
        actual: usize,
    },
    /// A transcoder writes at another point than it reads.
    #[error("the latents are a transcoder's: it does not write where it reads")]
    Transcoder,
    /// A threshold saves an encoding that is made in any case.
    #[error(
        "without the remainder the whole autoencoder runs: read its latents exactly, not by a \
         threshold"
    )]
    NeedlessThreshold,
    /// Latents of this kind are no function of a threshold.
    #[error("a threshold stands for the selection of TopK latents only, not of {activation}")]
    NoThreshold {
        /// The kind of the autoencoder.
        activation: String,
    },
    /// What is to be steered comes before what decides about it.
    #[error("the condition is read at {condition}, behind {point}, which it is to decide about")]
    ConditionAfter {
        /// Where the condition is read.
        condition: HookPoint,
        /// Where the intervention is.
        point: HookPoint,
    },
}

/// `value` as an f32, if it is a finite one.
pub(crate) fn finite(name: impl Into<String>, value: f64) -> Result<f32, SteeringError> {
    match value as f32 {
        narrow if narrow.is_finite() => Ok(narrow),
        _ => Err(SteeringError::NotFinite { name: name.into(), value }),
    }
}
