//! The plain defaults of what only training needs.

use burn::backend::tensor::{BoolTensor, FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata, get_or_init_device_settings};
use burn::tensor::{IndexingUpdateOp, Shape};

use crate::ops::{AdamConfig, KernelOps, Select, cast_like, dims};

/// `x · w` at some columns.
pub(crate) fn products_of<B: Backend>(
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    columns: IntTensor<B>,
) -> FloatTensor<B> {
    // Of a matrix that lies transposed, columns are rows in one piece.
    let rows = cast_like::<B>(B::float_select(B::float_transpose(w), 0, columns), &x);
    B::float_matmul(x, B::float_transpose(rows))
}

/// All rows move, and those without a gradient are put back.
pub(crate) fn plain_adam_step<B: KernelOps>(
    parameter: FloatTensor<B>,
    gradient: FloatTensor<B>,
    [first, second]: [FloatTensor<B>; 2],
    step: usize,
    config: AdamConfig,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let AdamConfig { learning_rate, beta_1, beta_2, epsilon, gradient_scale, .. } = config;
    let before = [parameter.clone(), first.clone(), second.clone()];
    let idle = config.skips_idle_rows.then(|| {
        let largest = B::float_max_dim(B::float_abs(gradient.clone()), 1);
        is_zero::<B>(largest, parameter.shape())
    });
    let gradient = B::float_mul_scalar(gradient, gradient_scale.into());
    let blend = |old, new, beta: f64| {
        let new = B::float_mul_scalar(new, (1.0 - beta).into());
        B::float_add(B::float_mul_scalar(old, beta.into()), new)
    };
    let first = blend(first, gradient.clone(), beta_1);
    let second = blend(second, B::float_mul(gradient.clone(), gradient), beta_2);
    let (correction_1, correction_2) = bias_corrections(&config, step);
    let root = B::float_sqrt(B::float_mul_scalar(second.clone(), (1.0 / correction_2).into()));
    let update = B::float_div(
        B::float_mul_scalar(first.clone(), (learning_rate / correction_1).into()),
        B::float_add_scalar(root, epsilon.into()),
    );
    let mut parameter = B::float_sub(parameter, update);
    if config.unit_rows {
        let norms = B::float_sqrt(products_by_row::<B>(&parameter, &parameter));
        let is_zero = is_zero::<B>(norms.clone(), norms.shape());
        parameter = B::float_div(parameter, B::float_mask_fill(norms, is_zero, 1f32.into()));
    }
    match idle {
        Some(idle) => {
            let [old_parameter, old_first, old_second] = before;
            let keep = |new, old| B::float_mask_where(new, idle.clone(), old);
            (keep(parameter, old_parameter), keep(first, old_first), keep(second, old_second))
        }
        None => (parameter, first, second),
    }
}

pub(crate) fn plain_project_rows<B: KernelOps>(
    gradient: FloatTensor<B>,
    rows: FloatTensor<B>,
) -> FloatTensor<B> {
    let squares = products_by_row::<B>(&rows, &rows);
    let is_zero = is_zero::<B>(squares.clone(), squares.shape());
    let squares = B::float_mask_fill(squares, is_zero, 1f32.into());
    let along = B::float_div(products_by_row::<B>(&gradient, &rows), squares);
    B::float_sub(gradient, B::float_mul(rows, along))
}

/// `⟨aᵢ, bᵢ⟩`, `[n, 1]`.
fn products_by_row<B: Backend>(a: &FloatTensor<B>, b: &FloatTensor<B>) -> FloatTensor<B> {
    B::float_sum_dim(B::float_mul(a.clone(), b.clone()), 1)
}

/// Where a column is zero, for every column of `shape`.
fn is_zero<B: Backend>(column: FloatTensor<B>, shape: Shape) -> BoolTensor<B> {
    let bools = get_or_init_device_settings::<B>(&column.device()).bool_dtype;
    B::bool_expand(B::float_equal_elem(column, 0.0.into(), bools), shape)
}

/// `1 − β₁ᵗ` and `1 − β₂ᵗ`.
pub(crate) fn bias_corrections(config: &AdamConfig, step: usize) -> (f64, f64) {
    let step = step as f64;
    (1.0 - config.beta_1.powf(step), 1.0 - config.beta_2.powf(step))
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
