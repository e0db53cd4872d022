//! Every kernel of a backend against the plain computation, values and gradients, on random shapes.

use burn::tensor::{DType, Device, Int, Tensor, TensorData, Tolerance};
use kernels::{
    AdamConfig, AdamState, AttentionConfig, KeyValues, Nonlinearity, RotaryPairs, Search, Select,
};
use proptest::prelude::*;

/// With kernels of its own.
fn device() -> Device {
    Device::flex()
}

/// With the plain defaults and nothing else.
#[allow(deprecated)]
fn plain_device() -> Device {
    Device::ndarray()
}

fn devices() -> impl Strategy<Value = Device> {
    prop_oneof![Just(device()), Just(plain_device())]
}

/// Numbers in [−1, 1) that depend on the seed alone.
fn noise<const D: usize>(shape: [usize; D], seed: u64, device: &Device) -> Tensor<D> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let values: Vec<f32> = (0..shape.iter().product::<usize>())
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().expect("f32 tensor")
}

fn ints(tensor: Tensor<2, Int>) -> Vec<i64> {
    tensor.into_data().iter::<i64>().collect()
}

fn assert_close<const D: usize>(actual: Tensor<D>, expected: Tensor<D>) {
    let tolerance = Tolerance::<f32>::rel_abs(1e-4, 2e-5);
    actual.into_data().assert_approx_eq::<f32>(&expected.into_data(), tolerance);
}

/// A full stable sort of each row.
fn naive_top_k(x: &[f32], m: usize, k: usize) -> (Vec<f32>, Vec<i64>) {
    let (mut values, mut columns) = (Vec::new(), Vec::new());
    for row in x.chunks(m) {
        let mut order: Vec<usize> = (0..m).collect();
        order.sort_by(|&a, &b| (row[b] + 0.0).total_cmp(&(row[a] + 0.0)));
        columns.extend(order[..k].iter().map(|&i| i as i64));
        values.extend(order[..k].iter().map(|&i| row[i]));
    }
    (values, columns)
}

/// 1 for what a selection keeps of pre-activations, by sorting everything.
fn naive_selection(pre: &[f32], by: &[f32], [n, m]: [usize; 2], select: Select) -> Vec<f32> {
    let ranked: Vec<f32> = pre.iter().enumerate().map(|(i, p)| p * by[i % m]).collect();
    let mut is_kept = vec![0.0; n * m];
    match select {
        Select::TopK(k) | Select::TopKSigned(k) | Select::TopKMagnitude(k) => {
            let magnitude = matches!(select, Select::TopKMagnitude(_));
            let measure = |x: &f32| if magnitude { x.abs() } else { *x };
            let columns = naive_top_k(&ranked.iter().map(measure).collect::<Vec<_>>(), m, k).1;
            for (at, column) in columns.into_iter().enumerate() {
                is_kept[at / k * m + column as usize] = 1.0;
            }
        }
        Select::GroupMax(k) => {
            let size = m / k;
            let columns = naive_top_k(pre, size, 1).1;
            for (group, within) in columns.into_iter().enumerate() {
                is_kept[group * size + within as usize] = 1.0;
            }
        }
        Select::BatchTopK(n_kept) => {
            let (values, places) = naive_top_k(&ranked, n * m, n_kept);
            for (value, place) in values.into_iter().zip(places) {
                is_kept[place as usize] = f32::from(value > 0.0);
            }
        }
        Select::Above => {
            for (at, is_kept) in is_kept.iter_mut().enumerate() {
                *is_kept = f32::from(pre[at] > by[at % m].max(0.0));
            }
        }
    }
    is_kept
}

/// `[n, k]` distinct indices below `m` in each row.
fn some_indices(n: usize, k: usize, m: usize, seed: u64, device: &Device) -> Tensor<2, Int> {
    let picked = naive_top_k(&floats(noise([n, m], seed, device)), m, k).1;
    Tensor::from_data(TensorData::new(picked, [n, k]), device)
}

/// The non-linearities by their definitions.
fn written_out(x: Tensor<2>, f: Nonlinearity) -> Tensor<2> {
    match f {
        Nonlinearity::Silu => x.clone() / ((-x).exp() + 1.0),
        Nonlinearity::Gelu => x.clone() * ((x * 0.5f64.sqrt()).erf() + 1.0) * 0.5,
        Nonlinearity::GeluTanh => {
            let inner = (x.clone() + x.clone().powi_scalar(3) * 0.044715)
                * (2.0 / std::f64::consts::PI).sqrt();
            x * (inner.tanh() + 1.0) * 0.5
        }
        _ => burn::tensor::activation::relu(x),
    }
}

/// Many cases of what decides which latents there are: 10,000 for each device in these three.
fn many() -> ProptestConfig {
    ProptestConfig::with_cases(8_000)
}

/// What `sparse_encode` is put to.
#[derive(Debug, Clone, Copy)]
enum Input {
    Noise,
    /// Few levels, so that sums are exact and many of them equal.
    Levels,
    /// The same row again and again.
    EqualRows,
    /// All pre-activations of a row are equal.
    EqualColumns,
}

fn inputs() -> impl Strategy<Value = Input> {
    prop_oneof![
        3 => Just(Input::Noise),
        1 => Just(Input::Levels),
        1 => Just(Input::EqualRows),
        1 => Just(Input::EqualColumns),
    ]
}

/// `x`, `w`, `bias` and `by`.
fn encoder(
    input: Input,
    [n, d, m]: [usize; 3],
    seed: u64,
    device: &Device,
) -> (Tensor<2>, Tensor<2>, Tensor<1>, Tensor<1>) {
    let x = noise([n, d], seed ^ 1, device);
    let w = noise([d, m], seed ^ 2, device);
    let bias = noise([m], seed ^ 3, device);
    let by = noise([m], seed ^ 4, device).abs() + 0.1;
    let levels = |x: Tensor<2>| (x * 2.0).round();
    match input {
        Input::Noise => (x, w, bias, by),
        Input::Levels => (levels(x), levels(w), (bias * 2.0).round(), by.ones_like()),
        Input::EqualRows => (x.narrow(0, 0, 1).expand([n, d]), w, bias, by),
        Input::EqualColumns => {
            let w = w.narrow(1, 0, 1).expand([d, m]);
            (x, w, bias.ones_like(), by.ones_like())
        }
    }
}

/// One, all of them, or some.
fn kept() -> impl Strategy<Value = usize> {
    prop_oneof![1 => Just(1), 1 => Just(usize::MAX), 4 => 1..9usize]
}

proptest! {
    #![proptest_config(many())]

    #[test]
    fn top_k_is_a_sorted_prefix(
        n in 1..6usize, m in 1..300usize, kept in prop_oneof![kept(), 1..40usize], levels in 0..50i32, device in devices(),
        seed: u64,
    ) {
        let k = kept.min(m);
        // Few levels make many ties; with none, all are equal.
        let x = (noise([n, m], seed, &device) * levels as f64).round();
        let (values, indices) = kernels::top_k(x.clone(), k);
        let (naive_values, naive_indices) = naive_top_k(&floats(x), m, k);
        prop_assert_eq!(ints(indices), naive_indices);
        prop_assert_eq!(floats(values), naive_values);
    }

    #[test]
    fn sparse_encode_keeps_what_plain_tensors_keep(
        (n, d, m) in (1..40usize, 1..20usize, 1..90usize), input in inputs(), which in 0..6, kept in kept(),
        device in devices(), seed: u64,
    ) {
        let device = device.autodiff();
        let select = match which {
            0 => Select::TopK(kept.min(m)),
            1 => Select::TopKMagnitude(kept.min(m)),
            2 => Select::BatchTopK(kept.saturating_mul(n).min(n * m)),
            3 => Select::TopKSigned(kept.min(m)),
            4 => Select::GroupMax((1..=kept.min(m)).rfind(|k| m % k == 0).expect("1 divides")),
            _ => Select::Above,
        };
        let (x, w, bias, by) = encoder(input, [n, d, m], seed, &device);
        let leaf = |x: &Tensor<2>| x.clone().detach().require_grad();
        let (x, w, bias) = (leaf(&x), leaf(&w), bias.detach().require_grad());
        let (values, indices) = kernels::sparse_encode(x.clone(), w.clone(), bias.clone(), by.clone(), select);

        let (px, pw, pb) = (leaf(&x), leaf(&w), bias.clone().detach().require_grad());
        let pre = px.clone().matmul(pw.clone()) + pb.clone().unsqueeze();
        let is_kept = naive_selection(&floats(pre.clone()), &floats(by), [n, m], select);
        let is_kept = Tensor::<2>::from_data(TensorData::new(is_kept, [n, m]), &device);
        let plain = match select {
            Select::TopK(_) | Select::GroupMax(_) => burn::tensor::activation::relu(pre),
            _ => pre,
        } * is_kept;
        let dense = Tensor::<2>::zeros([n, m], &device).scatter(1, indices, values, burn::tensor::IndexingUpdateOp::Add);
        assert_close(dense.clone(), plain.clone());

        let weight = noise([n, m], seed ^ 5, &device);
        let grads = (dense * weight.clone()).sum().backward();
        let plain_grads = (plain * weight).sum().backward();
        assert_close(x.grad(&grads).unwrap(), px.grad(&plain_grads).unwrap());
        assert_close(w.grad(&grads).unwrap(), pw.grad(&plain_grads).unwrap());
        assert_close(bias.grad(&grads).unwrap(), pb.grad(&plain_grads).unwrap());
    }
}

/// Values and indices of both ways to search, as bits.
fn both_searches(
    x: &Tensor<2>,
    w: &Tensor<2>,
    bias: &Tensor<1>,
    by: &Tensor<1>,
    select: Select,
) -> [(Vec<u32>, Vec<i64>); 2] {
    [Search::Full, Search::Proposed].map(|search| {
        let (x, w, bias, by) = (x.clone(), w.clone(), bias.clone(), by.clone());
        let (values, indices) = kernels::sparse_encode_by(search, x, w, bias, by, select);
        (floats(values).into_iter().map(f32::to_bits).collect(), ints(indices))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn proposed_entries_are_those_of_a_full_search(
        (n, d, m) in (250..300usize, 1..70usize, 60..400usize), input in inputs(), which in 0..4usize, kept in kept(),
        transposed: bool, outlier in 0..4, seed: u64,
    ) {
        let device = device();
        let k = kept.min(m / 16).max(1);
        let of_batch = Select::BatchTopK((k * n).min(n * m / 16));
        let select = [Select::TopK(k), Select::TopKSigned(k), Select::TopKMagnitude(k), of_batch][which];
        let (x, w, bias, by) = encoder(input, [n, d, m], seed, &device);
        // One dimension that dwarfs the others; rows of zeros; factors below zero.
        let x = match outlier {
            1 => x * (noise::<2>([1, d], seed ^ 6, &device) * 12.0).exp(),
            2 => x.clone() * x.narrow(1, 0, 1).lower_elem(0.0).float(),
            _ => x,
        };
        let by = if outlier == 3 { by - 0.6 } else { by };
        let w = if transposed { w.transpose().mul_scalar(1.0).transpose() } else { w.mul_scalar(1.0) };
        let [full, proposed] = both_searches(&x, &w, &bias, &by, select);
        prop_assert_eq!(full, proposed);
    }
}

#[test]
fn proposed_entries_have_the_bits_of_the_blocked_product() {
    let device = device();
    // Widths that the blocked product sums in one part and in several; tiles and ends of tiles.
    for (d, m, n) in
        [(512, 130, 257), (576, 300, 513), (1030, 200, 519), (2049, 130, 300), (5000, 70, 600)]
    {
        let (x, w) = (noise([n, d], 1, &device), noise([m, d], 2, &device).transpose());
        let (bias, by) = (noise([m], 3, &device), noise([m], 4, &device).abs() + 0.1);
        for select in [Select::TopKSigned(4), Select::BatchTopK(4 * n)] {
            let [full, proposed] = both_searches(&x, &w, &bias, &by, select);
            assert_eq!(full, proposed, "{d}, {select:?}");
        }
    }
}

#[test]
fn threads_do_not_change_what_is_proposed() {
    let device = device();
    let (n, d, m) = (700, 100, 300);
    let (x, w) = (noise([n, d], 1, &device), noise([m, d], 2, &device).transpose());
    let (bias, by) = (noise([m], 3, &device), noise([m], 4, &device).abs() + 0.1);
    let found = [1, 2, 5].map(|n_threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().expect("threads");
        let (x, w, bias, by) = (x.clone(), w.clone(), bias.clone(), by.clone());
        let selections = [Select::TopK(7), Select::BatchTopK(7 * n)];
        pool.install(move || selections.map(|select| both_searches(&x, &w, &bias, &by, select)))
    });
    for found_by in &found {
        for ([full, proposed], [expected, _]) in found_by.iter().zip(&found[0]) {
            assert_eq!(full, expected);
            assert_eq!(proposed, expected);
        }
    }
}

#[test]
fn what_cannot_be_proposed_is_searched_in_full() {
    let device = device();
    let (n, d, m) = (260, 30, 130);
    let (x, w) = (noise([n, d], 1, &device), noise([m, d], 2, &device).transpose());
    let (bias, by) = (noise([m], 3, &device), noise([m], 4, &device).abs() + 0.1);
    let column = || noise::<2>([n, 1], 5, &device);
    for odd in [f32::NAN, f32::INFINITY, 1e30, 1e-30] {
        let x = Tensor::cat(vec![x.clone().narrow(1, 1, d - 1), column() * odd], 1);
        let [full, proposed] = both_searches(&x, &w, &bias, &by, Select::TopK(4));
        assert_eq!(full, proposed, "{odd}");
        let w = w.clone() * odd;
        let [full, proposed] = both_searches(&x, &w, &bias, &by, Select::TopKMagnitude(4));
        assert_eq!(full, proposed, "{odd}");
        let bias = bias.clone() * odd;
        let [full, proposed] = both_searches(&x, &w, &bias, &by, Select::TopKSigned(4));
        assert_eq!(full, proposed, "{odd}");
    }
    // Rows so unlike each other that no bar can be guessed; and fewer above zero than are wanted.
    let few = Tensor::cat(vec![x.clone().narrow(0, 0, 4) * 1e3, x.clone().narrow(0, 4, n - 4)], 0);
    for (x, bias) in [(few, bias.clone()), (x, bias - 1e3)] {
        let [full, proposed] = both_searches(&x, &w, &bias, &by, Select::BatchTopK(2 * m));
        assert_eq!(full, proposed);
    }
}

#[test]
fn a_selection_over_the_batch_breaks_ties_by_place_over_several_tiles() {
    let device = device();
    // Sums of small integers: exact, and few enough that the last one kept has many equals.
    let (n, d, m) = (1100, 5, 24);
    let (x, w, bias, by) = encoder(Input::Levels, [n, d, m], 7, &device);
    let pre = x.clone().matmul(w.clone()) + bias.clone().unsqueeze();
    for n_kept in [1, 700, 2 * n, 5 * n, n * m] {
        let select = Select::BatchTopK(n_kept);
        let is_kept = naive_selection(&floats(pre.clone()), &floats(by.clone()), [n, m], select);
        let plain: Vec<f32> =
            floats(pre.clone()).iter().zip(is_kept).map(|(p, kept)| p * kept).collect();
        let (values, indices) =
            kernels::sparse_encode(x.clone(), w.clone(), bias.clone(), by.clone(), select);
        let dense = Tensor::<2>::zeros([n, m], &device);
        let dense = dense.scatter(1, indices, values, burn::tensor::IndexingUpdateOp::Add);
        assert_eq!(floats(dense), plain, "{n_kept}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn sparse_decode_is_a_dense_product(n in 1..100usize, d in 1..50usize, m in 1..60usize, k in 1..9usize, device in devices(), seed: u64) {
        let (k, device) = (k.min(m), device.autodiff());
        let indices = some_indices(n, k, m, seed, &device);
        let values = noise([n, k], seed ^ 1, &device).require_grad();
        let rows = noise([m, d], seed ^ 2, &device).require_grad();
        let out = kernels::sparse_decode(indices.clone(), values.clone(), rows.clone());

        let (pv, pr) = (values.clone().detach().require_grad(), rows.clone().detach().require_grad());
        let dense = Tensor::<2>::zeros([n, m], &device).scatter(1, indices, pv.clone(), burn::tensor::IndexingUpdateOp::Add);
        let plain = dense.matmul(pr.clone());
        assert_close(out.clone(), plain.clone());
        let weight = noise([n, d], seed ^ 3, &device);
        let grads = (out * weight.clone()).sum().backward();
        let plain_grads = (plain * weight).sum().backward();
        assert_close(values.grad(&grads).unwrap(), pv.grad(&plain_grads).unwrap());
        assert_close(rows.grad(&grads).unwrap(), pr.grad(&plain_grads).unwrap());
    }

    #[test]
    fn gradients_of_rows_match_written_out_tensors(n in 1..12usize, d in 1..40usize, device in devices(), seed: u64) {
        let device = device.autodiff();
        let leaf = |salt| (noise::<2>([n, d], seed ^ salt, &device) * 3.0).detach().require_grad();
        let weight = noise::<2>([n, d], seed ^ 9, &device);
        for f in [Nonlinearity::Silu, Nonlinearity::Gelu, Nonlinearity::GeluTanh, Nonlinearity::Relu] {
            let (gate, up) = (leaf(1), leaf(2));
            let grads = (kernels::gated(gate.clone(), up.clone(), f) * weight.clone()).sum().backward();
            let (pg, pu) = (gate.clone().detach().require_grad(), up.clone().detach().require_grad());
            let out = written_out(pg.clone(), f) * pu.clone();
            assert_close(kernels::gated(gate.clone(), up.clone(), f), out.clone());
            let plain = (out * weight.clone()).sum().backward();
            assert_close(gate.grad(&grads).unwrap(), pg.grad(&plain).unwrap());
            assert_close(up.grad(&grads).unwrap(), pu.grad(&plain).unwrap());
            let grads = (kernels::nonlinear(gate.clone(), f) * weight.clone()).sum().backward();
            let plain = (written_out(pg.clone(), f) * weight.clone()).sum().backward();
            assert_close(gate.grad(&grads).unwrap(), pg.grad(&plain).unwrap());
        }
        let (x, gain) = (leaf(3), noise::<1>([d], seed ^ 4, &device).require_grad());
        let grads = (kernels::rms_norm(x.clone(), gain.clone(), 1e-3) * weight.clone()).sum().backward();
        let (px, pg) = (x.clone().detach().require_grad(), gain.clone().detach().require_grad());
        let scale = (px.clone().square().mean_dim(1) + 1e-3).sqrt();
        let plain = px.clone() / scale * pg.clone().unsqueeze();
        assert_close(kernels::rms_norm(x.clone(), gain.clone(), 1e-3), plain.clone());
        let plain = (plain * weight).sum().backward();
        assert_close(x.grad(&grads).unwrap(), px.grad(&plain).unwrap());
        assert_close(gain.grad(&grads).unwrap(), pg.grad(&plain).unwrap());
    }

    #[test]
    fn gradients_of_heads_match_written_out_tensors(
        batch in 1..3usize, n in 1..20usize, past in 0..9usize, kv_heads in 1..3usize,
        group in 1..4usize, wide: bool, window in prop::option::of(1..12usize),
        device in devices(), seed: u64,
    ) {
        let (device, d_head) = (device.autodiff(), if wide { 16 } else { 6 });
        let own = past + n;
        let leaf = |shape: [usize; 4], salt| (noise::<4>(shape, seed ^ salt, &device) * 2.0).detach().require_grad();
        let q = leaf([batch, n, kv_heads * group, d_head], 1);
        // Out of the midst of longer buffers, as a cache with room keeps them.
        let cached = |salt| leaf([batch, own + 2, kv_heads, d_head], salt).narrow(1, 1, own).detach().require_grad();
        let (k, v) = (cached(2), cached(3));
        let weight = noise::<4>(q.dims(), seed ^ 4, &device);
        let first = |row: usize| (seed >> row) as usize % (own + 1);
        let firsts: Vec<i64> = (0..batch).flat_map(|row| vec![first(row) as i64; n]).collect();
        let firsts = Tensor::from_data(TensorData::new(firsts, [batch, n]), &device);
        let config = AttentionConfig { scale: 0.4, soft_cap: None, window };
        let key_values = KeyValues { prefix: None, own: (k.clone(), v.clone()) };
        let z = kernels::attention(q.clone(), key_values.clone(), firsts.clone(), config);
        let grads = (z * weight.clone()).sum().backward();

        let again = |x: &Tensor<4>| x.clone().detach().require_grad();
        let (pq, pk, pv) = (again(&q), again(&k), again(&v));
        // One head at a time, and a mask made by hand.
        let mut total = Tensor::<1>::zeros([1], &device);
        for row in 0..batch {
            let seen = |i: usize, c: usize| {
                let column = past + i;
                first(row) <= c && c <= column && window.is_none_or(|w| column - c < w)
            };
            let mask: Vec<f32> =
                (0..n).flat_map(|i| (0..own).map(move |c| f32::from(seen(i, c)))).collect();
            let mask = Tensor::<2>::from_data(TensorData::new(mask, [n, own]), &device);
            for head in 0..kv_heads * group {
                let pick = |x: &Tensor<4>, head: usize| {
                    let [_, len, _, _] = x.dims();
                    x.clone().narrow(0, row, 1).narrow(2, head, 1).reshape([len, d_head])
                };
                let (q, k, v) = (pick(&pq, head), pick(&pk, head / group), pick(&pv, head / group));
                let weights = (q.matmul(k.transpose()) * 0.4).exp() * mask.clone();
                let z = (weights.clone() / (weights.sum_dim(1) + 1e-16)).matmul(v);
                total = total + (z * pick(&weight, head)).sum();
            }
        }
        assert_close((kernels::attention(q.clone(), key_values, firsts, config) * weight.clone()).sum(), total.clone());
        let plain = total.backward();
        for (x, p) in [(&q, &pq), (&k, &pk), (&v, &pv)] {
            assert_close(x.grad(&grads).unwrap(), p.grad(&plain).unwrap());
        }

        let angles = noise::<3>([batch, n, d_head / 2], seed ^ 5, &device) * 9.0;
        let (cos, sin) = (angles.clone().cos().detach(), angles.sin().detach());
        let turned = kernels::rotary(q.clone(), cos.clone(), sin.clone(), RotaryPairs::Halves);
        let grads = (turned * weight.clone()).sum().backward();
        let half = |x: &Tensor<4>, from| x.clone().narrow(3, from, d_head / 2);
        let table = |t: Tensor<3>| t.unsqueeze_dim::<4>(2);
        let (a, b) = (half(&pq, 0), half(&pq, d_head / 2));
        let (cos, sin) = (table(cos), table(sin));
        let turned = Tensor::cat(vec![
            a.clone() * cos.clone() - b.clone() * sin.clone(),
            b * cos + a * sin,
        ], 3);
        let plain = (turned * weight).sum().backward();
        assert_close(q.grad(&grads).unwrap(), pq.grad(&plain).unwrap());
    }

    // What has no fused gradient runs its plain default on the autodiff device.
    #[test]
    fn layer_norm_matches_its_default(n in 1..30usize, d in 1..40usize, seed: u64) {
        let run = |device: &Device| {
            let row = |salt| noise::<1>([d], seed ^ salt, device);
            kernels::layer_norm(noise([n, d], seed, device) * 4.0, row(3), row(4), 1e-5)
        };
        assert_close(run(&device()), run(&device().autodiff()).inner());
    }

    // They are what they round to, in arithmetic of f32.
    #[test]
    fn weights_may_be_in_bf16(n in 1..120usize, d in 1..70usize, m in 5..1100usize, seed: u64) {
        let bf16 = noise::<2>([d, m], seed ^ 1, &device()).cast(DType::BF16);
        let w = bf16.clone().cast(DType::F32);
        let (rows_bf16, rows) = (bf16.clone().transpose(), w.clone().transpose());
        let (x, values) = (noise([n, d], seed, &device()), noise([n, 5], seed ^ 2, &device()));
        let at = some_indices(n, 5, m, seed, &device());
        assert_close(kernels::linear(x.clone(), bf16.clone()), kernels::linear(x.clone(), w.clone()));
        assert_close(
            kernels::dot_rows(x.clone(), rows_bf16.clone()),
            kernels::dot_rows(x.clone(), rows.clone()),
        );
        assert_close(
            kernels::sparse_decode(at.clone(), values.clone(), rows_bf16.clone()),
            kernels::sparse_decode(at.clone(), values, rows.clone()),
        );
        assert_close(
            kernels::sparse_dot(at.clone(), rows_bf16, x.clone()),
            kernels::sparse_dot(at.clone(), rows, x.clone()),
        );
        let (bias, by) = (noise([m], seed ^ 3, &device()), Tensor::ones([m], &device()));
        let among = at.slice(0..1).squeeze_dim::<1>(0);
        let encode = |w: &Tensor<2>| {
            let (x, by_column) = (x.clone(), [bias.clone(), by.clone()]);
            kernels::sparse_encode_with(x, w.clone(), by_column, Select::TopK(5), among.clone())
        };
        let (actual, expected) = (encode(&bf16), encode(&w));
        assert_close(actual.0, expected.0);
        prop_assert_eq!(ints(actual.1), ints(expected.1.clone()));
        assert_close(actual.2, expected.2);
        let encoded = kernels::sparse_encode(x, bf16, bias, by, Select::TopK(5));
        prop_assert_eq!(ints(encoded.1), ints(expected.1));
    }

    #[test]
    fn products_with_weights_match_their_defaults(n in 1..120usize, d in 1..70usize, m in 1..1100usize, seed: u64) {
        let run = |device: &Device| kernels::dot_rows(noise([n, d], seed, device), noise([m, d], seed ^ 1, device));
        assert_close(run(&device()), run(&device().autodiff()).inner());
        let run = |device: &Device| kernels::linear(noise([n, d], seed, device), noise([d, m], seed ^ 1, device));
        assert_close(run(&device()), run(&device().autodiff()).inner());
        let k = m.min(5);
        let run = |device: &Device| {
            let indices = some_indices(n, k, m, seed, device);
            kernels::sparse_dot(indices, noise([m, d], seed ^ 1, device), noise([n, d], seed, device))
        };
        assert_close(run(&device()), run(&device().autodiff()).inner());
    }

    #[test]
    fn rotary_is_complex_multiplication(
        batch in 1..4usize, pos in 1..6usize, heads in 1..4usize, half in 1..9usize, rest in 0..4usize,
        device in devices(), seed: u64,
    ) {
        let d_head = 2 * half + rest;
        let angles = noise::<3>([batch, pos, half], seed, &device) * 9.0;
        let x = noise([batch, pos, heads, d_head], seed ^ 1, &device);
        for pairs in [RotaryPairs::Halves, RotaryPairs::Neighbours] {
            let turned = kernels::rotary(x.clone(), angles.clone().cos(), angles.clone().sin(), pairs);
            let (mut expected, angles) = (floats(x.clone()), floats(angles.clone()));
            for (i, head) in expected.chunks_mut(d_head).enumerate() {
                for (pair, angle) in angles[i / heads * half..][..half].iter().enumerate() {
                    let (a, b) = match pairs {
                        RotaryPairs::Halves => (pair, pair + half),
                        RotaryPairs::Neighbours => (2 * pair, 2 * pair + 1),
                    };
                    let (sin, cos) = angle.sin_cos();
                    (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[a] * sin + head[b] * cos);
                }
            }
            let expected = TensorData::new(expected, [batch, pos, heads, d_head]);
            assert_close(turned, Tensor::from_data(expected, &device));
        }
    }

    #[test]
    fn attention_matches_its_default(
        batch in 1..4usize, n in 1..40usize, past in 0..20usize, prefix in 0..25usize,
        kv_heads in 1..3usize, group in 1..4usize, wide: bool, seed: u64, room in 0..3usize,
        soft_cap in prop::option::of(0.5..3f64), window in prop::option::of(1..30usize),
    ) {
        let d_head = if wide { 16 } else { 6 };
        let run = |device: &Device| {
            let vectors = |rows, len, salt| noise::<4>([rows, len, kv_heads, d_head], seed ^ salt, device) * 3.0;
            let q = noise([batch, n, kv_heads * group, d_head], seed ^ 1, device) * 3.0;
            let shared = (prefix > 0).then(|| (vectors(1, prefix, 2), vectors(1, prefix, 3)));
            // Out of the midst of longer buffers, as a cache with room keeps them.
            let cached = |salt| vectors(batch, past + n + 2 * room, salt).narrow(1, room, past + n);
            let own = (cached(4), cached(5));
            // Within a row, as where texts follow one another.
            let first = |row: usize, i: usize| ((seed >> row) % (past + n + 1) as u64) as i64 + (i as i64 / 7);
            let first: Vec<i64> = (0..batch).flat_map(|row| (0..n).map(move |i| first(row, i))).collect();
            let first = Tensor::from_data(TensorData::new(first, [batch, n]), device);
            let config = AttentionConfig { scale: 0.3, soft_cap, window };
            kernels::attention(q, KeyValues { prefix: shared, own }, first, config)
        };
        assert_close(run(&device()), run(&device().autodiff()).inner());
    }

    #[test]
    fn adam_matches_the_textbook(n in 1..8usize, m in 1..20usize, device in devices(), seed: u64) {
        let config = AdamConfig::new(0.01);
        let draw = |salt| noise::<2>([n, m], seed ^ salt, &device);
        let (mut w, mut state) = (draw(1), AdamState { first: draw(9) * 0.0, second: draw(9) * 0.0 });
        let mut book: Vec<f64> = floats(w.clone()).iter().map(|&w| f64::from(w)).collect();
        let (mut first, mut second) = (vec![0f64; n * m], vec![0f64; n * m]);
        for step in 1..=5usize {
            let g = draw(10 + step as u64);
            for (i, g) in floats(g.clone()).into_iter().map(f64::from).enumerate() {
                first[i] = 0.9 * first[i] + 0.1 * g;
                second[i] = 0.999 * second[i] + 0.001 * g * g;
                let (m_hat, v_hat) = (first[i] / (1.0 - 0.9f64.powi(step as i32)), second[i] / (1.0 - 0.999f64.powi(step as i32)));
                book[i] -= 0.01 * m_hat / (v_hat.sqrt() + 1e-8);
            }
            (w, state) = kernels::adam_step(w, g, state, step, config);
        }
        let book: Vec<f32> = book.into_iter().map(|w| w as f32).collect();
        assert_close(w, Tensor::from_data(TensorData::new(book, [n, m]), &device));
    }
}

/// The definition of rotary embeddings, by complex multiplication.
#[test]
fn rotary_turns_the_pairs_that_it_names() {
    let device = device();
    let x = Tensor::<4>::from_data([[[[1.0, 2.0, 3.0, 4.0, 5.0]]]], &device);
    let table = |values: [f64; 2]| Tensor::<3>::from_data([[values]], &device);
    // A quarter turn for the first pair, none for the second.
    let run =
        |pairs| floats(kernels::rotary(x.clone(), table([0.0, 1.0]), table([1.0, 0.0]), pairs));
    assert_eq!(run(RotaryPairs::Halves), [-3.0, 2.0, 1.0, 4.0, 5.0]);
    assert_eq!(run(RotaryPairs::Neighbours), [-2.0, 1.0, 3.0, 4.0, 5.0]);
}

#[test]
fn nan_ranks_last_and_ties_go_to_the_lowest_index() {
    let row = [f32::NAN, 1.0, f32::NEG_INFINITY, 1.0, -0.0, 0.0, 1.0];
    for device in [device(), plain_device()] {
        let x = Tensor::<2>::from_data(TensorData::new(row.to_vec(), [1, 7]), &device);
        assert_eq!(ints(kernels::top_k(x, 5).1), [1, 3, 6, 4, 5]);
    }
}

#[test]
fn a_pre_activation_that_is_nan_is_none_of_those_kept() {
    let (n, d, m) = (3, 2, 8);
    let selections = [
        Select::TopK(3),
        Select::TopKSigned(3),
        Select::TopKMagnitude(3),
        Select::BatchTopK(6),
        Select::GroupMax(4),
        Select::Above,
    ];
    for device in [device(), plain_device()] {
        for select in selections {
            let x = noise([n, d], 1, &device).slice_fill([2..3, 0..2], f32::NAN);
            let bias = noise::<1>([m], 3, &device).slice_fill(4..5, f32::NAN);
            let (w, by) = (noise([d, m], 2, &device), Tensor::ones([m], &device));
            let (values, indices) = kernels::sparse_encode(x, w, bias, by * 0.01, select);
            let [_, k] = values.dims();
            let rows: Vec<f32> = floats(values);
            let (numbers, nothing) = rows.split_at(2 * k);
            assert!(numbers.iter().all(|value| value.is_finite()), "{select:?}: {rows:?}");
            let any_sign = matches!(select, Select::TopKSigned(_) | Select::TopKMagnitude(_));
            let expected = |value: &f32| if any_sign { value.is_nan() } else { *value == 0.0 };
            assert!(nothing.iter().all(expected), "{select:?} on {device:?}: {rows:?}");
            let named = ints(indices).into_iter().zip(&rows).take(2 * k);
            assert!(named.into_iter().all(|(index, value)| index != 4 || *value == 0.0));
        }
    }
}

#[test]
#[should_panic(expected = "out of range")]
fn an_index_past_the_rows_panics() {
    let device = device();
    let indices = Tensor::<2, Int>::from_data(TensorData::new(vec![7i64], [1, 1]), &device);
    kernels::sparse_decode(indices, noise([1, 1], 1, &device), noise([7, 3], 2, &device));
}
