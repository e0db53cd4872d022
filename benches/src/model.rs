//! How fast a model runs, beside how fast the machine could run it.
//!
//! Passes are over `[8, 128]` tokens. The limit of a pass is the time that its matrix products take
//! by themselves; that of decoding, the time that reading the weights once takes.

use std::hint::black_box;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use burn::tensor::Device;
use examples::assets::locate_model;
use model_hooks::{
    GenerateConfig, HookPoint, LanguageModel, ModelConfig, Probe, SharedPrefix, TokenBatch,
    WeightDtype, load,
};
use serde::Serialize;
use serde_json::json;

use crate::limits::{gemm, linear_layers, median, read_bandwidth};
use crate::peak::{peak_mb, reset_peak};

const N_ROWS: usize = 8;
const N_POS: usize = 128;
const N_TOKENS: usize = N_ROWS * N_POS;
/// Tokens decoded, after the first.
const N_DECODED: usize = 48;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// A GGUF file, a Hugging Face folder, or a hub id; SmolLM2-135M-Instruct unless given.
    #[arg(long)]
    model: Option<String>,
    /// The block whose output is harvested and differentiated.
    #[arg(long, default_value_t = 15)]
    layer: usize,
    /// Measures these alone, by their names in the output.
    #[arg(long, value_parser = NAMES)]
    only: Vec<String>,
}

const NAMES: [&str; 9] = [
    "load",
    "harvest_l15",
    "forward_logits",
    "forward_last",
    "capture_overhead",
    "gradient_l15",
    "decode_f32",
    "decode_batch16",
    "decode_bf16",
];

/// A line of the output.
#[derive(Serialize)]
struct Line {
    name: &'static str,
    tokens_per_s: f64,
    /// Of the machine's limit.
    limit_fraction: f64,
    /// Of the whole process, while this was measured.
    peak_rss_mb: f64,
    /// What else there is to say.
    #[serde(flatten)]
    more: serde_json::Map<String, serde_json::Value>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let device = Device::flex();
    let path = locate_model(options.model.as_deref())?;
    let load = |dtype| -> Result<LanguageModel> {
        let mut checkpoint = load::open(&path)?;
        let tensors = checkpoint.tensors.as_mut();
        Ok(LanguageModel::load_as(dtype, checkpoint.config, tensors, &device)?)
    };
    let start = Instant::now();
    let model = load(WeightDtype::F32)?;
    let (load_s, load_peak_mb) = (start.elapsed().as_secs_f64(), peak_mb());
    let bandwidth = read_bandwidth();
    // Not before: what has been freed by now is to go back to the system.
    examples::allocator::keep_pages();
    let bench = Bench::new(model, options.layer, bandwidth)?;
    println!("{}", bench.limits());
    let wanted = |name: &str| options.only.is_empty() || options.only.iter().any(|n| n == name);
    if wanted("load") {
        let line = json!({ "name": "load", "seconds": load_s, "peak_rss_mb": load_peak_mb });
        println!("{line}");
    }
    if wanted("harvest_l15") {
        bench.harvest();
    }
    if wanted("forward_logits") {
        bench.forward_logits();
    }
    if wanted("forward_last") {
        bench.forward_last();
    }
    if wanted("capture_overhead") {
        bench.capture()?;
    }
    if wanted("gradient_l15") {
        bench.gradient()?;
    }
    for (name, n_rows) in [("decode_f32", 1), ("decode_batch16", 16)] {
        if wanted(name) {
            bench.decode(name, n_rows, size_of::<f32>())?;
        }
    }
    if wanted("decode_bf16") {
        let bench = Bench { model: load(WeightDtype::Bf16)?, ..bench };
        bench.decode("decode_bf16", 1, size_of::<u16>())?;
    }
    Ok(())
}

struct Bench {
    model: LanguageModel,
    layer: usize,
    tokens: TokenBatch,
    ids: Vec<Vec<u32>>,
    gemm: f64,
    bandwidth: f64,
}

impl Bench {
    fn new(model: LanguageModel, layer: usize, bandwidth: f64) -> Result<Self> {
        model.check_point(HookPoint::resid_post(layer))?;
        let d_vocab = model.config().d_vocab;
        // Any ids do; these repeat nothing.
        let id = |i: usize| (i * 7919 % d_vocab) as u32;
        let row = |row| (0..N_POS).map(|pos| id(row * N_POS + pos + 1)).collect();
        let ids: Vec<Vec<u32>> = (0..N_ROWS).map(row).collect();
        let tokens = TokenBatch::new(&ids, model.config(), model.device())?;
        let gemm = gemm(model.config(), N_TOKENS, model.device());
        Ok(Self { gemm, bandwidth, model, layer, tokens, ids })
    }

    fn limits(&self) -> serde_json::Value {
        json!({
            "name": "limits",
            "gemm_gflop_per_s": self.gemm / 1e9,
            "read_gb_per_s": self.bandwidth / 1e9,
        })
    }

    /// FLOPs of the matrix products of a pass through so many blocks.
    fn flops(&self, n_blocks: usize) -> f64 {
        let config = self.model.config();
        let linear: usize = linear_layers(config).iter().map(|[d_in, d_out]| d_in * d_out).sum();
        // Scores and weighted values, over the half of the keys that causality leaves.
        let attention = config.attention.n_heads * config.attention.d_head * (N_POS + 1);
        (n_blocks * N_TOKENS * 2 * (linear + attention)) as f64
    }

    fn unembedding_flops(&self, n_rows: usize) -> f64 {
        let ModelConfig { d_model, d_vocab, .. } = *self.model.config();
        (2 * n_rows * d_model * d_vocab) as f64
    }

    fn report(&self, name: &'static str, time: Duration, flops: f64, more: &[(&str, f64)]) {
        let limit = flops / self.gemm;
        say(name, N_TOKENS as f64 / time.as_secs_f64(), limit / time.as_secs_f64(), more);
    }

    fn until(&self) {
        let n_blocks = self.layer + 1;
        black_box(self.model.run_until(&self.tokens, n_blocks, &mut ()).expect("it runs"));
    }

    fn harvest(&self) {
        reset_peak();
        let time = median(|| self.until());
        self.report("harvest_l15", time, self.flops(self.layer + 1), &[]);
    }

    fn forward_logits(&self) {
        let n_layers = self.model.config().n_layers;
        reset_peak();
        let time = median(|| {
            black_box(self.model.logits(&self.tokens, &mut ()).expect("it runs"));
        });
        let flops = self.flops(n_layers) + self.unembedding_flops(N_TOKENS);
        self.report("forward_logits", time, flops, &[]);
    }

    fn forward_last(&self) {
        let n_layers = self.model.config().n_layers;
        reset_peak();
        let time = median(|| {
            black_box(self.model.last_logits(&self.tokens, &mut ()).expect("it runs"));
        });
        let flops = self.flops(n_layers) + self.unembedding_flops(N_ROWS);
        self.report("forward_last", time, flops, &[]);
    }

    /// Turn about, so that a change of the machine's pace hits both alike.
    fn capture(&self) -> Result<()> {
        let point = HookPoint::resid_post(self.layer);
        reset_peak();
        let (mut plain, mut captured) = (Vec::new(), Vec::new());
        for _ in 0..41 {
            let start = Instant::now();
            self.until();
            plain.push(start.elapsed());
            let start = Instant::now();
            black_box(self.model.capture(&self.tokens, [point])?);
            captured.push(start.elapsed());
        }
        let median = |times: &mut Vec<Duration>| {
            times.sort_unstable();
            times[times.len() / 2]
        };
        let (plain, captured) = (median(&mut plain), median(&mut captured));
        let overhead = captured.as_secs_f64() / plain.as_secs_f64() - 1.0;
        let flops = self.flops(self.layer + 1);
        self.report("capture_overhead", captured, flops, &[("overhead", overhead)]);
        Ok(())
    }

    /// Forward from the residual stream and back to it, beside the forward alone.
    fn gradient(&self) -> Result<()> {
        let (point, first) = (HookPoint::resid_post(self.layer), self.layer + 1);
        let n_layers = self.model.config().n_layers;
        let residual = self.model.run_until(&self.tokens, first, &mut ())?;
        let positions = self.tokens.positions(0);
        let last_logits = |residual| {
            let mut cache = self.model.cache(SharedPrefix::default(), &self.tokens);
            let end = self.model.blocks(residual, first..n_layers, &mut cache, &mut ());
            self.model.unembed_last(end.expect("it runs"), &positions, &mut ())
        };
        let forward = median(|| {
            black_box(last_logits(residual.clone()));
        });
        reset_peak();
        let both = median(|| {
            use model_hooks::Hook;
            let mut probe = Probe::new([point]);
            let residual = probe.at(point, residual.clone(), &positions);
            let grads = last_logits(residual).narrow(1, 7, 1).sum().backward();
            black_box(probe.gradient::<3>(point, &grads));
        });
        let flops = self.flops(n_layers - first) + self.unembedding_flops(N_ROWS);
        let ratio = both.as_secs_f64() / forward.as_secs_f64();
        // Back through a product by fixed weights costs as much as forth.
        self.report("gradient_l15", both, 2.0 * flops, &[("of_forward", ratio)]);
        Ok(())
    }

    /// Greedy steps behind a short prompt, without the prompt's own.
    fn decode(&self, name: &'static str, n_rows: usize, weight_bytes: usize) -> Result<()> {
        let prompts: Vec<&[u32]> = (0..n_rows).map(|i| &self.ids[i % N_ROWS][..16]).collect();
        let config = GenerateConfig {
            min_new_tokens: N_DECODED + 1,
            ..GenerateConfig::greedy(N_DECODED + 1, vec![])
        };
        reset_peak();
        let mut times = Vec::new();
        for _ in 0..3 {
            let mut last = vec![];
            let observe = |_: model_hooks::NewToken<'_>| {
                last.push(Instant::now());
                ControlFlow::Continue(())
            };
            self.model.generate(&prompts, &SharedPrefix::default(), &config, &mut (), observe)?;
            let (first, end) = (last[n_rows - 1], last.last().context("no tokens")?);
            times.push(*end - first);
        }
        times.sort_unstable();
        let step = times[1].as_secs_f64() / N_DECODED as f64;
        let bytes = (self.n_weights() * weight_bytes) as f64;
        let fraction = bytes / self.bandwidth / step;
        say(name, n_rows as f64 / step, fraction, &[("weight_mb", bytes / 1e6)]);
        Ok(())
    }

    /// What a step reads: the blocks and the unembedding.
    fn n_weights(&self) -> usize {
        let config = self.model.config();
        let linear: usize = linear_layers(config).iter().map(|[d_in, d_out]| d_in * d_out).sum();
        config.n_layers * linear + config.d_model * config.d_vocab
    }
}

fn say(name: &'static str, tokens_per_s: f64, limit_fraction: f64, more: &[(&str, f64)]) {
    let more = more.iter().map(|(key, value)| ((*key).to_owned(), (*value).into())).collect();
    let line = Line { name, tokens_per_s, limit_fraction, peak_rss_mb: peak_mb(), more };
    println!("{}", serde_json::to_string(&line).expect("numbers and strings"));
}
