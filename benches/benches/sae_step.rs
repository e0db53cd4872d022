//! One training step of an SAE of every kind (forward, backward, Adam), in activations per second.
//!
//! The sizes are those at which other libraries are compared: 4096 activations of width 576, 32 of
//! 4608 or of 18432 latents. Large temporaries cost page faults unless glibc keeps its pages, as
//! the programs tell it to:
//!
//! ```sh
//! MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=30000000000 cargo bench -p benches --bench sae_step
//! BURN_DEVICE=wgpu cargo bench -p benches --features wgpu --bench sae_step
//! ```

mod device;

use burn::tensor::{Distribution, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput};
use device::Finished;
use kernels::top_k;
use sae_core::train::{
    ActivationMatrix, AuxKTarget, Gated, GatedAuxiliary, Group, JumpRelu, Kind, Objective,
    ParameterName, RunningThreshold, Selecting, Selection, Sparsity, Standard, TrainConfig,
    TrainState,
};

const BATCH: usize = 4096;
const D_IN: usize = 576;
const K: usize = 32;

fn main() {
    let device = device::device();
    let criterion = Criterion::default().with_measurement(Finished(device.clone()));
    let mut criterion = criterion.configure_from_args();
    let x = Tensor::random([BATCH, D_IN], Distribution::Normal(0.0, 1.0), &device);
    let values: Vec<f32> = x.to_data().try_into_vec_as().expect("f32");
    let matrix = ActivationMatrix::new(&values, D_IN).expect("whole rows");
    let mut group = criterion.benchmark_group("sae_step");
    group.sample_size(10).throughput(Throughput::Elements(BATCH as u64));
    for d_sae in [4608, 18432] {
        for (name, objective) in objectives(d_sae) {
            let config = TrainConfig::new(d_sae, objective)
                .with_batch(BATCH)
                .with_clip_norm(Some(1.0))
                .with_dead_after(u64::MAX);
            // Made only for what is run.
            let mut state = None;
            group.bench_function(BenchmarkId::new(name, d_sae), |b| {
                let state = state.get_or_insert_with(|| {
                    let state = TrainState::initial(&config, &matrix, None, &device);
                    quiet(state.expect("a valid configuration"), &x)
                });
                b.iter(|| state.step(x.clone(), &config, usize::MAX));
            });
        }
    }
    group.finish();
    criterion.final_summary();
}

/// Every kind but matching pursuit, whose steps are for SAEs of few latents.
fn objectives(d_sae: usize) -> Vec<(&'static str, Objective)> {
    let sparsity = || Sparsity::new(1e-3);
    let selecting = |selection| Objective::new(Kind::Selecting(Selecting::new(selection)));
    let groups = [8, 4, 2, 1].map(|part| Group { width: d_sae / part, weight: 1.0 });
    let matryoshka = Selection::Matryoshka {
        k: K as f64,
        groups: groups.to_vec(),
        aux_k_target: AuxKTarget::Residual,
    };
    let threshold = Some(RunningThreshold::SaeLens { rate: 0.01 });
    let matryoshka = Selecting { threshold, ..Selecting::new(matryoshka) };
    let gated = Gated { sparsity: sparsity(), auxiliary: GatedAuxiliary::DetachedDecoder };
    vec![
        ("top_k", Objective::top_k(K)),
        ("abs_top_k", selecting(Selection::AbsTopK { k: K })),
        ("batch_top_k", Objective::batch_top_k(K as f64)),
        ("group_max", selecting(Selection::GroupMax { k: K })),
        ("multi_top_k", selecting(Selection::MultiTopK { k: K })),
        ("matryoshka", Objective::new(Kind::Selecting(matryoshka))),
        ("jump_relu", Objective::new(Kind::JumpRelu(JumpRelu::new(1e-3)))),
        ("gated", Objective::new(Kind::Gated(gated))),
        ("standard", Objective::new(Kind::Standard(Standard { sparsity: sparsity() }))),
    ]
}

/// With the encoder's biases so low that `K` latents are on, on average, where nothing selects.
fn quiet(mut state: TrainState, x: &Tensor<2>) -> TrainState {
    const SAMPLE: usize = 64;
    let parameters = &mut state.parameters;
    let d_sae = parameters.d_sae();
    let w_enc = parameters.get(ParameterName::WEnc).expect("an encoder").clone();
    let centre = parameters.get(ParameterName::BDec).expect("a decoder").clone();
    let pre = (x.clone().narrow(0, 0, SAMPLE) - centre).matmul(w_enc.transpose());
    let (largest, _) = top_k(pre.reshape([1, SAMPLE * d_sae]), SAMPLE * K);
    let bar: f32 = largest.narrow(1, SAMPLE * K - 1, 1).into_scalar();
    parameters.insert(ParameterName::BEnc, Tensor::zeros([1, d_sae], &x.device()) - bar);
    state
}
