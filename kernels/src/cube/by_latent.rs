//! Sums over the entries of each latent. Entries are grouped by latent first, in the order of their
//! rows, so that each sum has one owner and one order.
//!
//! A tile of rows is the work of one cube: it counts its entries of each latent, and later puts them
//! behind those of the tiles before. Within a tile the rows follow one another. Only where a row
//! names a latent twice may those two swap places from run to run.

use burn::backend::TensorMetadata;
use burn::backend::ops::IntTensorOps;
use burn::tensor::{DType, IntDType, Shape};
use burn_cubecl::CubeBackend;
use cubecl::prelude::*;
use cubecl::{CubeDim, calculate_cube_count_elemwise};

use super::{Float, Int, cubes, element, empty_beside, packed};

/// Units that share a tile, or a latent.
const UNITS: u32 = 64;
/// Units that share all latents.
const SCANNING: u32 = 256;
/// Tiles: more would make more counts of each latent, less would leave cubes idle.
const MOST_TILES: usize = 64;

/// Entries by latent.
struct Grouped {
    /// Places in `values`, `[n_entries]`.
    entries: Int,
    /// Where those of each latent begin, and where the last ends: `[m + 1]`.
    starts: Int,
    values: Float,
}

fn group(indices: Int, values: Float, m: usize) -> Grouped {
    let (indices, values) = (packed(indices), packed(values));
    let [n, k]: [usize; 2] = indices.shape().dims();
    let client = indices.client.clone();
    let rows_of_tile = n.div_ceil(MOST_TILES).max(1);
    let n_tiles = n.div_ceil(rows_of_tile).max(1);
    let zeros = Shape::new([n_tiles, m]);
    let counts = CubeBackend::int_zeros(zeros, &indices.device(), IntDType::U32);
    let of_indices = element(&indices);
    let tile = CubeDim::new_1d(UNITS);
    count_kernel::launch(
        &client,
        cubes(n_tiles),
        tile,
        indices.clone().into_buffer_arg(),
        values.clone().into_buffer_arg(),
        counts.clone().into_buffer_arg(),
        n,
        k,
        m,
        rows_of_tile,
        n_tiles,
        of_indices,
    );
    let totals = empty_beside(&indices, [m], DType::U32);
    let dim = CubeDim::new(&client, m);
    tiles_kernel::launch(
        &client,
        calculate_cube_count_elemwise(&client, m, dim),
        dim,
        counts.clone().into_buffer_arg(),
        totals.clone().into_buffer_arg(),
        n_tiles,
    );
    let starts = empty_beside(&indices, [m + 1], DType::U32);
    starts_kernel::launch(
        &client,
        cubes(1),
        CubeDim::new_1d(SCANNING),
        totals.into_buffer_arg(),
        starts.clone().into_buffer_arg(),
    );
    let entries = empty_beside(&indices, [(n * k).max(1)], DType::U32);
    place_kernel::launch(
        &client,
        cubes(n_tiles),
        tile,
        indices.into_buffer_arg(),
        values.clone().into_buffer_arg(),
        counts.into_buffer_arg(),
        starts.clone().into_buffer_arg(),
        entries.clone().into_buffer_arg(),
        n,
        k,
        m,
        rows_of_tile,
        n_tiles,
        of_indices,
    );
    Grouped { entries, starts, values }
}

/// `counts[tile, latent]`. Entries of value zero add nothing and are left out.
#[cube(launch)]
fn count_kernel<I: Numeric>(
    indices: &[I],
    values: &[f32],
    counts: &[Atomic<u32>],
    n: usize,
    k: usize,
    m: usize,
    rows_of_tile: usize,
    n_tiles: usize,
    #[define(I)] _of_indices: ElemType,
) {
    let tile = CUBE_POS;
    if tile >= n_tiles {
        terminate!();
    }
    let end = usize::min((tile + 1) * rows_of_tile, n) * k;
    let mut entry = tile * rows_of_tile * k + UNIT_POS as usize;
    while entry < end {
        let latent = u32::cast_from(indices[entry]) as usize;
        if latent < m && values[entry] != 0f32 {
            counts[tile * m + latent].fetch_add(1u32);
        }
        entry += UNITS as usize;
    }
}

/// For each latent, counts become what the tiles before have; and the total.
#[cube(launch)]
fn tiles_kernel(counts: &mut [u32], totals: &mut [u32], n_tiles: usize) {
    let m = totals.len();
    let latent = ABSOLUTE_POS;
    if latent >= m {
        terminate!();
    }
    let mut before = 0u32;
    for tile in 0..n_tiles {
        let own = counts[tile * m + latent];
        counts[tile * m + latent] = before;
        before += own;
    }
    totals[latent] = before;
}

/// `starts[latent]`: the totals of all before. One cube; each unit takes a stretch.
#[cube(launch)]
fn starts_kernel(totals: &[u32], starts: &mut [u32]) {
    let m = totals.len();
    let unit = UNIT_POS as usize;
    let stretch = m.div_ceil(SCANNING as usize);
    let first = usize::min(unit * stretch, m);
    let end = usize::min(first + stretch, m);
    let mut sums = Shared::<[u32]>::new_slice(SCANNING as usize);
    let mut own = 0u32;
    for latent in first..end {
        own += totals[latent];
    }
    sums[unit] = own;
    sync_cube();
    let mut before = 0u32;
    for other in 0..unit {
        before += sums[other];
    }
    for latent in first..end {
        starts[latent] = before;
        before += totals[latent];
    }
    if end == m && first < m {
        starts[m] = before;
    }
}

#[cube(launch)]
fn place_kernel<I: Numeric>(
    indices: &[I],
    values: &[f32],
    cursors: &[Atomic<u32>],
    starts: &[u32],
    entries: &mut [u32],
    n: usize,
    k: usize,
    m: usize,
    rows_of_tile: usize,
    n_tiles: usize,
    #[define(I)] _of_indices: ElemType,
) {
    let tile = CUBE_POS;
    if tile >= n_tiles {
        terminate!();
    }
    for nth in 0..rows_of_tile {
        let row = tile * rows_of_tile + nth;
        if row < n {
            let mut j = UNIT_POS as usize;
            while j < k {
                let entry = row * k + j;
                let latent = u32::cast_from(indices[entry]) as usize;
                if latent < m && values[entry] != 0f32 {
                    let behind = cursors[tile * m + latent].fetch_add(1u32);
                    entries[(starts[latent] + behind) as usize] = entry as u32;
                }
                j += UNITS as usize;
            }
        }
        // A row's entries stand before those of the next.
        sync_storage();
    }
}

/// `out[l] = Σ values[i, j] · grad[i]` over the entries with `indices[i, j] = l`.
pub(super) fn grad_rows(indices: Int, values: Float, grad: Float, m: usize) -> Float {
    let ([_, k], [_, d]): ([usize; 2], [usize; 2]) = (indices.shape().dims(), grad.shape().dims());
    let grad = packed(grad);
    let out = empty_beside(&grad, [m, d], DType::F32);
    let Grouped { entries, starts, values } = group(indices, values, m);
    let client = out.client.clone();
    grad_rows_kernel::launch(
        &client,
        cubes(m),
        CubeDim::new_1d(UNITS),
        entries.into_buffer_arg(),
        starts.into_buffer_arg(),
        values.into_buffer_arg(),
        grad.into_buffer_arg(),
        out.clone().into_buffer_arg(),
        k,
        d,
        m,
    );
    out
}

#[cube(launch)]
fn grad_rows_kernel(
    entries: &[u32],
    starts: &[u32],
    values: &[f32],
    grad: &[f32],
    out: &mut [f32],
    k: usize,
    d: usize,
    m: usize,
) {
    let latent = CUBE_POS;
    if latent >= m {
        terminate!();
    }
    let (first, end) = (starts[latent] as usize, starts[latent + 1] as usize);
    let mut column = UNIT_POS as usize;
    while column < d {
        let mut sum = 0f32;
        for at in first..end {
            let entry = entries[at] as usize;
            sum += values[entry] * grad[entry / k * d + column];
        }
        out[latent * d + column] = sum;
        column += UNITS as usize;
    }
}

/// `out[l] = Σ values[i, j]` over the entries with `indices[i, j] = l`.
pub(super) fn sum(indices: Int, values: Float, m: usize) -> Float {
    let out = empty_beside(&values, [m], DType::F32);
    let Grouped { entries, starts, values } = group(indices, values, m);
    let client = out.client.clone();
    let dim = CubeDim::new(&client, m);
    sum_kernel::launch(
        &client,
        calculate_cube_count_elemwise(&client, m, dim),
        dim,
        entries.into_buffer_arg(),
        starts.into_buffer_arg(),
        values.into_buffer_arg(),
        out.clone().into_buffer_arg(),
    );
    out
}

#[cube(launch)]
fn sum_kernel(entries: &[u32], starts: &[u32], values: &[f32], out: &mut [f32]) {
    if ABSOLUTE_POS >= out.len() {
        terminate!();
    }
    let mut sum = 0f32;
    for at in starts[ABSOLUTE_POS] as usize..starts[ABSOLUTE_POS + 1] as usize {
        sum += values[entries[at] as usize];
    }
    out[ABSOLUTE_POS] = sum;
}
