//! Gradients of the operations that have them.

use burn::tensor::{Device, Tensor, TensorData};
use kernels::{AttentionConfig, KeyValues, Nonlinearity, RotaryPairs, Select};

use crate::beside::{F32, Found, agree, indices, noise};

fn leaf<const D: usize>(shape: [usize; D], seed: u64, device: &Device) -> Tensor<D> {
    noise(shape, seed, &device.clone().autodiff()).detach().require_grad()
}

/// The gradients of `⟨weights, out⟩` at some leaves.
fn put_gradients<const O: usize, const D: usize>(
    found: &mut Found,
    out: Tensor<O>,
    leaves: &[(&str, &Tensor<D>)],
) {
    let weights = noise(out.dims(), 99, &out.device());
    let grads = (out * weights).sum().backward();
    for (what, leaf) in leaves {
        found.put(what, leaf.grad(&grads).unwrap_or_else(|| panic!("no gradient of {what}")));
    }
}

#[test]
fn sparse_encode_and_decode() {
    let (n, d, m) = (21, 24, 160);
    for select in [Select::TopK(6), Select::BatchTopK(90), Select::Above] {
        agree(F32, |device, found| {
            let (x, w) = (leaf([n, d], 1, device), leaf([d, m], 2, device));
            let bias = leaf([m], 3, device);
            let by = noise([m], 4, device).abs().autodiff() + 0.5;
            let encode = || {
                let (x, w) = (x.clone(), w.clone());
                kernels::sparse_encode(x, w, bias.clone(), by.clone(), select)
            };
            // By what is decoded, as entries may come in another order.
            let rows = leaf([m, d], 5, device);
            let decode = || {
                let (values, at) = encode();
                kernels::sparse_decode(at, values, rows.clone())
            };
            found.put("out", decode());
            put_gradients(found, decode(), &[("x", &x), ("w", &w), ("rows", &rows)]);
            put_gradients(found, decode(), &[("bias", &bias)]);
        });
    }
}

#[test]
fn sparse_products() {
    let (n, d, m) = (21, 24, 60);
    agree(F32, |device, found| {
        let at = indices([n, 5], m, 6, device).autodiff();
        let (values, x) = (leaf([n, 5], 7, device), leaf([n, d], 8, device));
        let rows = leaf([m, d], 9, device);
        let dot = kernels::sparse_dot(at.clone(), rows.clone(), x.clone());
        put_gradients(found, dot, &[("rows of dot", &rows), ("x of dot", &x)]);
        let sum = kernels::sparse_sum(at.clone(), values.clone(), m);
        put_gradients(found, sum, &[("values of sum", &values)]);
        let vector = leaf([m], 10, device);
        let gathered = kernels::sparse_gather(at, vector.clone());
        put_gradients(found, gathered, &[("vector of gathered", &vector)]);
    });
}

#[test]
fn rows() {
    agree(F32, |device, found| {
        let (x, up) = (leaf([17, 24], 10, device), leaf([17, 24], 11, device));
        let (gain, bias) = (leaf([24], 12, device), leaf([24], 13, device));
        let rms = || kernels::rms_norm(x.clone(), gain.clone(), 1e-5);
        put_gradients(found, rms(), &[("x of rms", &x)]);
        put_gradients(found, rms(), &[("gain of rms", &gain)]);
        let layer = || kernels::layer_norm(x.clone(), gain.clone(), bias.clone(), 1e-5);
        put_gradients(found, layer(), &[("x of layer", &x)]);
        put_gradients(found, layer(), &[("gain of layer", &gain), ("bias of layer", &bias)]);
        for f in [Nonlinearity::Silu, Nonlinearity::Gelu, Nonlinearity::GeluTanh] {
            put_gradients(found, kernels::nonlinear(x.clone(), f), &[("x of nonlinear", &x)]);
            let gated = kernels::gated(x.clone(), up.clone(), f);
            put_gradients(found, gated, &[("gate", &x), ("up", &up)]);
        }
        let (w, rows) = (noise([24, 40], 14, device), noise([40, 24], 15, device));
        put_gradients(found, kernels::linear(x.clone(), w.autodiff()), &[("x of linear", &x)]);
        put_gradients(found, kernels::dot_rows(x.clone(), rows.autodiff()), &[("x of dot", &x)]);
    });
}

#[test]
fn heads() {
    for (prefix, window, soft_cap) in [(0, None, None), (0, Some(4), None), (3, None, Some(2.0))] {
        agree(F32, |device, found| {
            let q = leaf([2, 7, 4, 8], 16, device);
            let (k, v) = (leaf([2, 9, 2, 8], 17, device), leaf([2, 9, 2, 8], 18, device));
            let shared = |seed| noise::<4>([1, prefix, 2, 8], seed, device).autodiff();
            let prefix = (prefix > 0).then(|| (shared(19), shared(20)));
            let own = (k.clone(), v.clone());
            let first = TensorData::new([vec![0i64; 7], vec![2; 7]].concat(), [2, 7]);
            let first = Tensor::from_data(first, &device.clone().autodiff());
            let config = AttentionConfig { scale: 0.6, soft_cap, window };
            let key_values = KeyValues { prefix, own };
            let z = kernels::attention(q.clone(), key_values, first, config);
            put_gradients(found, z, &[("q", &q), ("k", &k), ("v", &v)]);
            let angle = noise([2, 7, 4], 21, device) * 3.0;
            let (cos, sin) = (angle.clone().cos().autodiff(), angle.sin().autodiff());
            let turned = kernels::rotary(q.clone(), cos, sin, RotaryPairs::Halves);
            put_gradients(found, turned, &[("q of rotary", &q)]);
        });
    }
}
