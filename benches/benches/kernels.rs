//! Every kernel at the sizes of SmolLM2-135M and of an SAE on its residual stream.
//!
//! `encoder/plain_matmul` is the limit that the machine sets: no encoder of this shape is faster.
//! Large temporaries cost page faults unless glibc keeps its pages, as the programs tell it to:
//!
//! ```sh
//! MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=30000000000 cargo bench -p benches --bench kernels
//! BURN_DEVICE=wgpu cargo bench -p benches --features wgpu --bench kernels
//! ```

mod device;

use burn::tensor::{DType, Device, Distribution, Int, Tensor};
use criterion::{BatchSize, BenchmarkId, Throughput};
use kernels::{
    AdamConfig, AdamState, AttentionConfig, KeyValues, Nonlinearity, RotaryPairs, Search, Select,
    adam_step, attention, dot_rows, fit_residual, gated, layer_norm, linear, nonlinear,
    project_rows, rms_norm, rotary, sparse_decode, sparse_dot, sparse_encode, sparse_encode_by,
    sparse_encode_with, sparse_gather, sparse_grad_rows, sparse_sum, top_k,
};

use device::Finished;

type Criterion = criterion::Criterion<Finished>;
type BenchmarkGroup<'a> = criterion::BenchmarkGroup<'a, Finished>;

/// Activations of a training step.
const BATCH: usize = 4096;
/// Latents, eight for each dimension.
const D_SAE: usize = 4608;
/// Latents kept for each activation.
const K: usize = 32;

/// Conversations of a forward pass, and tokens of each.
const N_ROWS: usize = 8;
const N_POS: usize = 128;

/// SmolLM2-135M.
const D_MODEL: usize = 576;
const D_MLP: usize = 1536;
const N_HEADS: usize = 9;
const N_KV_HEADS: usize = 3;
const D_HEAD: usize = 64;
const D_VOCAB: usize = 49152;

fn main() {
    let device = device::device();
    let criterion = criterion::Criterion::default().with_measurement(Finished(device.clone()));
    let mut criterion = criterion.configure_from_args();
    encoder(&mut criterion, &device);
    decoder(&mut criterion, &device);
    optimiser(&mut criterion, &device);
    row_lazy(&mut criterion, &device);
    dead_latents(&mut criterion, &device);
    few_rows(&mut criterion, &device);
    blocks(&mut criterion, &device);
    gradients(&mut criterion, &device.clone().autodiff());
    cached_step(&mut criterion, &device);
    criterion.final_summary();
}

fn noise<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

/// From activations to latents, `[4096, 576]` to `[4096, 32]` of 4608.
fn encoder(criterion: &mut Criterion, device: &Device) {
    let (x, w) = (noise([BATCH, D_MODEL], device), noise([D_MODEL, D_SAE], device));
    let (bias, scale) = (noise([D_SAE], device), Tensor::ones([D_SAE], device));
    let pre: Tensor<2> = noise([BATCH, D_SAE], device);
    let dead = Tensor::<1, Int>::arange(0..D_SAE as i64 / 10, device) * 10;
    let mut group = criterion.benchmark_group("encoder");
    group.sample_size(10).throughput(Throughput::Elements(BATCH as u64));
    group.bench_function("plain_matmul", |b| b.iter(|| x.clone().matmul(w.clone())));
    group.bench_function("top_k", |b| b.iter(|| top_k(pre.clone(), K)));
    // So far above the mean of a product that as many are above it as the others keep.
    let bar = (D_MODEL as f64).sqrt() * 2.46;
    for (name, select) in [
        ("top_k", Select::TopK(K)),
        ("top_k_signed", Select::TopKSigned(K)),
        ("top_k_magnitude", Select::TopKMagnitude(K)),
        ("batch_top_k", Select::BatchTopK(K * BATCH)),
        ("group_max", Select::GroupMax(K)),
        ("above", Select::Above),
    ] {
        let by = if select == Select::Above { scale.clone() * bar } else { scale.clone() };
        group.bench_function(BenchmarkId::new("sparse_encode", name), |b| {
            b.iter(|| sparse_encode(x.clone(), w.clone(), bias.clone(), by.clone(), select));
        });
    }
    // The largest of each row as a training step finds them, and with the products of dead latents.
    let by = || [bias.clone(), scale.clone()];
    group.bench_function("sparse_encode_proposed", |b| {
        b.iter(|| {
            let ([bias, by], (x, w)) = (by(), (x.clone(), w.clone()));
            sparse_encode_by(Search::Proposed, x, w, bias, by, Select::TopK(K))
        });
    });
    group.bench_function("sparse_encode_with", |b| {
        b.iter(|| sparse_encode_with(x.clone(), w.clone(), by(), Select::TopK(K), dead.clone()));
    });
    group.finish();
}

/// From latents back to activations, and the gradients on that way: the passes over what is kept
/// that a training step is made of.
fn decoder(criterion: &mut Criterion, device: &Device) {
    let (values, indices) = top_k(noise([BATCH, D_SAE], device), K);
    let rows = noise([D_SAE, D_MODEL], device);
    let error = noise([BATCH, D_MODEL], device);
    let mut group = criterion.benchmark_group("decoder");
    group.sample_size(10).throughput(Throughput::Elements(BATCH as u64));
    group.bench_function("sparse_decode", |b| {
        b.iter(|| sparse_decode(indices.clone(), values.clone(), rows.clone()));
    });
    group.bench_function("sparse_dot", |b| {
        b.iter(|| sparse_dot(indices.clone(), rows.clone(), error.clone()));
    });
    group.bench_function("sparse_grad_rows", |b| {
        b.iter(|| sparse_grad_rows(indices.clone(), values.clone(), error.clone(), D_SAE));
    });
    group.bench_function("sparse_sum", |b| {
        b.iter(|| sparse_sum(indices.clone(), values.clone(), D_SAE));
    });
    group.bench_function("sparse_gather", |b| {
        let vector = noise([D_SAE], device);
        b.iter(|| sparse_gather(indices.clone(), vector.clone()));
    });
    group.finish();
}

/// One of the SAE's two matrices.
fn optimiser(criterion: &mut Criterion, device: &Device) {
    let shape = [D_SAE, D_MODEL];
    let gradient = noise(shape, device);
    let zeros = || Tensor::zeros(shape, device);
    let state = AdamState { first: zeros(), second: zeros() };
    // Handed on from step to step, so that nobody else holds it and it is updated in place.
    let mut now = Some((noise(shape, device), state));
    let mut step = 0;
    let mut group = criterion.benchmark_group("optimiser");
    group.sample_size(10).throughput(Throughput::Elements((D_SAE * D_MODEL) as u64));
    for (name, unit_rows) in [("adam_step", false), ("adam_step_unit_rows", true)] {
        group.bench_function(name, |b| {
            b.iter(|| {
                let (parameter, state) = now.take().expect("put back after every step");
                step += 1;
                let config = AdamConfig { unit_rows, ..AdamConfig::new(4e-4) };
                now = Some(adam_step(parameter, gradient.clone(), state, step, config));
            });
        });
    }
    let rows = noise(shape, device);
    let mut gradient = Some(gradient);
    group.bench_function("project_rows", |b| {
        b.iter(|| {
            let projected = project_rows(gradient.take().expect("put back"), rows.clone());
            gradient = Some(projected);
        });
    });
    group.finish();
}

/// A wide SAE of whose latents a share has a gradient.
fn row_lazy(criterion: &mut Criterion, device: &Device) {
    const WIDE: usize = 4 * D_SAE;
    let mut group = criterion.benchmark_group("row_lazy");
    group.sample_size(10).throughput(Throughput::Elements((WIDE * D_MODEL) as u64));
    for percent in [100, 50, 10] {
        let mut step = 0;
        let has_gradient = Tensor::<1, Int>::arange(0..WIDE as i64, device)
            .lower_elem((percent * WIDE / 100) as i64)
            .float()
            .unsqueeze_dim::<2>(1);
        let gradient: Tensor<2> = noise([WIDE, D_MODEL], device) * has_gradient;
        let zeros = || Tensor::zeros([WIDE, D_MODEL], device);
        let state = AdamState { first: zeros(), second: zeros() };
        let mut now = Some((noise([WIDE, D_MODEL], device), state));
        group.bench_function(BenchmarkId::new("adam_step", percent), |b| {
            b.iter(|| {
                let (parameter, state) = now.take().expect("put back after every step");
                step += 1;
                let config = AdamConfig { skips_idle_rows: true, ..AdamConfig::new(4e-4) };
                now = Some(adam_step(parameter, gradient.clone(), state, step, config));
            });
        });
    }
    group.finish();
}

/// A tenth of the latents are dead, and fit a residual with half as many as it is wide. The product
/// is one of the four that are needed.
fn dead_latents(criterion: &mut Criterion, device: &Device) {
    const N_DEAD: usize = D_SAE / 10;
    let matrix = |shape: [usize; 2]| noise::<2>(shape, device);
    let (x, products) = (matrix([BATCH, D_MODEL]), matrix([BATCH, N_DEAD]));
    let (rows, residual) = (matrix([N_DEAD, D_MODEL]), matrix([BATCH, D_MODEL]));
    let vector = || Tensor::ones([N_DEAD], device);
    let mut group = criterion.benchmark_group("dead_latents");
    group.sample_size(10).throughput(Throughput::Elements(BATCH as u64));
    group.bench_function("plain_matmul", |b| b.iter(|| products.clone().matmul(rows.clone())));
    group.bench_function("fit_residual", |b| {
        b.iter(|| {
            let (products, rows) = (products.clone(), rows.clone());
            let select = Select::TopKSigned(D_MODEL / 2);
            fit_residual(x.clone(), products, [vector(), vector()], rows, residual.clone(), select)
        });
    });
    group.finish();
}

fn scaled() -> AttentionConfig {
    AttentionConfig::new((D_HEAD as f64).powf(-0.5))
}

/// The products of a decoding step, of one conversation and of sixteen: as fast as the weights are
/// read, in either precision.
fn few_rows(criterion: &mut Criterion, device: &Device) {
    let mut group = criterion.benchmark_group("few_rows");
    group.sample_size(20);
    let precisions = [("f32", DType::F32), ("bf16", DType::BF16)];
    for (precision, dtype) in precisions.into_iter().filter(|p| device.supports_dtype(p.1)) {
        let weights = |shape: [usize; 2]| noise(shape, device).cast(dtype);
        for d_out in [D_MODEL, D_MLP] {
            let w = weights([D_MODEL, d_out]);
            group.throughput(Throughput::Bytes((D_MODEL * d_out * dtype.size()) as u64));
            for n in [1, 16] {
                let x = noise([n, D_MODEL], device);
                let id = BenchmarkId::new(format!("linear_{precision}_{D_MODEL}x{d_out}"), n);
                group.bench_function(id, |b| b.iter(|| linear(x.clone(), w.clone())));
            }
        }
        let (x, rows) = (noise([1, D_MODEL], device), weights([D_VOCAB, D_MODEL]));
        group.throughput(Throughput::Bytes((D_VOCAB * D_MODEL * dtype.size()) as u64));
        let id = BenchmarkId::new(format!("dot_rows_{precision}_{D_MODEL}x{D_VOCAB}"), 1);
        group.bench_function(id, |b| b.iter(|| dot_rows(x.clone(), rows.clone())));
    }
    group.finish();
}

/// What a block of the model is made of, over `[8, 128]` tokens.
fn blocks(criterion: &mut Criterion, device: &Device) {
    let n = N_ROWS * N_POS;
    let (x, gain) = (noise([n, D_MODEL], device), noise([D_MODEL], device));
    let (gate, up) = (noise([n, D_MLP], device), noise([n, D_MLP], device));
    let q = noise([N_ROWS, N_POS, N_HEADS, D_HEAD], device);
    let angles: Tensor<3> = noise([N_ROWS, N_POS, D_HEAD / 2], device);
    let (cos, sin) = (angles.clone().cos(), angles.sin());
    let heads = || noise([N_ROWS, N_POS, N_KV_HEADS, D_HEAD], device);
    let own = (heads(), heads());
    let no_padding = Tensor::<2, Int>::zeros([N_ROWS, N_POS], device);
    let mut group = criterion.benchmark_group("blocks");
    group.sample_size(20).throughput(Throughput::Elements(n as u64));
    group.bench_function("rms_norm", |b| {
        b.iter(|| rms_norm(x.clone(), gain.clone(), 1e-5));
    });
    let bias = noise([D_MODEL], device);
    group.bench_function("layer_norm", |b| {
        b.iter(|| layer_norm(x.clone(), gain.clone(), bias.clone(), 1e-5));
    });
    group.bench_function("gated", |b| {
        b.iter(|| gated(gate.clone(), up.clone(), Nonlinearity::Silu));
    });
    group.bench_function("nonlinear", |b| {
        b.iter(|| nonlinear(up.clone(), Nonlinearity::GeluTanh));
    });
    group.bench_function("rotary", |b| {
        b.iter(|| rotary(q.clone(), cos.clone(), sin.clone(), RotaryPairs::Halves));
    });
    group.bench_function("attention", |b| {
        b.iter(|| {
            let key_values = KeyValues { prefix: None, own: own.clone() };
            attention(q.clone(), key_values, no_padding.clone(), scaled())
        });
    });
    group.finish();
}

/// Back through what a block is made of, over `[8, 128]` tokens; the pass forth is not counted.
fn gradients(criterion: &mut Criterion, device: &Device) {
    let n = N_ROWS * N_POS;
    let mut group = criterion.benchmark_group("gradients");
    group.sample_size(20).throughput(Throughput::Elements(n as u64));

    let (x, gain) = (noise([n, D_MODEL], device), noise([D_MODEL], device));
    let x = x.require_grad();
    back(&mut group, "rms_norm", || rms_norm(x.clone(), gain.clone(), 1e-5));

    let bias = noise([D_MODEL], device);
    back(&mut group, "layer_norm", || layer_norm(x.clone(), gain.clone(), bias.clone(), 1e-5));

    let leaf = || noise([n, D_MLP], device).require_grad();
    let (gate, up) = (leaf(), leaf());
    back(&mut group, "nonlinear", || nonlinear(up.clone(), Nonlinearity::GeluTanh));
    back(&mut group, "gated", || gated(gate.clone(), up.clone(), Nonlinearity::Silu));

    let angles: Tensor<3> = noise([N_ROWS, N_POS, D_HEAD / 2], device);
    let (cos, sin) = (angles.clone().cos(), angles.sin());
    let heads = |n_heads| noise([N_ROWS, N_POS, n_heads, D_HEAD], device).require_grad();
    let (q, own) = (heads(N_HEADS), (heads(N_KV_HEADS), heads(N_KV_HEADS)));
    back(&mut group, "rotary", || rotary(q.clone(), cos.clone(), sin.clone(), RotaryPairs::Halves));

    let no_padding = Tensor::<2, Int>::zeros([N_ROWS, N_POS], device);
    back(&mut group, "attention", || {
        let key_values = KeyValues { prefix: None, own: own.clone() };
        attention(q.clone(), key_values, no_padding.clone(), scaled())
    });
    group.finish();
}

/// Times the way back from the mean square of what `forth` gives: the gradient that it starts with
/// has no two values alike.
fn back<const D: usize>(group: &mut BenchmarkGroup<'_>, name: &str, forth: impl Fn() -> Tensor<D>) {
    let loss = || forth().square().mean();
    group.bench_function(name, |b| b.iter_batched(loss, |y| y.backward(), BatchSize::PerIteration));
}

/// One new token in each of 40 conversations, behind a shared prefix of 128 tokens and 32 of
/// their own.
fn cached_step(criterion: &mut Criterion, device: &Device) {
    const N_CONVERSATIONS: usize = 40;
    const N_OWN: usize = 32;
    let q = noise([N_CONVERSATIONS, 1, N_HEADS, D_HEAD], device);
    let heads = |rows, n| noise([rows, n, N_KV_HEADS, D_HEAD], device);
    let prefix = (heads(1, N_POS), heads(1, N_POS));
    let own = (heads(N_CONVERSATIONS, N_OWN), heads(N_CONVERSATIONS, N_OWN));
    let no_padding = Tensor::<2, Int>::zeros([N_CONVERSATIONS, 1], device);
    let x = noise([N_CONVERSATIONS, D_MODEL], device);
    let unembedding = noise([D_VOCAB, D_MODEL], device);
    let mut group = criterion.benchmark_group("cached_step");
    group.sample_size(20).throughput(Throughput::Elements(N_CONVERSATIONS as u64));
    group.bench_function("attention", |b| {
        b.iter(|| {
            let key_values = KeyValues { prefix: Some(prefix.clone()), own: own.clone() };
            attention(q.clone(), key_values, no_padding.clone(), scaled())
        });
    });
    group.bench_function("unembedding", |b| {
        b.iter(|| dot_rows(x.clone(), unembedding.clone()));
    });
    group.finish();
}
