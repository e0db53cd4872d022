//! Every operation of `kernels`, forward.

use burn::tensor::{DType, Device, Tensor, TensorData, bf16};
use kernels::{
    AdamConfig, AdamState, AttentionConfig, KeyValues, Nonlinearity, RotaryPairs, Search, Select,
};

use crate::beside::{F32, Found, agree, dense, indices, noise};

const NONLINEARITIES: [Nonlinearity; 4] =
    [Nonlinearity::Silu, Nonlinearity::Gelu, Nonlinearity::GeluTanh, Nonlinearity::Relu];

/// Rows, width of the input, latents.
const SHAPE: (usize, usize, usize) = (37, 48, 320);

#[test]
fn top_k() {
    for (n, m, k) in [(50, 300, 17), (3, 5000, 32), (2, 5000, 1), (4, 9, 9), (2, 700, 200)] {
        agree(F32, |device, found| {
            let (values, indices) = kernels::top_k(noise([n, m], 1, device), k);
            found.put("values", values);
            found.put_ints("indices", indices);
        });
    }
}

/// Of equal entries the first; and NaN last.
#[test]
fn top_k_of_equal_entries_and_nan() {
    agree(F32, |device, found| {
        let equal = Tensor::ones([2, 5000], device);
        found.put_ints("of equal ones", kernels::top_k(equal, 20).1);
        let few = noise::<2>([3, 4000], 2, device).mul_scalar(2.0).round();
        found.put_ints("of few numbers", kernels::top_k(few, 20).1);
        let holed = noise([2, 40], 3, device).slice_fill([0..2, 3..39], f32::NAN);
        found.put_ints("of NaN", kernels::top_k(holed, 9).1);
    });
}

const SELECTIONS: [Select; 6] = [
    Select::TopK(8),
    Select::TopKSigned(8),
    Select::TopKMagnitude(8),
    Select::BatchTopK(200),
    Select::GroupMax(16),
    Select::Above,
];

fn encoder(device: &Device) -> (Tensor<2>, Tensor<2>, Tensor<1>, Tensor<1>) {
    let (n, d, m) = SHAPE;
    // Scales for what ranks by them, thresholds for what is kept above them.
    let by = noise([m], 5, device).abs() + 0.5;
    (noise([n, d], 2, device), noise([d, m], 3, device), noise([m], 4, device), by)
}

#[test]
fn sparse_encode() {
    for select in SELECTIONS {
        for search in [Search::Full, Search::Proposed] {
            agree(F32, |device, found| {
                let (x, w, bias, by) = encoder(device);
                let (values, indices) = kernels::sparse_encode_by(search, x, w, bias, by, select);
                found.put_values(&format!("{select:?}"), dense(values, indices, SHAPE.2));
            });
        }
    }
}

#[test]
fn sparse_encode_with() {
    for select in [Select::TopK(8), Select::TopKMagnitude(8)] {
        agree(F32, |device, found| {
            let (x, w, bias, by) = encoder(device);
            let among = (0..40).map(|i| i * 8 + 3).collect::<Vec<i64>>();
            let among = Tensor::from_data(TensorData::new(among, [40]), device);
            let of = kernels::sparse_encode_with(x, w, [bias, by], select, among);
            found.put_values("entries", dense(of.0, of.1, SHAPE.2));
            found.put("products", of.2);
        });
    }
}

#[test]
fn sparse_products() {
    let (n, d, m) = SHAPE;
    agree(F32, |device, found| {
        let entries = || (indices([n, 8], m, 6, device), noise([n, 8], 7, device));
        let ((at, values), rows, x) =
            (entries(), noise([m, d], 8, device), noise([n, d], 9, device));
        found.put("decode", kernels::sparse_decode(at.clone(), values.clone(), rows.clone()));
        found.put("dot", kernels::sparse_dot(at.clone(), rows, x.clone()));
        found.put("rows", kernels::sparse_grad_rows(at.clone(), values.clone(), x, m));
        found.put("sum", kernels::sparse_sum(at.clone(), values, m));
        found.put("gathered", kernels::sparse_gather(at, noise([m], 10, device)));
    });
}

/// Weights as they are, or rounded to bf16, and in bf16 where a device has it.
fn weights(is_rounded: bool, weights: Tensor<2>) -> Tensor<2> {
    if !is_rounded {
        return weights;
    }
    let device = &weights.device();
    let rounded = weights.into_data().convert::<bf16>();
    match device.supports_dtype(DType::BF16) {
        true => Tensor::from_data(rounded, (device, DType::BF16)),
        false => Tensor::from_data(rounded.convert::<f32>(), device),
    }
}

#[test]
fn products_with_weights() {
    for n in [1, 7, 130] {
        for is_rounded in [false, true] {
            agree(F32, |device, found| {
                let weights = |shape, seed| weights(is_rounded, noise(shape, seed, device));
                let x = noise([n, 48], 10, device);
                found.about(format!("{n} rows, in bf16: {is_rounded},"));
                found.put("linear", kernels::linear(x.clone(), weights([48, 200], 11)));
                found.put("dot_rows", kernels::dot_rows(x.clone(), weights([200, 48], 12)));
                let (at, values) = (indices([n, 8], 200, 6, device), noise([n, 8], 7, device));
                let decoded = kernels::sparse_decode(at.clone(), values, weights([200, 48], 12));
                found.put("sparse_decode", decoded);
                found.put("sparse_dot", kernels::sparse_dot(at, weights([200, 48], 12), x.clone()));
                let (bias, by) = (noise([200], 4, device), Tensor::ones([200], device));
                let w = weights([48, 200], 11);
                let (values, at) = kernels::sparse_encode(x, w, bias, by, Select::TopK(8));
                found.put_values("sparse_encode", dense(values, at, 200));
            });
        }
    }
}

#[test]
fn norms_and_nonlinearities() {
    agree(F32, |device, found| {
        let (x, up) = (noise([33, 48], 13, device) * 4.0, noise([33, 48], 14, device));
        let (gain, bias) = (noise([48], 15, device), noise([48], 16, device));
        found.put("rms", kernels::rms_norm(x.clone(), gain.clone(), 1e-5));
        found.put("layer", kernels::layer_norm(x.clone(), gain, bias, 1e-5));
        for f in NONLINEARITIES {
            found.put(&format!("{f:?}"), kernels::nonlinear(x.clone(), f));
            found.put(&format!("gated {f:?}"), kernels::gated(x.clone(), up.clone(), f));
        }
    });
}

#[test]
fn rotary() {
    for pairs in [RotaryPairs::Halves, RotaryPairs::Neighbours] {
        agree(F32, |device, found| {
            let x = noise([2, 9, 3, 16], 17, device);
            let angle = noise([2, 9, 6], 18, device) * 3.0;
            found.put("turned", kernels::rotary(x, angle.clone().cos(), angle.sin(), pairs));
        });
    }
}

/// Heads over key heads, left padding, a shared prefix, windows, soft caps, steps behind a cache.
#[test]
fn attention() {
    for (prefix, past, window, soft_cap) in
        [(0, 0, None, None), (5, 0, None, None), (5, 7, Some(6), None), (0, 9, None, Some(2.0))]
    {
        agree(F32, |device, found| {
            let vectors = |rows, n, seed| noise::<4>([rows, n, 2, 16], seed, device);
            let (batch, n) = (3, 11);
            let own = (vectors(batch, past + n, 20), vectors(batch, past + n, 21));
            let prefix = (prefix > 0).then(|| (vectors(1, prefix, 22), vectors(1, prefix, 23)));
            let first: Vec<i64> = (0..batch).flat_map(|row| vec![row as i64 * 2; n]).collect();
            let first = Tensor::from_data(TensorData::new(first, [batch, n]), device);
            let config = AttentionConfig { scale: 0.7, soft_cap, window };
            let q = noise([batch, n, 6, 16], 24, device) * 2.0;
            let z = kernels::attention(q, KeyValues { prefix, own }, first, config);
            found.put("z", z);
        });
    }
}

#[test]
fn training_steps() {
    let plain = AdamConfig::new(0.01);
    let configs = [
        plain,
        AdamConfig { gradient_scale: 0.3, ..plain },
        AdamConfig { skips_idle_rows: true, unit_rows: true, ..plain },
    ];
    for config in configs {
        agree(F32, |device, found| adam(config, device, found));
    }
    agree(F32, |device, found| {
        let rows = noise([20, 30], 31, device);
        found.put("projected", kernels::project_rows(noise([20, 30], 30, device), rows));
    });
}

fn adam(config: AdamConfig, device: &Device, found: &mut Found) {
    let mut parameter = noise([20, 30], 32, device);
    let zeros = Tensor::zeros([20, 30], device);
    let mut state = AdamState { first: zeros.clone(), second: zeros };
    for step in 1..=4 {
        // A row that does not move.
        let gradient = noise([20, 30], 32 + step as u64, device).slice_fill([3..4, 0..30], 0.0);
        (parameter, state) = kernels::adam_step(parameter, gradient, state, step, config);
    }
    found.put("parameter", parameter);
    found.put("first", state.first);
    found.put("second", state.second);
}

#[test]
fn fit_residual() {
    let (n, d, m) = (30, 24, 40);
    for select in [Select::TopK(12), Select::TopKMagnitude(12)] {
        agree(F32, |device, found| {
            let (x, products) = (noise([n, d], 40, device), noise([n, m], 41, device));
            let by = noise([m], 43, device).abs() + 0.5;
            let (rows, residual) = (noise([m, d], 44, device), noise([n, d], 45, device));
            let columns = [noise([m], 42, device), by];
            let fit = kernels::fit_residual(x, products, columns, rows, residual, select);
            found.put("squares", fit.squares);
            found.put("rows", fit.rows);
            found.put("w", fit.w);
            found.put("bias", fit.bias);
        });
    }
}
