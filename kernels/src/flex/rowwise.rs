//! Operations that read and write each row once.

use rayon::prelude::*;

use super::simd::{dot, exp, multiversion};
use super::{Float, floats, new_floats, packed};
use crate::ops::dims;

/// Elements a task handles at least, so that small tensors are not cut into crumbs.
const TASK: usize = 1 << 14;

pub(super) fn rms_norm(x: Float, gain: Float, epsilon: f64) -> Float {
    let [n, d] = dims(&x);
    let (x, gain) = (packed(x), packed(gain));
    let (x, gain) = (floats(&x), floats(&gain));
    let mut out = vec![0f32; n * d];
    out.par_chunks_mut(d)
        .zip(x.par_chunks(d))
        .with_min_len(TASK.div_ceil(d))
        .for_each(|(out, x)| norm_row(out, x, gain, epsilon));
    new_floats(out, [n, d])
}

pub(super) fn silu_mul(gate: Float, up: Float) -> Float {
    let [n, m]: [usize; 2] = dims(&gate);
    let (gate, up) = (packed(gate), packed(up));
    let mut out = vec![0f32; n * m];
    out.par_chunks_mut(TASK)
        .zip(floats(&gate).par_chunks(TASK).zip(floats(&up).par_chunks(TASK)))
        .for_each(|(out, (gate, up))| silu_mul_slice(out, gate, up));
    new_floats(out, [n, m])
}

pub(super) fn rotary(x: Float, cos: Float, sin: Float) -> Float {
    let shape @ [_, _, n_heads, d_head]: [usize; 4] = dims(&x);
    let (x, cos, sin) = (packed(x), packed(cos), packed(sin));
    let (x, half, width) = (floats(&x), d_head / 2, n_heads * d_head);
    let mut out = vec![0f32; x.len()];
    out.par_chunks_mut(width)
        .zip(x.par_chunks(width))
        .zip(floats(&cos).par_chunks(half).zip(floats(&sin).par_chunks(half)))
        .with_min_len(TASK.div_ceil(width))
        .for_each(|((out, x), (cos, sin))| rotate_heads(out, x, cos, sin));
    new_floats(out, shape)
}

multiversion! {
    fn norm_row(out: &mut [f32], x: &[f32], gain: &[f32], epsilon: f64) {
        let mean = f64::from(dot(x, x)) / x.len() as f64;
        let scale = (1.0 / (mean + epsilon).sqrt()) as f32;
        for ((out, &x), &gain) in out.iter_mut().zip(x).zip(gain) {
            *out = x * scale * gain;
        }
    }
}

multiversion! {
    fn silu_mul_slice(out: &mut [f32], gate: &[f32], up: &[f32]) {
        for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
            *out = gate / (1.0 + exp(-gate)) * up;
        }
    }
}

multiversion! {
    fn rotate_heads(out: &mut [f32], x: &[f32], cos: &[f32], sin: &[f32]) {
        let half = cos.len();
        for (out, x) in out.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)) {
            let ((out_a, out_b), (a, b)) = (out.split_at_mut(half), x.split_at(half));
            for i in 0..half {
                out_a[i] = a[i] * cos[i] - b[i] * sin[i];
                out_b[i] = b[i] * cos[i] + a[i] * sin[i];
            }
        }
    }
}
