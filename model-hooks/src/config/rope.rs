//! Rotary position embedding: which frequencies, and how they are stretched.

use kernels::RotaryPairs;
use serde::{Deserialize, Serialize};

use super::{ConfigError, require, require_positive};

/// Rotary position embedding: pair `i` of a head turns by `theta^(-2i / n_dims)` per position.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RopeConfig {
    /// The base of the frequencies.
    pub theta: f64,
    /// Dimensions of a head that turn; the others stay.
    pub n_dims: usize,
    /// Which dimensions make a pair.
    pub pairs: RotaryPairs,
    /// How the frequencies are changed to reach further than in training.
    pub scaling: RopeScaling,
}

/// A change of the rotary frequencies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RopeScaling {
    /// None.
    Default,
    /// Every frequency divided by `factor`.
    Linear {
        /// How many times further the positions reach.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// How many times further the positions reach.
        factor: f64,
        /// Wavelengths above `original_n_ctx / low_freq_factor` are divided by `factor`.
        low_freq_factor: f64,
        /// Wavelengths below `original_n_ctx / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The context length before the stretch.
        original_n_ctx: usize,
    },
    /// YaRN (Peng et al., 2023): as Llama 3.1, with the ramp over the indices of the pairs.
    Yarn {
        /// How many times further the positions reach.
        factor: f64,
        /// Pairs that turn more often than this in the original context are kept.
        beta_fast: f64,
        /// Pairs that turn less often than this are divided by `factor`.
        beta_slow: f64,
        /// Whether the ends of the ramp are rounded outwards to whole pairs.
        truncate: bool,
        /// The context length before the stretch.
        original_n_ctx: usize,
        /// By what cosines and sines are multiplied.
        attention_factor: f64,
    },
    /// LongRoPE (Ding et al., 2024): a divisor for every pair, of one set for conversations up to
    /// the original context, and of another for longer ones.
    LongRope(LongRope),
}

/// The divisors of LongRoPE.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LongRope {
    /// Divisors for conversations of at most `original_n_ctx` tokens.
    pub short_factors: Vec<f64>,
    /// Divisors for longer ones.
    pub long_factors: Vec<f64>,
    /// The context length before the stretch.
    pub original_n_ctx: usize,
    /// By what cosines and sines are multiplied.
    pub attention_factor: f64,
}

impl RopeConfig {
    /// Plain rotary embedding of all dimensions of a head, in halves.
    pub fn new(theta: f64, d_head: usize) -> Self {
        let pairs = RotaryPairs::Halves;
        Self { theta, n_dims: d_head, pairs, scaling: RopeScaling::Default }
    }

    pub(super) fn validate(&self, d_head: usize) -> Result<(), ConfigError> {
        require_positive("rope theta", self.theta)?;
        let fits = (2..=d_head).contains(&self.n_dims) && self.n_dims.is_multiple_of(2);
        require(fits, "rotary dimensions", "even, and no more than a head has", self.n_dims)?;
        let original =
            |n: usize| require(n > 0, "original_max_position_embeddings", "at least 1", n);
        match &self.scaling {
            RopeScaling::Default => Ok(()),
            &RopeScaling::Linear { factor } => require_positive("rope factor", factor),
            &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_n_ctx } => {
                require_positive("rope factor", factor)?;
                require_positive("low_freq_factor", low_freq_factor)?;
                require(
                    high_freq_factor.is_finite() && high_freq_factor > low_freq_factor,
                    "high_freq_factor",
                    "above low_freq_factor",
                    high_freq_factor,
                )?;
                original(original_n_ctx)
            }
            &RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                attention_factor,
                original_n_ctx,
                ..
            } => {
                require_positive("rope factor", factor)?;
                require_positive("beta_slow", beta_slow)?;
                let is_above = beta_fast.is_finite() && beta_fast >= beta_slow;
                require(is_above, "beta_fast", "no less than beta_slow", beta_fast)?;
                require(self.theta > 1.0, "rope theta", "above 1, for yarn", self.theta)?;
                require_positive("attention_factor", attention_factor)?;
                original(original_n_ctx)
            }
            RopeScaling::LongRope(long) => {
                for (field, factors) in
                    [("short_factor", &long.short_factors), ("long_factor", &long.long_factors)]
                {
                    let n = factors.len();
                    require(2 * n == self.n_dims, field, "one number for every pair", n)?;
                    factors.iter().try_for_each(|&factor| require_positive(field, factor))?;
                }
                require_positive("attention_factor", long.attention_factor)?;
                original(long.original_n_ctx)
            }
        }
    }
}
