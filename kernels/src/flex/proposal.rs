//! The encoder's largest entries, proposed by a product in integers and confirmed in f32.
//!
//! ```text
//! |κ − κ̂| ≤ |by| · ( ‖δx‖ ‖w‖ + ‖x‖ ‖δw‖ + ε (‖x‖ ‖w‖ + |bias|) )
//! ```
//!
//! for the key `κ = (x·w + bias) · by` that the ordinary product gives, with all its roundings, and
//! `κ̂`, that of the rows in integers; `δ` is what these leave of the rows (Cauchy and Schwarz). Where
//! `k` entries are certain to reach a bar, whatever may not reach it is none of the `k` largest. What
//! may is computed anew, in the order of the ordinary product, and so has its bits.

mod batch;

use std::ops::Range;

use burn::backend::Flex;
use burn::backend::ops::FloatTensorOps;
use rayon::prelude::*;

use super::encode::{Contender, Ranking, TILE_ROWS};
use super::quantized::{
    Affine, LEFT_ROWS, QuantizedRow, QuantizedRows, RIGHT_ROWS, above, products,
};
use super::rescore::{Order, dots};
use super::simd::multiversion;
use super::top_k::{Candidate, Picked, Room, keep_best};
use super::{Float, floats, packed, rows_of};
use crate::ops::dims;

/// From so few columns, and rows of a tile, on the blocked product has other ways of its own.
const FEWEST_COLUMNS: usize = 65;
const FEWEST_ROWS: usize = 8;
/// Fewer rows than that do not pay for the weights' integers.
const FEWEST_IN_ALL: usize = 256;
/// With more than one of so many entries to keep, computing them anew costs more than is gained.
const SPARSITY: usize = 16;
/// Longer rows would need another bound of f32's roundings.
const WIDEST: usize = 1 << 17;
/// Biases and factors larger than that might leave the range of f32.
const LARGEST_BIAS: f32 = 1e20;
const LARGEST_BY: f32 = 1e12;
/// Keys that a task has at a time: few enough to stay in a cache.
const TASK_KEYS: usize = 1 << 20;
/// Bytes of the integers of a task's rows.
const TASK_BYTES: usize = 200 << 10;
/// Strands side by side.
const LANES: usize = 32;
/// Entries of a strand, at most.
const DEEPEST: usize = 64;

/// Picks the `k` largest entries of the first rows of `x`, as many as can be done in this way. Gives
/// the others.
pub(super) fn pick(
    picked: &mut Picked,
    x: Float,
    w: &Float,
    [bias, by]: [&[f32]; 2],
    k: usize,
    ranking: Ranking,
) -> Float {
    let ([n, d], [_, m]) = (dims::<2>(&x), dims::<2>(w));
    let n_proposed = in_whole_tiles(n);
    let pays = n_proposed >= FEWEST_IN_ALL && k.saturating_mul(SPARSITY) <= m;
    if !(pays && fits(d, m)) {
        return x;
    }
    let rows = packed(rows_of(&x, 0, n_proposed));
    let latents = packed(Flex::float_transpose(w.clone()));
    let (rows, latents) = (floats(&rows), floats(&latents));
    let Some(proposal) = Proposal::new([rows, latents], d, [bias, by], ranking) else { return x };
    proposal.pick(picked, k);
    rows_of(&x, n_proposed, n)
}

/// Entries by rows among which are the `n_kept` largest of the whole batch that are above zero, with
/// their exact keys; none if they cannot be found in this way.
pub(super) fn contenders(
    x: &Float,
    w: &Float,
    [bias, by]: [&[f32]; 2],
    n_kept: usize,
) -> Option<Vec<Contender>> {
    let ([n, d], [_, m]) = (dims::<2>(x), dims::<2>(w));
    let pays = n >= FEWEST_IN_ALL && n_kept.saturating_mul(SPARSITY) <= n * m;
    if !(pays && in_whole_tiles(n) == n && fits(d, m)) {
        return None;
    }
    let rows = packed(x.clone());
    let latents = packed(Flex::float_transpose(w.clone()));
    let (rows, latents) = (floats(&rows), floats(&latents));
    Proposal::new([rows, latents], d, [bias, by], Ranking::Value)?.contenders(n_kept)
}

/// The rows without a last tile of few, which would be multiplied in another way.
fn in_whole_tiles(n: usize) -> usize {
    match n % TILE_ROWS {
        rest if rest < FEWEST_ROWS => n - rest,
        _ => n,
    }
}

/// Whether the blocked product of such widths, and the processor, are as is assumed here.
fn fits(d: usize, m: usize) -> bool {
    m >= FEWEST_COLUMNS && (3..=WIDEST).contains(&d) && has_instructions()
}

fn has_instructions() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

struct Proposal<'a> {
    x: &'a [f32],
    /// `[m, d]`
    w: &'a [f32],
    d: usize,
    bias: &'a [f32],
    by: &'a [f32],
    ranking: Ranking,
    order: Order,
    quantized_x: QuantizedRows,
    quantized_w: QuantizedRows,
    affine: Affine,
    margins: Margins,
}

/// `|κ − κ̂| ≤ slope · excess(row) + offset`
struct Margins {
    /// `|by| · ‖w‖`
    slope: Vec<f32>,
    offset: Vec<f32>,
    /// `‖δw‖ / ‖w‖` at most, and what f32 rounds.
    relative: f64,
}

impl Margins {
    fn new(w: &[QuantizedRow], d: usize, [bias, by]: [&[f32]; 2]) -> Self {
        // More than underflow takes from a sum.
        const TINY: f64 = 1e-30;
        let unit = f64::from(f32::EPSILON) / 2.0;
        let ratios = w.iter().filter(|row| row.norm > 0.0).map(|row| row.error / row.norm);
        let largest = f64::from(ratios.fold(0.0, f32::max));
        let with_by = w.iter().zip(by).zip(bias);
        Self {
            slope: w.iter().zip(by).map(|(w, by)| above(f64::from(w.norm * by.abs()))).collect(),
            offset: with_by
                .map(|((_, by), bias)| {
                    let (bias, by) = (f64::from(bias.abs()), f64::from(by.abs()));
                    above(by * (8.0 * unit * bias + TINY) + TINY)
                })
                .collect(),
            // d + 2 roundings of the sum, and a few before and behind it.
            relative: largest * (1.0 + 1e-6) + (1.1 * d as f64 + 16.0) * unit,
        }
    }

    fn excess(&self, x: QuantizedRow) -> f32 {
        above(f64::from(x.error) + f64::from(x.norm) * self.relative)
    }
}

/// Room to work in, used again from task to task.
#[derive(Default)]
struct Desk {
    keys: Vec<f32>,
    bounds: Bounds,
    columns: Vec<u32>,
    sums: Vec<f32>,
    room: Room,
}

/// What the keys of a row are at least and at most.
#[derive(Default)]
struct Bounds {
    lows: Vec<f32>,
    highs: Vec<f32>,
    ranked: Vec<f32>,
    possible: Vec<Possible>,
}

/// An entry that may be among the largest.
#[derive(Clone, Copy)]
struct Possible {
    column: u32,
    low: f32,
    high: f32,
}

impl<'a> Proposal<'a> {
    fn new(
        [x, w]: [&'a [f32]; 2],
        d: usize,
        [bias, by]: [&'a [f32]; 2],
        ranking: Ranking,
    ) -> Option<Self> {
        let within = |values: &[f32], limit: f32| values.iter().all(|value| value.abs() <= limit);
        if !(within(bias, LARGEST_BIAS) && within(by, LARGEST_BY)) {
            return None;
        }
        let order = Order::of(d)?;
        let quantized_w = QuantizedRows::new(w, d, RIGHT_ROWS)?;
        let quantized_x = QuantizedRows::new(x, d, LEFT_ROWS)?;
        let width = quantized_w.rows().len();
        let filled_up = |mut values: Vec<f32>| {
            values.resize(width, 0.0);
            values
        };
        let affine = Affine {
            factor: filled_up(by.to_vec()),
            summand: filled_up(bias.iter().zip(by).map(|(bias, by)| bias * by).collect()),
        };
        let margins = Margins::new(&quantized_w.rows()[..bias.len()], d, [bias, by]);
        Some(Self { x, w, d, bias, by, ranking, order, quantized_x, quantized_w, affine, margins })
    }

    fn n_rows(&self) -> usize {
        self.x.len() / self.d
    }

    /// Keys of a row, those that fill up panels included.
    fn width(&self) -> usize {
        self.affine.factor.len()
    }

    /// Rows that a task has at a time: whole panels.
    fn task_rows(&self) -> usize {
        let row_bytes = 2 * self.d.next_multiple_of(2);
        let rows = (TASK_KEYS / self.width()).min(TASK_BYTES / row_bytes);
        rows.clamp(LEFT_ROWS, 16 * LEFT_ROWS) / LEFT_ROWS * LEFT_ROWS
    }

    /// The keys of some rows, of which the first begins a panel, and of those that fill up the last.
    fn keys(&self, rows: Range<usize>, keys: &mut Vec<f32>) {
        let panels = rows.start / LEFT_ROWS..rows.end.div_ceil(LEFT_ROWS);
        keys.resize(panels.len() * LEFT_ROWS * self.width(), 0.0);
        // SAFETY: a proposal is only made after the processor was asked.
        unsafe { products(&self.quantized_x, panels, &self.quantized_w, &self.affine, keys) };
    }

    fn pick(&self, picked: &mut Picked, k: usize) {
        let (width, n_rows) = (self.width(), self.task_rows());
        let (values, columns) = picked.appended(self.n_rows());
        let slots = values.par_chunks_mut(n_rows * k).zip(columns.par_chunks_mut(n_rows * k));
        slots.enumerate().for_each_init(Desk::default, |desk, (task, (values, columns))| {
            let first = task * n_rows;
            self.keys(first..first + values.len() / k, &mut desk.keys);
            let slots = values.chunks_exact_mut(k).zip(columns.chunks_exact_mut(k));
            for (row, (values, columns)) in slots.enumerate() {
                self.pick_row(first + row, row * width, k, desk);
                for (slot, candidate) in desk.room.best.iter().enumerate() {
                    values[slot] = candidate.value;
                    columns[slot] = candidate.column as i32;
                }
            }
        });
    }

    /// Leaves the `k` best of a row in `desk.room`; its keys begin at `from`.
    fn pick_row(&self, row: usize, from: usize, k: usize, desk: &mut Desk) {
        let Desk { keys, bounds, columns, sums, room } = desk;
        let keys = &keys[from..][..self.bias.len()];
        let excess = self.margins.excess(self.quantized_x.rows()[row]);
        match self.ranking {
            Ranking::Value => bound_values(keys, &self.margins, excess, k, bounds),
            Ranking::Magnitude => bound_magnitudes(keys, &self.margins, excess, k, bounds),
        }
        columns.clear();
        columns.extend(bounds.possible.iter().map(|possible| possible.column));
        let x = &self.x[row * self.d..][..self.d];
        // SAFETY: a proposal is only made after the processor was asked.
        unsafe { dots(x, self.w, self.order, columns, sums) };
        room.best.clear();
        room.best.extend(columns.iter().zip(sums).map(|(&column, sum)| {
            let value = *sum + self.bias[column as usize];
            let ranked = value * self.by[column as usize];
            let ranked = match self.ranking {
                Ranking::Value => ranked,
                Ranking::Magnitude => ranked.abs(),
            };
            Candidate::new(ranked, value, column)
        }));
        keep_best(&mut room.best, k);
    }
}

multiversion! {
    fn bound_values(keys: &[f32], margins: &Margins, excess: f32, k: usize, bounds: &mut Bounds) {
        bound(keys, margins, excess, k, bounds, #[inline(always)] |key| key);
    }
}

multiversion! {
    fn bound_magnitudes(
        keys: &[f32],
        margins: &Margins,
        excess: f32,
        k: usize,
        bounds: &mut Bounds,
    ) {
        bound(keys, margins, excess, k, bounds, #[inline(always)] |key: f32| key.abs());
    }
}

/// What a key is at least and at most.
#[inline(always)]
fn around(key: f32, slope: f32, excess: f32, offset: f32) -> (f32, f32) {
    let margin = slope.mul_add(excess, offset);
    (key - margin, key + margin)
}

/// Leaves all entries in `bounds.possible` that may be among the `k` largest.
///
/// As in the scan of exact keys, columns are dealt out to strands: `k` strands have an entry that is
/// certain to reach the bar, and only those are looked into that have one that may.
#[inline(always)]
fn bound(
    keys: &[f32],
    margins: &Margins,
    excess: f32,
    k: usize,
    bounds: &mut Bounds,
    measure: impl Fn(f32) -> f32,
) {
    let m = keys.len();
    let (slope, offset) = (&margins.slope[..m], &margins.offset[..m]);
    let Bounds { lows, highs, ranked, possible } = bounds;
    possible.clear();
    let depth = (m / (8 * k)).clamp(1, DEEPEST);
    let whole = m / (LANES * depth) * (LANES * depth);
    let mut bar = f32::NEG_INFINITY;
    if whole / depth >= 2 * k {
        lows.clear();
        highs.clear();
        let vectors =
            [keys, slope, offset].map(|x| x[..whole].as_chunks::<LANES>().0.chunks_exact(depth));
        let [keys, slope, offset] = vectors;
        for ((keys, slope), offset) in keys.zip(slope).zip(offset) {
            let (mut low, mut high) = ([f32::NEG_INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
            for ((keys, slope), offset) in keys.iter().zip(slope).zip(offset) {
                for lane in 0..LANES {
                    let (l, h) = around(measure(keys[lane]), slope[lane], excess, offset[lane]);
                    low[lane] = if l > low[lane] { l } else { low[lane] };
                    high[lane] = if h > high[lane] { h } else { high[lane] };
                }
            }
            lows.extend(low);
            highs.extend(high);
        }
        bar = kth_largest(lows, k);
    }
    let mut look = |i: usize| {
        let (low, high) = around(measure(keys[i]), slope[i], excess, offset[i]);
        if high >= bar {
            possible.push(Possible { column: i as u32, low, high });
        }
    };
    if bar == f32::NEG_INFINITY {
        (0..m).for_each(look);
    } else {
        for (strand, _) in highs.iter().enumerate().filter(|&(_, &high)| high >= bar) {
            let first = strand / LANES * LANES * depth + strand % LANES;
            for i in 0..depth {
                look(first + i * LANES);
            }
        }
        (whole..m).for_each(look);
    }
    // Strands hide what is second to another.
    ranked.clear();
    ranked.extend(possible.iter().map(|possible| possible.low));
    let bar = kth_largest(ranked, k);
    possible.retain(|possible| possible.high >= bar);
}

/// The `k`-th largest, which leaves the others in another order.
fn kth_largest(values: &mut [f32], k: usize) -> f32 {
    *values.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Normally distributed, by the central limit theorem.
    fn normal(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        (0..n).map(|_| (0..12).map(|_| uniform()).sum()).collect()
    }

    #[test]
    fn few_more_than_k_are_possible() {
        if !has_instructions() {
            return;
        }
        let (n, d, m, k) = (96, 576, 1024, 8);
        let (x, w) = (normal(n * d, 1), normal(m * d, 2));
        let (bias, by) = (vec![0.0; m], vec![1.0; m]);
        let proposal = Proposal::new([&x, &w], d, [&bias, &by], Ranking::Value).expect("finite");
        let (mut desk, mut n_possible) = (Desk::default(), 0);
        proposal.keys(0..n, &mut desk.keys);
        for row in 0..n {
            proposal.pick_row(row, row * m, k, &mut desk);
            n_possible += desk.columns.len();
        }
        // Keys are sums of 576 products with a standard deviation of 24, known to about 0.3.
        assert!(n_possible < n * (k + 1), "{n_possible} for {n} rows of {k}");
    }
}
