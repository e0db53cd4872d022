//! Top-k of rows by a threshold scan.

use rayon::prelude::*;

use super::simd::multiversion;
use super::{Float, Int, floats, new_floats, new_ints, packed};
use crate::ops::dims;

/// Entries that the scan rejects or looks into together.
const BLOCK: usize = 32;

/// A ranked entry: its key, the value to report, and its column.
#[derive(Clone, Copy)]
pub(super) struct Candidate {
    key: f32,
    value: f32,
    column: u32,
}

impl Candidate {
    /// Larger keys first, then lower columns; keys are never NaN.
    fn order(&self, other: &Self) -> std::cmp::Ordering {
        other.key.total_cmp(&self.key).then(self.column.cmp(&other.column))
    }
}

/// `−0` and NaN would break ties or comparisons.
#[inline(always)]
fn key(x: f32) -> f32 {
    if x.is_nan() { f32::NEG_INFINITY } else { x + 0.0 }
}

pub(super) fn top_k(x: Float, k: usize) -> (Float, Int) {
    let [n, m] = dims(&x);
    let x = packed(x);
    let mut picked = Picked::new(n, k);
    picked.scan(floats(&x), m, |row, best| scan_plain(row, k, best));
    picked.into_tensors(n, k)
}

/// Values and columns picked so far, row after row.
pub(super) struct Picked {
    values: Vec<f32>,
    columns: Vec<i32>,
    k: usize,
}

impl Picked {
    pub(super) fn new(n: usize, k: usize) -> Self {
        Self { values: Vec::with_capacity(n * k), columns: Vec::with_capacity(n * k), k }
    }

    /// Appends the picks of every row of `x`.
    pub(super) fn scan(
        &mut self,
        x: &[f32],
        m: usize,
        pick: impl Fn(&[f32], &mut Vec<Candidate>) + Sync,
    ) {
        let (k, from) = (self.k, self.values.len());
        let n = x.len() / m;
        self.values.resize(from + n * k, 0.0);
        self.columns.resize(from + n * k, 0);
        self.values[from..]
            .par_chunks_mut(k)
            .zip(self.columns[from..].par_chunks_mut(k))
            .zip(x.par_chunks(m))
            .for_each_init(
                || Vec::with_capacity(4 * k + BLOCK),
                |best, ((values, columns), row)| {
                    pick(row, best);
                    for (slot, candidate) in best.iter().enumerate() {
                        values[slot] = candidate.value;
                        columns[slot] = candidate.column as i32;
                    }
                },
            );
    }

    /// What is below zero counts as zero.
    pub(super) fn rectify(&mut self) {
        for value in &mut self.values {
            *value = value.max(0.0);
        }
    }

    pub(super) fn into_tensors(self, n: usize, k: usize) -> (Float, Int) {
        (new_floats(self.values, [n, k]), new_ints(self.columns, [n, k]))
    }
}

multiversion! {
    fn scan_plain(row: &[f32], k: usize, best: &mut Vec<Candidate>) {
        scan(row.len(), k, best, #[inline(always)] |i| (row[i], row[i]));
    }
}

multiversion! {
    /// The columns with the largest `(row + bias) ⊙ scale`.
    pub(super) fn pick_values(
        row: &[f32],
        bias: &[f32],
        scale: &[f32],
        k: usize,
        best: &mut Vec<Candidate>,
    ) {
        let (bias, scale) = (&bias[..row.len()], &scale[..row.len()]);
        scan(row.len(), k, best, #[inline(always)] |i| {
            let value = row[i] + bias[i];
            (value * scale[i], value)
        });
    }
}

multiversion! {
    /// The columns with the largest `|(row + bias) ⊙ scale|`.
    pub(super) fn pick_magnitudes(
        row: &[f32],
        bias: &[f32],
        scale: &[f32],
        k: usize,
        best: &mut Vec<Candidate>,
    ) {
        let (bias, scale) = (&bias[..row.len()], &scale[..row.len()]);
        scan(row.len(), k, best, #[inline(always)] |i| {
            let value = row[i] + bias[i];
            ((value * scale[i]).abs(), value)
        });
    }
}

/// Leaves the `k` best of `m` entries in `best`, in order.
///
/// The threshold is the k-th best key of some earlier prefix, so an entry that does not exceed it
/// cannot be among the best (an equal one comes later, and ties go to the lower column). Whole
/// blocks are rejected by one vectorised comparison.
#[inline(always)]
fn scan(m: usize, k: usize, best: &mut Vec<Candidate>, at: impl Fn(usize) -> (f32, f32)) {
    best.clear();
    let candidate = |i: usize| {
        let (ranked, value) = at(i);
        Candidate { key: key(ranked), value, column: i as u32 }
    };
    best.extend((0..k).map(candidate));
    let mut threshold = best.iter().map(|c| c.key).fold(f32::INFINITY, f32::min);
    let mut i = k;
    while i < m {
        let end = (i + BLOCK).min(m);
        let mut any = false;
        for j in i..end {
            any |= at(j).0 > threshold;
        }
        if any {
            best.extend((i..end).map(candidate).filter(|c| c.key > threshold));
            if best.len() >= 4 * k {
                threshold = shrink(best, k);
            }
        }
        i = end;
    }
    if best.len() > k {
        shrink(best, k);
    }
    best.sort_unstable_by(Candidate::order);
}

/// Keeps the `k` best and gives the key of the last of them.
fn shrink(best: &mut Vec<Candidate>, k: usize) -> f32 {
    best.select_nth_unstable_by(k - 1, Candidate::order);
    best.truncate(k);
    best[k - 1].key
}
