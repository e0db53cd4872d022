//! Top-k of rows by the maxima of strands of columns.

use rayon::prelude::*;

use super::simd::multiversion;
use super::{Float, Int, floats, new_floats, new_ints, packed};
use crate::ops::dims;

/// Strands side by side.
const LANES: usize = 32;
/// Entries of a strand, at most.
const DEEPEST: usize = 64;

/// A ranked entry: its key, the value to report, and its column.
#[derive(Clone, Copy)]
pub(super) struct Candidate {
    key: f32,
    pub(super) value: f32,
    pub(super) column: u32,
}

impl Candidate {
    pub(super) fn new(ranked: f32, value: f32, column: u32) -> Self {
        Self { key: key(ranked), value, column }
    }

    /// Larger keys first, then lower columns; keys are never NaN.
    fn order(&self, other: &Self) -> std::cmp::Ordering {
        other.key.total_cmp(&self.key).then(self.column.cmp(&other.column))
    }
}

/// Room to work in, used again from row to row.
#[derive(Default)]
pub(super) struct Room {
    pub(super) best: Vec<Candidate>,
    maxima: Vec<f32>,
    ranked: Vec<f32>,
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
    picked.scan(floats(&x), m, |row, room| scan_plain(row, k, room));
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
    pub(super) fn scan(&mut self, x: &[f32], m: usize, pick: impl Fn(&[f32], &mut Room) + Sync) {
        let k = self.k;
        let (values, columns) = self.appended(x.len() / m);
        values.par_chunks_mut(k).zip(columns.par_chunks_mut(k)).zip(x.par_chunks(m)).for_each_init(
            Room::default,
            |room, ((values, columns), row)| {
                pick(row, room);
                for (slot, candidate) in room.best.iter().enumerate() {
                    values[slot] = candidate.value;
                    columns[slot] = candidate.column as i32;
                }
            },
        );
    }

    /// Places for the picks of so many more rows.
    pub(super) fn appended(&mut self, n: usize) -> (&mut [f32], &mut [i32]) {
        let from = self.values.len();
        self.values.resize(from + n * self.k, 0.0);
        self.columns.resize(from + n * self.k, 0);
        (&mut self.values[from..], &mut self.columns[from..])
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
    fn scan_plain(row: &[f32], k: usize, room: &mut Room) {
        scan(row.len(), k, room, #[inline(always)] |i| (row[i], row[i]));
    }
}

multiversion! {
    /// The columns with the largest `(row + bias) ⊙ scale`.
    pub(super) fn pick_values(
        row: &[f32],
        bias: &[f32],
        scale: &[f32],
        k: usize,
        room: &mut Room,
    ) {
        let (bias, scale) = (&bias[..row.len()], &scale[..row.len()]);
        scan(row.len(), k, room, #[inline(always)] |i| {
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
        room: &mut Room,
    ) {
        let (bias, scale) = (&bias[..row.len()], &scale[..row.len()]);
        scan(row.len(), k, room, #[inline(always)] |i| {
            let value = row[i] + bias[i];
            ((value * scale[i]).abs(), value)
        });
    }
}

/// Leaves the `k` best of `m` entries in `room.best`, in order.
///
/// Columns are dealt out to strands, and the maximum of each is found by vector instructions. The
/// k-th largest of these maxima is a bar that at least `k` entries reach, and few more: only strands
/// whose maximum reaches it are looked into.
#[inline(always)]
fn scan(m: usize, k: usize, room: &mut Room, at: impl Fn(usize) -> (f32, f32)) {
    let Room { best, maxima, ranked } = room;
    best.clear();
    let candidate = |i: usize| {
        let (ranked, value) = at(i);
        Candidate::new(ranked, value, i as u32)
    };
    let depth = (m / (8 * k)).clamp(1, DEEPEST);
    let whole = m / (LANES * depth) * (LANES * depth);
    if whole / depth < 2 * k {
        best.extend((0..m).map(candidate));
    } else {
        maxima.clear();
        for group in (0..whole).step_by(LANES * depth) {
            let mut lanes = [f32::NEG_INFINITY; LANES];
            for start in (group..group + LANES * depth).step_by(LANES) {
                for (lane, max) in lanes.iter_mut().enumerate() {
                    let x = at(start + lane).0;
                    *max = if x > *max { x } else { *max };
                }
            }
            maxima.extend(lanes);
        }
        ranked.clone_from(maxima);
        let (_, &mut bar, _) = ranked.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
        let reaches = |candidate: &Candidate| candidate.key >= bar;
        for (strand, _) in maxima.iter().enumerate().filter(|&(_, &max)| max >= bar) {
            let first = strand / LANES * LANES * depth + strand % LANES;
            let columns = (first..first + LANES * depth).step_by(LANES);
            best.extend(columns.map(candidate).filter(reaches));
        }
        best.extend((whole..m).map(candidate).filter(reaches));
    }
    keep_best(best, k);
}

/// Leaves the `k` best, in order.
pub(super) fn keep_best(best: &mut Vec<Candidate>, k: usize) {
    if best.len() > k {
        best.select_nth_unstable_by(k - 1, Candidate::order);
        best.truncate(k);
    }
    best.sort_unstable_by(Candidate::order);
}
