//! Causal grouped-query attention: keys and values are read where they lie, a shared prefix once
//! for all rows of the batch, and no `[query, key]` matrix outlives a block of four queries.

use rayon::prelude::*;

use super::simd::{add_scaled, dot, exp, max, multiversion};
use super::{Float, Int, floats, ints, new_floats, packed, packed_ints};
use crate::ops::dims;

/// Queries handled together when there are enough of them.
const ROWS: usize = 4;
/// Columns of a micro-product.
const COLS: usize = 16;

/// Keys or values of one key head in one part of the cache: `n` vectors, `stride` apart.
#[derive(Clone, Copy)]
struct Vectors<'a> {
    data: &'a [f32],
    stride: usize,
    n: usize,
    d_head: usize,
}

impl<'a> Vectors<'a> {
    /// Of row `row` and head `head` in a `[batch, n, n_heads, d_head]` buffer.
    fn new(data: &'a [f32], [_, n, n_heads, d_head]: [usize; 4], row: usize, head: usize) -> Self {
        let stride = n_heads * d_head;
        let from = (row * n * stride + head * d_head).min(data.len());
        Self {
            data: &data[from..],
            stride,
            n,
            d_head,
        }
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
    scale: f64,
) -> Float {
    let shape @ [batch, n, n_heads, d_head]: [usize; 4] = dims(&q);
    let (own_shape, prefix_shape) = (dims(&k), dims(&prefix_k));
    let ([_, own, n_kv_heads, _], [_, prefix, _, _]) = (own_shape, prefix_shape);
    let group = n_heads / n_kv_heads;
    let first_column = packed_ints(first_column);
    let first_column = ints(&first_column);
    let [q, k, v, prefix_k, prefix_v] = [q, k, v, prefix_k, prefix_v].map(packed);
    let q = floats(&q);
    let keys = [floats(&prefix_k), floats(&k)];
    let values = [floats(&prefix_v), floats(&v)];

    // One task a row of the batch and key head; its results are gathered and put in place after,
    // since heads interleave in memory.
    let heads: Vec<Vec<f32>> = (0..batch * n_kv_heads)
        .into_par_iter()
        .map(|task| {
            let (row, kv_head) = (task / n_kv_heads, task % n_kv_heads);
            let parts = [(prefix_shape, 0), (own_shape, row)];
            let head = Head {
                keys: std::array::from_fn(|i| {
                    Vectors::new(keys[i], parts[i].0, parts[i].1, kv_head)
                }),
                values: std::array::from_fn(|i| {
                    Vectors::new(values[i], parts[i].0, parts[i].1, kv_head)
                }),
                first: first_column[row].max(0) as usize,
                scale: scale as f32,
            };
            // Query row `i · group + g` is query `i` of head `kv_head · group + g`.
            let queries = |r: usize| {
                let (i, g) = (r / group, r % group);
                let from = ((row * n + i) * n_heads + kv_head * group + g) * d_head;
                &q[from..][..d_head]
            };
            let visible = |r: usize| prefix + own - n + r / group + 1;
            let mut z = vec![0f32; n * group * d_head];
            let rows: Vec<(&[f32], usize)> =
                (0..n * group).map(|r| (queries(r), visible(r))).collect();
            head.attend(&rows, &mut z);
            z
        })
        .collect();

    let mut out = vec![0f32; batch * n * n_heads * d_head];
    let width = group * d_head;
    out.par_chunks_mut(n_heads * d_head)
        .enumerate()
        .for_each(|(position, out)| {
            let (row, i) = (position / n, position % n);
            for (kv_head, out) in out.chunks_exact_mut(width).enumerate() {
                out.copy_from_slice(&heads[row * n_kv_heads + kv_head][i * width..][..width]);
            }
        });
    new_floats(out, shape)
}

/// The keys and values one task works on; index 0 is the shared prefix, 1 the row's own part.
struct Head<'a> {
    keys: [Vectors<'a>; 2],
    values: [Vectors<'a>; 2],
    /// First own column that is not padding.
    first: usize,
    scale: f32,
}

impl Head<'_> {
    /// `rows` are the queries with the number of columns (prefix first) each may see.
    fn attend(&self, rows: &[(&[f32], usize)], z: &mut [f32]) {
        let prefix = self.keys[0].n;
        let total = prefix + self.keys[1].n;
        let d_head = self.keys[1].d_head;
        // Few queries (a decoding step): packing the keys would cost as much as the products.
        let blocked = rows.len() >= 4 * ROWS && d_head % COLS == 0;
        let packed_keys = if blocked {
            self.pack_keys(total)
        } else {
            Vec::new()
        };
        let padded = total.next_multiple_of(COLS);
        let mut scores = vec![0f32; ROWS * padded];
        for (block, z) in rows.chunks(ROWS).zip(z.chunks_mut(ROWS * d_head)) {
            let seen = block.iter().map(|&(_, seen)| seen).max().unwrap_or(0);
            if blocked && block.len() == ROWS {
                let queries = std::array::from_fn(|r| block[r].0);
                block_scores(queries, &packed_keys, padded, seen, &mut scores);
            } else {
                for (r, &(query, seen)) in block.iter().enumerate() {
                    let scores = &mut scores[r * padded..][..padded];
                    row_scores(query, &self.keys, seen, scores);
                }
            }
            for (r, &(_, seen)) in block.iter().enumerate() {
                let scores = &mut scores[r * padded..][..padded];
                self.softmax(scores, prefix, seen);
            }
            if blocked && block.len() == ROWS {
                block_values(&scores, padded, seen, &self.values, z);
            } else {
                for (r, z) in z.chunks_exact_mut(d_head).enumerate() {
                    row_values(&scores[r * padded..][..seen], &self.values, z);
                }
            }
        }
    }

    /// Scores to weights: hidden columns weigh zero.
    fn softmax(&self, scores: &mut [f32], prefix: usize, seen: usize) {
        let start = prefix + self.first;
        if prefix < start {
            scores[prefix..start.min(seen).max(prefix)].fill(f32::NEG_INFINITY);
        }
        scores[seen..].fill(0.0);
        softmax_slice(&mut scores[..seen], self.scale);
    }

    /// All keys as `[d_head, total]`, the columns padded to a whole number of micro-products.
    fn pack_keys(&self, total: usize) -> Vec<f32> {
        let padded = total.next_multiple_of(COLS);
        let d_head = self.keys[1].d_head;
        let mut packed = vec![0f32; d_head * padded];
        let all = self
            .keys
            .iter()
            .flat_map(|part| (0..part.n).map(|i| part.get(i)));
        for (column, key) in all.enumerate() {
            for (dim, &x) in key.iter().enumerate() {
                packed[dim * padded + column] = x;
            }
        }
        packed
    }
}

multiversion! {
    /// Four queries against packed keys, sixteen columns at a time, sums kept in registers.
    fn block_scores(
        queries: [&[f32]; ROWS],
        keys: &[f32],
        padded: usize,
        seen: usize,
        scores: &mut [f32],
    ) {
        let d_head = queries[0].len();
        let queries = queries.map(|query| &query[..d_head]);
        for column in (0..seen).step_by(COLS) {
            let mut sums = [[0f32; COLS]; ROWS];
            for dim in 0..d_head {
                let keys: &[f32; COLS] =
                    keys[dim * padded + column..][..COLS].try_into().expect("COLS wide");
                for row in 0..ROWS {
                    let q = queries[row][dim];
                    for lane in 0..COLS {
                        sums[row][lane] = q.mul_add(keys[lane], sums[row][lane]);
                    }
                }
            }
            for row in 0..ROWS {
                scores[row * padded + column..][..COLS].copy_from_slice(&sums[row]);
            }
        }
    }
}

multiversion! {
    fn row_scores(query: &[f32], keys: &[Vectors<'_>; 2], seen: usize, scores: &mut [f32]) {
        let (mut column, mut left) = (0, seen);
        for part in keys {
            for i in 0..part.n.min(left) {
                scores[column] = dot(query, part.get(i));
                column += 1;
            }
            left -= part.n.min(left);
        }
    }
}

multiversion! {
    /// Scales, then exponentiates and normalises; a row of −∞ becomes zeros.
    fn softmax_slice(scores: &mut [f32], scale: f32) {
        let max = max(scores);
        if max == f32::NEG_INFINITY {
            scores.fill(0.0);
            return;
        }
        for score in scores.iter_mut() {
            let weight = exp((*score - max) * scale);
            *score = if *score == f32::NEG_INFINITY { 0.0 } else { weight };
        }
        let sum: f32 = scores.iter().sum();
        let inverse = 1.0 / sum;
        for score in scores.iter_mut() {
            *score *= inverse;
        }
    }
}

multiversion! {
    /// Four rows of weights times the values, sixteen columns at a time.
    fn block_values(
        weights: &[f32],
        padded: usize,
        seen: usize,
        values: &[Vectors<'_>; 2],
        z: &mut [f32],
    ) {
        let d_head = values[1].d_head;
        for column in (0..d_head).step_by(COLS) {
            let mut sums = [[0f32; COLS]; ROWS];
            let (mut position, mut left) = (0, seen);
            for part in values {
                for i in 0..part.n.min(left) {
                    let value: &[f32; COLS] =
                        part.get(i)[column..][..COLS].try_into().expect("COLS wide");
                    for row in 0..ROWS {
                        let weight = weights[row * padded + position];
                        for lane in 0..COLS {
                            sums[row][lane] = weight.mul_add(value[lane], sums[row][lane]);
                        }
                    }
                    position += 1;
                }
                left -= part.n.min(left);
            }
            for row in 0..ROWS {
                z[row * d_head + column..][..COLS].copy_from_slice(&sums[row]);
            }
        }
    }
}

multiversion! {
    fn row_values(weights: &[f32], values: &[Vectors<'_>; 2], z: &mut [f32]) {
        let (mut position, mut left) = (0, weights.len());
        for part in values {
            for i in 0..part.n.min(left) {
                add_scaled(z, weights[position], part.get(i));
                position += 1;
            }
            left -= part.n.min(left);
        }
    }
}
