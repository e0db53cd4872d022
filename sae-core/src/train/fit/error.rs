//! What can go wrong when SAEs are fitted to a stream.

use crate::source::SourceError;
use crate::train::checkpoint::CheckpointError;
use crate::train::error::TrainError;

/// Why a run over a stream cannot start, or had to stop.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FitError {
    /// One of the SAEs cannot be trained.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// The stream failed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The run could not be saved, or cannot be gone on with.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// There is nothing to train.
    #[error("no runs were given")]
    NoRuns,
    /// Two runs have one name.
    #[error("two runs are named {name:?}")]
    SameName {
        /// The name.
        name: String,
    },
    /// Runs on one stream take batches of different sizes.
    #[error("run {run:?} takes batches of {actual}, the first one of {expected}")]
    Batch {
        /// The run.
        run: String,
        /// The first one's batch.
        expected: usize,
        /// This one's.
        actual: usize,
    },
    /// The stream does not know its length, and no number of steps was given.
    #[error("the stream does not know its length: say how many steps to make")]
    UnknownLength,
    /// The stream ended before the run.
    #[error("the stream ends in step {step} of {n_steps}")]
    SourceEnded {
        /// The step, from 0.
        step: usize,
        /// Steps of the run.
        n_steps: usize,
    },
    /// The stream failed before, within a step.
    #[error("the stream failed in step {step}: go on from a checkpoint")]
    Interrupted {
        /// The step, from 0.
        step: usize,
    },
    /// Too many steps had a loss or a gradient that was not finite. The run was saved before this.
    #[error("run {run:?} has skipped {n_skipped} steps, more than {limit}")]
    TooManySkipped {
        /// The run.
        run: String,
        /// Steps it skipped.
        n_skipped: usize,
        /// Steps it may skip.
        limit: usize,
        /// Why it skipped the last one.
        source: TrainError,
    },
    /// The metrics could not be written.
    #[error("the metrics cannot be written")]
    Metrics {
        /// What the system said.
        source: std::io::Error,
    },
}
