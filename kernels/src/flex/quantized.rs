//! Rows of a matrix in 16-bit integers, and products of them: an instruction multiplies twice as many
//! as it does in f32, and the sums are exact.
//!
//! ```text
//! x = s · q + δ        s a power of two, q integers with ‖q‖² < 2³¹
//! ```
//!
//! By Cauchy and Schwarz no sum of products of two such rows, nor a part of one, leaves 32 bits,
//! whatever their length.

use std::arch::x86_64::*;
use std::mem::transmute;

use rayon::prelude::*;

use super::simd::multiversion;

/// Rows of the left and the right matrix whose products are found together.
pub(super) const LEFT_ROWS: usize = 6;
pub(super) const RIGHT_ROWS: usize = 16;

/// Exponents of `s`. Within them all products of two scales and a 32-bit integer are normal numbers.
const EXPONENTS: std::ops::RangeInclusive<i32> = -60..=20;
/// `√(2³¹ − 1)`, rounded down.
const LARGEST_NORM: f64 = 46_340.0;
const LARGEST: f64 = i16::MAX as f64;
/// Adding 1.5 · 2²³ rounds to an integer, left in the low bits of the mantissa.
const ROUND: f32 = 12_582_912.0;

/// Rows in integers.
pub(super) struct QuantizedRows {
    /// Panels of so many rows, zeros behind the last: pairs of neighbours, `[d / 2, rows]`.
    panels: Vec<i32>,
    rows: Vec<QuantizedRow>,
    panel_len: usize,
}

/// What the integers of a row stand for.
#[derive(Debug, Clone, Copy)]
pub(super) struct QuantizedRow {
    /// `s`.
    pub(super) scale: f32,
    /// At least the norms of `x` and of `s · q`.
    pub(super) norm: f32,
    /// At least the norm of `δ`.
    pub(super) error: f32,
}

impl QuantizedRows {
    /// Rows of width `d`, in panels of `together` rows; none if one is not finite or too large.
    pub(super) fn new(x: &[f32], d: usize, together: usize) -> Option<Self> {
        let panel_len = d.div_ceil(2) * together;
        let n_panels = (x.len() / d).div_ceil(together);
        let empty = QuantizedRow { scale: 1.0, norm: 0.0, error: 0.0 };
        let mut quantized = Self {
            panels: vec![0; n_panels * panel_len],
            rows: vec![empty; n_panels * together],
            panel_len,
        };
        let panels = quantized.panels.par_chunks_mut(panel_len);
        let rows = quantized.rows.par_chunks_mut(together);
        let are_representable =
            panels.zip(rows).zip(x.par_chunks(together * d)).all(|((panel, rows), x)| {
                let mut integers = vec![0i16; panel_len / together * 2];
                x.chunks_exact(d).zip(rows).enumerate().all(|(i, (x, row))| {
                    let Some(exponent) = exponent(x) else { return false };
                    *row = quantize(x, exponent, &mut integers);
                    interleave(&integers, &mut panel[i..], together);
                    true
                })
            });
        are_representable.then_some(quantized)
    }

    /// The rows, and those that fill up the last panel.
    pub(super) fn rows(&self) -> &[QuantizedRow] {
        &self.rows
    }
}

/// The exponent of the finest scale that keeps the integers in their range.
fn exponent(x: &[f32]) -> Option<i32> {
    let (squares, largest) = measure(x);
    // Rounding makes a row longer by at most this.
    let rounding = (x.len() as f64).sqrt() / 2.0;
    let finest =
        (squares.sqrt() / (LARGEST_NORM - 1.0 - rounding)).max(f64::from(largest) / LARGEST);
    if !squares.is_finite() || finest > f64::from(power_of_two(*EXPONENTS.end())) {
        return None;
    }
    Some((finest.log2() + 1e-9).ceil().max(f64::from(*EXPONENTS.start())) as i32)
}

fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((exponent + 127) as u32) << 23)
}

/// Pairs of one row, between those of the others of its panel.
fn interleave(integers: &[i16], panel: &mut [i32], together: usize) {
    for (pair, slot) in integers.as_chunks::<2>().0.iter().zip(panel.iter_mut().step_by(together)) {
        *slot = i32::from(pair[0] as u16) | i32::from(pair[1]) << 16;
    }
}

/// Rounded up, so that what is computed of bounds in f32 still bounds.
pub(super) fn above(x: f64) -> f32 {
    (x * (1.0 + 1e-6)) as f32
}

multiversion! {
    /// The sum of squares, and the largest magnitude. Either is NaN or infinite if an element is.
    fn measure(x: &[f32]) -> (f64, f32) {
        const LANES: usize = 16;
        let (mut squares, mut largest) = ([0f64; LANES], [0f32; LANES]);
        let chunks = x.chunks_exact(LANES);
        let tail = chunks.remainder();
        for chunk in chunks {
            for lane in 0..LANES {
                squares[lane] += f64::from(chunk[lane]) * f64::from(chunk[lane]);
                largest[lane] = largest[lane].max(chunk[lane].abs());
            }
        }
        for (lane, &x) in tail.iter().enumerate() {
            squares[lane] += f64::from(x) * f64::from(x);
            largest[lane] = largest[lane].max(x.abs());
        }
        (squares.iter().sum(), largest.iter().fold(0.0, |a, &b| a.max(b)))
    }
}

/// The integer nearest to `x / scale`, and what it leaves.
#[inline(always)]
fn rounded(x: f32, scale: f32, inverse: f32) -> (i16, f64) {
    let shifted = x * inverse + ROUND;
    // Exact: a multiple of the last bit of `x`, and not larger than `x`.
    let error = x - (shifted - ROUND) * scale;
    (shifted.to_bits() as i16, f64::from(error))
}

multiversion! {
    /// Fills in the integers.
    fn quantize(x: &[f32], exponent: i32, integers: &mut [i16]) -> QuantizedRow {
        const LANES: usize = 16;
        let (scale, inverse) = (power_of_two(exponent), power_of_two(-exponent));
        let (mut squares, mut errors) = ([0f64; LANES], [0f64; LANES]);
        let whole = x.len() / LANES * LANES;
        for (x, integers) in x.chunks_exact(LANES).zip(integers.chunks_exact_mut(LANES)) {
            for lane in 0..LANES {
                let (integer, error) = rounded(x[lane], scale, inverse);
                integers[lane] = integer;
                squares[lane] += f64::from(x[lane]) * f64::from(x[lane]);
                errors[lane] += error * error;
            }
        }
        for (lane, i) in (whole..x.len()).enumerate() {
            let (integer, error) = rounded(x[i], scale, inverse);
            integers[i] = integer;
            squares[lane] += f64::from(x[i]) * f64::from(x[i]);
            errors[lane] += error * error;
        }
        let error = errors.iter().sum::<f64>().sqrt();
        let norm = squares.iter().sum::<f64>().sqrt() + error;
        QuantizedRow { scale, norm: above(norm), error: above(error) }
    }
}

/// What becomes of a product: `product · factor + summand`, both by columns.
pub(super) struct Affine {
    pub(super) factor: Vec<f32>,
    pub(super) summand: Vec<f32>,
}

/// Products of some rows of `x`, beginning with a panel, with all rows of `w`, each put through
/// `affine`, into `out`: rows as wide as `w` has, those that fill up panels included.
///
/// # Panics
/// If a length does not fit.
#[target_feature(enable = "avx2,fma")]
pub(super) fn products(
    x: &QuantizedRows,
    panels: std::ops::Range<usize>,
    w: &QuantizedRows,
    affine: &Affine,
    out: &mut [f32],
) {
    let width = w.rows.len();
    assert_eq!(out.len(), panels.len() * LEFT_ROWS * width);
    assert_eq!(x.panel_len / LEFT_ROWS, w.panel_len / RIGHT_ROWS);
    assert!(affine.factor.len() == width && affine.summand.len() == width);
    let first = panels.start;
    let x_panels = &x.panels[panels.start * x.panel_len..panels.end * x.panel_len];
    // A panel of `w` stays in the first cache while those of `x` come by, out of the second.
    for (at, w_panel) in w.panels.chunks_exact(w.panel_len).enumerate() {
        let column = at * RIGHT_ROWS;
        let scales = std::array::from_fn(|i| w.rows[column + i].scale);
        let factor = affine.factor[column..].first_chunk().expect("as wide as `w` has rows");
        let summand = affine.summand[column..].first_chunk().expect("as wide as `w` has rows");
        for (i, x_panel) in x_panels.chunks_exact(x.panel_len).enumerate() {
            let sums = panel_product(x_panel, w_panel);
            let rows = &x.rows[(first + i) * LEFT_ROWS..][..LEFT_ROWS];
            let out = &mut out[i * LEFT_ROWS * width + column..];
            write(sums, rows, [&scales, factor, summand], out, width);
        }
    }
}

/// Sums of products of the rows of two panels.
type Sums = [[__m256i; 2]; LEFT_ROWS];

#[target_feature(enable = "avx2,fma")]
#[inline]
fn panel_product(x: &[i32], w: &[i32]) -> Sums {
    let mut sums = [[_mm256_setzero_si256(); 2]; LEFT_ROWS];
    let (x, w) = (x.as_chunks::<LEFT_ROWS>().0, w.as_chunks::<RIGHT_ROWS>().0);
    for (x, w) in x.iter().zip(w) {
        // SAFETY: vectors are their lanes.
        let w: [__m256i; 2] = unsafe { transmute(*w) };
        for (sums, &x) in sums.iter_mut().zip(x) {
            let x = _mm256_set1_epi32(x);
            sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(x, w[0]));
            sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(x, w[1]));
        }
    }
    sums
}

#[target_feature(enable = "avx2,fma")]
#[inline]
fn write(
    sums: Sums,
    rows: &[QuantizedRow],
    [scales, factor, summand]: [&[f32; RIGHT_ROWS]; 3],
    out: &mut [f32],
    width: usize,
) {
    let vectors = |lanes: &[f32; RIGHT_ROWS]| {
        // SAFETY: vectors are their lanes.
        unsafe { transmute::<[f32; RIGHT_ROWS], [__m256; 2]>(*lanes) }
    };
    let (scales, factor, summand) = (vectors(scales), vectors(factor), vectors(summand));
    for (i, (sums, row)) in sums.into_iter().zip(rows).enumerate() {
        let row_scale = _mm256_set1_ps(row.scale);
        let keys: [__m256; 2] = std::array::from_fn(|half| {
            let product = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[half]), row_scale);
            let product = _mm256_mul_ps(product, scales[half]);
            _mm256_fmadd_ps(product, factor[half], summand[half])
        });
        // SAFETY: vectors are their lanes.
        let keys: [f32; RIGHT_ROWS] = unsafe { transmute(keys) };
        out[i * width..][..RIGHT_ROWS].copy_from_slice(&keys);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One product of rows, and how far it may be off by what the rows say.
    fn product(x: &[f32], w: &[f32]) -> (f64, f64) {
        let d = x.len();
        let [x, w] = [(x, LEFT_ROWS), (w, RIGHT_ROWS)]
            .map(|(row, together)| QuantizedRows::new(row, d, together).expect("finite"));
        let affine = Affine { factor: vec![1.0; RIGHT_ROWS], summand: vec![0.0; RIGHT_ROWS] };
        let mut out = vec![0f32; LEFT_ROWS * RIGHT_ROWS];
        // SAFETY: the tests ask the processor.
        unsafe { products(&x, 0..1, &w, &affine, &mut out) };
        assert!(out[1..].iter().all(|&filled_up| filled_up == 0.0));
        let (x, w) = (x.rows()[0], w.rows()[0]);
        let [x_norm, x_error, w_norm, w_error] = [x.norm, x.error, w.norm, w.error].map(f64::from);
        (f64::from(out[0]), x_error * w_norm + x_norm * w_error + 1e-7 * x_norm * w_norm)
    }

    #[test]
    fn sums_stay_within_32_bits_and_the_bound() {
        if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")) {
            return;
        }
        for d in [1, 2, 3, 15, 16, 17, 576, 5001, 70_000] {
            let wave = |scale: f32| -> Vec<f32> {
                (0..d).map(|i| scale * ((i * i % 97) as f32 - 48.0)).collect()
            };
            let one_large: Vec<f32> = (0..d).map(|i| if i == d / 2 { 1e6 } else { 0.3 }).collect();
            let ones = vec![1f32; d];
            let minus: Vec<f32> = vec![-3e-9; d];
            for x in [&ones, &minus, &wave(1.0), &wave(1e-4), &one_large] {
                for w in [&ones, &minus, &wave(7.0), &one_large] {
                    let exact: f64 =
                        x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                    let (found, bound) = product(x, w);
                    assert!((found - exact).abs() <= bound, "{d}: {found} for {exact} ± {bound}");
                }
            }
            // A row with itself is as long as the integers allow.
            let (found, bound) = product(&ones, &ones);
            assert!(bound < 1e-3 * found + 1e-3, "{d}: {bound}");
        }
    }

    #[test]
    fn what_is_not_finite_or_too_large_is_refused() {
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e12, f32::MAX] {
            assert!(QuantizedRows::new(&[1.0, odd, 2.0], 3, LEFT_ROWS).is_none(), "{odd}");
        }
        for fine in [0.0, -0.0, 1e-45, 1e9] {
            assert!(QuantizedRows::new(&[fine; 3], 3, LEFT_ROWS).is_some(), "{fine}");
        }
    }
}
