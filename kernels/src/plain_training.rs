//! The plain defaults of what only training needs.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata, get_or_init_device_settings};
use burn::tensor::{IndexingUpdateOp, Shape};

use crate::ops::{AdamConfig, KernelOps, Select, dims};

/// `x · w` at some columns.
pub(crate) fn products_of<B: Backend>(
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    columns: IntTensor<B>,
) -> FloatTensor<B> {
    // Of a matrix that lies transposed, columns are rows in one piece.
    let rows = B::float_select(B::float_transpose(w), 0, columns);
    B::float_matmul(x, B::float_transpose(rows))
}

/// All rows move, and those without a gradient are put back.
pub(crate) fn plain_adam_step_rows<B: KernelOps>(
    parameter: FloatTensor<B>,
    gradient: FloatTensor<B>,
    [first, second]: [FloatTensor<B>; 2],
    step: usize,
    config: AdamConfig,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let (shape, device) = (parameter.shape(), parameter.device());
    let bools = get_or_init_device_settings::<B>(&device).bool_dtype;
    let largest = B::float_max_dim(B::float_abs(gradient.clone()), 1);
    let is_idle = B::bool_expand(B::float_equal_elem(largest, 0.0.into(), bools), shape);
    let before = [parameter.clone(), first.clone(), second.clone()];
    let (parameter, first, second) = B::adam_step(parameter, gradient, first, second, step, config);
    let [parameter, first, second] = {
        let [old_parameter, old_first, old_second] = before;
        let keep = |new, old| B::float_mask_where(new, is_idle.clone(), old);
        [keep(parameter, old_parameter), keep(first, old_first), keep(second, old_second)]
    };
    (parameter, first, second)
}

/// By dense products.
pub(crate) fn plain_fit_residual<B: KernelOps>(
    x: FloatTensor<B>,
    products: FloatTensor<B>,
    [bias, by]: [FloatTensor<B>; 2],
    rows: FloatTensor<B>,
    residual: FloatTensor<B>,
    select: Select,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let [n, m] = dims(&products);
    let row = |t| B::float_reshape(t, Shape::new([1, m]));
    let pre = B::float_add(products, row(bias));
    let ranked = B::float_mul(pre.clone(), row(by));
    let (ranked, k) = match select {
        Select::TopKMagnitude(k) => (B::float_abs(ranked), k),
        Select::TopK(k) | Select::TopKSigned(k) => (ranked, k),
        other => unreachable!("{other:?} is refused before"),
    };
    let (kept, indices) = B::top_k(ranked, k);
    let number = |t, factor: f64, term: f64| {
        B::float_add_scalar(B::float_mul_scalar(t, factor.into()), term.into())
    };
    let passes = B::float_scatter(
        1,
        number(pre.clone(), 0.0, 0.0),
        indices,
        number(kept, 0.0, 1.0),
        IndexingUpdateOp::Add,
    );
    let passes = match select {
        Select::TopK(_) => {
            let bools = get_or_init_device_settings::<B>(&pre.device()).bool_dtype;
            let float = pre.dtype().into();
            let above = B::float_greater_elem(pre.clone(), 0.0.into(), bools);
            B::float_mul(passes, B::bool_into_float(above, float))
        }
        _ => passes,
    };
    let z = B::float_mul(pre, passes.clone());
    let error = B::float_add(B::float_matmul(z.clone(), rows.clone()), residual);
    let squares = B::float_sum_dim(B::float_mul(error.clone(), error.clone()), 1);
    let by_rows = B::float_matmul(B::float_transpose(z), error.clone());
    let by_p = B::float_mul(B::float_matmul(error, B::float_transpose(rows)), passes);
    let by_bias = B::float_reshape(B::float_sum_dim(by_p.clone(), 0), Shape::new([m]));
    let by_w = B::float_matmul(B::float_transpose(by_p), x);
    (B::float_reshape(squares, Shape::new([n])), by_rows, by_w, by_bias)
}
