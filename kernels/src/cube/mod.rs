//! wgpu and CUDA, by CubeCL: kernels for what training a sparse autoencoder does most, and the plain
//! defaults for the rest.
//!
//! Kernels are launched with bounds checks; an index past the rows, which would panic on CPU, counts
//! for nothing here, as nothing is read back to look.

mod adam;
mod by_latent;
mod sparse;
mod top_k;

#[cfg(feature = "fusion")]
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::ops::IntTensorOps;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, IntDType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::{CubeCount, ElemType};

use crate::ops::{AdamConfig, KernelOps, Select};
use crate::plain_encode::plain_encode;
use crate::plain_top_k::plain_top_k;
use crate::plain_training::plain_adam_step;

type Float = FloatTensor<CubeBackend>;
type Int = IntTensor<CubeBackend>;

impl KernelOps for CubeBackend {
    fn top_k(x: Float, k: usize) -> (Float, Int) {
        match top_k::fits(k) && is_f32(&[&x]) {
            true => top_k::top_k(x, k),
            false => with_indices(plain_top_k::<Self>(x, k)),
        }
    }

    fn encode_top_k(
        x: Float,
        w: Float,
        bias: Float,
        by: Float,
        select: Select,
        k: usize,
    ) -> (Float, Int) {
        match top_k::fits(k) && is_f32(&[&x, &bias, &by]) {
            true => top_k::encode(x, w, bias, by, select, k),
            false => with_indices(plain_encode::<Self>(x, w, bias, by, select)),
        }
    }

    fn sparse_decode(indices: Int, values: Float, rows: Float) -> Float {
        sparse::decode(indices, values, rows)
    }

    fn sparse_dot(indices: Int, rows: Float, x: Float) -> Float {
        sparse::dot(indices, rows, x)
    }

    fn sparse_decode_grad_rows(indices: Int, values: Float, grad: Float, m: usize) -> Float {
        by_latent::grad_rows(indices, values, grad, m)
    }

    fn sparse_sum(indices: Int, values: Float, m: usize) -> Float {
        by_latent::sum(indices, values, m)
    }

    fn adam_step(
        parameter: Float,
        gradient: Float,
        first: Float,
        second: Float,
        step: usize,
        config: AdamConfig,
    ) -> (Float, Float, Float) {
        match is_f32(&[&parameter, &gradient, &first, &second]) {
            true => adam::step(parameter, gradient, [first, second], step, &config),
            false => plain_adam_step::<Self>(parameter, gradient, [first, second], step, config),
        }
    }
}

fn is_f32(tensors: &[&Float]) -> bool {
    tensors.iter().all(|tensor| tensor.dtype == DType::F32)
}

/// What kernels index by themselves: row-major, without gaps.
fn packed(tensor: CubeTensor) -> CubeTensor {
    into_contiguous(tensor)
}

/// A tensor beside another, to be written.
fn empty_beside<const D: usize>(
    beside: &CubeTensor,
    shape: [usize; D],
    dtype: DType,
) -> CubeTensor {
    let n_bytes = shape.iter().product::<usize>() * dtype.size();
    let buffer = beside.client.empty(n_bytes);
    let (client, device) = (beside.client.clone(), beside.device.clone());
    CubeTensor::new_contiguous(client, device, Shape::new(shape), buffer, dtype)
}

/// The type that indices have, whatever other integers are: fusion has to know before it runs them.
const INDEX: DType = DType::I32;

fn with_indices((values, indices): (Float, Int)) -> (Float, Int) {
    (values, CubeBackend::int_cast(indices, IntDType::I32))
}

/// The `k` entries of each row of `x`, before they are there.
#[cfg(feature = "fusion")]
pub(crate) fn entries(x: &TensorSpec, k: usize) -> (TensorSpec, TensorSpec) {
    let shape = Shape::new([x.shape[0], k]);
    (TensorSpec::new(shape.clone(), x.dtype), TensorSpec::new(shape, INDEX))
}

fn element(tensor: &CubeTensor) -> ElemType {
    burn::backend::cubecl::dtype_to_storage_type(tensor.dtype)
}

/// So many cubes or a few more, whichever way they are counted: each asks whether it is one of them.
fn cubes(n: usize) -> CubeCount {
    const MOST: usize = 32_768;
    CubeCount::Static(n.clamp(1, MOST) as u32, n.div_ceil(MOST).max(1) as u32, 1)
}
