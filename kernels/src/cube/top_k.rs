//! The largest entries of rows: exact, in one order, without sorting and without atomics.
//!
//! A cube takes a row. Each unit finds the largest of its share; the k-th of these is no larger than
//! the k-th of the row, and little smaller. What reaches it is put together, a few times `k` entries,
//! and each of those counts how many come before it: that is its place.

use burn::backend::TensorMetadata;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, Shape, Slice};
use burn_cubecl::CubeBackend;
use cubecl::prelude::*;

use super::{Float, INDEX, Int, cubes, element, empty_beside, packed};
use crate::ops::{Select, cast_like};

/// Units that share a row.
const UNITS: u32 = 256;
/// The shared memory for what may be kept; rows in which more reaches the bound (many equal ones)
/// are searched entry by entry.
const ROOM: u32 = 1024;
/// Pre-activations that exist at a time: 64 MiB.
const TILE: usize = 1 << 24;

/// How entries are ranked and what is kept of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Rank {
    /// The numbers themselves.
    Plain,
    /// `relu(x + bias)` of the largest `(x + bias) ⊙ by`.
    Rectified,
    /// `x + bias` of the largest `(x + bias) ⊙ by`.
    Signed,
    /// `x + bias` of the largest `|(x + bias) ⊙ by|`.
    Magnitude,
}

/// Whether the kernel is for so many: bounds of shares are near the k-th entry only where there are
/// several shares for each.
pub(super) fn fits(k: usize) -> bool {
    k <= UNITS as usize / 2
}

pub(super) fn top_k(x: Float, k: usize) -> (Float, Int) {
    let [n, _]: [usize; 2] = x.shape().dims();
    let values = empty_beside(&x, [n, k], DType::F32);
    let columns = empty_beside(&x, [n, k], INDEX);
    let nothing = empty_beside(&x, [1], DType::F32);
    let by = [nothing.clone(), nothing];
    pick(packed(x), by, (values.clone(), columns.clone()), 0, k, Rank::Plain);
    (values, columns)
}

/// The encoder: some rows of pre-activations at a time.
pub(super) fn encode(
    x: Float,
    w: Float,
    bias: Float,
    by: Float,
    select: Select,
    k: usize,
) -> (Float, Int) {
    let ([n, d], [_, m]): ([usize; 2], [usize; 2]) = (x.shape().dims(), w.shape().dims());
    let rank = match select {
        Select::TopKSigned(_) => Rank::Signed,
        Select::TopKMagnitude(_) => Rank::Magnitude,
        _ => Rank::Rectified,
    };
    let values = empty_beside(&x, [n, k], DType::F32);
    let columns = empty_beside(&x, [n, k], INDEX);
    let by = [packed(bias), packed(by)];
    let w = cast_like::<CubeBackend>(w, &x);
    let rows_of_tile = (TILE / m).max(1);
    for first in (0..n).step_by(rows_of_tile) {
        let end = (first + rows_of_tile).min(n);
        let slices = [Slice::from(first..end), Slice::from(0..d)];
        let tile = CubeBackend::float_slice(x.clone(), &slices);
        let products = packed(CubeBackend::float_matmul(tile, w.clone()));
        let products = CubeBackend::float_reshape(products, Shape::new([end - first, m]));
        pick(products, by.clone(), (values.clone(), columns.clone()), first, k, rank);
    }
    (values, columns)
}

/// Writes the largest of each row of `x` to `values` and `columns` from row `first` on.
fn pick(
    x: Float,
    [bias, by]: [Float; 2],
    (values, columns): (Float, Int),
    first: usize,
    k: usize,
    rank: Rank,
) {
    let [n, m]: [usize; 2] = x.shape().dims();
    let client = x.client.clone();
    let of_columns = element(&columns);
    pick_kernel::launch(
        &client,
        cubes(n),
        CubeDim::new_1d(UNITS),
        x.into_buffer_arg(),
        bias.into_buffer_arg(),
        by.into_buffer_arg(),
        values.into_buffer_arg(),
        columns.into_buffer_arg(),
        n,
        m,
        first,
        k,
        rank,
        of_columns,
    );
}

/// An integer that is larger for a larger number. NaN is as −∞, and −0 as 0.
#[cube]
fn key(x: f32) -> u32 {
    let bits = u32::reinterpret(x);
    let magnitude = bits & 0x7fff_ffffu32;
    // Of −∞.
    let mut key = 0x007f_ffffu32;
    if magnitude == 0u32 {
        key = 0x8000_0000u32;
    } else if magnitude <= 0x7f80_0000u32 {
        if bits == magnitude {
            key = bits | 0x8000_0000u32;
        } else {
            key = !bits;
        }
    }
    key
}

/// What an entry is ranked by.
#[cube]
fn ranked(x: f32, bias: &[f32], by: &[f32], column: usize, #[comptime] rank: Rank) -> u32 {
    match rank {
        Rank::Plain => key(x),
        Rank::Rectified | Rank::Signed => key((x + bias[column]) * by[column]),
        Rank::Magnitude => key(f32::abs((x + bias[column]) * by[column])),
    }
}

/// What is kept of an entry.
#[cube]
fn kept(x: f32, bias: &[f32], column: usize, #[comptime] rank: Rank) -> f32 {
    match rank {
        Rank::Plain => x,
        Rank::Signed | Rank::Magnitude => x + bias[column],
        Rank::Rectified => {
            let pre = x + bias[column];
            let mut kept = 0f32;
            // Of NaN, nothing.
            if pre > 0f32 {
                kept = pre;
            }
            kept
        }
    }
}

#[cube(launch)]
fn pick_kernel<I: Numeric>(
    x: &[f32],
    bias: &[f32],
    by: &[f32],
    values: &mut [f32],
    columns: &mut [I],
    n: usize,
    m: usize,
    first: usize,
    k: usize,
    #[comptime] rank: Rank,
    #[define(I)] _of_columns: ElemType,
) {
    let row = CUBE_POS;
    if row >= n {
        terminate!();
    }
    let units = UNITS as usize;
    let unit = UNIT_POS as usize;
    let of_x = row * m;
    let out = (first + row) * k;

    // 0 is below the key of any number: of units that have none.
    let mut largest = Shared::<[u32]>::new_slice(UNITS as usize);
    let mut own = 0u32;
    let mut column = unit;
    while column < m {
        own = u32::max(own, ranked(x[of_x + column], bias, by, column, rank));
        column += units;
    }
    largest[unit] = own;
    sync_cube();

    let mut bound = Shared::<[u32]>::new_slice(1usize);
    let mut before = 0usize;
    for other in 0..units {
        let its = largest[other];
        if its > own || (its == own && other < unit) {
            before += 1;
        }
    }
    if before == k - 1 {
        bound[0] = own;
    }
    sync_cube();
    let bound = bound[0];

    let mut counts = Shared::<[u32]>::new_slice(UNITS as usize);
    let mut reaching = 0u32;
    if own >= bound {
        let mut column = unit;
        while column < m {
            if ranked(x[of_x + column], bias, by, column, rank) >= bound {
                reaching += 1u32;
            }
            column += units;
        }
    }
    counts[unit] = reaching;
    sync_cube();
    let mut place = 0u32;
    let mut total = 0u32;
    for other in 0..units {
        let its = counts[other];
        if other < unit {
            place += its;
        }
        total += its;
    }

    let mut keys = Shared::<[u32]>::new_slice(ROOM as usize);
    let mut names = Shared::<[u32]>::new_slice(ROOM as usize);
    if total <= ROOM {
        if reaching > 0u32 {
            let mut column = unit;
            while column < m {
                let its = ranked(x[of_x + column], bias, by, column, rank);
                if its >= bound {
                    keys[place as usize] = its;
                    names[place as usize] = column as u32;
                    place += 1u32;
                }
                column += units;
            }
        }
        sync_cube();
        let mut at = unit;
        while at < total as usize {
            let mine = keys[at];
            let name = names[at];
            let mut before = 0usize;
            for other in 0..total as usize {
                let its = keys[other];
                if its > mine || (its == mine && names[other] < name) {
                    before += 1;
                }
            }
            if before < k {
                values[out + before] = kept(x[of_x + name as usize], bias, name as usize, rank);
                columns[out + before] = I::cast_from(name);
            }
            at += units;
        }
    } else {
        // The next in order, again and again.
        let mut last = u32::MAX.runtime();
        let mut last_name = 0u32.runtime();
        for place in 0..k {
            let mut best = 0u32.runtime();
            let mut name = u32::MAX.runtime();
            let mut column = unit;
            while column < m {
                let its = ranked(x[of_x + column], bias, by, column, rank);
                let is_after = its < last || (its == last && column as u32 > last_name);
                // Columns come in order: of equals, the first stays.
                if is_after && its > best {
                    best = its;
                    name = column as u32;
                }
                column += units;
            }
            keys[unit] = best;
            names[unit] = name;
            sync_cube();
            for other in 0..units {
                let its = keys[other];
                if its > best || (its == best && names[other] < name) {
                    best = its;
                    name = names[other];
                }
            }
            sync_cube();
            last = best;
            last_name = name;
            if unit == 0 {
                values[out + place] = kept(x[of_x + name as usize], bias, name as usize, rank);
                columns[out + place] = I::cast_from(name);
            }
        }
    }
}
