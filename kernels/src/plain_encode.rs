//! The plain default of the encoder: all pre-activations, then a selection.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{TensorMetadata, get_or_init_device_settings};
use burn::tensor::{IndexingUpdateOp, Shape, TensorData};

use crate::ops::{KernelOps, Select, cast_like, dims};

pub(crate) fn plain_encode<B: KernelOps>(
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    bias: FloatTensor<B>,
    by: FloatTensor<B>,
    select: Select,
) -> (FloatTensor<B>, IntTensor<B>) {
    let m = bias.shape()[0];
    let row = |t| B::float_reshape(t, Shape::new([1, m]));
    let w = cast_like::<B>(w, &x);
    let pre = B::float_add(B::float_matmul(x, w), row(bias));
    let by = row(by);
    match select {
        Select::TopK(k) => {
            let (_, indices) = B::top_k(B::float_mul(pre.clone(), by), k);
            (rectified::<B>(B::float_gather(1, pre, indices.clone())), indices)
        }
        Select::TopKSigned(k) => {
            let (_, indices) = B::top_k(B::float_mul(pre.clone(), by), k);
            (B::float_gather(1, pre, indices.clone()), indices)
        }
        Select::GroupMax(k) => {
            let [n, m] = dims(&pre);
            let groups = B::float_reshape(pre.clone(), Shape::new([n * k, m / k]));
            let (_, within) = B::top_k(groups, 1);
            let firsts: Vec<i32> = (0..k).map(|group| (group * (m / k)) as i32).collect();
            let firsts = B::int_from_data(TensorData::new(firsts, [1, k]), &pre.device());
            let firsts = B::int_cast(firsts, within.dtype().into());
            let indices = B::int_add(B::int_reshape(within, Shape::new([n, k])), firsts);
            (rectified::<B>(B::float_gather(1, pre, indices.clone())), indices)
        }
        Select::TopKMagnitude(k) => {
            let (_, indices) = B::top_k(B::float_abs(B::float_mul(pre.clone(), by)), k);
            (B::float_gather(1, pre, indices.clone()), indices)
        }
        Select::BatchTopK(n_kept) => {
            let ranked = B::relu(B::float_mul(pre.clone(), by));
            let [n, m] = dims(&ranked);
            let flat = B::float_reshape(ranked, Shape::new([1, n * m]));
            let (largest, indices) = B::top_k(flat.clone(), n_kept);
            let zeros = B::float_zeros(flat.shape(), &flat.device(), flat.dtype().into());
            let is_kept =
                B::float_scatter(1, zeros, indices, sign::<B>(largest), IndexingUpdateOp::Add);
            kept::<B>(pre, B::float_reshape(is_kept, Shape::new([n, m])))
        }
        Select::Above => {
            let is_kept = sign::<B>(B::relu(B::float_sub(pre.clone(), B::relu(by))));
            kept::<B>(pre, is_kept)
        }
    }
}

/// What is above zero, and zero for everything else: for NaN too, which a backend's own ReLU may keep.
fn rectified<B: KernelOps>(x: FloatTensor<B>) -> FloatTensor<B> {
    let bools = get_or_init_device_settings::<B>(&x.device()).bool_dtype;
    let is_above = B::float_greater_elem(x.clone(), 0.0.into(), bools);
    B::float_mask_fill(x, B::bool_not(is_above), 0.0.into())
}

/// 1 above zero, 0 elsewhere.
fn sign<B: KernelOps>(x: FloatTensor<B>) -> FloatTensor<B> {
    let bools = get_or_init_device_settings::<B>(&x.device()).bool_dtype;
    let float = x.dtype().into();
    B::bool_into_float(B::float_greater_elem(x, 0.0.into(), bools), float)
}

/// The entries of `pre` where `is_kept` is 1, and as many zeros as fill up the rows.
fn kept<B: KernelOps>(
    pre: FloatTensor<B>,
    is_kept: FloatTensor<B>,
) -> (FloatTensor<B>, IntTensor<B>) {
    let counts = B::float_max(B::float_sum_dim(is_kept.clone(), 1));
    let data = burn::tensor::read_sync(B::float_into_data(counts)).expect("a number");
    let k = data.iter::<f32>().next().expect("one number") as usize;
    let bools = get_or_init_device_settings::<B>(&pre.device()).bool_dtype;
    let is_left_out = B::float_equal_elem(is_kept.clone(), 0.0.into(), bools);
    let (_, indices) = B::top_k(is_kept, k.max(1));
    // Not a product: what is not kept may be NaN.
    let kept = B::float_mask_fill(pre, is_left_out, 0.0.into());
    (B::float_gather(1, kept, indices.clone()), indices)
}
