//! Products of a sparse matrix whose rows are not sparse at all, as those of a run that has just begun:
//! some rows at a time are written out with the zeros between their entries, for a dense product.

use burn::backend::Flex;
use burn::backend::ops::FloatTensorOps;
use rayon::prelude::*;

use super::simd::multiversion;
use super::{Float, add_product, floats, new_floats, packed, rows_of};
use crate::ops::dims;

/// Rows that are written out together.
const TILE_ROWS: usize = 1024;
/// Entries that fill one part in so many of their rows take a dense product less time than they take
/// one by one.
const CROWDED_FROM: usize = 5;
/// With fewer rows, a product is not worth it.
const MIN_ROWS: usize = 64;

/// A sparse matrix, `[n, m]`, with `k` places a row.
#[derive(Clone, Copy)]
pub(super) struct Entries<'a> {
    pub(super) indices: &'a [i32],
    pub(super) values: &'a [f32],
    pub(super) k: usize,
    pub(super) m: usize,
}

impl Entries<'_> {
    fn n(&self) -> usize {
        self.indices.len() / self.k
    }

    /// Whether a dense product is the faster one, and does the same: a number that is not finite would
    /// reach rows that have nothing to do with it.
    pub(super) fn are_crowded_beside(&self, dense: &[f32]) -> bool {
        let n_entries = self.values.par_chunks(1 << 14).map(n_not_zero).sum();
        is_crowded(n_entries, [self.n(), self.m]) && dense.par_iter().all(|x| x.is_finite())
    }

    /// The rows from `start` to `end`.
    fn written_out(&self, start: usize, end: usize) -> Float {
        let Self { indices, values, k, m } = *self;
        let mut out = vec![0f32; (end - start) * m];
        out.par_chunks_mut(m)
            .zip(indices[start * k..].par_chunks(k).zip(values[start * k..].par_chunks(k)))
            .for_each(|(out, (indices, values))| {
                for (&index, &value) in indices.iter().zip(values) {
                    out[index as usize] += value;
                }
            });
        new_floats(out, [end - start, m])
    }
}

/// Whether so many entries are crowded in a matrix of so many rows and columns.
fn is_crowded(n_entries: usize, [n, m]: [usize; 2]) -> bool {
    n >= MIN_ROWS && n_entries * CROWDED_FROM >= n * m
}

/// Whether indices that name rows to be multiplied are crowded. What fills up a row is the same one
/// again and again.
pub(super) fn name_a_crowd(indices: &[i32], k: usize, m: usize) -> bool {
    let distinct = |row: &[i32]| 1 + row.windows(2).filter(|pair| pair[0] != pair[1]).count();
    let n_entries = indices.par_chunks(k).map(distinct).sum();
    is_crowded(n_entries, [indices.len() / k, m])
}

/// `entries · rows`.
pub(super) fn decode(entries: &Entries<'_>, rows: Float) -> Float {
    let (n, [_, d]) = (entries.n(), dims(&rows));
    let mut out = Vec::with_capacity(n * d);
    for (start, end) in tiles(n) {
        let product = packed(Flex::float_matmul(entries.written_out(start, end), rows.clone()));
        out.extend_from_slice(floats(&product));
    }
    new_floats(out, [n, d])
}

/// `x · rowsᵀ` at the indices.
pub(super) fn dot_at(indices: &[i32], rows: Float, x: Float) -> Float {
    let ([n, _], [m, _]) = (dims::<2>(&x), dims::<2>(&rows));
    let k = indices.len() / n;
    let transposed = Flex::float_transpose(rows);
    let mut out = vec![0f32; n * k];
    for (start, end) in tiles(n) {
        let product = packed(Flex::float_matmul(rows_of(&x, start, end), transposed.clone()));
        out[start * k..end * k]
            .par_chunks_mut(k)
            .zip(indices[start * k..end * k].par_chunks(k).zip(floats(&product).par_chunks(m)))
            .for_each(|(out, (indices, product))| {
                for (out, &index) in out.iter_mut().zip(indices) {
                    *out = product[index as usize];
                }
            });
    }
    new_floats(out, [n, k])
}

/// `entriesᵀ · grad`, tile after tile, so that the sum is the same on any number of threads.
pub(super) fn grad_rows(entries: &Entries<'_>, grad: &Float) -> Float {
    let (m, [n, d]) = (entries.m, dims(grad));
    let mut out = vec![0f32; m * d];
    for (start, end) in tiles(n) {
        let transposed = Flex::float_transpose(entries.written_out(start, end));
        add_product(&mut out, transposed, rows_of(grad, start, end));
    }
    new_floats(out, [m, d])
}

fn tiles(n: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..n).step_by(TILE_ROWS).map(move |start| (start, (start + TILE_ROWS).min(n)))
}

multiversion! {
    fn n_not_zero(values: &[f32]) -> usize {
        values.iter().map(|&value| u32::from(value != 0.0)).sum::<u32>() as usize
    }
}
