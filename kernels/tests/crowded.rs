//! Sparse products whose rows are not sparse: `flex` takes them as dense ones.

use burn::tensor::{Device, Int, Tensor, TensorData};
use kernels::{sparse_decode, sparse_dot, sparse_grad_rows, sparse_sum};
use proptest::prelude::*;

const D: usize = 7;

/// Entries of `[n, m]`, some of them in the same place, with rows filled up by the last column and
/// zeros; and a dense matrix on either side.
struct Products {
    indices: Vec<usize>,
    values: Vec<f32>,
    rows: Vec<f32>,
    x: Vec<f32>,
    n: usize,
    m: usize,
}

impl Products {
    fn new([n, k, m]: [usize; 3], seed: u64) -> Self {
        let mut state = seed | 1;
        let mut draw = || {
            state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
            (state >> 33) as usize
        };
        let (mut indices, mut values) = (vec![m - 1; n * k], vec![0.0; n * k]);
        for (indices, values) in indices.chunks_mut(k).zip(values.chunks_mut(k)) {
            let n_own = 1 + draw() % k;
            indices[..n_own].fill_with(|| draw() % m);
            values[..n_own].fill_with(|| draw() as f32 / (1u64 << 30) as f32 - 1.0);
        }
        let mut numbers = |n| (0..n).map(|_| draw() as f32 / (1u64 << 30) as f32 - 1.0).collect();
        Self { indices, values, rows: numbers(m * D), x: numbers(n * D), n, m }
    }

    /// Decoded, products at the entries, gradients of the rows, sums.
    fn on(&self, device: &Device) -> [Vec<f32>; 4] {
        let Self { n, m, .. } = *self;
        let k = self.indices.len() / n;
        let matrix = |values: &[f32], shape| {
            Tensor::<2>::from_data(TensorData::new(values.to_vec(), shape), device)
        };
        let at: Vec<i64> = self.indices.iter().map(|&index| index as i64).collect();
        let at = Tensor::<2, Int>::from_data(TensorData::new(at, [n, k]), device);
        let values = || matrix(&self.values, [n, k]);
        let (rows, x) = (|| matrix(&self.rows, [m, D]), || matrix(&self.x, [n, D]));
        [
            floats(sparse_decode(at.clone(), values(), rows())),
            floats(sparse_dot(at.clone(), rows(), x())),
            floats(sparse_grad_rows(at.clone(), values(), x(), m)),
            floats(sparse_sum(at, values(), m)),
        ]
    }

    /// The same one by one, in f64.
    fn expected(&self) -> [Vec<f64>; 4] {
        let k = self.indices.len() / self.n;
        let (mut decoded, mut by_rows) = (vec![0.0; self.n * D], vec![0.0; self.m * D]);
        let (mut dots, mut sums) = (Vec::new(), vec![0.0; self.m]);
        for (place, (&index, &value)) in self.indices.iter().zip(&self.values).enumerate() {
            let (row, value) = (place / k, f64::from(value));
            let mut dot = 0.0;
            for i in 0..D {
                let (w, x) = (self.rows[index * D + i], self.x[row * D + i]);
                let (w, x) = (f64::from(w), f64::from(x));
                if value != 0.0 {
                    decoded[row * D + i] += value * w;
                    by_rows[index * D + i] += value * x;
                }
                dot += w * x;
            }
            dots.push(dot);
            sums[index] += value;
        }
        [decoded, dots, by_rows, sums]
    }

    fn check(&self, device: &Device) {
        for (actual, expected) in self.on(device).iter().zip(&self.expected()) {
            assert_eq!(actual.len(), expected.len());
            let scale = expected.iter().fold(1f64, |scale, x| scale.max(x.abs()));
            for (actual, expected) in actual.iter().zip(expected) {
                assert!(
                    (f64::from(*actual) - expected).abs() < 1e-5 * scale,
                    "{actual} {expected}"
                );
            }
        }
    }
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().expect("f32")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn products_are_those_of_the_entries_one_by_one(n in 40..150usize, k in 1..40usize, m in 2..60usize, seed: u64) {
        Products::new([n, k, m], seed).check(&Device::flex());
    }
}

/// More rows than are taken together, and not a multiple of them.
#[test]
fn tiles_of_rows_add_up() {
    Products::new([2300, 30, 40], 3).check(&Device::flex());
}

/// More entries than a task sums up.
#[test]
fn sums_of_many_entries_add_up() {
    Products::new([30_000, 40, 9], 4).check(&Device::flex());
}

#[test]
fn products_do_not_depend_on_the_number_of_threads() {
    let products = Products::new([20_000, 60, 110], 5);
    let bits = |n| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().expect("threads");
        let found = pool.install(|| products.on(&Device::flex()));
        found.concat().into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    assert!(bits(1) == bits(2));
}

/// As where entries are few: what is not a number stays with the rows that name it.
#[test]
fn numbers_that_are_not_finite_reach_nobody_else() {
    let mut products = Products::new([200, 20, 30], 6);
    for index in &mut products.indices {
        *index = (*index).min(28);
    }
    products.rows[29 * D..].fill(f32::NAN);
    products.x[..D].fill(f32::INFINITY);
    products.values[..20].fill(0.0);
    let [decoded, _, by_rows, sums] = products.on(&Device::flex());
    assert!([decoded, by_rows, sums].concat().into_iter().all(f32::is_finite));
}
