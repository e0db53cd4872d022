//! Adam in one pass: a cube takes a row, moves it, and brings it to norm 1 if asked to.

use burn::backend::TensorMetadata;
use cubecl::CubeDim;
use cubecl::prelude::*;

use super::sparse::sum_of_cube;
use super::{Float, cubes, packed};
use crate::ops::AdamConfig;
use crate::plain_training::bias_corrections;

/// Units that share a row.
const UNITS: u32 = 128;

pub(super) fn step(
    parameter: Float,
    gradient: Float,
    moments: [Float; 2],
    step: usize,
    config: &AdamConfig,
) -> (Float, Float, Float) {
    // In place, unless somebody else holds it.
    let own = |tensor: Float| {
        let tensor = packed(tensor);
        if tensor.can_mut() { tensor } else { tensor.copy() }
    };
    let (parameter, gradient) = (own(parameter), packed(gradient));
    let [first, second] = moments.map(own);
    let [n, m]: [usize; 2] = parameter.shape().dims();
    let (correction_1, correction_2) = bias_corrections(config, step);
    let client = parameter.client.clone();
    adam_kernel::launch(
        &client,
        cubes(n),
        CubeDim::new_1d(UNITS),
        gradient.into_buffer_arg(),
        parameter.clone().into_buffer_arg(),
        first.clone().into_buffer_arg(),
        second.clone().into_buffer_arg(),
        n,
        m,
        config.beta_1 as f32,
        config.beta_2 as f32,
        (config.learning_rate / correction_1) as f32,
        (1.0 / correction_2) as f32,
        config.epsilon as f32,
        config.gradient_scale as f32,
        config.skips_idle_rows,
        config.unit_rows,
    );
    (parameter, first, second)
}

#[cube(launch)]
fn adam_kernel(
    gradient: &[f32],
    parameter: &mut [f32],
    first: &mut [f32],
    second: &mut [f32],
    n: usize,
    m: usize,
    beta_1: f32,
    beta_2: f32,
    learning_rate: f32,
    correction_2: f32,
    epsilon: f32,
    gradient_scale: f32,
    #[comptime] skips_idle_rows: bool,
    #[comptime] unit_rows: bool,
) {
    let row = CUBE_POS;
    if row >= n {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let units = UNITS as usize;
    let end = (row + 1) * m;
    let mut n_moving = 1f32;
    if skips_idle_rows {
        let mut moving = 0f32;
        let mut at = row * m + unit;
        while at < end {
            if gradient[at] != 0f32 {
                moving = 1f32;
            }
            at += units;
        }
        n_moving = sum_of_cube(moving, UNITS);
        sync_cube();
    }
    if n_moving > 0f32 {
        let mut squares = 0f32;
        let mut at = row * m + unit;
        while at < end {
            let slope = gradient[at] * gradient_scale;
            let mean = beta_1 * first[at] + (1f32 - beta_1) * slope;
            let square = beta_2 * second[at] + (1f32 - beta_2) * slope * slope;
            let root = f32::sqrt(square * correction_2);
            let moved = parameter[at] - learning_rate * mean / (root + epsilon);
            first[at] = mean;
            second[at] = square;
            parameter[at] = moved;
            squares += moved * moved;
            at += units;
        }
        if unit_rows {
            let norm = f32::sqrt(sum_of_cube(squares, UNITS));
            if norm > 0f32 {
                let mut at = row * m + unit;
                while at < end {
                    let moved = parameter[at];
                    parameter[at] = moved / norm;
                    at += units;
                }
            }
        }
    }
}
