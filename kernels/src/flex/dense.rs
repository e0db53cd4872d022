//! Products of a few rows with fixed weights, which a blocked matrix product spends its time packing
//! for: here the weights are read once, in the order they lie in.

use burn::backend::Flex;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::bf16;
use rayon::prelude::*;

use super::simd::{add, dot, dot_4, multiversion};
use super::{Float, Weights, floats, new_floats, packed, weights, widened};
use crate::ops::dims;

/// From so many rows of `x` on, the blocked product is the faster one.
const BLOCKED_FROM: usize = 24;
/// The same where the matrix lies transposed.
const ROWS_BLOCKED_FROM: usize = 12;
/// Rows of a transposed matrix that a task takes.
const TASK_ROWS: usize = 512;
/// Rows of the weights that meet a row of `x` together.
const TOGETHER: usize = 8;
/// Parts that the inputs of a linear layer are cut into.
const N_PARTS: usize = 4;
/// Outputs of which a task adds up the parts.
const SUM_COLUMNS: usize = 1 << 12;

/// Weights of either precision.
trait Weight: Copy + Sync {
    fn wide(self) -> f32;

    /// A row in f32: itself, or `scratch`.
    fn wide_row<'a>(row: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32];
}

impl Weight for f32 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }

    #[inline(always)]
    fn wide_row<'a>(row: &'a [Self], _scratch: &'a mut [f32]) -> &'a [f32] {
        row
    }
}

impl Weight for bf16 {
    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn wide_row<'a>(row: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        for (wide, weight) in scratch.iter_mut().zip(row) {
            *wide = weight.wide();
        }
        scratch
    }
}

/// `x · w`.
pub(super) fn linear(x: Float, w: Float) -> Float {
    let ([n, d_in], [_, d_out]) = (dims::<2>(&x), dims::<2>(&w));
    if n >= BLOCKED_FROM {
        return Flex::float_matmul(x, widened(w));
    }
    let (x, w) = (packed(x), packed(w));
    let out = match weights(&w) {
        Weights::F32(w) => by_inputs(floats(&x), w, [n, d_in, d_out], fill_inputs),
        Weights::Bf16(w) => by_inputs(floats(&x), w, [n, d_in, d_out], fill_inputs_bf16),
    };
    new_floats(out, [n, d_out])
}

/// `x · rowsᵀ`.
pub(super) fn dot_rows(x: Float, rows: Float) -> Float {
    let ([n, d], [m, _]) = (dims::<2>(&x), dims::<2>(&rows));
    if n >= ROWS_BLOCKED_FROM {
        return Flex::float_matmul(x, Flex::float_transpose(widened(rows)));
    }
    let (x, rows) = (packed(x), packed(rows));
    let out = match weights(&rows) {
        Weights::F32(rows) => by_rows(floats(&x), rows, [n, d, m], fill_rows),
        Weights::Bf16(rows) => by_rows(floats(&x), rows, [n, d, m], fill_rows_bf16),
    };
    new_floats(out, [n, m])
}

/// Fills a part of a result out of `x` and weights.
type Fill<W, Dims> = fn(&mut [f32], &[f32], &[W], Dims);

/// Each task has some consecutive rows of the weights, and a sum of its own.
fn by_inputs<W: Weight>(
    x: &[f32],
    w: &[W],
    [n, d_in, d_out]: [usize; 3],
    fill: Fill<W, [usize; 3]>,
) -> Vec<f32> {
    // The same cut whatever the number of threads, so that the sum is.
    let rows = d_in.div_ceil(N_PARTS);
    let parts: Vec<Vec<f32>> = w
        .par_chunks(rows * d_out)
        .enumerate()
        .map(|(part, w)| {
            let mut out = vec![0f32; n * d_out];
            fill(&mut out, x, w, [d_in, d_out, part * rows]);
            out
        })
        .collect();
    let mut parts = parts.into_iter();
    let mut out = parts.next().unwrap_or_default();
    let parts: Vec<Vec<f32>> = parts.collect();
    out.par_chunks_mut(SUM_COLUMNS).enumerate().for_each(|(chunk, out)| {
        for part in &parts {
            add(out, &part[chunk * SUM_COLUMNS..][..out.len()]);
        }
    });
    out
}

/// Each task has some rows of the matrix, which are columns of the result.
fn by_rows<W: Weight>(
    x: &[f32],
    rows: &[W],
    [n, d, m]: [usize; 3],
    fill: Fill<W, usize>,
) -> Vec<f32> {
    let parts: Vec<Vec<f32>> = rows
        .par_chunks(TASK_ROWS * d)
        .map(|rows| {
            let mut part = vec![0f32; n * (rows.len() / d)];
            fill(&mut part, x, rows, d);
            part
        })
        .collect();
    interleaved(&parts, n, m, TASK_ROWS)
}

fn interleaved(parts: &[Vec<f32>], n: usize, m: usize, width: usize) -> Vec<f32> {
    let mut out = vec![0f32; n * m];
    for (row, out) in out.chunks_exact_mut(m).enumerate() {
        for (part, out) in parts.iter().zip(out.chunks_mut(width)) {
            out.copy_from_slice(&part[row * out.len()..][..out.len()]);
        }
    }
    out
}

/// Adds what the inputs from `first` on give, some rows of the weights at a time, so that the
/// outputs are loaded and stored that much less often.
#[inline(always)]
fn some_inputs<W: Weight>(out: &mut [f32], x: &[f32], w: &[W], [d_in, d_out, first]: [usize; 3]) {
    let blocks = w.chunks_exact(TOGETHER * d_out);
    let rest = blocks.remainder();
    let mut i = first;
    for w in blocks {
        let rows: [&[W]; TOGETHER] = std::array::from_fn(|row| &w[row * d_out..][..d_out]);
        for (out, x) in out.chunks_exact_mut(d_out).zip(x.chunks_exact(d_in)) {
            let x: [f32; TOGETHER] = std::array::from_fn(|row| x[i + row]);
            for column in 0..d_out {
                let mut sum = out[column];
                for row in 0..TOGETHER {
                    sum = x[row].mul_add(rows[row][column].wide(), sum);
                }
                out[column] = sum;
            }
        }
        i += TOGETHER;
    }
    for w in rest.chunks_exact(d_out) {
        for (out, x) in out.chunks_exact_mut(d_out).zip(x.chunks_exact(d_in)) {
            for (out, w) in out.iter_mut().zip(w) {
                *out = x[i].mul_add(w.wide(), *out);
            }
        }
        i += 1;
    }
}

/// Every row of the matrix meets all of `x`, four rows of it at a time.
#[inline(always)]
fn some_rows<W: Weight>(out: &mut [f32], x: &[f32], rows: &[W], d: usize) {
    let m = rows.len() / d;
    let mut scratch = vec![0f32; d];
    for (column, row) in rows.chunks_exact(d).enumerate() {
        let row = W::wide_row(row, &mut scratch);
        let fours = x.chunks_exact(4 * d);
        let n_fours = fours.len();
        for (four, x) in fours.enumerate() {
            let dots = dot_4(std::array::from_fn(|i| &x[i * d..][..d]), row);
            for (i, dot) in dots.into_iter().enumerate() {
                out[(4 * four + i) * m + column] = dot;
            }
        }
        for (i, x) in x.chunks_exact(d).enumerate().skip(4 * n_fours) {
            out[i * m + column] = dot(x, row);
        }
    }
}

multiversion! {
    fn fill_inputs(out: &mut [f32], x: &[f32], w: &[f32], dims: [usize; 3]) {
        some_inputs(out, x, w, dims);
    }
}

multiversion! {
    fn fill_inputs_bf16(out: &mut [f32], x: &[f32], w: &[bf16], dims: [usize; 3]) {
        some_inputs(out, x, w, dims);
    }
}

multiversion! {
    fn fill_rows(out: &mut [f32], x: &[f32], rows: &[f32], d: usize) {
        some_rows(out, x, rows, d);
    }
}

multiversion! {
    fn fill_rows_bf16(out: &mut [f32], x: &[f32], rows: &[bf16], d: usize) {
        some_rows(out, x, rows, d);
    }
}
