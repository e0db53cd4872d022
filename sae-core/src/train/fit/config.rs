//! How SAEs are fitted to a stream.

use burn::config::Config;

/// What a [`Fit`](super::Fit) does beside the steps.
#[derive(Config, Debug, PartialEq)]
pub struct FitConfig {
    /// Steps of the run; all that the stream has batches for if not given.
    #[config(default = "None")]
    pub n_steps: Option<usize>,
    /// Steps between checkpoints, if they are kept. There is one at the end in any case.
    #[config(default = 1000)]
    pub checkpoint_every: usize,
    /// Steps between evaluations, if there is a stream to evaluate on. There is one at the end.
    #[config(default = 1000)]
    pub evaluate_every: usize,
    /// Activations that an evaluation is over, at most.
    #[config(default = 65_536)]
    pub evaluate_rows: usize,
    /// Steps that may be skipped in each run because a loss or gradient was not finite.
    #[config(default = 10)]
    pub max_skipped: usize,
    /// Rows are left out whose norm is above so many times the median norm of the first rows, at any
    /// of the points that are trained on: one such row in thousands outweighs all others in the loss
    /// of its batch. All of them are counted. The stream may then have batches for fewer steps than
    /// its length says: the run ends with it, unless a number of steps is given.
    #[config(default = "None")]
    pub max_norm: Option<f64>,
    /// What makes the activations: a model's name. Checkpoints are bound to it.
    #[config(default = "String::new()")]
    pub model: String,
}
