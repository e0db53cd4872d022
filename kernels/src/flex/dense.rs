//! Dense products with few rows, which a blocked matrix product spends its time packing for.

use burn::backend::Flex;
use burn::backend::ops::FloatTensorOps;
use rayon::prelude::*;

use super::simd::{dot, multiversion};
use super::{Float, floats, new_floats, packed};
use crate::ops::dims;

/// From so many rows of `x` on, the blocked product is the faster one.
const BLOCKED_FROM: usize = 16;
/// Rows of the matrix that a task takes.
const TASK_ROWS: usize = 512;
/// Rows of the matrix that meet all of `x` before the next ones are read.
const NEAR_ROWS: usize = 8;

/// Streams the matrix once, in order.
pub(super) fn dot_rows(x: Float, rows: Float) -> Float {
    let ([n, d], [m, _]) = (dims::<2>(&x), dims::<2>(&rows));
    if n >= BLOCKED_FROM {
        return Flex::float_matmul(x, Flex::float_transpose(rows));
    }
    let (x, rows) = (packed(x), packed(rows));
    let (x, rows) = (floats(&x), floats(&rows));
    // Each task fills its columns for all rows of `x`; they interleave in the result.
    let parts: Vec<Vec<f32>> = rows
        .par_chunks(TASK_ROWS * d)
        .map(|rows| {
            let mut part = vec![0f32; n * (rows.len() / d)];
            fill(&mut part, x, rows, d);
            part
        })
        .collect();
    let mut out = vec![0f32; n * m];
    out.par_chunks_mut(m).enumerate().for_each(|(row, out)| {
        for (part, out) in parts.iter().zip(out.chunks_mut(TASK_ROWS)) {
            out.copy_from_slice(&part[row * out.len()..][..out.len()]);
        }
    });
    new_floats(out, [n, m])
}

multiversion! {
    fn fill(out: &mut [f32], x: &[f32], rows: &[f32], d: usize) {
        let m = rows.len() / d;
        // A few rows at a time stay in the nearest cache while all of `x` passes by.
        for start in (0..m).step_by(NEAR_ROWS) {
            let end = (start + NEAR_ROWS).min(m);
            for (out, x) in out.chunks_exact_mut(m).zip(x.chunks_exact(d)) {
                for column in start..end {
                    out[column] = dot(x, &rows[column * d..][..d]);
                }
            }
        }
    }
}
