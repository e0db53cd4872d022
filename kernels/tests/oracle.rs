//! Every kernel of a backend against the plain computation, values and gradients, on random shapes.

use burn::tensor::{Device, Int, Tensor, TensorData, Tolerance};
use kernels::{AdamConfig, AdamState, AttentionConfig, KeyValues, Nonlinearity, RotaryPairs};
use proptest::prelude::*;

fn device() -> Device {
    Device::flex()
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

/// `[n, k]` distinct indices below `m` in each row.
fn some_indices(n: usize, k: usize, m: usize, seed: u64, device: &Device) -> Tensor<2, Int> {
    let picked = naive_top_k(&floats(noise([n, m], seed, device)), m, k).1;
    Tensor::from_data(TensorData::new(picked, [n, k]), device)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn top_k_is_a_sorted_prefix(n in 1..6usize, m in 1..300usize, k in 1..40usize, levels in 1..50i32, seed: u64) {
        let k = k.min(m);
        // Few levels make many ties.
        let x = (noise([n, m], seed, &device()) * levels as f64).round();
        let (values, indices) = kernels::top_k(x.clone(), k);
        let (naive_values, naive_indices) = naive_top_k(&floats(x), m, k);
        prop_assert_eq!(ints(indices), naive_indices);
        prop_assert_eq!(floats(values), naive_values);
    }

    #[test]
    fn top_k_encode_matches_plain_tensors(n in 1..40usize, d in 1..20usize, m in 1..90usize, k in 1..9usize, seed: u64) {
        let (k, device) = (k.min(m), device().autodiff());
        let leaf = |shape, salt| noise::<2>(shape, seed ^ salt, &device).require_grad();
        let (x, w) = (leaf([n, d], 1), leaf([d, m], 2));
        let bias = noise([m], seed ^ 3, &device).require_grad();
        let scale = noise([m], seed ^ 4, &device).abs() + 0.1;
        let (values, indices) = kernels::top_k_encode(x.clone(), w.clone(), bias.clone(), scale.clone(), k);

        let (px, pw, pb) = (x.clone().detach().require_grad(), w.clone().detach().require_grad(), bias.clone().detach().require_grad());
        let pre = px.clone().matmul(pw.clone()) + pb.clone().unsqueeze();
        let ranked = (pre.clone() * scale.unsqueeze()).inner();
        let naive = naive_top_k(&floats(ranked), m, k).1;
        prop_assert_eq!(ints(indices.clone()), naive);
        let plain = burn::tensor::activation::relu(pre.gather(1, indices));
        assert_close(values.clone(), plain.clone());

        let weight = noise([n, k], seed ^ 5, &device);
        let grads = (values * weight.clone()).sum().backward();
        let plain_grads = (plain * weight).sum().backward();
        assert_close(x.grad(&grads).unwrap(), px.grad(&plain_grads).unwrap());
        assert_close(w.grad(&grads).unwrap(), pw.grad(&plain_grads).unwrap());
        assert_close(bias.grad(&grads).unwrap(), pb.grad(&plain_grads).unwrap());
    }

    #[test]
    fn sparse_decode_is_a_dense_product(n in 1..20usize, d in 1..50usize, m in 1..60usize, k in 1..9usize, seed: u64) {
        let (k, device) = (k.min(m), device().autodiff());
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

    // The autodiff device runs the plain defaults, so the same call on it is the oracle.
    #[test]
    fn transformer_kernels_match_their_defaults(n in 1..30usize, d in 1..40usize, seed: u64) {
        let (fast, plain) = (device(), device().autodiff());
        let pair = |salt| (noise::<2>([n, d], seed ^ salt, &fast) * 4.0, noise::<2>([n, d], seed ^ salt, &plain) * 4.0);
        let ((a, pa), (b, pb)) = (pair(1), pair(2));
        let gain = |device| noise::<1>([d], seed ^ 3, device);
        assert_close(kernels::rms_norm(a.clone(), gain(&fast), 1e-5), kernels::rms_norm(pa.clone(), gain(&plain), 1e-5).inner());
        let norm = |x, device| kernels::layer_norm(x, gain(device), noise([d], seed ^ 4, device), 1e-5);
        assert_close(norm(a.clone(), &fast), norm(pa.clone(), &plain).inner());
        for f in [Nonlinearity::Silu, Nonlinearity::Gelu, Nonlinearity::GeluTanh, Nonlinearity::Relu] {
            assert_close(kernels::nonlinear(a.clone(), f), kernels::nonlinear(pa.clone(), f).inner());
            let gated = kernels::gated(a.clone(), b.clone(), f);
            assert_close(gated, kernels::gated(pa.clone(), pb.clone(), f).inner());
        }
    }

    #[test]
    fn products_with_weights_match_their_defaults(n in 1..120usize, d in 1..70usize, m in 1..1100usize, seed: u64) {
        let run = |device: &Device| kernels::dot_rows(noise([n, d], seed, device), noise([m, d], seed ^ 1, device));
        assert_close(run(&device()), run(&device().autodiff()).inner());
        let run = |device: &Device| kernels::linear(noise([n, d], seed, device), noise([d, m], seed ^ 1, device));
        assert_close(run(&device()), run(&device().autodiff()).inner());
        // Weights in bf16 are what they round to, in arithmetic of f32.
        let bf16 = |w: Tensor<2>| w.cast(burn::tensor::DType::BF16);
        let rounded = |w| bf16(w).cast(burn::tensor::DType::F32);
        let (x, w) = (noise([n, d], seed, &device()), noise([d, m], seed ^ 1, &device()));
        assert_close(kernels::linear(x.clone(), bf16(w.clone())), kernels::linear(x.clone(), rounded(w.clone())));
        let w = w.transpose();
        assert_close(kernels::dot_rows(x.clone(), bf16(w.clone())), kernels::dot_rows(x, rounded(w)));
        let k = m.min(5);
        let run = |device: &Device| {
            let indices = some_indices(n, k, m, seed, device);
            kernels::sparse_dot(indices, noise([m, d], seed ^ 1, device), noise([n, d], seed, device))
        };
        assert_close(run(&device()), run(&device().autodiff()).inner());
    }

    #[test]
    fn rotary_matches_its_default(
        batch in 1..4usize, pos in 1..6usize, heads in 1..4usize, half in 1..9usize, rest in 0..4usize, seed: u64,
    ) {
        for pairs in [RotaryPairs::Halves, RotaryPairs::Neighbours] {
            let run = |device: &Device| {
                let angles = noise::<3>([batch, pos, half], seed, device) * 9.0;
                let x = noise([batch, pos, heads, 2 * half + rest], seed ^ 1, device);
                kernels::rotary(x, angles.clone().cos(), angles.sin(), pairs)
            };
            assert_close(run(&device()), run(&device().autodiff()).inner());
        }
    }

    #[test]
    fn attention_matches_its_default(
        batch in 1..4usize, n in 1..40usize, past in 0..20usize, prefix in 0..25usize,
        kv_heads in 1..3usize, group in 1..4usize, wide: bool, seed: u64,
        soft_cap in prop::option::of(0.5..3f64), window in prop::option::of(1..30usize),
    ) {
        let d_head = if wide { 16 } else { 6 };
        let run = |device: &Device| {
            let vectors = |rows, len, salt| noise::<4>([rows, len, kv_heads, d_head], seed ^ salt, device) * 3.0;
            let q = noise([batch, n, kv_heads * group, d_head], seed ^ 1, device) * 3.0;
            let shared = (prefix > 0).then(|| (vectors(1, prefix, 2), vectors(1, prefix, 3)));
            let own = (vectors(batch, past + n, 4), vectors(batch, past + n, 5));
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
    fn adam_matches_the_textbook(n in 1..8usize, m in 1..20usize, seed: u64) {
        let device = device();
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
    let x = Tensor::<2>::from_data(TensorData::new(row.to_vec(), [1, 7]), &device());
    assert_eq!(ints(kernels::top_k(x, 5).1), [1, 3, 6, 4, 5]);
}

#[test]
#[should_panic(expected = "out of range")]
fn an_index_past_the_rows_panics() {
    let device = device();
    let indices = Tensor::<2, Int>::from_data(TensorData::new(vec![7i64], [1, 1]), &device);
    kernels::sparse_decode(indices, noise([1, 1], 1, &device), noise([7, 3], 2, &device));
}
