//! Operations that read and write each row once.

use rayon::prelude::*;

use super::simd::{dot, multiversion, sum};
use super::{Float, floats, new_floats, packed};
use crate::ops::{RotaryPairs, dims};

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

pub(super) fn rms_norm_backward(x: Float, gain: Float, epsilon: f64, grad: Float) -> Float {
    let [n, d] = dims(&x);
    let [x, gain, grad] = [x, gain, grad].map(packed);
    let (x, gain, grad) = (floats(&x), floats(&gain), floats(&grad));
    let mut out = vec![0f32; n * d];
    out.par_chunks_mut(d)
        .zip(x.par_chunks(d).zip(grad.par_chunks(d)))
        .with_min_len(TASK.div_ceil(d))
        .for_each(|(out, (x, grad))| norm_row_backward(out, x, gain, grad, epsilon));
    new_floats(out, [n, d])
}

pub(super) fn layer_norm(x: Float, gain: Float, bias: Float, epsilon: f64) -> Float {
    let [n, d] = dims(&x);
    let [x, gain, bias] = [x, gain, bias].map(packed);
    let (x, gain, bias) = (floats(&x), floats(&gain), floats(&bias));
    let mut out = vec![0f32; n * d];
    out.par_chunks_mut(d)
        .zip(x.par_chunks(d))
        .with_min_len(TASK.div_ceil(d))
        .for_each(|(out, x)| layer_norm_row(out, x, gain, bias, epsilon));
    new_floats(out, [n, d])
}

pub(super) fn rotary(x: Float, cos: Float, sin: Float, pairs: RotaryPairs) -> Float {
    let shape @ [_, _, n_heads, d_head]: [usize; 4] = dims(&x);
    let [_, _, n_pairs]: [usize; 3] = dims(&cos);
    let (x, cos, sin) = (packed(x), packed(cos), packed(sin));
    let (x, width) = (floats(&x), n_heads * d_head);
    let mut out = vec![0f32; x.len()];
    out.par_chunks_mut(width)
        .zip(x.par_chunks(width))
        .zip(floats(&cos).par_chunks(n_pairs).zip(floats(&sin).par_chunks(n_pairs)))
        .with_min_len(TASK.div_ceil(width))
        .for_each(|((out, x), (cos, sin))| match pairs {
            RotaryPairs::Halves => rotate_halves(out, x, d_head, cos, sin),
            RotaryPairs::Neighbours => rotate_neighbours(out, x, d_head, cos, sin),
        });
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
    fn norm_row_backward(out: &mut [f32], x: &[f32], gain: &[f32], grad: &[f32], epsilon: f64) {
        let d = x.len() as f64;
        let mean = f64::from(dot(x, x)) / d;
        let scale = 1.0 / (mean + epsilon).sqrt();
        for ((out, &grad), &gain) in out.iter_mut().zip(grad).zip(gain) {
            *out = grad * gain;
        }
        let along = (f64::from(dot(out, x)) / d * scale * scale * scale) as f32;
        let scale = scale as f32;
        for (out, &x) in out.iter_mut().zip(x) {
            *out = *out * scale - x * along;
        }
    }
}

multiversion! {
    fn layer_norm_row(out: &mut [f32], x: &[f32], gain: &[f32], bias: &[f32], epsilon: f64) {
        let n = x.len() as f64;
        let mean = (f64::from(sum(x)) / n) as f32;
        for (out, &x) in out.iter_mut().zip(x) {
            *out = x - mean;
        }
        let variance = f64::from(dot(out, out)) / n;
        let scale = (1.0 / (variance + epsilon).sqrt()) as f32;
        for ((out, &gain), &bias) in out.iter_mut().zip(gain).zip(bias) {
            *out = *out * scale * gain + bias;
        }
    }
}

multiversion! {
    fn rotate_halves(out: &mut [f32], x: &[f32], d_head: usize, cos: &[f32], sin: &[f32]) {
        let half = cos.len();
        for (out, x) in out.chunks_exact_mut(d_head).zip(x.chunks_exact(d_head)) {
            let ((out_a, out_b), (a, b)) = (out.split_at_mut(half), x.split_at(half));
            for i in 0..half {
                out_a[i] = a[i] * cos[i] - b[i] * sin[i];
                out_b[i] = b[i] * cos[i] + a[i] * sin[i];
            }
            out_b[half..].copy_from_slice(&b[half..]);
        }
    }
}

multiversion! {
    fn rotate_neighbours(out: &mut [f32], x: &[f32], d_head: usize, cos: &[f32], sin: &[f32]) {
        let turned = 2 * cos.len();
        for (out, x) in out.chunks_exact_mut(d_head).zip(x.chunks_exact(d_head)) {
            let angles = cos.iter().zip(sin);
            let pairs = out.chunks_exact_mut(2).zip(x.chunks_exact(2));
            for ((out, x), (cos, sin)) in pairs.zip(angles) {
                out[0] = x[0] * cos - x[1] * sin;
                out[1] = x[1] * cos + x[0] * sin;
            }
            out[turned..].copy_from_slice(&x[turned..]);
        }
    }
}
