//! Why an attribution cannot be made.

use model_hooks::{ForwardError, HookError, HookPoint, TokenError};

/// Why an attribution cannot be made.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AttributionError {
    /// A pass could not be run.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// What a unit of a latent writes is not the same for every activation, so that latents have no
    /// directions: the SAE is a transcoder, or normalises each activation by itself.
    #[error("the latents of the SAE at {point} write no fixed directions there")]
    NoDirections {
        /// Where it was to stand.
        point: HookPoint,
    },
    /// A conversation of the other run has another number of tokens.
    #[error("conversation {conversation} has {expected} tokens, the other run has {actual} there")]
    RunDiffers {
        /// Index of the conversation.
        conversation: usize,
        /// Its tokens.
        expected: usize,
        /// Those of the other run.
        actual: usize,
    },
    /// A mean of the activation has another width, or none would fit: attention patterns have no
    /// mean that does not depend on the length.
    #[error("the activation at {point} is {expected} wide, the mean given is {actual}")]
    Mean {
        /// The point asked for.
        point: HookPoint,
        /// The width of the activation, heads joined.
        expected: usize,
        /// The width of the mean.
        actual: usize,
    },
    /// What is at one point does not depend on what is at the other.
    #[error("{to} does not come behind {from} in a pass")]
    NotBehind {
        /// Where edges were to begin.
        from: HookPoint,
        /// Where they were to end.
        to: HookPoint,
    },
    /// The activation has no axis of positions next to that of the batch.
    #[error("{point} has no row for every position")]
    NotByPosition {
        /// The point asked for.
        point: HookPoint,
    },
}

impl From<HookError> for AttributionError {
    fn from(error: HookError) -> Self {
        Self::Forward(error.into())
    }
}

impl From<TokenError> for AttributionError {
    fn from(error: TokenError) -> Self {
        Self::Forward(error.into())
    }
}
