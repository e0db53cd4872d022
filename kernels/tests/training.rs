//! What only training needs, against the equations in f64.

use burn::tensor::{Device, Tensor, TensorData};
use kernels::{AdamConfig, AdamState, ResidualFit, Select};
use proptest::prelude::*;

/// Numbers in [−1, 1) that depend on the seed alone.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut draw = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| draw()).collect()
}

/// With the plain defaults and nothing else.
#[allow(deprecated)]
fn plain_device() -> Device {
    Device::ndarray()
}

fn devices() -> impl Strategy<Value = Device> {
    prop_oneof![Just(Device::flex()), Just(plain_device())]
}

fn tensor<const D: usize>(values: &[f32], shape: [usize; D]) -> Tensor<D> {
    on(&Device::flex(), values, shape)
}

fn on<const D: usize>(device: &Device, values: &[f32], shape: [usize; D]) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), device)
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().expect("f32 tensor")
}

/// A random residual to fit.
struct Problem {
    n: usize,
    m: usize,
    d: usize,
    d_in: usize,
    x: Vec<f32>,
    products: Vec<f32>,
    bias: Vec<f32>,
    by: Vec<f32>,
    rows: Vec<f32>,
    residual: Vec<f32>,
    select: Select,
}

impl Problem {
    fn new([n, m, d, d_in]: [usize; 4], levels: f32, select: Select, seed: u64) -> Self {
        // Few levels make many ties, and pre-activations of exactly zero.
        let coarse = |values: Vec<f32>| -> Vec<f32> {
            values.into_iter().map(|value| (value * levels).round() / levels).collect()
        };
        Self {
            n,
            m,
            d,
            d_in,
            x: noise(n * d_in, seed ^ 1),
            products: coarse(noise(n * m, seed ^ 2)),
            bias: coarse(noise(m, seed ^ 3)),
            by: noise(m, seed ^ 4).into_iter().map(|by| by.abs() + 0.1).collect(),
            rows: noise(m * d, seed ^ 5),
            residual: noise(n * d, seed ^ 6),
            select,
        }
    }

    fn fit(&self) -> ResidualFit {
        self.fit_on(&Device::flex())
    }

    fn fit_on(&self, device: &Device) -> ResidualFit {
        let &Self { n, m, d, d_in, .. } = self;
        kernels::fit_residual(
            on(device, &self.x, [n, d_in]),
            on(device, &self.products, [n, m]),
            [on(device, &self.bias, [m]), on(device, &self.by, [m])],
            on(device, &self.rows, [m, d]),
            on(device, &self.residual, [n, d]),
            self.select,
        )
    }

    /// Squares, and gradients for rows, `w` and `bias`, by a full sort of every row.
    fn expected(&self) -> [Vec<f64>; 4] {
        let &Self { n, m, d, d_in, .. } = self;
        let wide = |x: f32| f64::from(x);
        let (mut squares, mut by_rows) = (vec![0.0; n], vec![0.0; m * d]);
        let (mut by_w, mut by_bias) = (vec![0.0; m * d_in], vec![0.0; m]);
        for (i, row_squares) in squares.iter_mut().enumerate() {
            let p: Vec<f32> = (0..m).map(|l| self.products[i * m + l] + self.bias[l]).collect();
            let (k, magnitude, positive) = match self.select {
                Select::TopK(k) => (k, false, true),
                Select::TopKSigned(k) => (k, false, false),
                Select::TopKMagnitude(k) => (k, true, false),
                other => panic!("{other:?}"),
            };
            let key = |l: usize| match magnitude {
                true => (p[l] * self.by[l]).abs(),
                false => p[l] * self.by[l] + 0.0,
            };
            let mut order: Vec<usize> = (0..m).collect();
            order.sort_by(|&a, &b| key(b).total_cmp(&key(a)));
            order.truncate(k);
            order.retain(|&l| !positive || p[l] > 0.0);
            let error: Vec<f64> = (0..d)
                .map(|at| {
                    let terms = order.iter().map(|&l| wide(p[l]) * wide(self.rows[l * d + at]));
                    terms.sum::<f64>() + wide(self.residual[i * d + at])
                })
                .collect();
            *row_squares = error.iter().map(|e| e * e).sum();
            for &l in &order {
                let mut by_p = 0.0;
                for (at, error) in error.iter().enumerate() {
                    by_rows[l * d + at] += wide(p[l]) * error;
                    by_p += error * wide(self.rows[l * d + at]);
                }
                by_bias[l] += by_p;
                for at in 0..d_in {
                    by_w[l * d_in + at] += by_p * wide(self.x[i * d_in + at]);
                }
            }
        }
        [squares, by_rows, by_w, by_bias]
    }

    fn check(&self, device: &Device) {
        let ResidualFit { squares, rows, w, bias } = self.fit_on(device);
        let found = [floats(squares), floats(rows), floats(w), floats(bias)];
        for (which, (found, expected)) in found.iter().zip(self.expected()).enumerate() {
            let largest = expected.iter().fold(1.0, |max: f64, x| max.max(x.abs()));
            for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let off = (f64::from(*found) - expected).abs();
                let place = format!("{:?}: result {which}[{at}]", self.select);
                assert!(off < 2e-5 * largest, "{place}: {found} for {expected}");
            }
        }
    }
}

fn select(which: usize, k: usize) -> Select {
    [Select::TopK(k), Select::TopKSigned(k), Select::TopKMagnitude(k)][which]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_fit_is_that_of_the_equations(
        (n, m, d, d_in) in (1..30usize, 1..70usize, 1..20usize, 1..20usize),
        (which, k) in (0..3usize, 1..80usize),
        levels in 1..40u32,
        device in devices(),
        seed: u64,
    ) {
        let select = select(which, k.min(m));
        Problem::new([n, m, d, d_in], levels as f32, select, seed).check(&device);
    }

    #[test]
    fn an_encoder_shows_the_products_that_it_makes(
        (n, d, m) in (1..1200usize, 1..9usize, 1..60usize), which in 0..5usize, k in 1..9usize,
        device in devices(), seed: u64,
    ) {
        let tensor = |values: &[f32], shape| on::<2>(&device, values, shape);
        let select = [
            Select::TopK(k.min(m)),
            Select::TopKSigned(k.min(m)),
            Select::TopKMagnitude(k.min(m)),
            Select::BatchTopK(k.min(n * m)),
            Select::Above,
        ][which];
        let (x, w) = (tensor(&noise(n * d, seed ^ 1), [n, d]), tensor(&noise(m * d, seed ^ 2), [m, d]).transpose());
        let bias = || on(&device, &noise(m, seed ^ 3), [m]);
        let by = || on(&device, &noise(m, seed ^ 4), [m]).abs() + 0.1;
        let columns: Vec<i64> = (0..m as i64).filter(|l| (seed >> (l % 61)) & 1 == 1).collect();
        prop_assume!(!columns.is_empty());
        let n_columns = columns.len();
        let among = Tensor::from_data(TensorData::new(columns, [n_columns]), &device);
        let (values, indices, products) = kernels::sparse_encode_with(
            x.clone(), w.clone(), [bias(), by()], select, among,
        );
        let (plain_values, plain_indices) = kernels::sparse_encode(x.clone(), w.clone(), bias(), by(), select);
        prop_assert_eq!(floats(values), floats(plain_values));
        indices.into_data().assert_eq(&plain_indices.into_data(), true);
        let (all, m) = (floats(x.matmul(w)), m);
        let columns: Vec<usize> = (0..m).filter(|l| (seed >> (l % 61)) & 1 == 1).collect();
        let expected = all.chunks(m).flat_map(|row| columns.iter().map(|&column| row[column]));
        for (found, expected) in floats(products).into_iter().zip(expected) {
            prop_assert!((found - expected).abs() < 1e-5, "{} for {}", found, expected);
        }
    }

    #[test]
    fn adam_by_rows_is_adam_where_there_is_a_gradient(
        n in 1..40usize, m in 1..150usize, idle in 0..4u32, device in devices(), seed: u64,
    ) {
        let tensor = |values: &[f32], shape| on::<2>(&device, values, shape);
        let is_idle = |row: usize| (seed >> (row % 61)) & 3 < u64::from(idle);
        let mut gradient = noise(n * m, seed ^ 1);
        for (row, gradient) in gradient.chunks_mut(m).enumerate() {
            // Zeros in a row do not make it idle; one entry alone makes it move.
            gradient.iter_mut().step_by(2).for_each(|g| *g = -0.0);
            if is_idle(row) {
                gradient.fill(0.0);
            } else {
                gradient[m - 1] = 1e-30;
            }
        }
        let draw = |salt| tensor(&noise(n * m, seed ^ salt), [n, m]);
        let state = || AdamState { first: draw(3), second: draw(4).abs() };
        let config = AdamConfig { gradient_scale: 0.5, ..AdamConfig::new(0.01) };
        let by_row = AdamConfig { skips_idle_rows: true, ..config };
        let g = tensor(&gradient, [n, m]);
        let (all, all_state) = kernels::adam_step(draw(2), g.clone(), state(), 3, config);
        let (some, some_state) = kernels::adam_step(draw(2), g, state(), 3, by_row);
        let moved = [(all, some), (all_state.first, some_state.first), (all_state.second, some_state.second)];
        for ((all, some), before) in moved.into_iter().zip([draw(2), draw(3), draw(4).abs()]) {
            let (all, some, before) = (floats(all), floats(some), floats(before));
            for row in 0..n {
                let rows = row * m..(row + 1) * m;
                let expected = if is_idle(row) { &before[rows.clone()] } else { &all[rows.clone()] };
                prop_assert_eq!(&some[rows], expected);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn rows_are_held_at_norm_1(
        n in 1..40usize, m in 1..150usize, skips_idle_rows: bool, device in devices(), seed: u64,
    ) {
        let draw = |salt| on::<2>(&device, &noise(n * m, seed ^ salt), [n, m]);
        let has = |salt: u64| {
            let on_or_off: Vec<f32> = (0..n as u64).map(|row| f32::from((seed ^ salt) >> (row % 61) & 3 != 0)).collect();
            on::<2>(&device, &on_or_off, [n, 1])
        };
        // Some rows of zeros, some without a gradient.
        let (rows, gradient) = (draw(1) * has(2), draw(3) * has(4));
        let projected = kernels::project_rows(gradient.clone(), rows.clone());
        let along = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let (rows_were, gradient_was, is) = (floats(rows.clone()), floats(gradient.clone()), floats(projected.clone()));
        for row in 0..n {
            let [w, g, is] = [&rows_were, &gradient_was, &is].map(|x| &x[row * m..(row + 1) * m]);
            let share = match along(w, w) { 0.0 => 0.0, squares => along(g, w) / squares };
            for ((w, g), is) in w.iter().zip(g).zip(is) {
                let expected = f64::from(*g) - share * f64::from(*w);
                prop_assert!((f64::from(*is) - expected).abs() < 1e-5, "{} for {}", is, expected);
            }
        }
        let zeros = || AdamState { first: draw(1) * 0.0, second: draw(1) * 0.0 };
        let config = AdamConfig { skips_idle_rows, ..AdamConfig::new(0.01) };
        let unit = AdamConfig { unit_rows: true, ..config };
        let (free, free_state) = kernels::adam_step(rows.clone(), projected.clone(), zeros(), 1, config);
        let (held, held_state) = kernels::adam_step(rows, projected.clone(), zeros(), 1, unit);
        prop_assert_eq!(floats(free_state.second), floats(held_state.second));
        let (free, held, gradient) = (floats(free), floats(held), floats(projected));
        for row in 0..n {
            let [free, held, gradient] = [&free, &held, &gradient].map(|x| &x[row * m..(row + 1) * m]);
            let is_idle = skips_idle_rows && gradient.iter().all(|g| *g == 0.0);
            let norm = match along(free, free).sqrt() { norm if is_idle || norm == 0.0 => 1.0, norm => norm };
            for (free, held) in free.iter().zip(held) {
                prop_assert!((f64::from(*held) - f64::from(*free) / norm).abs() < 1e-6, "{} for {}", held, free);
            }
        }
    }
}

/// More rows than the kernel takes at a time, and not a multiple of them.
#[test]
fn tiles_of_rows_add_up() {
    for which in 0..3 {
        Problem::new([2500, 9, 5, 7], 1e4, select(which, 4), 3).check(&Device::flex());
    }
}

#[test]
fn a_fit_does_not_depend_on_the_number_of_threads() {
    let problem = Problem::new([1300, 70, 33, 41], 1e4, Select::TopKSigned(30), 5);
    let bits = |n| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().expect("threads");
        let ResidualFit { squares, rows, w, bias } = pool.install(|| problem.fit());
        let all = [floats(squares), floats(rows), floats(w), floats(bias)].concat();
        all.into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    assert!(bits(1) == bits(2));
}

#[test]
#[should_panic(expected = "of 4 columns")]
fn more_entries_than_columns_cannot_be_selected() {
    Problem::new([2, 4, 3, 3], 8.0, Select::TopK(5), 1).fit();
}

#[test]
#[should_panic(expected = "not a selection by rows")]
fn a_fit_is_of_selections_by_rows() {
    Problem::new([2, 4, 3, 3], 8.0, Select::Above, 1).fit();
}

fn indices(device: &Device, values: Vec<i64>, shape: [usize; 2]) -> Tensor<2, burn::tensor::Int> {
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// What a row names twice counts twice.
#[test]
fn entries_that_are_named_twice_add_up() {
    for device in [Device::flex(), plain_device()] {
        let named = || indices(&device, vec![2, 2, 0], [1, 3]);
        let values = || on(&device, &[1.0, 10.0, 5.0], [1, 3]);
        let rows = on(&device, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [3, 2]);
        let x = on(&device, &[1.0, 2.0], [1, 2]);
        let decoded = kernels::sparse_decode(named(), values(), rows.clone());
        assert_eq!(floats(decoded), [11.0 * 5.0 + 5.0, 11.0 * 6.0 + 10.0]);
        assert_eq!(floats(kernels::sparse_dot(named(), rows, x.clone())), [17.0, 17.0, 5.0]);
        let by_rows = kernels::sparse_grad_rows(named(), values(), x, 3);
        assert_eq!(floats(by_rows), [5.0, 10.0, 0.0, 0.0, 11.0, 22.0]);
        assert_eq!(floats(kernels::sparse_sum(named(), values(), 3)), [5.0, 0.0, 11.0]);
        let vector = on(&device, &[7.0, 8.0, 9.0], [3]);
        assert_eq!(floats(kernels::sparse_gather(named(), vector)), [9.0, 9.0, 7.0]);
    }
}

#[test]
fn indices_out_of_range_are_refused_by_every_operation() {
    for bad in [-1, 3, i64::from(i32::MAX)] {
        let named = || indices(&Device::flex(), vec![0, bad], [1, 2]);
        let values = || tensor(&[1.0, 1.0], [1, 2]);
        let rows = || tensor(&[1.0; 6], [3, 2]);
        let x = || tensor(&[1.0, 2.0], [1, 2]);
        let operations: [(&str, &dyn Fn()); 5] = [
            ("decode", &|| drop(kernels::sparse_decode(named(), values(), rows()))),
            ("dot", &|| drop(kernels::sparse_dot(named(), rows(), x()))),
            ("grad_rows", &|| drop(kernels::sparse_grad_rows(named(), values(), x(), 3))),
            ("sum", &|| drop(kernels::sparse_sum(named(), values(), 3))),
            ("gather", &|| drop(kernels::sparse_gather(named(), tensor(&[1.0; 3], [3])))),
        ];
        for (name, run) in operations {
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
            let panic = outcome.expect_err(name);
            let message = panic.downcast_ref::<String>().expect("a message");
            assert!(message.contains("out of range for 3 rows"), "{name} of {bad}: {message}");
        }
    }
}

#[test]
#[should_panic(expected = "column 4 is out of range for 4 columns")]
fn products_of_a_column_that_is_not_there_are_refused() {
    let among = Tensor::from_data(TensorData::new(vec![4i64], [1]), &Device::flex());
    let vector = || tensor(&[1.0; 4], [4]);
    let (x, w) = (tensor(&[1.0; 6], [2, 3]), tensor(&[1.0; 12], [3, 4]));
    let _ = kernels::sparse_encode_with(x, w, [vector(), vector()], Select::TopK(1), among);
}
