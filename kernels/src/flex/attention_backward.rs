//! Gradients of attention: the pattern is computed again, one query's at a time.

use rayon::prelude::*;

use super::attention::{
    Cached, Head, Query, Vectors, add_to_rows, row_scores, softmax, weighted_sum,
};
use super::simd::{dot, multiversion};
use super::{Float, Int, floats, ints, new_floats, packed, packed_ints};
use crate::ops::{AttentionConfig, dims};

/// For queries, keys and values.
pub(super) fn attention_backward(
    q: Float,
    k: Float,
    v: Float,
    first_column: Int,
    config: &AttentionConfig,
    grad: Float,
) -> (Float, Float, Float) {
    let q_shape @ [batch, n, n_heads, d_head]: [usize; 4] = dims(&q);
    let k_shape @ [_, own, n_kv_heads, _]: [usize; 4] = dims(&k);
    let group = n_heads / n_kv_heads;
    let first_column = packed_ints(first_column);
    let first_column = ints(&first_column);
    let [q, grad] = [q, grad].map(packed);
    let [q, grad] = [&q, &grad].map(floats);
    let [k, v] = [k, v].map(Cached::new);
    let none = Vectors::none(d_head);

    // One task a row of the batch and key head, whose gradients nobody else adds to.
    let tasks: Vec<Gradients> = (0..batch * n_kv_heads)
        .into_par_iter()
        .map(|task| {
            let (row, kv_head) = (task / n_kv_heads, task % n_kv_heads);
            let head = Head {
                keys: [none, k.head(row, kv_head)],
                values: [none, v.head(row, kv_head)],
                config,
            };
            let mut gradients = Gradients::new(n * group, own, d_head);
            let packed = head.pack_both();
            for r in 0..n * group {
                let (i, g) = (r / group, r % group);
                let from = ((row * n + i) * n_heads + kv_head * group + g) * d_head;
                let first = first_column[row * n + i].max(0) as usize;
                let vector = &q[from..][..d_head];
                let query = Query { vector, column: own - n + i, first };
                gradients.add(r, &head, &packed, &query, &grad[from..][..d_head]);
            }
            gradients
        })
        .collect();

    // Heads interleave in memory: the tasks' results are put in place after.
    let place = |shape @ [_, n, n_heads, d_head]: [usize; 4], of: fn(&Gradients) -> &[f32]| {
        let group = n_heads / n_kv_heads;
        let width = group * d_head;
        let mut out = vec![0f32; batch * n * n_heads * d_head];
        for (position, out) in out.chunks_exact_mut(n_heads * d_head).enumerate() {
            let (row, i) = (position / n, position % n);
            for (kv_head, out) in out.chunks_exact_mut(width).enumerate() {
                out.copy_from_slice(&of(&tasks[row * n_kv_heads + kv_head])[i * width..][..width]);
            }
        }
        new_floats(out, shape)
    };
    (place(q_shape, |g| &g.q), place(k_shape, |g| &g.k), place(k_shape, |g| &g.v))
}

/// Of one key head and the queries that it serves.
struct Gradients {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    d_head: usize,
    pattern: Vec<f32>,
    of_pattern: Vec<f32>,
}

impl Gradients {
    fn new(n_queries: usize, own: usize, d_head: usize) -> Self {
        let zeros = |n: usize| vec![0f32; n * d_head];
        let (pattern, of_pattern) = (vec![0f32; own], vec![0f32; own]);
        Self { q: zeros(n_queries), k: zeros(own), v: zeros(own), d_head, pattern, of_pattern }
    }

    /// What one query adds; `grad` is that of its weighted values.
    fn add(
        &mut self,
        r: usize,
        head: &Head<'_>,
        packed: &[Vec<f32>; 2],
        query: &Query<'_>,
        grad: &[f32],
    ) {
        let (seen, d_head) = (query.column + 1, self.d_head);
        let own = self.pattern.len();
        let (pattern, of_pattern) = (&mut self.pattern[..seen], &mut self.of_pattern[..seen]);
        row_scores(query.vector, &packed[0], own, pattern);
        let (_, hidden) = head.hidden(query);
        pattern[..hidden.min(seen)].fill(f32::NEG_INFINITY);
        let scale = head.config.scale as f32;
        softmax(pattern, scale);
        // Columns that are not seen weigh nothing, and get nothing.
        let from = hidden.min(seen);
        add_to_rows(&mut self.v[from * d_head..seen * d_head], &pattern[from..], grad);
        row_scores(grad, &packed[1], own, of_pattern);
        to_scores(of_pattern, pattern, scale);
        add_to_rows(&mut self.k[from * d_head..seen * d_head], &of_pattern[from..], query.vector);
        weighted_sum(of_pattern, &head.keys, &mut self.q[r * d_head..][..d_head]);
    }
}

multiversion! {
    /// From the gradient of the pattern to that of the scores before they are scaled.
    fn to_scores(of_pattern: &mut [f32], pattern: &[f32], scale: f32) {
        let mean = dot(of_pattern, pattern);
        for (of, &p) in of_pattern.iter_mut().zip(pattern) {
            *of = p * (*of - mean) * scale;
        }
    }
}
