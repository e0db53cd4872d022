//! Training of TopK SAEs.
//!
//! ```text
//! x̃      = x · √d_in / mean‖x‖                    inputs of norm √d_in, on average
//! pre    = (x̃ − b_dec) · w_encᵀ + b_enc
//! z      = relu(pre) at the k largest of pre ⊙ ‖w_dec[i]‖
//! loss   = mean over the batch of ‖z · w_dec + b_dec − x̃‖²
//! ```
//!
//! minimised by Adam. At the end the scale of the inputs and the norms of the decoder rows are
//! folded into the weights: the [`Sae`](crate::Sae) takes raw activations and writes unit rows.
//!
//! A run is determined by its configuration and its activations, bit for bit on one machine: all
//! that it has to remember between two steps is a [`TrainState`] and the position in the stream of
//! activations.
//!
//! [`Trainer`] trains one SAE. [`Fit`] trains several on one stream, evaluates them, and keeps
//! [`Checkpoints`] that it goes on from.

mod activation_matrix;
mod ages;
mod checkpoint;
mod config;
mod error;
mod fit;
mod initial;
mod matrix_source;
mod moments;
mod parameters;
mod row_order;
mod schedule;
mod state;
mod trainer;

pub use activation_matrix::ActivationMatrix;
pub use ages::Ages;
pub use checkpoint::{CheckpointError, Checkpoints, Difference, PassedOver};
pub use config::{Centre, TrainConfig};
pub use error::TrainError;
pub use fit::{Ended, Evaluation, Event, Fit, FitConfig, FitError, Resumed, Run};
pub use matrix_source::MatrixSource;
pub use moments::Moments;
pub use parameters::{Differentiated, Parameters};
pub use schedule::Schedule;
pub use state::{StepReport, TrainState};
pub use trainer::{Progress, Trainer};

pub(crate) use row_order::random_stream;
