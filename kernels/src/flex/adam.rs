//! Adam in one pass over memory.

use rayon::prelude::*;

use super::simd::multiversion;
use super::{Float, floats, packed};
use crate::ops::{AdamConfig, bias_corrections};

const TASK: usize = 1 << 15;

/// Works in place on tensors that nobody else holds; copies the others once.
pub(super) fn step(
    parameter: Float,
    gradient: Float,
    first: Float,
    second: Float,
    step: usize,
    config: &AdamConfig,
) -> (Float, Float, Float) {
    let (mut parameter, gradient) = (packed(parameter), packed(gradient));
    let (mut first, mut second) = (packed(first), packed(second));
    let constants = Constants::new(config, step);
    parameter
        .storage_mut::<f32>()
        .par_chunks_mut(TASK)
        .zip(floats(&gradient).par_chunks(TASK))
        .zip(first.storage_mut::<f32>().par_chunks_mut(TASK))
        .zip(second.storage_mut::<f32>().par_chunks_mut(TASK))
        .for_each(|(((parameter, gradient), first), second)| {
            step_slice(parameter, gradient, first, second, constants);
        });
    (parameter, first, second)
}

#[derive(Clone, Copy)]
pub(super) struct Constants {
    beta_1: f32,
    beta_2: f32,
    rate: f32,
    root_scale: f32,
    epsilon: f32,
    gradient_scale: f32,
}

impl Constants {
    pub(super) fn new(config: &AdamConfig, step: usize) -> Self {
        let (correction_1, correction_2) = bias_corrections(config, step);
        Self {
            beta_1: config.beta_1 as f32,
            beta_2: config.beta_2 as f32,
            rate: (config.learning_rate / correction_1) as f32,
            root_scale: (1.0 / correction_2.sqrt()) as f32,
            epsilon: config.epsilon as f32,
            gradient_scale: config.gradient_scale as f32,
        }
    }
}

multiversion! {
    pub(super) fn step_slice(
        parameter: &mut [f32],
        gradient: &[f32],
        first: &mut [f32],
        second: &mut [f32],
        constants: Constants,
    ) {
        let Constants { beta_1, beta_2, rate, root_scale, epsilon, gradient_scale } = constants;
        let moments = first.iter_mut().zip(second.iter_mut());
        for ((parameter, &g), (first, second)) in parameter.iter_mut().zip(gradient).zip(moments) {
            let g = g * gradient_scale;
            *first = beta_1 * *first + (1.0 - beta_1) * g;
            *second = beta_2 * *second + (1.0 - beta_2) * g * g;
            *parameter -= rate * *first / (second.sqrt() * root_scale + epsilon);
        }
    }
}
