//! The largest entries of all rows together.
//!
//! A bar is guessed from some of the rows. Where as many entries as are kept are certain to reach it,
//! none that may not reach it is kept, and what remains is confirmed as it is for single rows.

use rayon::prelude::*;

use super::{Desk, Proposal, around, kth_largest};
use crate::flex::encode::Contender;
use crate::flex::quantized::LEFT_ROWS;
use crate::flex::rescore::dots;
use crate::flex::simd::multiversion;

/// Panels of rows, spread over the batch, that the bar is guessed from.
const SAMPLE: usize = 16;
/// So many times the entries that are kept are to reach the guess.
const SURPLUS: f64 = 1.5;

/// An entry that may be among the largest.
struct Possible {
    row: u32,
    column: u32,
    low: f32,
    high: f32,
}

impl Proposal<'_> {
    /// All entries that may be among the `n_kept` largest above zero, and their values, by rows. None
    /// if the rows are too unlike each other for a guess, or too few entries are above zero.
    pub(super) fn contenders(&self, n_kept: usize) -> Option<Vec<Contender>> {
        let guess = self.guess(n_kept).filter(|guess| *guess > 0.0)?;
        let n = self.n_rows();
        let n_rows = self.task_rows();
        let tasks = (0..n.div_ceil(n_rows)).into_par_iter();
        let mut tasks: Vec<Vec<Possible>> = tasks
            .map_init(Vec::new, |keys, task| {
                let rows = task * n_rows..((task + 1) * n_rows).min(n);
                self.keys(rows.clone(), keys);
                let mut possible = Vec::new();
                for (row, keys) in rows.zip(keys.chunks_exact(self.width())) {
                    let keys = &keys[..self.bias.len()];
                    let excess = self.margins.excess(self.quantized_x.rows()[row]);
                    let (slope, offset) = (&self.margins.slope, &self.margins.offset);
                    reaching(keys, slope, offset, excess, guess, row as u32, &mut possible);
                }
                possible
            })
            .collect();
        let possible = || tasks.iter().flatten();
        let mut lows: Vec<f32> = possible().map(|x| x.low).filter(|low| *low >= guess).collect();
        if lows.len() < n_kept {
            return None;
        }
        let bar = kth_largest(&mut lows, n_kept);
        let confirmed = tasks.par_iter_mut().map_init(Desk::default, |desk, possible| {
            possible.retain(|x| x.high >= bar);
            let rows = possible.chunk_by(|a, b| a.row == b.row);
            rows.flat_map(|row| self.confirmed(row, desk)).collect::<Vec<_>>()
        });
        Some(confirmed.flatten().collect())
    }

    /// A bar that more than the `n_kept` largest should reach.
    fn guess(&self, n_kept: usize) -> Option<f32> {
        let n = self.n_rows();
        let n_panels = n / LEFT_ROWS;
        let n_sampled = SAMPLE.min(n_panels);
        let panels = (0..n_sampled).into_par_iter().map(|i| i * n_panels / n_sampled);
        let keys = panels.flat_map_iter(|panel| {
            let mut keys = Vec::new();
            self.keys(panel * LEFT_ROWS..(panel + 1) * LEFT_ROWS, &mut keys);
            let rows = keys.chunks_exact(self.width());
            let keys = rows.flat_map(|keys| &keys[..self.bias.len()]);
            keys.copied().filter(|key| *key > 0.0).collect::<Vec<_>>()
        });
        let mut keys: Vec<f32> = keys.collect();
        let share = (n_sampled * LEFT_ROWS) as f64 / n as f64;
        let rank = (SURPLUS * share * n_kept as f64).ceil() as usize;
        (0 < rank && rank <= keys.len()).then(|| kth_largest(&mut keys, rank))
    }

    /// The exact keys and values of some entries of a row.
    fn confirmed(&self, entries: &[Possible], desk: &mut Desk) -> Vec<Contender> {
        let Desk { columns, sums, .. } = desk;
        let row = entries[0].row;
        columns.clear();
        columns.extend(entries.iter().map(|entry| entry.column));
        let x = &self.x[row as usize * self.d..][..self.d];
        // SAFETY: a proposal is only made after the processor was asked.
        unsafe { dots(x, self.w, self.order, columns, sums) };
        let contender = |(&column, sum): (&u32, &f32)| {
            let value = *sum + self.bias[column as usize];
            Contender { key: value * self.by[column as usize], value, row, column }
        };
        columns.iter().zip(sums.iter()).map(contender).collect()
    }
}

multiversion! {
    fn reaching(
        keys: &[f32],
        slope: &[f32],
        offset: &[f32],
        excess: f32,
        bar: f32,
        row: u32,
        possible: &mut Vec<Possible>,
    ) {
        let m = keys.len();
        let (slope, offset) = (&slope[..m], &offset[..m]);
        crate::flex::encode::sift(
            m,
            #[inline(always)] |i| around(keys[i], slope[i], excess, offset[i]).1 >= bar,
            #[inline(always)] |i| {
                let (low, high) = around(keys[i], slope[i], excess, offset[i]);
                possible.push(Possible { row, column: i as u32, low, high });
            },
        );
    }
}
