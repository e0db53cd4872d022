//! Attention and its gradients in a backend's own operations: the definition, and what runs where
//! there is no kernel.

use burn::backend::tensor::{BoolTensor, FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata, get_or_init_device_settings};
use burn::tensor::Shape;

use crate::ops::{AttentionConfig, dims};

/// Rows of queries that share a key head lie together: `[batch, kv_head, group · n, d_head]`.
#[derive(Clone, Copy)]
struct Layout {
    batch: usize,
    n: usize,
    n_kv_heads: usize,
    group: usize,
    d_head: usize,
}

impl Layout {
    fn of<B: Backend>(q: &FloatTensor<B>, k: &FloatTensor<B>) -> Self {
        let ([batch, n, n_heads, d_head], [_, _, n_kv_heads, _]) = (dims(q), dims(k));
        Self { batch, n, n_kv_heads, group: n_heads / n_kv_heads, d_head }
    }

    /// From `[batch, n, head, d_head]`.
    fn by_kv_head<B: Backend>(self, x: FloatTensor<B>) -> FloatTensor<B> {
        let Self { batch, n, n_kv_heads, group, d_head } = self;
        let x = B::float_reshape(x, Shape::new([batch, n, n_kv_heads, group, d_head]));
        let x = B::float_permute(x, &[0, 2, 3, 1, 4]);
        B::float_reshape(x, Shape::new([batch, n_kv_heads, group * n, d_head]))
    }

    /// Back to `[batch, n, head, d_head]`.
    fn by_position<B: Backend>(self, x: FloatTensor<B>) -> FloatTensor<B> {
        let Self { batch, n, n_kv_heads, group, d_head } = self;
        let x = B::float_reshape(x, Shape::new([batch, n_kv_heads, group, n, d_head]));
        let x = B::float_permute(x, &[0, 3, 1, 2, 4]);
        B::float_reshape(x, Shape::new([batch, n, n_kv_heads * group, d_head]))
    }
}

/// `KernelOps::attention`.
pub(crate) fn plain_attention<B: Backend>(
    q: FloatTensor<B>,
    [prefix_k, prefix_v]: [FloatTensor<B>; 2],
    [k, v]: [FloatTensor<B>; 2],
    first_column: IntTensor<B>,
    config: AttentionConfig,
) -> FloatTensor<B> {
    let layout = Layout::of::<B>(&q, &k);
    let Layout { batch, n_kv_heads, d_head, .. } = layout;
    let [_, prefix, _, _]: [usize; 4] = dims(&prefix_k);
    let joined = |shared: FloatTensor<B>, own: FloatTensor<B>| {
        let all = match prefix {
            0 => own,
            _ => {
                let shape = Shape::new([batch, prefix, n_kv_heads, d_head]);
                B::float_cat(vec![B::float_expand(shared, shape), own], 1)
            }
        };
        B::float_swap_dims(all, 1, 2)
    };
    let (k, v) = (joined(prefix_k, k), joined(prefix_v, v));
    let q = layout.by_kv_head::<B>(q);
    let pattern = pattern::<B>(q, k, layout, prefix, first_column, config);
    layout.by_position::<B>(B::float_matmul(pattern, v))
}

/// `KernelOps::attention_backward`: with the pattern `P`, `dV = Pᵀ dZ`, `dP = dZ Vᵀ`,
/// `dS = P ⊙ (dP − Σ P ⊙ dP)`, `dQ = scale · dS K`, `dK = scale · dSᵀ Q`.
pub(crate) fn plain_attention_backward<B: Backend>(
    [q, k, v]: [FloatTensor<B>; 3],
    first_column: IntTensor<B>,
    config: AttentionConfig,
    grad: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let layout = Layout::of::<B>(&q, &k);
    let (q, grad) = (layout.by_kv_head::<B>(q), layout.by_kv_head::<B>(grad));
    let (k, v) = (B::float_swap_dims(k, 1, 2), B::float_swap_dims(v, 1, 2));
    let pattern = pattern::<B>(q.clone(), k.clone(), layout, 0, first_column, config);
    let of_v = B::float_matmul(B::float_swap_dims(pattern.clone(), 2, 3), grad.clone());
    let of_pattern = B::float_matmul(grad, B::float_swap_dims(v, 2, 3));
    let weighed = B::float_mul(pattern.clone(), of_pattern.clone());
    let mean = B::float_sum_dim(weighed, 3);
    let of_scores = B::float_mul(pattern, B::float_sub(of_pattern, mean));
    let of_scores = B::float_mul_scalar(of_scores, config.scale.into());
    let of_q = B::float_matmul(of_scores.clone(), k);
    let of_k = B::float_matmul(B::float_swap_dims(of_scores, 2, 3), q);
    let by_position = |x| B::float_swap_dims(x, 1, 2);
    (layout.by_position::<B>(of_q), by_position(of_k), by_position(of_v))
}

/// What every query weighs every key by, `[batch, kv_head, group · n, total]`.
fn pattern<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    layout: Layout,
    prefix: usize,
    first_column: IntTensor<B>,
    config: AttentionConfig,
) -> FloatTensor<B> {
    let Layout { batch, n, n_kv_heads, group, .. } = layout;
    let [_, _, total, _]: [usize; 4] = dims(&k);
    let scores = B::float_matmul(q, B::float_swap_dims(k, 2, 3));
    let scores = B::float_mul_scalar(scores, config.scale.into());
    let scores = match config.soft_cap {
        Some(cap) => {
            let squashed = B::float_tanh(B::float_mul_scalar(scores, (1.0 / cap).into()));
            B::float_mul_scalar(squashed, cap.into())
        }
        None => scores,
    };
    let shape = [batch, n_kv_heads, group, n, total];
    let scores = B::float_reshape(scores, Shape::new(shape));
    let hidden = hidden::<B>(first_column, shape, prefix, config.window);
    // A finite fill keeps rows that see nothing free of NaN; the second fill zeroes them.
    let scores = B::float_mask_fill(scores, hidden.clone(), (-1e30f32).into());
    let pattern = softmax::<B>(scores, 4);
    let pattern = B::float_mask_fill(pattern, hidden, 0f32.into());
    B::float_reshape(pattern, Shape::new([batch, n_kv_heads, group * n, total]))
}

/// Where a column is padding, comes after the query, or lies too far back.
fn hidden<B: Backend>(
    first_column: IntTensor<B>,
    shape @ [batch, _, _, n, total]: [usize; 5],
    prefix: usize,
    window: Option<usize>,
) -> BoolTensor<B> {
    let device = first_column.device();
    let settings = get_or_init_device_settings::<B>(&device);
    let (int, bools) = (settings.int_dtype, settings.bool_dtype);
    let expand =
        |t, from: [usize; 5]| B::int_expand(B::int_reshape(t, Shape::new(from)), Shape::new(shape));
    let column = B::int_arange(0..total as i64, &device, int);
    let column = expand(column, [1, 1, 1, 1, total]);
    let query = B::int_arange((total - n) as i64..total as i64, &device, int);
    let query = expand(query, [1, 1, 1, n, 1]);
    let first = expand(B::int_cast(first_column, int), [batch, 1, 1, n, 1]);

    let after = B::int_greater(column.clone(), query.clone(), bools);
    let is_own = B::int_greater_equal_elem(column.clone(), (prefix as i64).into(), bools);
    let own_first = B::int_add_scalar(first.clone(), (prefix as i64).into());
    let before = B::int_lower(column.clone(), own_first, bools);
    let hidden = B::bool_or(after, B::bool_and(before, is_own.clone()));
    let Some(window) = window else { return hidden };
    // Between a prefix key and the query lie no padding columns.
    let gap = B::int_mask_fill(first, is_own, 0.into());
    let distance = B::int_sub(B::int_sub(query, column), gap);
    B::bool_or(hidden, B::int_greater_equal_elem(distance, (window as i64).into(), bools))
}

fn softmax<B: Backend>(scores: FloatTensor<B>, dim: usize) -> FloatTensor<B> {
    let max = B::float_detach(B::float_max_dim(scores.clone(), dim));
    let exp = B::float_exp(B::float_sub(scores, max));
    let sum = B::float_sum_dim(exp.clone(), dim);
    B::float_div(exp, sum)
}
