//! A training step of an SAE, beside the product of its encoder.

use std::hint::black_box;
use std::time::Instant;

use anyhow::Result;
use burn::tensor::{Device, Distribution, Tensor};
use kernels::AdamConfig;
use sae_core::train::{Parameters, TrainState};
use serde::Serialize;

use crate::limits::read_bandwidth;
use crate::peak::{peak_mb, reset_peak};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Width of the activations.
    #[arg(long, default_value_t = 576)]
    d_in: usize,
    /// Number of latents.
    #[arg(long, default_value_t = 4608)]
    d_sae: usize,
    /// Activations per step.
    #[arg(long, default_value_t = 4096)]
    batch: usize,
    /// Latents kept per activation.
    #[arg(long, default_value_t = 32)]
    k: usize,
    /// Steps measured, after three to warm up.
    #[arg(long, default_value_t = 15)]
    steps: usize,
}

#[derive(Serialize)]
struct Line {
    kind: &'static str,
    d_in: usize,
    d_sae: usize,
    batch: usize,
    tokens_per_s: f64,
    /// Median.
    step_s: f64,
    /// The product `[batch, d_in] · [d_in, d_sae]` alone, at its best.
    encoder_gemm_s: f64,
    /// `step_s / encoder_gemm_s`, the median of the ratios of neighbours in time.
    of_encoder: f64,
    gemm_gflops: f64,
    read_gb_s: f64,
    peak_rss_mb: f64,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let &Options { d_in, d_sae, batch, k, steps } = options;
    let device = Device::flex();
    let read_gb_s = read_bandwidth() / 1e9;
    examples::allocator::keep_pages();
    let noise = |shape| Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &device);
    let x = noise([batch, d_in]);
    let w = noise([d_in, d_sae]);
    // In one piece, and tile by tile: the machine's best is the better of them.
    let product = |tile: usize| {
        let start = Instant::now();
        for first in (0..batch).step_by(tile) {
            let rows = x.clone().narrow(0, first, tile.min(batch - first));
            black_box(rows.matmul(w.clone()));
        }
        start.elapsed().as_secs_f64()
    };
    let rows = noise([d_sae, d_in]) * (0.1 / (d_in as f64).sqrt());
    let parameters = Parameters {
        w_enc: rows.clone() + 0.0,
        b_enc: Tensor::zeros([d_sae], &device),
        w_dec: rows + 0.0,
        b_dec: Tensor::zeros([d_in], &device),
    };
    let mut state = TrainState::new(parameters, 1.0);
    reset_peak();
    let (mut times, mut products, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for step in 0..steps + 3 {
        // Turn about, so that a change of the machine's pace hits both alike.
        let encoder = product(512).min(product(batch));
        let start = Instant::now();
        state.step(x.clone(), k, Some(1.0), AdamConfig::new(1e-4))?;
        let time = start.elapsed().as_secs_f64();
        if step >= 3 {
            times.push(time);
            products.push(encoder);
            ratios.push(time / encoder);
        }
    }
    let (step_s, encoder_gemm_s) = (median_of(times), median_of(products));
    let line = Line {
        kind: "topk",
        d_in,
        d_sae,
        batch,
        tokens_per_s: batch as f64 / step_s,
        step_s,
        encoder_gemm_s,
        of_encoder: median_of(ratios),
        gemm_gflops: (2 * batch * d_in * d_sae) as f64 / encoder_gemm_s / 1e9,
        read_gb_s,
        peak_rss_mb: peak_mb(),
    };
    println!("{}", serde_json::to_string(&line)?);
    Ok(())
}

fn median_of(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}
