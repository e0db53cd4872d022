//! Single entries of a product, summed in the very order of the blocked product.

use std::arch::x86_64::*;
use std::mem::transmute;
use std::sync::{Mutex, PoisonError};

use burn::backend::Flex;
use burn::backend::ops::FloatTensorOps;

use super::simd::multiversion;
use super::{floats, new_floats, packed};

/// Rows of the right matrix that meet a row of the left one in the lanes of a vector.
const LANES: usize = 8;
/// Vectors of sums side by side: as many as it takes to hide an FMA behind the others.
const GROUPS: usize = 5;

/// Elements of a row that a line of a cache holds.
const LINE: usize = 16;
/// How far ahead of their use elements are asked for.
const AHEAD: usize = 4 * LINE;

/// The order in which the blocked product sums: one chain of FMAs for each part of so many terms (the
/// last may be shorter), and then the parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Order {
    pub(super) part: usize,
}

/// Widths that were asked for.
static KNOWN: Mutex<Vec<(usize, Option<Order>)>> = Mutex::new(Vec::new());

impl Order {
    /// The order for rows of width `d`; none if it is another than such a one.
    ///
    /// How long a part is depends on the machine's caches. It is found out by a small product, not
    /// assumed: rows of numbers whose sum differs in its last bits from order to order.
    pub(super) fn of(d: usize) -> Option<Self> {
        let known = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&(_, order)) = known().iter().find(|(width, _)| *width == d) {
            return order;
        }
        // Without the lock: a product may wait for other tasks of the pool.
        let order = Self::found(d);
        known().push((d, order));
        order
    }

    fn found(d: usize) -> Option<Self> {
        // Larger than what the blocked product has shorter ways for.
        const ROWS: usize = 72;
        let mut state = 1u32;
        let mut draw = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1u32 << 23) as f32 - 1.0
        };
        let mut matrix = || (0..ROWS * d).map(|_| draw()).collect::<Vec<f32>>();
        let (x, w) = (matrix(), matrix());
        let product = Flex::float_matmul(
            new_floats(x.clone(), [ROWS, d]),
            Flex::float_transpose(new_floats(w.clone(), [ROWS, d])),
        );
        let product = packed(product);
        let product = floats(&product);
        let has = |order: Self| {
            x.chunks(d).zip(product.chunks(ROWS)).all(|(x, product)| {
                w.chunks(d)
                    .zip(product)
                    .all(|(w, sum)| plain(x, w, order).to_bits() == sum.to_bits())
            })
        };
        (1..=d.div_ceil(128)).map(|n| Self { part: d.div_ceil(n) }).find(|&order| has(order))
    }
}

multiversion! {
    /// `⟨x, w⟩` in this order.
    fn plain(x: &[f32], w: &[f32], order: Order) -> f32 {
        let parts = x.chunks(order.part).zip(w.chunks(order.part));
        let mut total = None;
        for (x, w) in parts {
            let mut sum = 0f32;
            for (x, w) in x.iter().zip(w) {
                sum = x.mul_add(*w, sum);
            }
            total = Some(total.map_or(sum, #[inline(always)] |total| sum + total));
        }
        total.unwrap_or(0.0)
    }
}

/// `⟨x, w[row]⟩` for some rows of `w`, in this order.
///
/// # Panics
/// If a row is out of range.
#[target_feature(enable = "avx2,fma")]
pub(super) fn dots(x: &[f32], w: &[f32], order: Order, rows: &[u32], out: &mut Vec<f32>) {
    let d = x.len();
    out.clear();
    for rows in rows.chunks(GROUPS * LANES) {
        // What fills up the vectors is computed with, and dropped.
        let row = |i: usize| {
            let row = rows[i.min(rows.len() - 1)] as usize;
            &w[row * d..][..d]
        };
        let n = rows.len();
        match n.div_ceil(LANES) {
            1 => out.extend_from_slice(&together::<1>(x, row, order).as_flattened()[..n]),
            2 => out.extend_from_slice(&together::<2>(x, row, order).as_flattened()[..n]),
            3 => out.extend_from_slice(&together::<3>(x, row, order).as_flattened()[..n]),
            4 => out.extend_from_slice(&together::<4>(x, row, order).as_flattened()[..n]),
            _ => out.extend_from_slice(&together::<GROUPS>(x, row, order).as_flattened()[..n]),
        }
    }
}

/// Eight rows to a vector: four of their columns at a time are transposed into place.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn together<'a, const N: usize>(
    x: &[f32],
    row: impl Fn(usize) -> &'a [f32],
    order: Order,
) -> [[f32; LANES]; N] {
    let rows: [[&[f32]; LANES]; N] =
        std::array::from_fn(|group| std::array::from_fn(|lane| row(group * LANES + lane)));
    // The rows lie all over the matrix, and there are too many of them for the processor to guess
    // how they go on.
    for row in rows.as_flattened() {
        (0..AHEAD).step_by(LINE).for_each(|i| prefetch(row, i));
    }
    let mut totals = [_mm256_setzero_ps(); N];
    for start in (0..x.len()).step_by(order.part) {
        let end = (start + order.part).min(x.len());
        let (fours, rest) = x[start..end].as_chunks::<4>();
        let parts = rows.map(|rows| rows.map(|row| row[start..end].as_chunks::<4>().0));
        let mut sums = [_mm256_setzero_ps(); N];
        for (i, x) in fours.iter().enumerate() {
            if (i * 4).is_multiple_of(LINE) {
                rows.as_flattened().iter().for_each(|row| prefetch(row, start + i * 4 + AHEAD));
            }
            for (sum, rows) in sums.iter_mut().zip(&parts) {
                // SAFETY: parts of rows are as long as that of `x`.
                let columns = transposed(rows.map(|row| unsafe { *row.get_unchecked(i) }));
                for (&x, column) in x.iter().zip(columns) {
                    *sum = _mm256_fmadd_ps(_mm256_set1_ps(x), column, *sum);
                }
            }
        }
        for i in end - rest.len()..end {
            let x = _mm256_set1_ps(x[i]);
            for (sum, rows) in sums.iter_mut().zip(&rows) {
                *sum = _mm256_fmadd_ps(x, vector(rows.map(|row| row[i])), *sum);
            }
        }
        for (total, sum) in totals.iter_mut().zip(sums) {
            *total = if start == 0 { sum } else { _mm256_add_ps(sum, *total) };
        }
    }
    // SAFETY: vectors are their lanes.
    totals.map(|total| unsafe { transmute::<__m256, [f32; LANES]>(total) })
}

/// Asks for element `i` before it is needed.
#[inline(always)]
fn prefetch(row: &[f32], i: usize) {
    // SAFETY: a hint, which does not access memory that is not there.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(row.as_ptr().wrapping_add(i).cast()) }
}

#[target_feature(enable = "avx2,fma")]
#[inline]
fn vector(lanes: [f32; LANES]) -> __m256 {
    // SAFETY: vectors are their lanes.
    unsafe { transmute(lanes) }
}

/// Four columns of eight rows.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn transposed(rows: [[f32; 4]; LANES]) -> [__m256; 4] {
    // SAFETY: vectors are their lanes.
    let [r0, r1, r2, r3, r4, r5, r6, r7] = rows.map(|row| unsafe { transmute::<_, __m128>(row) });
    let (a, b) = (_mm256_set_m128(r4, r0), _mm256_set_m128(r5, r1));
    let (c, d) = (_mm256_set_m128(r6, r2), _mm256_set_m128(r7, r3));
    let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
    let (ab_high, cd_high) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
    [
        _mm256_shuffle_ps::<0x44>(ab, cd),
        _mm256_shuffle_ps::<0xEE>(ab, cd),
        _mm256_shuffle_ps::<0x44>(ab_high, cd_high),
        _mm256_shuffle_ps::<0xEE>(ab_high, cd_high),
    ]
}
