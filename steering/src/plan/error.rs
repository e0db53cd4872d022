//! Why plans fail.

use model_hooks::{HookError, HookPoint};

use crate::error::SteeringError;

/// Why a plan cannot be read, written or carried out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// Not a plan: not JSON, an unknown key, a missing one, or a value of another type.
    #[error("this is no steering plan, or no probe of requests")]
    Json(#[source] serde_json::Error),
    /// A version that is not read here.
    #[error("the document is of version {actual}, expected {expected}")]
    Version {
        /// The version that is read.
        expected: u32,
        /// That of the document.
        actual: u32,
    },
    /// A number that is infinite, or none.
    #[error("{place} is {value}: expected a finite number")]
    NotFinite {
        /// Where it stands.
        place: String,
        /// The number.
        value: f32,
    },
    /// A plan that does nothing.
    #[error("the plan has no steps")]
    NoSteps,
    /// Two autoencoders of one name.
    #[error("the plan has two autoencoders named {name:?}")]
    DuplicateSae {
        /// The name.
        name: String,
    },
    /// An autoencoder that is not there.
    #[error("{place} names the autoencoder {name:?}, which is not given")]
    NoSuchSae {
        /// What names it.
        place: String,
        /// The name.
        name: String,
    },
    /// The model or an autoencoder is another one than the plan was made for.
    #[error("the plan is for {what} with {field} {expected}, this one has {actual}")]
    Mismatch {
        /// The model, or an autoencoder by its name.
        what: String,
        /// What differs.
        field: &'static str,
        /// What the plan says.
        expected: String,
        /// What it is.
        actual: String,
    },
    /// The plan says which file the model is, and the caller does not.
    #[error("the plan is for a model with SHA-256 {expected}: the hash of this one is not given")]
    UnknownHash {
        /// The hash.
        expected: String,
    },
    /// A direction that does not fit where it is used.
    #[error("{place} is {actual} wide, the activations of {point} are {expected}")]
    Width {
        /// Where it stands.
        place: String,
        /// The hook point.
        point: HookPoint,
        /// The width of the activations.
        expected: usize,
        /// Its own width.
        actual: usize,
    },
    /// Latents away from where their autoencoder was trained.
    #[error("{place} is at {actual}, its autoencoder was trained at {expected}")]
    Layer {
        /// Where it stands.
        place: String,
        /// Where the autoencoder was trained.
        expected: String,
        /// Where the plan uses it.
        actual: HookPoint,
    },
    /// A marker that no conversation has.
    #[error("the marker of step {step} is token {marker}, the model has {d_vocab}")]
    NoSuchToken {
        /// Which step, from 0.
        step: usize,
        /// The token's id.
        marker: u32,
        /// Tokens of the model.
        d_vocab: usize,
    },
    /// A hook point that the model does not have.
    #[error("step {step} of the plan")]
    Point {
        /// Which step, from 0.
        step: usize,
        /// What is wrong.
        source: HookError,
    },
    /// A probe whose weights are not as many as what it reads.
    #[error("the probe has {actual} weights, for features of {expected} numbers together")]
    ProbeWidth {
        /// Numbers that it reads.
        expected: usize,
        /// Its weights.
        actual: usize,
    },
    /// A block that a probe reads and the model does not have.
    #[error("what the probe reads")]
    Probe {
        /// What is wrong.
        source: HookError,
    },
    /// A step that cannot be made.
    #[error("step {step} of the plan")]
    Step {
        /// Which step, from 0.
        step: usize,
        /// What is wrong.
        source: SteeringError,
    },
}
