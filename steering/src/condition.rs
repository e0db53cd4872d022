//! When to steer: decided from what the model thinks, for each conversation by itself.

use std::collections::BTreeMap;

use burn::tensor::activation::sigmoid;
use burn::tensor::{Tensor, TensorData};
use model_hooks::{HookPoint, Positions};
use sae_core::Sae;
use serde::{Deserialize, Serialize};

use crate::error::{SteeringError, finite};
use crate::intervention::{finite_norm, unit_column};
use crate::latent_reader::{LatentReader, Reading};
use crate::region::Prompts;

/// A number read off each token's activation.
#[derive(Debug, Clone)]
pub enum Score<'a> {
    /// The cosine with a direction (Lee et al., 2024).
    Cosine {
        /// `[d_model]`, of any norm but zero.
        direction: Tensor<1>,
    },
    /// The value of a latent.
    Latent {
        /// The autoencoder that it belongs to.
        sae: &'a Sae,
        /// The latent.
        latent: usize,
        /// How it is read.
        reading: Reading,
    },
    /// The probability that a logistic probe gives: `σ(w · x + b)`.
    Probe {
        /// `w`, `[d_model]`.
        weights: Tensor<1>,
        /// `b`.
        bias: f64,
    },
}

/// Over which tokens a score is taken, and when a decision falls.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Over {
    /// Each token decides for itself.
    EachToken,
    /// The last token of the prompt decides for the conversation.
    LastPromptToken,
    /// The mean over the prompt.
    PromptMean,
    /// The largest over the prompt.
    PromptMax,
    /// The share of the prompt's tokens whose score is above this.
    PromptShare(f32),
}

/// Steers where a score is above a threshold.
///
/// What is decided over a prompt is decided in its pass and holds for the rest of the conversation;
/// the prompt itself is steered too, where the region says so. The tokens of a
/// [`SharedPrefix`](model_hooks::SharedPrefix) do not count and are not steered: they are run before
/// the conversations are known.
#[derive(Debug, Clone)]
pub struct Condition<'a> {
    /// Where the activation is read: before or at the first point that is steered.
    pub point: HookPoint,
    /// What is read off it.
    pub score: Score<'a>,
    /// Over which tokens.
    pub over: Over,
    /// What the score has to exceed.
    pub threshold: f64,
    /// Earlier positions do not count. Position 0 should not: its activation is unlike all others.
    pub from_position: usize,
}

/// A condition made ready, and what it has decided.
#[derive(Debug, Clone)]
pub(crate) struct Decider<'a> {
    scorer: Scorer<'a>,
    over: Over,
    threshold: f32,
    from_position: usize,
    /// Of each token of the pass.
    tokens: Vec<bool>,
    /// Of each prompt, by its number.
    prompts: BTreeMap<usize, bool>,
}

#[derive(Debug, Clone)]
enum Scorer<'a> {
    /// `[d_model, 1]`, of norm 1.
    Cosine(Tensor<2>),
    Latent(Box<LatentReader<'a>>),
    Probe {
        /// `[d_model, 1]`.
        weights: Tensor<2>,
        bias: f32,
    },
}

impl<'a> Scorer<'a> {
    fn new(score: Score<'a>) -> Result<Self, SteeringError> {
        Ok(match score {
            Score::Cosine { direction } => Self::Cosine(unit_column(direction)?),
            Score::Latent { sae, latent, reading } => {
                Self::Latent(Box::new(LatentReader::new(sae, &[latent], reading)?))
            }
            Score::Probe { weights, bias } => {
                finite_norm("the probe", &weights)?;
                let [d_model] = weights.dims();
                let bias = finite("the probe's bias", bias)?;
                Self::Probe { weights: weights.reshape([d_model, 1]), bias }
            }
        })
    }

    fn width(&self) -> usize {
        match self {
            Self::Cosine(column) | Self::Probe { weights: column, .. } => column.dims()[0],
            Self::Latent(reader) => reader.sae().config().d_in,
        }
    }

    fn scores(&self, x: Tensor<2>) -> Vec<f32> {
        let scores = match self {
            Self::Cosine(unit) => {
                let norms = x.clone().square().sum_dim(1).sqrt().clamp_min(f32::MIN_POSITIVE);
                x.matmul(unit.clone()) / norms
            }
            Self::Latent(reader) => reader.read(x),
            Self::Probe { weights, bias } => sigmoid(x.matmul(weights.clone()).add_scalar(*bias)),
        };
        scores.into_data().try_to_vec().expect("scores are f32")
    }
}

impl<'a> Decider<'a> {
    pub(crate) fn new(condition: Condition<'a>) -> Result<Self, SteeringError> {
        let Condition { score, over, threshold, from_position, .. } = condition;
        if let Over::PromptShare(above) = over {
            finite("the score to share", above.into())?;
        }
        Ok(Self {
            scorer: Scorer::new(score)?,
            over,
            threshold: finite("the threshold of the condition", threshold)?,
            from_position,
            tokens: Vec::new(),
            prompts: BTreeMap::new(),
        })
    }

    pub(crate) fn width(&self) -> usize {
        self.scorer.width()
    }

    /// Whether a pass has anything to decide.
    pub(crate) fn is_due(&self, positions: &Positions) -> bool {
        match self.over {
            Over::EachToken => true,
            _ => begins(positions),
        }
    }

    /// Decides about a pass.
    ///
    /// # Shapes
    /// `x`: `[batch · pos, d_model]`.
    pub(crate) fn decide(&mut self, x: Tensor<2>, positions: &Positions, prompts: &Prompts) {
        let scores = self.scorer.scores(x);
        if self.over == Over::EachToken {
            self.tokens = scores.iter().map(|&score| score > self.threshold).collect();
            return;
        }
        self.prompts.clear();
        let n = positions.n_columns();
        for row in 0..positions.n_rows() {
            let counts = |&column: &usize| {
                let position = positions.get(row, column);
                position.is_some_and(|p| p >= self.from_position)
                    && !prompts.is_generated(positions, row, column)
            };
            let own = (0..n).filter(counts).map(|column| scores[row * n + column]);
            let own: Vec<f32> = own.collect();
            let score = self.over(&own);
            self.prompts.insert(positions.prompt(row), score.is_some_and(|s| s > self.threshold));
        }
    }

    /// The score of a prompt, if any of its tokens counts.
    fn over(&self, scores: &[f32]) -> Option<f32> {
        let n = scores.len() as f32;
        let last = *scores.last()?;
        Some(match self.over {
            Over::EachToken | Over::LastPromptToken => last,
            Over::PromptMean => scores.iter().sum::<f32>() / n,
            Over::PromptMax => scores.iter().copied().fold(f32::NEG_INFINITY, f32::max),
            Over::PromptShare(above) => scores.iter().filter(|&&s| s > above).count() as f32 / n,
        })
    }

    /// What was decided about a token of this pass.
    pub(crate) fn holds(&self, positions: &Positions, row: usize, column: usize) -> bool {
        match self.over {
            Over::EachToken => self.tokens[row * positions.n_columns() + column],
            _ => self.prompts.get(&positions.prompt(row)).copied().unwrap_or(false),
        }
    }

    /// Whether it is prompts that are decided about.
    pub(crate) fn is_by_prompt(&self) -> bool {
        self.over != Over::EachToken
    }

    /// What was decided about each prompt, by its number.
    pub(crate) fn decisions(&self) -> &BTreeMap<usize, bool> {
        &self.prompts
    }
}

/// Whether this is the first pass over the prompts. Conversations that are run anew from their first
/// tokens have begun before.
pub(crate) fn begins(positions: &Positions) -> bool {
    let is_first = positions.n_past() == 0 && !positions.is_prefix();
    is_first && !positions.is_generated(positions.n_columns() - 1)
}

/// A condition's score of activations: to find its threshold by, or to decide about prompts before
/// they are run.
///
/// # Shapes
/// `x`: `[n, d_model]`; one score for each row.
///
/// # Errors
/// If the score cannot be made.
///
/// # Panics
/// If `x` has another width.
pub fn scores(score: Score<'_>, x: Tensor<2>) -> Result<Vec<f32>, SteeringError> {
    let scorer = Scorer::new(score)?;
    assert_eq!(x.dims()[1], scorer.width(), "activations of another width");
    Ok(scorer.scores(x))
}

/// A mask of the pass, `[batch · pos, width]`.
pub(crate) fn mask(cells: &[bool], width: usize, x: &Tensor<2>) -> Tensor<2, burn::tensor::Bool> {
    let mask = TensorData::new(cells.to_vec(), [cells.len(), 1]);
    Tensor::<2, burn::tensor::Bool>::from_data(mask, &x.device()).expand([cells.len(), width])
}
