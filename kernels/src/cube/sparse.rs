//! Products with the rows that entries name.

use burn::backend::TensorMetadata;
use burn::tensor::DType;
use cubecl::prelude::*;
use cubecl::{CubeDim, calculate_cube_count_elemwise};

use super::{Float, Int, cubes, element, empty_beside, packed};

/// Units that share one product.
const UNITS: u32 = 64;

/// `out[i] = Σⱼ values[i, j] · rows[indices[i, j]]`: a unit for each number, which neighbours in a
/// row of weights lie beside. Weights may be bf16; sums are f32.
pub(super) fn decode(indices: Int, values: Float, rows: Float) -> Float {
    let (indices, values, rows) = (packed(indices), packed(values), packed(rows));
    let ([n, k], [m, d]) = (values.shape().dims(), rows.shape().dims());
    let out = empty_beside(&values, [n, d], DType::F32);
    let client = &out.client;
    let dim = CubeDim::new(client, n * d);
    let count = calculate_cube_count_elemwise(client, n * d, dim);
    let types = [element(&values), element(&rows), element(&indices)];
    decode_kernel::launch(
        client,
        count,
        dim,
        indices.into_buffer_arg(),
        values.into_buffer_arg(),
        rows.into_buffer_arg(),
        out.clone().into_buffer_arg(),
        k,
        d,
        m,
        types,
    );
    out
}

#[cube(launch)]
fn decode_kernel<V: Numeric, W: Numeric, I: Numeric>(
    indices: &[I],
    values: &[V],
    rows: &[W],
    out: &mut [f32],
    k: usize,
    d: usize,
    m: usize,
    #[define(V, W, I)] _types: [ElemType; 3],
) {
    if ABSOLUTE_POS >= out.len() {
        terminate!();
    }
    let first = ABSOLUTE_POS / d * k;
    let column = ABSOLUTE_POS % d;
    let mut sum = 0f32;
    for j in 0..k {
        let row = u32::cast_from(indices[first + j]) as usize;
        if row < m {
            sum += f32::cast_from(values[first + j]) * f32::cast_from(rows[row * d + column]);
        }
    }
    out[ABSOLUTE_POS] = sum;
}

/// `out[i, j] = ⟨rows[indices[i, j]], x[i]⟩`: a cube for each.
pub(super) fn dot(indices: Int, rows: Float, x: Float) -> Float {
    let (indices, rows, x) = (packed(indices), packed(rows), packed(x));
    let ([n, k], [m, d]) = (indices.shape().dims(), rows.shape().dims());
    let out = empty_beside(&x, [n, k], DType::F32);
    let client = &out.client;
    let types = [element(&x), element(&rows), element(&indices)];
    dot_kernel::launch(
        client,
        cubes(n * k),
        CubeDim::new_1d(UNITS),
        indices.into_buffer_arg(),
        rows.into_buffer_arg(),
        x.into_buffer_arg(),
        out.clone().into_buffer_arg(),
        k,
        d,
        m,
        types,
    );
    out
}

#[cube(launch)]
fn dot_kernel<V: Numeric, W: Numeric, I: Numeric>(
    indices: &[I],
    rows: &[W],
    x: &[V],
    out: &mut [f32],
    k: usize,
    d: usize,
    m: usize,
    #[define(V, W, I)] _types: [ElemType; 3],
) {
    let entry = CUBE_POS;
    if entry >= out.len() {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let row = u32::cast_from(indices[entry]) as usize;
    let of_x = entry / k * d;
    let mut sum = 0f32;
    if row < m {
        let mut column = unit;
        while column < d {
            sum += f32::cast_from(x[of_x + column]) * f32::cast_from(rows[row * d + column]);
            column += UNITS as usize;
        }
    }
    let total = sum_of_cube(sum, UNITS);
    if unit == 0 {
        out[entry] = total;
    }
}

/// The sum over the units of a cube, of which there are a power of two; every unit gets it.
#[cube]
pub(super) fn sum_of_cube(own: f32, #[comptime] n_units: u32) -> f32 {
    let unit = UNIT_POS as usize;
    let mut sums = Shared::<[f32]>::new_slice(n_units as usize);
    sums[unit] = own;
    sync_cube();
    // Without `runtime` it would be a constant, which does not change.
    let mut half = (n_units as usize / 2).runtime();
    while half > 0 {
        if unit < half {
            let other = sums[unit + half];
            sums[unit] += other;
        }
        sync_cube();
        half /= 2;
    }
    sums[0]
}
