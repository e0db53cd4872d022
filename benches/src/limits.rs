//! What the machine can do at most, measured in the same run.

use std::hint::black_box;
use std::time::{Duration, Instant};

use burn::tensor::{Device, Distribution, Tensor};
use model_hooks::ModelConfig;
use rayon::prelude::*;

/// Shortest time that a measurement takes.
const AT_LEAST: Duration = Duration::from_millis(1500);

/// The median time of a call.
pub(crate) fn median(mut run: impl FnMut()) -> Duration {
    run();
    let (start, mut times) = (Instant::now(), Vec::new());
    while times.len() < 5 || (start.elapsed() < AT_LEAST && times.len() < 1000) {
        let start = Instant::now();
        run();
        times.push(start.elapsed());
    }
    times.sort_unstable();
    times[times.len() / 2]
}

/// Shapes `[d_in, d_out]` of the linear layers of a block, as the model's largest products.
pub(crate) fn linear_layers(config: &ModelConfig) -> Vec<[usize; 2]> {
    let (d_model, d_mlp) = (config.d_model, config.mlp.d_mlp);
    let d_query = config.attention.n_heads * config.attention.d_head;
    let d_key = config.attention.n_kv_heads * config.attention.d_head;
    vec![
        [d_model, d_query],
        [d_model, d_key],
        [d_model, d_key],
        [d_query, d_model],
        [d_model, d_mlp],
        [d_model, d_mlp],
        [d_mlp, d_model],
    ]
}

/// FLOP/s of the matrix products of one block on `n` rows, by the backend's own product.
pub(crate) fn gemm(config: &ModelConfig, n: usize, device: &Device) -> f64 {
    let noise = |shape| Tensor::<2>::random(shape, Distribution::Default, device);
    let products: Vec<_> = linear_layers(config)
        .into_iter()
        .map(|[d_in, d_out]| (noise([n, d_in]), noise([d_in, d_out])))
        .collect();
    let time = median(|| {
        for (x, w) in &products {
            black_box(x.clone().matmul(w.clone()));
        }
    });
    let flops: usize = linear_layers(config).iter().map(|[d_in, d_out]| 2 * n * d_in * d_out).sum();
    flops as f64 / time.as_secs_f64()
}

/// Bytes that a device moves in a second at most: what all cores together read from memory, or on a
/// GPU what a copy reads and writes.
pub(crate) fn memory_bandwidth(device: &Device) -> f64 {
    const N: usize = 1 << 26;
    if *device == Device::flex() {
        return read_bandwidth();
    }
    let x = Tensor::<1>::zeros([N], device);
    let time = median(|| {
        black_box(x.clone() + 1.0);
        device.sync().expect("the device does its work");
    });
    (2 * N * size_of::<f32>()) as f64 / time.as_secs_f64()
}

/// Bytes that all cores together read from memory in a second.
pub(crate) fn read_bandwidth() -> f64 {
    const N: usize = 1 << 28;
    let data = vec![1f32; N];
    let time = median(|| {
        let sum: f32 = data.par_chunks(1 << 16).map(sum).sum();
        black_box(sum);
    });
    (N * size_of::<f32>()) as f64 / time.as_secs_f64()
}

fn sum(x: &[f32]) -> f32 {
    let mut lanes = [0f32; 32];
    for chunk in x.chunks_exact(32) {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x;
        }
    }
    lanes.iter().sum()
}
