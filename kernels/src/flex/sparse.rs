//! Products of a sparse matrix (`k` entries a row) with a dense one, and their gradients.

use rayon::prelude::*;

use super::crowded::{self, Entries};
use super::simd::{add_scaled, add_scaled_4, dot, multiversion};
use super::{Float, Int, floats, ints, new_floats, packed, packed_ints, widened};
use crate::ops::dims;

/// Entries that a task takes, where their rows do not matter.
const TASK: usize = 1 << 14;
/// The same where each task has a sum of its own, unless the sums are long.
const SUM_TASK: usize = 1 << 19;

pub(super) fn decode(indices: Int, values: Float, rows: Float) -> Float {
    let ([n, k], [m, d]) = (dims(&values), dims(&rows));
    let (indices, values, rows) = (packed_ints(indices), packed(values), packed(widened(rows)));
    let entries = Entries { indices: checked(&indices, m), values: floats(&values), k, m };
    if entries.are_crowded_beside(floats(&rows)) {
        return crowded::decode(&entries, rows);
    }
    let (Entries { indices, values, .. }, rows) = (entries, floats(&rows));
    let mut out = vec![0f32; n * d];
    out.par_chunks_mut(d)
        .zip(indices.par_chunks(k).zip(values.par_chunks(k)))
        .for_each(|(out, (indices, values))| decode_row(out, indices, values, rows));
    new_floats(out, [n, d])
}

pub(super) fn dot_at(indices: Int, rows: Float, x: Float) -> Float {
    let ([n, d], [m, _], [_, k]) = (dims(&x), dims::<2>(&rows), dims::<2>(&indices));
    let (indices, rows, x) = (packed_ints(indices), packed(widened(rows)), packed(x));
    let indices = checked(&indices, m);
    if crowded::name_a_crowd(indices, k, m) {
        return crowded::dot_at(indices, rows, x);
    }
    let (rows, x) = (floats(&rows), floats(&x));
    let mut out = vec![0f32; n * k];
    out.par_chunks_mut(k)
        .zip(indices.par_chunks(k).zip(x.par_chunks(d)))
        .for_each(|(out, (indices, x))| dot_rows(out, indices, x, rows));
    new_floats(out, [n, k])
}

/// Latent-major: the entries are sorted by index first, so that each row of the result has one
/// owner. No atomics, the same sum in the same order on any number of threads.
pub(super) fn grad_rows(indices: Int, values: Float, grad: Float, m: usize) -> Float {
    let ([_, d], [_, k]) = (dims::<2>(&grad), dims::<2>(&values));
    let (indices, values, grad) = (packed_ints(indices), packed(values), packed(grad));
    let entries = Entries { indices: checked(&indices, m), values: floats(&values), k, m };
    if entries.are_crowded_beside(floats(&grad)) {
        return crowded::grad_rows(&entries, &grad);
    }
    let (Entries { indices, values, .. }, grad) = (entries, floats(&grad));
    let (starts, entries) = by_index(indices, values, k, m);
    let mut out = vec![0f32; m * d];
    out.par_chunks_mut(d).enumerate().for_each(|(index, out)| {
        add_rows(out, &entries[starts[index]..starts[index + 1]], grad);
    });
    new_floats(out, [m, d])
}

/// The sums of some entries after the other, so that they are the same on any number of threads.
pub(super) fn sum(indices: Int, values: Float, m: usize) -> Float {
    let (indices, values) = (packed_ints(indices), packed(values));
    let part = SUM_TASK.max(16 * m);
    let parts = checked(&indices, m).par_chunks(part).zip(floats(&values).par_chunks(part));
    let sums = parts.map(|(indices, values)| {
        let mut sum = vec![0f32; m];
        for (&index, &value) in indices.iter().zip(values) {
            sum[index as usize] += value;
        }
        sum
    });
    let mut out = vec![0f32; m];
    for sum in sums.collect::<Vec<_>>() {
        out.iter_mut().zip(sum).for_each(|(out, sum)| *out += sum);
    }
    new_floats(out, [m])
}

pub(super) fn gather(indices: Int, vector: Float) -> Float {
    let ([n, k], [m]) = (dims::<2>(&indices), dims(&vector));
    let (indices, vector) = (packed_ints(indices), packed(vector));
    let (indices, vector) = (checked(&indices, m), floats(&vector));
    let mut out = vec![0f32; n * k];
    out.par_chunks_mut(TASK).zip(indices.par_chunks(TASK)).for_each(|(out, indices)| {
        for (out, &index) in out.iter_mut().zip(indices) {
            *out = vector[index as usize];
        }
    });
    new_floats(out, [n, k])
}

/// Indices from outside must not reach past the table.
fn checked(indices: &Int, m: usize) -> &[i32] {
    let indices = ints(indices);
    if indices.par_chunks(TASK).any(|indices| largest(indices) as usize >= m) {
        let bad = indices.iter().find(|&&i| i < 0 || i as usize >= m).expect("the largest");
        panic!("sparse index {bad} is out of range for {m} rows");
    }
    indices
}

/// A counting sort: `entries[starts[l]..starts[l + 1]]` are the (row, value) pairs of index `l`, but
/// for values of zero, with which rows are filled up.
fn by_index(indices: &[i32], values: &[f32], k: usize, m: usize) -> (Vec<usize>, Vec<(u32, f32)>) {
    let named = || indices.iter().zip(values).enumerate().filter(|(_, (_, value))| **value != 0.0);
    let mut starts = vec![0usize; m + 1];
    for (_, (&index, _)) in named() {
        starts[index as usize + 1] += 1;
    }
    for index in 0..m {
        starts[index + 1] += starts[index];
    }
    let mut next = starts.clone();
    let mut entries = vec![(0u32, 0f32); starts[m]];
    for (position, (&index, &value)) in named() {
        let slot = &mut next[index as usize];
        entries[*slot] = ((position / k) as u32, value);
        *slot += 1;
    }
    (starts, entries)
}

multiversion! {
    /// What is below zero counts as larger than any other.
    fn largest(indices: &[i32]) -> u32 {
        indices.iter().fold(0, |largest, &index| largest.max(index as u32))
    }
}

multiversion! {
    fn decode_row(out: &mut [f32], indices: &[i32], values: &[f32], rows: &[f32]) {
        let d = out.len();
        let entries = indices.iter().zip(values).filter(|&(_, &value)| value != 0.0);
        add_all(out, entries.map(|(&index, &value)| (value, &rows[index as usize * d..][..d])));
    }
}

multiversion! {
    fn dot_rows(out: &mut [f32], indices: &[i32], x: &[f32], rows: &[f32]) {
        let d = x.len();
        // What fills up a row is the same entry again and again.
        let (mut last, mut product) = (None, 0.0);
        for (out, &index) in out.iter_mut().zip(indices) {
            if last != Some(index) {
                product = dot(x, &rows[index as usize * d..][..d]);
                last = Some(index);
            }
            *out = product;
        }
    }
}

multiversion! {
    fn add_rows(out: &mut [f32], entries: &[(u32, f32)], grad: &[f32]) {
        let d = out.len();
        add_all(out, entries.iter().map(|&(row, value)| (value, &grad[row as usize * d..][..d])));
    }
}

/// `out += Σ value · row`, in the order of the entries.
#[inline(always)]
fn add_all<'a>(out: &mut [f32], mut entries: impl Iterator<Item = (f32, &'a [f32])>) {
    while let Some(first) = entries.next() {
        let Some(second) = entries.next() else { return add_scaled(out, first.0, first.1) };
        let (third, fourth) = (entries.next(), entries.next());
        match (third, fourth) {
            (Some(third), Some(fourth)) => add_scaled_4(
                out,
                [first.0, second.0, third.0, fourth.0],
                [first.1, second.1, third.1, fourth.1],
            ),
            (third, _) => {
                for (value, row) in [Some(first), Some(second), third].into_iter().flatten() {
                    add_scaled(out, value, row);
                }
            }
        }
    }
}
