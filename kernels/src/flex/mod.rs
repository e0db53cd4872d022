//! Hand-written CPU kernels for Burn's `flex` backend: rayon over rows, SIMD by run-time detection.

mod adam;
mod attention;
mod attention_backward;
mod crowded;
mod dense;
mod encode;
mod encode_with;
mod nonlinear;
#[cfg(target_arch = "x86_64")]
mod proposal;
#[cfg(target_arch = "x86_64")]
mod quantized;
#[cfg(target_arch = "x86_64")]
mod rescore;
mod residual_fit;
mod rowwise;
mod simd;
mod sparse;
mod top_k;

use burn::backend::Flex;
use burn::backend::ops::{FloatTensorOps, IntTensorOps};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, FloatDType, IntDType, Slice, TensorData, bf16};
use rayon::prelude::*;

use crate::ops::{
    AdamConfig, AttentionConfig, KernelOps, Nonlinearity, RotaryPairs, Search, Select,
};

type Float = FloatTensor<Flex>;
type Int = IntTensor<Flex>;

impl KernelOps for Flex {
    fn top_k(x: Float, k: usize) -> (Float, Int) {
        top_k::top_k(x, k)
    }

    fn sparse_encode(
        x: Float,
        w: Float,
        bias: Float,
        by: Float,
        select: Select,
        search: Search,
    ) -> (Float, Int) {
        encode::sparse_encode(x, w, bias, by, select, search)
    }

    fn sparse_encode_with(
        x: Float,
        w: Float,
        bias: Float,
        by: Float,
        select: Select,
        among: Int,
    ) -> (Float, Int, Float) {
        encode_with::sparse_encode_with(x, w, bias, by, select, among)
    }

    fn sparse_decode(indices: Int, values: Float, rows: Float) -> Float {
        sparse::decode(indices, values, rows)
    }

    fn sparse_dot(indices: Int, rows: Float, x: Float) -> Float {
        sparse::dot_at(indices, rows, x)
    }

    fn sparse_decode_grad_rows(indices: Int, values: Float, grad: Float, m: usize) -> Float {
        sparse::grad_rows(indices, values, grad, m)
    }

    fn sparse_sum(indices: Int, values: Float, m: usize) -> Float {
        sparse::sum(indices, values, m)
    }

    fn sparse_gather(indices: Int, vector: Float) -> Float {
        sparse::gather(indices, vector)
    }

    fn linear(x: Float, w: Float) -> Float {
        dense::linear(x, w)
    }

    fn dot_rows(x: Float, rows: Float) -> Float {
        dense::dot_rows(x, rows)
    }

    fn rms_norm(x: Float, gain: Float, epsilon: f64) -> Float {
        rowwise::rms_norm(x, gain, epsilon)
    }

    fn layer_norm(x: Float, gain: Float, bias: Float, epsilon: f64) -> Float {
        rowwise::layer_norm(x, gain, bias, epsilon)
    }

    fn nonlinear(x: Float, nonlinearity: Nonlinearity) -> Float {
        nonlinear::nonlinear(x, nonlinearity)
    }

    fn gated(gate: Float, up: Float, nonlinearity: Nonlinearity) -> Float {
        nonlinear::gated(gate, up, nonlinearity)
    }

    fn rotary(x: Float, cos: Float, sin: Float, pairs: RotaryPairs) -> Float {
        rowwise::rotary(x, cos, sin, pairs)
    }

    fn attention(
        q: Float,
        prefix_k: Float,
        prefix_v: Float,
        k: Float,
        v: Float,
        first_column: Int,
        config: AttentionConfig,
    ) -> Float {
        attention::attention(q, (prefix_k, prefix_v), (k, v), first_column, &config)
    }

    fn nonlinear_slope(x: Float, nonlinearity: Nonlinearity) -> Float {
        nonlinear::slope(x, nonlinearity)
    }

    fn gated_backward(
        gate: Float,
        up: Float,
        nonlinearity: Nonlinearity,
        grad: Float,
    ) -> (Float, Float) {
        nonlinear::gated_backward(gate, up, nonlinearity, grad)
    }

    fn rms_norm_backward(x: Float, gain: Float, epsilon: f64, grad: Float) -> Float {
        rowwise::rms_norm_backward(x, gain, epsilon, grad)
    }

    fn attention_backward(
        q: Float,
        k: Float,
        v: Float,
        first_column: Int,
        config: AttentionConfig,
        grad: Float,
    ) -> (Float, Float, Float) {
        attention_backward::attention_backward(q, k, v, first_column, &config, grad)
    }

    fn adam_step(
        parameter: Float,
        gradient: Float,
        first: Float,
        second: Float,
        step: usize,
        config: AdamConfig,
    ) -> (Float, Float, Float) {
        adam::step(parameter, gradient, first, second, step, &config)
    }

    fn project_rows(gradient: Float, rows: Float) -> Float {
        adam::project_rows(gradient, rows)
    }

    fn fit_residual(
        x: Float,
        products: Float,
        bias: Float,
        by: Float,
        rows: Float,
        residual: Float,
        select: Select,
    ) -> (Float, Float, Float, Float) {
        residual_fit::fit(x, products, bias, by, rows, residual, select)
    }
}

/// A tensor whose storage is its elements in row-major order and nothing else.
fn packed(tensor: Float) -> Float {
    let n_bytes = tensor.layout().num_elements() * tensor.dtype().size();
    let whole = tensor.is_contiguous()
        && tensor.layout().start_offset() == 0
        && tensor.bytes().len() == n_bytes;
    if whole { tensor } else { tensor.to_contiguous() }
}

/// The rows of a matrix from `start` to `end`.
fn rows_of(x: &Float, start: usize, end: usize) -> Float {
    let rows = [Slice::new(start as isize, Some(end as isize), 1), Slice::full()];
    Flex::float_slice(x.clone(), &rows)
}

/// `out += a · b`.
fn add_product(out: &mut [f32], a: Float, b: Float) {
    const TASK: usize = 1 << 14;
    let product = packed(Flex::float_matmul(a, b));
    let product = floats(&product).par_chunks(TASK);
    out.par_chunks_mut(TASK).zip(product).for_each(|(out, product)| simd::add(out, product));
}

fn floats(tensor: &Float) -> &[f32] {
    assert_eq!(tensor.dtype(), DType::F32, "the CPU kernels work on f32 tensors");
    let slice = tensor.as_slice::<f32>();
    &slice.expect("packed tensors are contiguous")[..tensor.layout().num_elements()]
}

/// Weights in f32, for what has no kernel that reads them as they are kept.
fn widened(w: Float) -> Float {
    match w.dtype() {
        DType::BF16 => Flex::float_cast(w, FloatDType::F32),
        _ => w,
    }
}

/// The storage of a matrix of weights, of either precision.
fn weights(tensor: &Float) -> Weights<'_> {
    let n = tensor.layout().num_elements();
    match tensor.dtype() {
        DType::BF16 => {
            let slice = tensor.as_slice::<bf16>().expect("packed tensors are contiguous");
            Weights::Bf16(&slice[..n])
        }
        _ => Weights::F32(floats(tensor)),
    }
}

/// Weights as they are kept.
#[derive(Clone, Copy)]
enum Weights<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

fn packed_ints(tensor: Int) -> Int {
    match tensor.dtype() {
        DType::I32 => packed(tensor),
        _ => packed(Flex::int_cast(tensor, IntDType::I32)),
    }
}

fn ints(tensor: &Int) -> &[i32] {
    let slice = tensor.as_slice::<i32>();
    &slice.expect("packed integer tensors are contiguous")[..tensor.layout().num_elements()]
}

fn new_floats<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> Float {
    Float::from_data(TensorData::new(values, shape))
}

fn new_ints<const D: usize>(values: Vec<i32>, shape: [usize; D]) -> Int {
    Int::from_data(TensorData::new(values, shape))
}
