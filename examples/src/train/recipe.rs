//! How an SAE is trained, as a user says it: each of the library's options, with its defaults.

use sae_core::train::{
    Anneal, Betas, Centre, DecayShape, DecoderNorm, InputScale, Momentum, Optimizer, Resampling,
    ResamplingRule,
};
use serde::Deserialize;

/// How weights follow their gradients.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum OptimizerPlan {
    /// Adam.
    Adam(BetasPlan),
    /// Adam that leaves alone the rows of latents that get no gradient in a step.
    RowLazyAdam(BetasPlan),
    /// A step of the learning rate along the sign of a running mean of the gradient.
    Signum {
        /// Decay of the running mean.
        #[serde(default = "default_beta")]
        beta: f64,
    },
}

/// The constants of Adam.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BetasPlan {
    /// Decay of the first moment.
    pub beta_1: f64,
    /// Decay of the second moment.
    pub beta_2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
}

impl Default for BetasPlan {
    fn default() -> Self {
        let Betas { beta_1, beta_2, epsilon } = Betas::new();
        Self { beta_1, beta_2, epsilon }
    }
}

fn default_beta() -> f64 {
    Momentum::new().beta
}

impl Default for OptimizerPlan {
    fn default() -> Self {
        Self::Adam(BetasPlan::default())
    }
}

impl From<OptimizerPlan> for Optimizer {
    fn from(plan: OptimizerPlan) -> Self {
        let betas = |BetasPlan { beta_1, beta_2, epsilon }| Betas { beta_1, beta_2, epsilon };
        match plan {
            OptimizerPlan::Adam(plan) => Self::Adam(betas(plan)),
            OptimizerPlan::RowLazyAdam(plan) => Self::RowLazyAdam(betas(plan)),
            OptimizerPlan::Signum { beta } => Self::Signum(Momentum { beta }),
        }
    }
}

/// How the learning rate falls.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecayPlan {
    /// In a straight line.
    #[default]
    Linear,
    /// Along half a cosine.
    Cosine,
}

impl From<DecayPlan> for DecayShape {
    fn from(plan: DecayPlan) -> Self {
        match plan {
            DecayPlan::Linear => Self::Linear,
            DecayPlan::Cosine => Self::Cosine,
        }
    }
}

/// `k` or `p` of the objective, moving to where the objective has it.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnnealPlan {
    /// Where it starts.
    pub from: f64,
    /// The share of the steps before it moves.
    #[serde(default)]
    pub begin: f64,
    /// The share of the steps after which it has arrived.
    #[serde(default = "default_end")]
    pub end: f64,
}

fn default_end() -> f64 {
    1.0
}

impl From<AnnealPlan> for Anneal {
    fn from(AnnealPlan { from, begin, end }: AnnealPlan) -> Self {
        Self { from, begin, end }
    }
}

/// What holds the norms of decoder rows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecoderPlan {
    /// Nothing; they are folded away at the end.
    #[default]
    Free,
    /// They have norm 1 throughout.
    Unit,
}

impl From<DecoderPlan> for DecoderNorm {
    fn from(plan: DecoderPlan) -> Self {
        match plan {
            DecoderPlan::Free => Self::Free,
            DecoderPlan::Unit => Self::Unit,
        }
    }
}

/// Where `b_dec` starts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CentrePlan {
    /// At the origin.
    Zero,
    /// At the mean of the first activations.
    #[default]
    Mean,
    /// At their geometric median.
    GeometricMedian,
}

impl From<CentrePlan> for Centre {
    fn from(plan: CentrePlan) -> Self {
        match plan {
            CentrePlan::Zero => Self::Zero,
            CentrePlan::Mean => Self::Mean,
            CentrePlan::GeometricMedian => Self::GeometricMedian,
        }
    }
}

/// How activations are scaled before the SAE reads them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InputScalePlan {
    /// Not at all.
    Raw,
    /// By one factor, that brings their mean norm to the root of their width.
    #[default]
    AverageNorm,
    /// Each to that norm.
    ConstantNorm,
    /// Each to mean 0 and standard deviation 1.
    LayerNorm,
}

impl From<InputScalePlan> for InputScale {
    fn from(plan: InputScalePlan) -> Self {
        match plan {
            InputScalePlan::Raw => Self::Raw,
            InputScalePlan::AverageNorm => Self::AverageNorm,
            InputScalePlan::ConstantNorm => Self::ConstantNorm,
            InputScalePlan::LayerNorm => Self::LayerNorm,
        }
    }
}

/// Dead latents get new weights from time to time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResamplingPlan {
    /// Steps from one time to the next.
    pub every: usize,
    /// Whose rule it is.
    #[serde(default)]
    pub rule: ResamplingRulePlan,
}

/// How resampled latents find their new weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResamplingRulePlan {
    /// By the square of the loss; encoder rows a fifth as long as those of living latents.
    #[default]
    Anthropic,
    /// By the norm of the error.
    DictionaryLearning,
}

impl From<ResamplingPlan> for Resampling {
    fn from(ResamplingPlan { every, rule }: ResamplingPlan) -> Self {
        Self::new(every).with_rule(match rule {
            ResamplingRulePlan::Anthropic => ResamplingRule::Anthropic,
            ResamplingRulePlan::DictionaryLearning => ResamplingRule::DictionaryLearning,
        })
    }
}
