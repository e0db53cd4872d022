//! Adam that passes over rows without a gradient.

use rayon::prelude::*;

use super::adam::{Constants, step_slice};
use super::simd::multiversion;
use super::{Float, floats, packed};
use crate::ops::{AdamConfig, dims};

/// Elements that a task looks at, at least.
const TASK: usize = 1 << 15;

/// Works in place on tensors that nobody else holds. Of a row without a gradient, nothing else is
/// read.
pub(super) fn step(
    parameter: Float,
    gradient: Float,
    first: Float,
    second: Float,
    step: usize,
    config: &AdamConfig,
) -> (Float, Float, Float) {
    let [_, m] = dims(&parameter);
    let (mut parameter, gradient) = (packed(parameter), packed(gradient));
    let (mut first, mut second) = (packed(first), packed(second));
    let constants = Constants::new(config, step);
    let task = TASK.div_ceil(m.max(1)) * m.max(1);
    parameter
        .storage_mut::<f32>()
        .par_chunks_mut(task)
        .zip(floats(&gradient).par_chunks(task))
        .zip(first.storage_mut::<f32>().par_chunks_mut(task))
        .zip(second.storage_mut::<f32>().par_chunks_mut(task))
        .for_each(|(((parameter, gradient), first), second)| {
            let rows = parameter.chunks_mut(m).zip(gradient.chunks(m));
            let moments = first.chunks_mut(m).zip(second.chunks_mut(m));
            for ((parameter, gradient), (first, second)) in rows.zip(moments) {
                if !is_zero(gradient) {
                    step_slice(parameter, gradient, first, second, constants);
                }
            }
        });
    (parameter, first, second)
}

multiversion! {
    /// Whether a row is zero everywhere. Most rows say no at their beginning.
    fn is_zero(row: &[f32]) -> bool {
        row.chunks(64).all(|part| {
            let bits = part.iter().fold(0, |bits, x| bits | x.to_bits());
            bits << 1 == 0
        })
    }
}
