//! Rotary position embeddings (Su et al., 2021), half-split, with their scalings.

use burn::tensor::{Device, Tensor, TensorData};

use crate::config::RopeScaling;
use crate::positions::Positions;

/// Angles per position for one head width.
#[derive(Debug, Clone)]
pub(crate) struct Rotary {
    /// Radians per position for each pair of dimensions.
    frequencies: Vec<f64>,
}

/// Cosines and sines of the tokens of one pass.
#[derive(Debug, Clone)]
pub(crate) struct RotaryTable {
    cos: Tensor<3>,
    sin: Tensor<3>,
}

impl Rotary {
    pub(crate) fn new(d_head: usize, theta: f64, scaling: &RopeScaling) -> Self {
        let plain = (0..d_head / 2).map(|i| theta.powf(-((2 * i) as f64) / d_head as f64));
        let scale = |frequency: f64| match *scaling {
            RopeScaling::Default => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_n_ctx } => {
                // Llama 3.1: long waves are stretched, short ones kept, those between blended.
                let turns = original_n_ctx as f64 * frequency / std::f64::consts::TAU;
                let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                let smooth = smooth.clamp(0.0, 1.0);
                frequency * (smooth + (1.0 - smooth) / factor)
            }
        };
        Self { frequencies: plain.map(scale).collect() }
    }

    /// The table of a pass; padding gets position 0.
    pub(crate) fn table(&self, positions: &Positions, device: &Device) -> RotaryTable {
        let (rows, columns, half) =
            (positions.n_rows(), positions.n_columns(), self.frequencies.len());
        let size = rows * columns * half;
        let (mut cos, mut sin) = (Vec::with_capacity(size), Vec::with_capacity(size));
        for row in 0..rows {
            for column in 0..columns {
                let position = positions.get(row, column).unwrap_or(0) as f64;
                for frequency in &self.frequencies {
                    // transformers multiplies in f32: the angle is rounded there, and so here.
                    let angle = (position as f32) * (*frequency as f32);
                    cos.push(angle.cos());
                    sin.push(angle.sin());
                }
            }
        }
        let tensor =
            |values| Tensor::from_data(TensorData::new(values, [rows, columns, half]), device);
        RotaryTable { cos: tensor(cos), sin: tensor(sin) }
    }
}

impl RotaryTable {
    /// # Shapes
    /// `x`: `[batch, pos, head, d_head]`.
    pub(crate) fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        kernels::rotary(x, self.cos.clone(), self.sin.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_keeps_short_waves_and_stretches_long_ones() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_n_ctx: 16,
        };
        let plain = Rotary::new(16, 500_000.0, &RopeScaling::Default).frequencies;
        let scaled = Rotary::new(16, 500_000.0, &scaling).frequencies;
        // 16 positions of frequency 1 are 2.5 turns, between 1 and 4: (2.546 − 1) / 3 = 0.515.
        let smooth = (16.0 / std::f64::consts::TAU - 1.0) / 3.0;
        assert!((scaled[0] - (smooth + (1.0 - smooth) / 8.0)).abs() < 1e-12);
        assert!((scaled[7] - plain[7] / 8.0).abs() < 1e-18);
    }
}
