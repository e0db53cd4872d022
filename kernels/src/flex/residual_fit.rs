//! What selected entries make of a residual: products of tiles that stay in the cache, one after the
//! other.

use burn::backend::Flex;
use burn::backend::ops::FloatTensorOps;
use rayon::prelude::*;

use super::simd::{add, dot, multiversion};
use super::{Float, add_product, floats, new_floats, packed, rows_of};
use crate::ops::{Select, dims};

/// Rows that go through all products together.
const TILE_ROWS: usize = 1024;
/// What stands in place of an entry that is not kept: it adds nothing to a product, and differs from
/// an entry that is kept and zero.
const LEFT_OUT: f32 = -0.0;

/// Room for the keys of a row.
#[derive(Default)]
struct Room {
    keys: Vec<i32>,
}

/// How entries rank, and which of those that rank high enough are kept.
#[derive(Clone, Copy)]
struct Rule {
    k: usize,
    by_magnitude: bool,
    /// Only what is above zero.
    positive: bool,
}

impl Rule {
    fn new(select: Select) -> Self {
        let (k, by_magnitude, positive) = match select {
            Select::TopK(k) => (k, false, true),
            Select::TopKSigned(k) => (k, false, false),
            Select::TopKMagnitude(k) => (k, true, false),
            other => unreachable!("{other:?} is refused before"),
        };
        Self { k, by_magnitude, positive }
    }
}

pub(super) fn fit(
    x: Float,
    products: Float,
    bias: Float,
    by: Float,
    rows: Float,
    residual: Float,
    select: Select,
) -> (Float, Float, Float, Float) {
    let ([n, m], [_, d], [_, d_in]) = (dims(&products), dims(&rows), dims(&x));
    let [products, bias, by, residual] = [products, bias, by, residual].map(packed);
    let (products, residual) = (floats(&products), floats(&residual));
    let (bias, by, rule) = (floats(&bias), floats(&by), Rule::new(select));
    let transposed = Flex::float_transpose(rows.clone());
    let mut squares = vec![0f32; n];
    let (mut by_rows, mut by_w) = (vec![0f32; m * d], vec![0f32; m * d_in]);
    let mut by_bias = vec![0f32; m];
    for start in (0..n).step_by(TILE_ROWS) {
        let end = (start + TILE_ROWS).min(n);
        let z = kept(&products[start * m..end * m], bias, by, rule);
        let z = new_floats(z, [end - start, m]);
        let mut error = packed(Flex::float_matmul(z.clone(), rows.clone()));
        error
            .storage_mut::<f32>()
            .par_chunks_mut(d)
            .zip(residual[start * d..end * d].par_chunks(d))
            .zip(&mut squares[start..end])
            .for_each(|((error, residual), square)| *square = add_row(error, residual));
        add_product(&mut by_rows, Flex::float_transpose(z.clone()), error.clone());

        let mut by_p = packed(Flex::float_matmul(error, transposed.clone()));
        by_p.storage_mut::<f32>()
            .par_chunks_mut(m)
            .zip(floats(&z).par_chunks(m))
            .for_each(|(by_p, z)| leave_out(by_p, z));
        floats(&by_p).chunks(m).for_each(|by_p| add(&mut by_bias, by_p));
        add_product(&mut by_w, Flex::float_transpose(by_p), rows_of(&x, start, end));
    }
    (
        new_floats(squares, [n]),
        new_floats(by_rows, [m, d]),
        new_floats(by_w, [m, d_in]),
        new_floats(by_bias, [m]),
    )
}

/// The entries that are kept, and [`LEFT_OUT`] in the other places.
fn kept(products: &[f32], bias: &[f32], by: &[f32], rule: Rule) -> Vec<f32> {
    let m = bias.len();
    let mut out = vec![0f32; products.len()];
    out.par_chunks_mut(m).zip(products.par_chunks(m)).for_each_init(
        Room::default,
        |room, (out, products)| {
            keep_row(out, products, bias, by, rule, room);
        },
    );
    out
}

/// Integers in the order of the floats, `−0` as zero and NaN last.
#[inline(always)]
fn ordered(x: f32) -> i32 {
    let bits = (x + 0.0).to_bits() as i32;
    let ordered = bits ^ (((bits >> 31) as u32) >> 1) as i32;
    if x.is_nan() { i32::MIN } else { ordered }
}

/// How many keys reach the bar.
#[inline(always)]
fn n_reaching(keys: &[i32], bar: i32) -> usize {
    keys.iter().map(|&key| u32::from(key >= bar)).sum::<u32>() as usize
}

/// The highest bar that at least `k` keys reach, bit by bit, and how many reach it.
#[inline(always)]
fn bar_of(keys: &[i32], k: usize) -> (i32, usize) {
    const SIGN: u32 = 1 << 31;
    let (mut bar, mut reaching) = (0u32, keys.len());
    for bit in (0..32).rev() {
        if reaching == k {
            break;
        }
        let higher = bar | 1 << bit;
        let n = n_reaching(keys, (higher ^ SIGN) as i32);
        if n >= k {
            (bar, reaching) = (higher, n);
        }
    }
    ((bar ^ SIGN) as i32, reaching)
}

multiversion! {
    fn keep_row(
        out: &mut [f32],
        products: &[f32],
        bias: &[f32],
        by: &[f32],
        rule: Rule,
        room: &mut Room,
    ) {
        let (m, keys) = (out.len(), &mut room.keys);
        let (products, bias, by) = (&products[..m], &bias[..m], &by[..m]);
        keys.clear();
        keys.resize(m, 0);
        let mask = if rule.by_magnitude { u32::MAX >> 1 } else { u32::MAX };
        for i in 0..m {
            out[i] = products[i] + bias[i] + 0.0;
            keys[i] = ordered(f32::from_bits((out[i] * by[i]).to_bits() & mask));
        }
        let (bar, reaching) = bar_of(keys, rule.k);
        // Of equals, the first ones.
        let mut n_too_many = reaching - rule.k;
        for key in keys.iter_mut().rev() {
            if n_too_many == 0 {
                break;
            }
            if *key == bar {
                *key = i32::MIN;
                n_too_many -= 1;
            }
        }
        for i in 0..m {
            let is_kept = keys[i] >= bar && (!rule.positive || out[i] > 0.0);
            out[i] = if is_kept { out[i] } else { LEFT_OUT };
        }
    }
}

multiversion! {
    /// Adds a row to another one; gives the square of its norm.
    fn add_row(out: &mut [f32], x: &[f32]) -> f32 {
        add(out, x);
        dot(out, out)
    }
}

multiversion! {
    fn leave_out(gradient: &mut [f32], z: &[f32]) {
        for (gradient, z) in gradient.iter_mut().zip(z) {
            *gradient = if z.to_bits() == LEFT_OUT.to_bits() { 0.0 } else { *gradient };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_order_as_their_numbers_do() {
        let rising =
            [f32::NAN, f32::NEG_INFINITY, -2.0, -1e-40, 0.0, 1e-40, 1.0, 1.5, f32::INFINITY];
        assert!(rising.windows(2).all(|pair| ordered(pair[0]) < ordered(pair[1])));
        assert_eq!(ordered(-0.0), ordered(0.0));
    }

    #[test]
    fn the_bar_is_the_kth_largest() {
        let keys = [5, -3, 5, 9, i32::MIN, 0, 5, i32::MAX];
        for (k, bar) in [(1, (i32::MAX, 1)), (2, (9, 2)), (3, (5, 5)), (6, (0, 6)), (7, (-3, 7))] {
            let found = bar_of(&keys, k);
            // A bar that just as many keys reach will do.
            assert!(n_reaching(&keys, found.0) == bar.1 && found.1 == bar.1, "{k}: {found:?}");
        }
        assert_eq!(bar_of(&keys, 8).1, 8);
    }

    #[test]
    fn of_equals_the_first_are_kept_and_zeros_differ_from_what_is_left_out() {
        let run = |select, products: [f32; 6]| {
            let out = kept(&products, &[0.0; 6], &[1.0; 6], Rule::new(select));
            out.iter().map(|z| z.to_bits()).collect::<Vec<_>>()
        };
        let bits = |values: [f32; 6]| values.map(f32::to_bits).to_vec();
        let o = LEFT_OUT;
        let products = [-1.0, 2.0, -0.0, 2.0, -3.0, 2.0];
        assert_eq!(run(Select::TopK(2), products), bits([o, 2.0, o, 2.0, o, o]));
        assert_eq!(run(Select::TopK(5), products), bits([o, 2.0, o, 2.0, o, 2.0]));
        assert_eq!(run(Select::TopKSigned(4), products), bits([o, 2.0, 0.0, 2.0, o, 2.0]));
        assert_eq!(run(Select::TopKMagnitude(2), products), bits([o, 2.0, o, o, -3.0, o]));
        assert_eq!(run(Select::TopKSigned(6), products), bits([-1.0, 2.0, 0.0, 2.0, -3.0, 2.0]));
    }
}
