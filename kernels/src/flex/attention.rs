//! Causal grouped-query attention: values are read where they lie, a shared prefix is never copied
//! for each row of the batch, and only one query's scores exist at a time.

use rayon::prelude::*;

use super::simd::{add_scaled, add_scaled_4, dot, exp, max, multiversion, sum, tanh};
use super::{Float, Int, floats, ints, new_floats, packed, packed_ints};
use crate::ops::{AttentionConfig, dims};

/// From so many queries on, packing the keys pays: a decoding step has fewer.
const PACK_FROM: usize = 16;

/// Keys or values `[batch, n, head, d_head]` where they lie: a cache with room for more columns is
/// read as it is.
pub(super) struct Cached {
    tensor: Float,
    /// Of rows, columns and heads.
    strides: [usize; 3],
}

impl Cached {
    pub(super) fn new(tensor: Float) -> Self {
        let dense = |tensor: &Float| match *tensor.layout().strides() {
            [rows, columns, heads, 1] if rows.min(columns).min(heads) >= 0 => {
                Some([rows, columns, heads].map(|stride| stride as usize))
            }
            _ => None,
        };
        let strides = dense(&tensor);
        let tensor = if strides.is_some() { tensor } else { packed(tensor) };
        let strides = strides.or_else(|| dense(&tensor)).expect("packed tensors have dense heads");
        Self { tensor, strides }
    }

    /// Those of a row and a head.
    pub(super) fn head(&self, row: usize, head: usize) -> Vectors<'_> {
        let [_, n, _, d_head]: [usize; 4] = dims(&self.tensor);
        let [rows, columns, heads] = self.strides;
        let from = self.tensor.layout().start_offset() + row * rows + head * heads;
        let data = self.tensor.storage::<f32>();
        Vectors { data: &data[from.min(data.len())..], stride: columns, n, d_head }
    }
}

/// Keys or values of one key head in one part of the cache: `n` vectors, `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Vectors<'a> {
    data: &'a [f32],
    stride: usize,
    n: usize,
    d_head: usize,
}

impl<'a> Vectors<'a> {
    pub(super) fn none(d_head: usize) -> Self {
        Self { data: &[], stride: 0, n: 0, d_head }
    }

    #[inline(always)]
    fn get(&self, i: usize) -> &'a [f32] {
        &self.data[i * self.stride..][..self.d_head]
    }
}

pub(super) fn attention(
    q: Float,
    (prefix_k, prefix_v): (Float, Float),
    (k, v): (Float, Float),
    first_column: Int,
    config: &AttentionConfig,
) -> Float {
    let shape @ [batch, n, n_heads, d_head]: [usize; 4] = dims(&q);
    let [_, own, n_kv_heads, _]: [usize; 4] = dims(&k);
    let group = n_heads / n_kv_heads;
    let first_column = packed_ints(first_column);
    let first_column = ints(&first_column);
    let q = packed(q);
    let q = floats(&q);
    let keys = [prefix_k, k].map(Cached::new);
    let values = [prefix_v, v].map(Cached::new);

    // One task a row of the batch and key head; its results are gathered and put in place after,
    // since heads interleave in memory.
    let heads: Vec<Vec<f32>> = (0..batch * n_kv_heads)
        .into_par_iter()
        .map(|task| {
            let (row, kv_head) = (task / n_kv_heads, task % n_kv_heads);
            // All rows share the prefix.
            let head = Head {
                keys: [keys[0].head(0, kv_head), keys[1].head(row, kv_head)],
                values: [values[0].head(0, kv_head), values[1].head(row, kv_head)],
                config,
            };
            // Query row `i · group + g` is query `i` of head `kv_head · group + g`.
            let queries = |r: usize| {
                let (i, g) = (r / group, r % group);
                let from = ((row * n + i) * n_heads + kv_head * group + g) * d_head;
                &q[from..][..d_head]
            };
            let first_column = &first_column[row * n..][..n];
            let rows: Vec<Query<'_>> = (0..n * group)
                .map(|r| Query {
                    vector: queries(r),
                    column: own - n + r / group,
                    first: first_column[r / group].max(0) as usize,
                })
                .collect();
            let mut z = vec![0f32; n * group * d_head];
            head.attend(&rows, &mut z);
            z
        })
        .collect();

    let mut out = vec![0f32; batch * n * n_heads * d_head];
    let width = group * d_head;
    out.par_chunks_mut(n_heads * d_head).enumerate().for_each(|(position, out)| {
        let (row, i) = (position / n, position % n);
        for (kv_head, out) in out.chunks_exact_mut(width).enumerate() {
            out.copy_from_slice(&heads[row * n_kv_heads + kv_head][i * width..][..width]);
        }
    });
    new_floats(out, shape)
}

/// A query, its own column, and the first own column that it may see.
pub(super) struct Query<'a> {
    pub(super) vector: &'a [f32],
    pub(super) column: usize,
    pub(super) first: usize,
}

/// The keys and values one task works on; index 0 is the shared prefix, 1 the row's own part.
pub(super) struct Head<'a> {
    pub(super) keys: [Vectors<'a>; 2],
    pub(super) values: [Vectors<'a>; 2],
    pub(super) config: &'a AttentionConfig,
}

impl Head<'_> {
    fn attend(&self, rows: &[Query<'_>], z: &mut [f32]) {
        let prefix = self.keys[0].n;
        let total = prefix + self.keys[1].n;
        let packed = (rows.len() >= PACK_FROM).then(|| pack(&self.keys));
        let mut scores = vec![0f32; total];
        for (query, z) in rows.iter().zip(z.chunks_exact_mut(self.keys[1].d_head)) {
            let seen = prefix + query.column + 1;
            let scores = &mut scores[..seen];
            match &packed {
                Some(keys) => row_scores(query.vector, keys, total, scores),
                None => plain_scores(query.vector, &self.keys, scores),
            }
            let (prefix_hidden, own_hidden) = self.hidden(query);
            scores[..prefix_hidden].fill(f32::NEG_INFINITY);
            scores[prefix..(prefix + own_hidden).min(seen)].fill(f32::NEG_INFINITY);
            let scale = self.config.scale as f32;
            match self.config.soft_cap {
                Some(cap) => {
                    squash(scores, scale, cap as f32);
                    softmax(scores, 1.0);
                }
                None => softmax(scores, scale),
            }
            weighted_sum(scores, &self.values, z);
        }
    }

    /// How many columns at the start of the prefix, and of the row's own part, the query does not
    /// see: padding, another text, or out of its window.
    pub(super) fn hidden(&self, query: &Query<'_>) -> (usize, usize) {
        let &Query { column, first, .. } = query;
        let Some(window) = self.config.window else { return (0, first) };
        let prefix = self.keys[0].n;
        // Absolute, with the prefix directly before the first own column.
        let lowest = (prefix + column + 1).saturating_sub(first + window);
        (lowest.min(prefix), first.max((column + 1).saturating_sub(window)))
    }

    /// Keys and values, each as `[d_head, total]`.
    pub(super) fn pack_both(&self) -> [Vec<f32>; 2] {
        [pack(&self.keys), pack(&self.values)]
    }
}

/// All vectors as `[d_head, total]`.
fn pack(parts: &[Vectors<'_>; 2]) -> Vec<f32> {
    let total = parts[0].n + parts[1].n;
    let mut packed = vec![0f32; parts[1].d_head * total];
    let all = parts.iter().flat_map(|part| (0..part.n).map(|i| part.get(i)));
    for (column, vector) in all.enumerate() {
        for (dim, &x) in vector.iter().enumerate() {
            packed[dim * total + column] = x;
        }
    }
    packed
}

multiversion! {
    /// `query · keys` over packed keys, four dimensions at a time.
    pub(super) fn row_scores(query: &[f32], keys: &[f32], total: usize, scores: &mut [f32]) {
        scores.fill(0.0);
        let n_fours = query.len() / 4 * 4;
        for dim in (0..n_fours).step_by(4) {
            let four = std::array::from_fn(|i| query[dim + i]);
            add_scaled_4(scores, four, std::array::from_fn(|i| &keys[(dim + i) * total..]));
        }
        for dim in n_fours..query.len() {
            add_scaled(scores, query[dim], &keys[dim * total..]);
        }
    }
}

multiversion! {
    fn plain_scores(query: &[f32], keys: &[Vectors<'_>; 2], scores: &mut [f32]) {
        let all = keys.iter().flat_map(|part| (0..part.n).map(|i| part.get(i)));
        for (score, key) in scores.iter_mut().zip(all) {
            *score = dot(query, key);
        }
    }
}

multiversion! {
    /// `cap · tanh(scale · score / cap)`, but for scores of −∞.
    fn squash(scores: &mut [f32], scale: f32, cap: f32) {
        for score in scores.iter_mut() {
            let squashed = cap * tanh(*score * scale / cap);
            *score = if *score == f32::NEG_INFINITY { *score } else { squashed };
        }
    }
}

multiversion! {
    /// Scales, then exponentiates and normalises; a row of −∞ becomes zeros.
    pub(super) fn softmax(scores: &mut [f32], scale: f32) {
        let max = max(scores);
        if max == f32::NEG_INFINITY {
            scores.fill(0.0);
            return;
        }
        for score in scores.iter_mut() {
            let weight = exp((*score - max) * scale);
            *score = if *score == f32::NEG_INFINITY { 0.0 } else { weight };
        }
        let inverse = 1.0 / sum(scores);
        for score in scores.iter_mut() {
            *score *= inverse;
        }
    }
}

multiversion! {
    /// `z = weights · values`, four columns at a time.
    pub(super) fn weighted_sum(weights: &[f32], values: &[Vectors<'_>; 2], z: &mut [f32]) {
        z.fill(0.0);
        let mut start = 0;
        for part in values {
            let n = part.n.min(weights.len() - start);
            let weights = &weights[start..start + n];
            let n_fours = n / 4 * 4;
            for i in (0..n_fours).step_by(4) {
                let four = std::array::from_fn(|j| weights[i + j]);
                add_scaled_4(z, four, std::array::from_fn(|j| part.get(i + j)));
            }
            for (i, &weight) in weights.iter().enumerate().skip(n_fours) {
                add_scaled(z, weight, part.get(i));
            }
            start += n;
        }
    }
}

multiversion! {
    /// `rows[i] += weights[i] · x`.
    pub(super) fn add_to_rows(rows: &mut [f32], weights: &[f32], x: &[f32]) {
        for (row, &weight) in rows.chunks_exact_mut(x.len()).zip(weights) {
            add_scaled(row, weight, x);
        }
    }
}
