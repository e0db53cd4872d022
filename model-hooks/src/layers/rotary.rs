//! Rotary position embeddings (Su et al., 2021), with their scalings.

use burn::tensor::{Device, Tensor, TensorData};
use kernels::RotaryPairs;

use crate::config::{LongRope, RopeConfig, RopeScaling};
use crate::positions::Positions;

/// Angles per position.
#[derive(Debug, Clone)]
pub(crate) struct Rotary {
    /// Radians per position for each pair of dimensions.
    frequencies: Vec<f64>,
    /// The frequencies of conversations longer than this.
    long: Option<(usize, Vec<f64>)>,
    /// By what cosines and sines are multiplied.
    attention_factor: f64,
    pairs: RotaryPairs,
}

/// Cosines and sines of the tokens of one pass.
#[derive(Debug, Clone)]
pub(crate) struct RotaryTable {
    cos: Tensor<3>,
    sin: Tensor<3>,
    pairs: RotaryPairs,
}

/// Which length decides between the two sets of frequencies of LongRoPE.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum RopeLength {
    /// That of each conversation: what comes of one does not depend on the others of the batch.
    #[default]
    Conversation,
    /// That of the longest conversation of the batch, as in transformers.
    LongestOfBatch,
}

impl Rotary {
    pub(crate) fn new(config: &RopeConfig) -> Self {
        let &RopeConfig { theta, n_dims, pairs, ref scaling } = config;
        let plain: Vec<f64> =
            (0..n_dims / 2).map(|i| theta.powf(-((2 * i) as f64) / n_dims as f64)).collect();
        let divided = |factors: &[f64]| plain.iter().zip(factors).map(|(f, by)| f / by).collect();
        let (attention_factor, long) = match scaling {
            RopeScaling::Yarn { attention_factor, .. } => (*attention_factor, None),
            RopeScaling::LongRope(LongRope { attention_factor, original_n_ctx, .. }) => {
                (*attention_factor, Some(*original_n_ctx))
            }
            _ => (1.0, None),
        };
        let (frequencies, long) = match scaling {
            RopeScaling::Default => (plain, None),
            RopeScaling::Linear { factor } => (plain.iter().map(|f| f / factor).collect(), None),
            &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_n_ctx } => {
                // Long waves are stretched, short ones kept, those between blended.
                let scale = |frequency: &f64| {
                    let turns = original_n_ctx as f64 * frequency / std::f64::consts::TAU;
                    let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    blend(*frequency, factor, kept)
                };
                (plain.iter().map(scale).collect(), None)
            }
            &RopeScaling::Yarn {
                factor, beta_fast, beta_slow, truncate, original_n_ctx, ..
            } => {
                // The pair that makes so many turns in the original context.
                let pair = |turns: f64| {
                    let wavelength = original_n_ctx as f64 / (turns * std::f64::consts::TAU);
                    n_dims as f64 * wavelength.ln() / (2.0 * theta.ln())
                };
                let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, high) = (low.max(0.0), high.min(n_dims as f64 - 1.0));
                let width = if low == high { 0.001 } else { high - low };
                let scale = |(i, frequency): (usize, &f64)| {
                    blend(*frequency, factor, 1.0 - ((i as f64 - low) / width).clamp(0.0, 1.0))
                };
                (plain.iter().enumerate().map(scale).collect(), None)
            }
            RopeScaling::LongRope(LongRope { short_factors, long_factors, .. }) => {
                (divided(short_factors), long.map(|n_ctx| (n_ctx, divided(long_factors))))
            }
        };
        Self { frequencies, long, attention_factor, pairs }
    }

    /// The length of conversations above which the angles of all their tokens are others.
    pub(crate) fn switch(&self) -> Option<usize> {
        self.long.as_ref().map(|&(n_ctx, _)| n_ctx)
    }

    /// The table of a pass; padding gets position 0.
    pub(crate) fn table(
        &self,
        positions: &Positions,
        length: RopeLength,
        device: &Device,
    ) -> RotaryTable {
        let (rows, columns) = (positions.n_rows(), positions.n_columns());
        let n_pairs = self.frequencies.len();
        let longest = match length {
            RopeLength::Conversation => 0,
            RopeLength::LongestOfBatch => longest(positions),
        };
        let size = rows * columns * n_pairs;
        let (mut cos, mut sin) = (Vec::with_capacity(size), Vec::with_capacity(size));
        for row in 0..rows {
            for column in 0..columns {
                let position = positions.get(row, column).unwrap_or(0);
                let frequencies = match &self.long {
                    Some((n_ctx, long)) if positions.length(row, column).max(longest) > *n_ctx => {
                        long
                    }
                    _ => &self.frequencies,
                };
                for frequency in frequencies {
                    // transformers multiplies in f32: the angle is rounded there, and so here.
                    let angle = (position as f32) * (*frequency as f32);
                    cos.push(angle.cos() * self.attention_factor as f32);
                    sin.push(angle.sin() * self.attention_factor as f32);
                }
            }
        }
        let tensor =
            |values| Tensor::from_data(TensorData::new(values, [rows, columns, n_pairs]), device);
        RotaryTable { cos: tensor(cos), sin: tensor(sin), pairs: self.pairs }
    }
}

/// `kept` (within 0 and 1) of the frequency, and the rest of it stretched.
fn blend(frequency: f64, factor: f64, kept: f64) -> f64 {
    let kept = kept.clamp(0.0, 1.0);
    frequency * (kept + (1.0 - kept) / factor)
}

/// Tokens of the longest conversation at the end of a pass.
pub(crate) fn longest(positions: &Positions) -> usize {
    positions.cells(|row, column| positions.length(row, column)).into_iter().max().unwrap_or(0)
}

impl RotaryTable {
    /// # Shapes
    /// `x`: `[batch, pos, head, d_head]`.
    pub(crate) fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        kernels::rotary(x, self.cos.clone(), self.sin.clone(), self.pairs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(theta: f64, n_dims: usize, scaling: RopeScaling) -> Vec<f64> {
        Rotary::new(&RopeConfig { scaling, ..RopeConfig::new(theta, n_dims) }).frequencies
    }

    #[test]
    fn llama3_keeps_short_waves_and_stretches_long_ones() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_n_ctx: 16,
        };
        let plain = frequencies(500_000.0, 16, RopeScaling::Default);
        let scaled = frequencies(500_000.0, 16, scaling);
        // 16 positions of frequency 1 are 2.5 turns, between 1 and 4: (2.546 − 1) / 3 = 0.515.
        let smooth = (16.0 / std::f64::consts::TAU - 1.0) / 3.0;
        assert!((scaled[0] - (smooth + (1.0 - smooth) / 8.0)).abs() < 1e-12);
        assert!((scaled[7] - plain[7] / 8.0).abs() < 1e-18);
    }

    #[test]
    fn yarn_ramps_over_the_pairs() {
        let scaling = RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            original_n_ctx: 4096,
            attention_factor: 1.0,
        };
        let plain = frequencies(10_000.0, 128, RopeScaling::Default);
        let scaled = frequencies(10_000.0, 128, scaling);
        // Pair 20.9 makes 32 turns, pair 45.03 makes one: the ramp goes from 20 to 46.
        assert_eq!(scaled[20], plain[20]);
        assert!((scaled[33] / plain[33] - (0.5 + 0.5 / 4.0)).abs() < 1e-12);
        assert_eq!(scaled[46], plain[46] / 4.0);
    }

    #[test]
    fn longrope_switches_for_each_conversation() {
        let long = LongRope {
            short_factors: vec![1.0],
            long_factors: vec![2.0],
            original_n_ctx: 3,
            attention_factor: 1.5,
        };
        let scaling = RopeScaling::LongRope(long);
        let rotary = Rotary::new(&RopeConfig { scaling, ..RopeConfig::new(1e4, 2) });
        let cos = |length| {
            let positions = Positions::new(0, 0, 4, vec![0, 1]);
            let table = rotary.table(&positions, length, &Device::flex());
            let cos: Vec<f32> = table.cos.into_data().try_to_vec().unwrap();
            [cos[3], cos[7]]
        };
        let (long, short) = (1.5 * 1.5f32.cos(), 1.5 * 2f32.cos());
        assert_eq!(cos(RopeLength::Conversation), [long, short]);
        assert_eq!(cos(RopeLength::LongestOfBatch), [long, 1.5 * 1f32.cos()]);
    }
}
