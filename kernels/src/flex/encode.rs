//! The encoder: a tile of pre-activations at a time, and what is kept of it.

use std::ops::Range;

use burn::backend::Flex;
use burn::backend::ops::FloatTensorOps;
use rayon::prelude::*;

use super::simd::multiversion;
use super::top_k::{Picked, pick_magnitudes, pick_values};
use super::{Float, Int, floats, new_floats, new_ints, packed, rows_of, widened};
use crate::ops::{Search, Select, dims};

/// Rows of pre-activations made at a time: they stay in the cache until the scan has read them.
pub(super) const TILE_ROWS: usize = 512;
/// Entries that the scan rejects or looks into together.
const BLOCK: usize = 32;

pub(super) fn sparse_encode(
    x: Float,
    w: Float,
    bias: Float,
    by: Float,
    select: Select,
    search: Search,
) -> (Float, Int) {
    let ([n, _], w) = (dims(&x), widened(w));
    let (bias, by) = (packed(bias), packed(by));
    let (bias, by) = (floats(&bias), floats(&by));
    match select {
        Select::TopK(k) | Select::TopKSigned(k) => {
            let mut picked = Picked::new(n, k);
            let x = propose(&mut picked, x, &w, [bias, by], k, Ranking::Value, search);
            for_each_tile(x, w, |tile, m| {
                picked.scan(tile, m, |row, room| pick_values(row, bias, by, k, room));
            });
            if matches!(select, Select::TopK(_)) {
                picked.rectify();
            }
            picked.into_tensors(n, k)
        }
        Select::GroupMax(k) => {
            let mut picked = Vec::with_capacity(n * k);
            for_each_tile(x, w, |tile, m| {
                let rows = tile.par_chunks(m);
                picked.par_extend(rows.flat_map_iter(|row| group_maxima(row, bias, m / k)));
            });
            let (values, columns) = picked.into_iter().unzip();
            (new_floats(values, [n, k]), new_ints(columns, [n, k]))
        }
        Select::TopKMagnitude(k) => {
            let mut picked = Picked::new(n, k);
            let x = propose(&mut picked, x, &w, [bias, by], k, Ranking::Magnitude, search);
            for_each_tile(x, w, |tile, m| {
                picked.scan(tile, m, |row, room| pick_magnitudes(row, bias, by, k, room));
            });
            picked.into_tensors(n, k)
        }
        Select::BatchTopK(n_kept) => batch_top_k(x, w, [bias, by], n_kept, search),
        Select::Above => {
            let mut rows = Vec::with_capacity(n);
            for_each_tile(x, w, |tile, m| {
                rows.par_extend(tile.par_chunks(m).map(|row| {
                    let mut kept = Vec::new();
                    keep_above(row, bias, by, &mut kept);
                    kept
                }));
            });
            filled_up(&rows.iter().map(Vec::as_slice).collect::<Vec<_>>(), |kept| *kept)
        }
    }
}

/// How entries rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ranking {
    /// By their keys.
    Value,
    /// By the magnitudes of their keys.
    Magnitude,
}

/// The picks of the first rows, where they are to be proposed and can be. Gives the other rows.
#[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
fn propose(
    picked: &mut Picked,
    x: Float,
    w: &Float,
    by_column: [&[f32]; 2],
    k: usize,
    ranking: Ranking,
    search: Search,
) -> Float {
    #[cfg(target_arch = "x86_64")]
    if search == Search::Proposed {
        return super::proposal::pick(picked, x, w, by_column, k, ranking);
    }
    x
}

/// Calls `consume` with some rows of `x · w` after the other, and their width.
pub(super) fn for_each_tile(x: Float, w: Float, mut consume: impl FnMut(&[f32], usize)) {
    let ([n, _], [_, m]) = (dims::<2>(&x), dims::<2>(&w));
    for start in (0..n).step_by(TILE_ROWS) {
        let end = (start + TILE_ROWS).min(n);
        let tile = packed(Flex::float_matmul(rows_of(&x, start, end), w.clone()));
        consume(floats(&tile), m);
    }
}

/// An entry that may be among the largest of the batch.
#[derive(Clone, Copy)]
pub(super) struct Contender {
    pub(super) key: f32,
    pub(super) value: f32,
    pub(super) row: u32,
    pub(super) column: u32,
}

impl Contender {
    /// Larger keys first, then earlier entries.
    fn order(&self, other: &Self) -> std::cmp::Ordering {
        let place = |c: &Self| (c.row, c.column);
        other.key.total_cmp(&self.key).then(place(self).cmp(&place(other)))
    }
}

#[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
fn batch_top_k(
    x: Float,
    w: Float,
    by_column: [&[f32]; 2],
    n_kept: usize,
    search: Search,
) -> (Float, Int) {
    let [n, _] = dims(&x);
    #[cfg(target_arch = "x86_64")]
    let proposed = match search {
        Search::Proposed => super::proposal::contenders(&x, &w, by_column, n_kept),
        Search::Full => None,
    };
    #[cfg(not(target_arch = "x86_64"))]
    let proposed = None;
    let mut best = proposed.unwrap_or_else(|| all_contenders(x, w, by_column, n_kept));
    keep_largest(&mut best, n_kept);
    let mut rest = best.as_slice();
    let rows = (0..n as u32).map(|row| {
        let (own, behind) = rest.split_at(rest.partition_point(|contender| contender.row <= row));
        rest = behind;
        own
    });
    filled_up(&rows.collect::<Vec<_>>(), |contender| (contender.column, contender.value))
}

/// By a full search. The bar rises as contenders come in: what is not above it has as many before it
/// as are kept.
fn all_contenders(x: Float, w: Float, [bias, by]: [&[f32]; 2], n_kept: usize) -> Vec<Contender> {
    let (mut best, mut bar, mut first_row) = (Vec::<Contender>::new(), 0f32, 0);
    for_each_tile(x, w, |tile, m| {
        let rows = tile.par_chunks(m).enumerate().map(|(row, tile)| {
            let mut above = Vec::new();
            contend(tile, bias, by, bar, (first_row + row) as u32, &mut above);
            above
        });
        let rows: Vec<Vec<Contender>> = rows.collect();
        rows.iter().for_each(|row| best.extend(row));
        first_row += tile.len() / m;
        bar = keep_largest(&mut best, n_kept).unwrap_or(bar);
    });
    best
}

/// Leaves the `n_kept` largest in the order in which they stand; gives the smallest key of them, if
/// there were more.
fn keep_largest(best: &mut Vec<Contender>, n_kept: usize) -> Option<f32> {
    if best.len() <= n_kept {
        return None;
    }
    let mut ranked = best.clone();
    let last = *ranked.select_nth_unstable_by(n_kept - 1, Contender::order).1;
    best.retain(|contender| contender.order(&last).is_le());
    Some(last.key)
}

/// The largest entry of each group, zero where it is below, with its column.
fn group_maxima<'a>(
    row: &'a [f32],
    bias: &'a [f32],
    size: usize,
) -> impl Iterator<Item = (f32, i32)> + 'a {
    let groups = row.chunks(size).zip(bias.chunks(size)).enumerate();
    groups.map(move |(group, (row, bias))| {
        let (mut best, mut within) = (f32::NEG_INFINITY, 0);
        for (at, (x, bias)) in row.iter().zip(bias).enumerate() {
            if x + bias > best {
                (best, within) = (x + bias, at);
            }
        }
        (best.max(0.0), (group * size + within) as i32)
    })
}

/// Columns and values of every row, with zeros behind those of the shorter rows.
fn filled_up<E: Sync>(
    rows: &[&[E]],
    column_and_value: impl Fn(&E) -> (u32, f32) + Sync,
) -> (Float, Int) {
    let k = rows.iter().map(|row| row.len()).max().unwrap_or(0).max(1);
    let (mut values, mut columns) = (vec![0f32; rows.len() * k], vec![0i32; rows.len() * k]);
    let slots = values.par_chunks_mut(k).zip(columns.par_chunks_mut(k));
    slots.zip(rows).for_each(|((values, columns), row)| {
        for ((to_value, to_column), entry) in values.iter_mut().zip(columns).zip(*row) {
            let (column, value) = column_and_value(entry);
            (*to_value, *to_column) = (value, column as i32);
        }
    });
    (new_floats(values, [rows.len(), k]), new_ints(columns, [rows.len(), k]))
}

/// Calls `take` on the entries for which `is_kept`, asking whole blocks first.
#[inline(always)]
pub(super) fn sift(m: usize, is_kept: impl Fn(usize) -> bool, mut take: impl FnMut(usize)) {
    for block in blocks_with_some(m, &is_kept) {
        block.filter(|&i| is_kept(i)).for_each(&mut take);
    }
}

/// The blocks with entries for which `is_kept`.
#[inline(always)]
fn blocks_with_some(
    m: usize,
    is_kept: impl Fn(usize) -> bool,
) -> impl Iterator<Item = Range<usize>> {
    let blocks = (0..m).step_by(BLOCK).map(move |start| start..(start + BLOCK).min(m));
    blocks.filter(
        #[inline(always)]
        move |block| {
            let mut any = false;
            for i in block.clone() {
                any |= is_kept(i);
            }
            any
        },
    )
}

multiversion! {
    fn keep_above(row: &[f32], bias: &[f32], threshold: &[f32], kept: &mut Vec<(u32, f32)>) {
        let (bias, threshold) = (&bias[..row.len()], &threshold[..row.len()]);
        let is_kept = |i: usize| row[i] + bias[i] > threshold[i].max(0.0);
        for block in blocks_with_some(row.len(), is_kept) {
            // Each entry is written, and stays if it is kept: where many are, no branch could be
            // foretold.
            let (mut found, mut n_found) = ([(0u32, 0f32); BLOCK], 0);
            for i in block {
                found[n_found % BLOCK] = (i as u32, row[i] + bias[i]);
                n_found += usize::from(is_kept(i));
            }
            kept.extend_from_slice(&found[..n_found]);
        }
    }
}

multiversion! {
    fn contend(
        tile: &[f32],
        bias: &[f32],
        by: &[f32],
        bar: f32,
        row: u32,
        above: &mut Vec<Contender>,
    ) {
        let (bias, by) = (&bias[..tile.len()], &by[..tile.len()]);
        sift(
            tile.len(),
            #[inline(always)] |i| (tile[i] + bias[i]) * by[i] > bar,
            #[inline(always)] |i| {
                let value = tile[i] + bias[i];
                above.push(Contender { key: value * by[i], value, row, column: i as u32 });
            },
        );
    }
}
