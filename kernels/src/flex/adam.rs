//! Adam in one pass over memory.

use rayon::prelude::*;

use super::simd::{add_scaled, dot, multiversion};
use super::{Float, floats, packed};
use crate::ops::{AdamConfig, dims};
use crate::plain_training::bias_corrections;

/// Elements of a task, at least.
const TASK: usize = 1 << 15;

/// Works in place on tensors that nobody else holds; copies the others once. Of a row that is skipped,
/// nothing but the gradient is read.
pub(super) fn step(
    parameter: Float,
    gradient: Float,
    first: Float,
    second: Float,
    step: usize,
    config: &AdamConfig,
) -> (Float, Float, Float) {
    let width = dims::<2>(&parameter)[1].max(1);
    let (mut parameter, gradient) = (packed(parameter), packed(gradient));
    let (mut first, mut second) = (packed(first), packed(second));
    let constants = Constants::new(config, step);
    let task = task_of_rows(width);
    let by_row = config.skips_idle_rows || config.unit_rows;
    parameter
        .storage_mut::<f32>()
        .par_chunks_mut(task)
        .zip(floats(&gradient).par_chunks(task))
        .zip(first.storage_mut::<f32>().par_chunks_mut(task))
        .zip(second.storage_mut::<f32>().par_chunks_mut(task))
        .for_each(|(((parameter, gradient), first), second)| {
            if !by_row {
                return step_slice(parameter, gradient, first, second, constants);
            }
            let rows = parameter.chunks_mut(width).zip(gradient.chunks(width));
            let moments = first.chunks_mut(width).zip(second.chunks_mut(width));
            for ((parameter, gradient), (first, second)) in rows.zip(moments) {
                if config.skips_idle_rows && is_zero(gradient) {
                    continue;
                }
                step_slice(parameter, gradient, first, second, constants);
                if config.unit_rows {
                    bring_to_norm_1(parameter);
                }
            }
        });
    (parameter, first, second)
}

/// Takes what lies along the rows out of a gradient, in place where nobody else holds it.
pub(super) fn project_rows(gradient: Float, rows: Float) -> Float {
    let width = dims::<2>(&rows)[1].max(1);
    let (mut gradient, rows) = (packed(gradient), packed(rows));
    let task = task_of_rows(width);
    gradient
        .storage_mut::<f32>()
        .par_chunks_mut(task)
        .zip(floats(&rows).par_chunks(task))
        .for_each(|(gradient, rows)| {
            for (gradient, row) in gradient.chunks_mut(width).zip(rows.chunks(width)) {
                project(gradient, row);
            }
        });
    gradient
}

/// Elements of as many whole rows as make a task.
fn task_of_rows(width: usize) -> usize {
    TASK.div_ceil(width) * width
}

#[derive(Clone, Copy)]
struct Constants {
    beta_1: f32,
    beta_2: f32,
    rate: f32,
    root_scale: f32,
    epsilon: f32,
    gradient_scale: f32,
}

impl Constants {
    fn new(config: &AdamConfig, step: usize) -> Self {
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
    fn step_slice(
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

multiversion! {
    /// Whether a row is zero everywhere. Most rows say no at their beginning.
    fn is_zero(row: &[f32]) -> bool {
        row.chunks(64).all(|part| {
            let bits = part.iter().fold(0, |bits, x| bits | x.to_bits());
            bits << 1 == 0
        })
    }
}

multiversion! {
    /// A row of zeros has no direction, and stays.
    fn bring_to_norm_1(row: &mut [f32]) {
        let norm = dot(row, row).sqrt();
        if norm > 0.0 {
            row.iter_mut().for_each(|x| *x /= norm);
        }
    }
}

multiversion! {
    fn project(gradient: &mut [f32], row: &[f32]) {
        let squares = dot(row, row);
        if squares > 0.0 {
            let along = dot(gradient, row) / squares;
            add_scaled(gradient, -along, row);
        }
    }
}
