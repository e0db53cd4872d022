//! Non-linearities, element by element.

use rayon::prelude::*;

use super::simd::{erf, exp, multiversion, tanh};
use super::{Float, floats, new_floats, packed};
use crate::ops::{Nonlinearity, dims};

/// Elements a task handles.
const TASK: usize = 1 << 14;

pub(super) fn nonlinear(x: Float, nonlinearity: Nonlinearity) -> Float {
    let shape: [usize; 2] = dims(&x);
    let x = packed(x);
    let mut out = floats(&x).to_vec();
    out.par_chunks_mut(TASK).for_each(|out| apply(out, nonlinearity));
    new_floats(out, shape)
}

pub(super) fn gated(gate: Float, up: Float, nonlinearity: Nonlinearity) -> Float {
    let shape @ [n, m]: [usize; 2] = dims(&gate);
    let (gate, up) = (packed(gate), packed(up));
    let mut out = vec![0f32; n * m];
    out.par_chunks_mut(TASK)
        .zip(floats(&gate).par_chunks(TASK).zip(floats(&up).par_chunks(TASK)))
        .for_each(|(out, (gate, up))| {
            if nonlinearity == Nonlinearity::Silu {
                return silu_mul(out, gate, up);
            }
            out.copy_from_slice(gate);
            apply(out, nonlinearity);
            mul(out, up);
        });
    new_floats(out, shape)
}

pub(super) fn slope(x: Float, nonlinearity: Nonlinearity) -> Float {
    let shape: [usize; 2] = dims(&x);
    let x = packed(x);
    let mut out = floats(&x).to_vec();
    out.par_chunks_mut(TASK).for_each(|out| apply_slope(out, nonlinearity));
    new_floats(out, shape)
}

pub(super) fn gated_backward(
    gate: Float,
    up: Float,
    nonlinearity: Nonlinearity,
    grad: Float,
) -> (Float, Float) {
    let shape: [usize; 2] = dims(&gate);
    let [gate, up, grad] = [gate, up, grad].map(packed);
    let (gate, up, grad) = (floats(&gate), floats(&up), floats(&grad));
    let (mut of_gate, mut of_up) = (gate.to_vec(), gate.to_vec());
    of_gate
        .par_chunks_mut(TASK)
        .zip(of_up.par_chunks_mut(TASK))
        .zip(up.par_chunks(TASK).zip(grad.par_chunks(TASK)))
        .for_each(|((of_gate, of_up), (up, grad))| {
            apply_slope(of_gate, nonlinearity);
            mul(of_gate, up);
            mul(of_gate, grad);
            apply(of_up, nonlinearity);
            mul(of_up, grad);
        });
    (new_floats(of_gate, shape), new_floats(of_up, shape))
}

fn apply_slope(x: &mut [f32], nonlinearity: Nonlinearity) {
    match nonlinearity {
        Nonlinearity::Silu => silu_slope(x),
        Nonlinearity::Gelu => gelu_slope(x),
        Nonlinearity::GeluTanh => gelu_tanh_slope(x),
        Nonlinearity::Relu => x.iter_mut().for_each(|x| *x = f32::from(*x > 0.0)),
    }
}

fn apply(x: &mut [f32], nonlinearity: Nonlinearity) {
    match nonlinearity {
        Nonlinearity::Silu => silu(x),
        Nonlinearity::Gelu => gelu(x),
        Nonlinearity::GeluTanh => gelu_tanh(x),
        Nonlinearity::Relu => x.iter_mut().for_each(|x| *x = if *x < 0.0 { 0.0 } else { *x }),
    }
}

multiversion! {
    fn silu_mul(out: &mut [f32], gate: &[f32], up: &[f32]) {
        for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
            *out = gate / (1.0 + exp(-gate)) * up;
        }
    }
}

multiversion! {
    fn mul(out: &mut [f32], up: &[f32]) {
        for (out, &up) in out.iter_mut().zip(up) {
            *out *= up;
        }
    }
}

multiversion! {
    fn silu(x: &mut [f32]) {
        for x in x {
            *x /= 1.0 + exp(-*x);
        }
    }
}

multiversion! {
    fn gelu(x: &mut [f32]) {
        for x in x {
            *x *= 0.5 * (1.0 + erf(*x * std::f32::consts::FRAC_1_SQRT_2));
        }
    }
}

multiversion! {
    fn gelu_tanh(x: &mut [f32]) {
        // √(2/π).
        const ROOT: f32 = 0.797_884_6;
        for x in x {
            *x *= 0.5 * (1.0 + tanh(ROOT * (*x + 0.044_715 * *x * *x * *x)));
        }
    }
}

multiversion! {
    fn silu_slope(x: &mut [f32]) {
        for x in x {
            let s = 1.0 / (1.0 + exp(-*x));
            *x = s * (1.0 + *x * (1.0 - s));
        }
    }
}

multiversion! {
    fn gelu_slope(x: &mut [f32]) {
        // 1/√(2π).
        const PEAK: f32 = 0.398_942_3;
        for x in x {
            let below = 0.5 * (1.0 + erf(*x * std::f32::consts::FRAC_1_SQRT_2));
            *x = below + *x * PEAK * exp(-0.5 * *x * *x);
        }
    }
}

multiversion! {
    fn gelu_tanh_slope(x: &mut [f32]) {
        const ROOT: f32 = 0.797_884_6;
        for x in x {
            let square = *x * *x;
            let t = tanh(ROOT * *x * (1.0 + 0.044_715 * square));
            let steep = 0.5 * ROOT * (1.0 + 3.0 * 0.044_715 * square);
            *x = 0.5 * (1.0 + t) + *x * (1.0 - t * t) * steep;
        }
    }
}
