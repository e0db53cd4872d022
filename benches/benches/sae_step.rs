//! One training step of a TopK SAE (forward, backward, Adam), in activations per second.
//!
//! The sizes are those at which other libraries are compared: 4096 activations of width 576, 32 of
//! 4608 or of 18432 latents. Large temporaries cost page faults unless glibc keeps its pages, as
//! the programs tell it to:
//!
//! ```sh
//! MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=30000000000 cargo bench -p benches --bench sae_step
//! ```

use burn::tensor::{Device, Distribution, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput};
use sae_core::SaeWeights;
use sae_core::train::{Objective, Optimizer, Parameters, TrainConfig, TrainState};

const BATCH: usize = 4096;
const D_IN: usize = 576;
const K: usize = 32;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let device = Device::flex();
    let mut group = criterion.benchmark_group("sae_step");
    group.sample_size(10).throughput(Throughput::Elements(BATCH as u64));
    for d_sae in [4608, 18432] {
        let x = noise([BATCH, D_IN], 1.0, &device);
        let mut state = state(d_sae, &device);
        let config = TrainConfig::new(d_sae, Objective::top_k(K)).with_clip_norm(Some(1.0));
        group.bench_function(BenchmarkId::new("top_k", d_sae), |b| {
            b.iter(|| state.step(x.clone(), &config, usize::MAX));
        });
    }
    group.finish();
    criterion.final_summary();
}

fn noise<const D: usize>(shape: [usize; D], deviation: f64, device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, deviation), device)
}

/// Before the first step: decoder rows of norm 0.1, about, and the encoder their transpose.
fn state(d_sae: usize, device: &Device) -> TrainState {
    let rows = noise([d_sae, D_IN], 0.1 / (D_IN as f64).sqrt(), device);
    let (b_enc, b_dec) = (Tensor::zeros([d_sae], device), Tensor::zeros([D_IN], device));
    let weights = SaeWeights::new(rows.clone().transpose(), b_enc, rows, b_dec);
    TrainState::new(Parameters::from_weights(weights), 1.0, &Optimizer::default())
}
