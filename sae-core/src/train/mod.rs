//! Training of sparse autoencoders and transcoders.
//!
//! ```text
//! x̃ = x · √d_in / mean‖x‖                    inputs of norm √d_in, on average
//! ```
//!
//! unless [`InputScale`] says otherwise.
//!
//! A [`TrainConfig`] says what is minimised on them ([`Objective`]), by what optimiser
//! ([`Optimizer`]) and over which course ([`Schedule`]). At the end the scale of the inputs is folded
//! into the weights, and so are the norms of the decoder rows where that changes nothing: the
//! [`Sae`](crate::Sae) takes raw activations.
//!
//! | kind | see |
//! |---|---|
//! | standard (L1, Lᵖ), p-annealing | [`Standard`], [`Sparsity`], [`Anneal`] |
//! | gated | [`Gated`], [`GatedAuxiliary`] |
//! | TopK, multi-TopK, AbsTopK, GroupMax, BatchTopK, Matryoshka, k-annealing | [`Selecting`], [`Selection`] |
//! | AuxK for dead latents, ghost gradients | [`AuxK`], [`AuxKRule`], [`GhostGradients`] |
//! | JumpReLU | [`JumpRelu`], [`L0Loss`], [`StraightThrough`] |
//! | matching pursuit | [`MatchingPursuit`] |
//! | transcoders, with and without a skip | [`Transcoder`], [`Batch`] |
//! | unit decoder rows, resampling | [`DecoderNorm`], [`Resampling`] |
//! | the divergence of a language model's predictions | [`EndToEnd`], [`Upstream`] |
//! | several workers, each on its part of a batch | [`TrainState::step_among`], [`Reduce`] |
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
mod decoder_norm;
mod end_to_end;
mod error;
mod fit;
mod initial;
mod matrix_source;
mod moments;
mod objective;
mod parameters;
mod reduce;
mod resampling;
mod row_order;
mod schedule;
mod state;
mod trainer;

pub use activation_matrix::ActivationMatrix;
pub use ages::Ages;
pub use checkpoint::{CheckpointError, Checkpoints, Difference, PassedOver};
pub use config::{Centre, InputScale, TrainConfig, Transcoder};
pub use decoder_norm::DecoderNorm;
pub use end_to_end::{EndToEnd, EndToEndError};
pub use error::TrainError;
pub use fit::{Ended, Event, Fit, FitConfig, FitError, HeldOutFigures, Resumed, Run};
pub use matrix_source::MatrixSource;
pub use moments::{Betas, Moments, Momentum, Optimizer};
pub use objective::{
    AuxK, AuxKRule, AuxKTarget, Batch, Differentiated, ErrorMeasure, Gated, GatedAuxiliary,
    GhostGradients, Group, JumpRelu, Kind, L0Loss, MatchingPursuit, Objective, RunningThreshold,
    Selecting, Selection, Sparsity, SparsityNorm, Standard, StraightThrough, Term,
    ThresholdParameter, Upstream,
};
pub use parameters::{ParameterName, Parameters};
pub use reduce::{Collective, Reduce, ReduceError, Thread};
pub use resampling::{Resampling, ResamplingRule};
pub use schedule::{Anneal, DecayShape, Schedule};
pub use state::{StepOutcome, StepReport, TrainState};
pub use trainer::{Progress, Trainer};

pub use kernels::Search;

pub(crate) use row_order::random_stream;
