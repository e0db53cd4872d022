//! A training step of an SAE, beside the product of its encoder.

use std::hint::black_box;
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use burn::tensor::{Device, Distribution, Tensor};
use kernels::top_k;
use sae_core::train::{
    ActivationMatrix, AuxK, AuxKRule, Betas, DecoderNorm, Gated, GatedAuxiliary, JumpRelu, Kind,
    Objective, Optimizer, ParameterName, Search, Selecting, Sparsity, SparsityNorm, Standard,
    StepOutcome, TrainConfig, TrainState,
};
use serde::Serialize;

use crate::limits::memory_bandwidth;
use crate::peak::{peak_mb, reset_peak};

/// Steps before the first that counts.
const WARM_UP: usize = 3;
/// Activations that the biases to start with are found by.
const SAMPLE: usize = 64;

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    case: Case,
    /// Steps measured, after three to warm up.
    #[arg(long, default_value_t = 15)]
    steps: usize,
    /// Measures steps that search for their latents in full as well, turn about with those that have
    /// them proposed in integers, and checks that they do the same.
    #[arg(long)]
    full: bool,
    /// The backend that computes; the machine's limits are then those of this device.
    #[arg(long, env = "BURN_DEVICE", default_value = "flex")]
    device: String,
}

/// The step that is measured.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Case {
    /// Width of the activations.
    #[arg(long, default_value_t = 576)]
    pub(crate) d_in: usize,
    /// Number of latents.
    #[arg(long, default_value_t = 4608)]
    pub(crate) d_sae: usize,
    /// Activations per step.
    #[arg(long, default_value_t = 4096)]
    pub(crate) batch: usize,
    /// The kind of SAE.
    #[arg(long, value_enum, default_value_t = KindName::Topk)]
    pub(crate) kind: KindName,
    /// Latents per activation: kept, or where nothing is selected, above the biases or thresholds
    /// that the run starts with.
    #[arg(long, default_value_t = 32)]
    pub(crate) k: usize,
    /// Share of latents that are dead; they get the gradient of AuxK, if the kind has it.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) dead: f64,
    /// Leaves dead latents without the gradient of AuxK.
    #[arg(long)]
    pub(crate) without_aux: bool,
    /// Row-lazy Adam in place of Adam: latents without a gradient cost nothing.
    #[arg(long)]
    pub(crate) row_lazy: bool,
    /// Holds the decoder's rows at norm 1.
    #[arg(long)]
    pub(crate) unit_rows: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum KindName {
    Topk,
    Batchtopk,
    Jumprelu,
    Gated,
    Standard,
}

#[derive(Serialize)]
pub(crate) struct Line {
    kind: KindName,
    /// How latents are found.
    search: Search,
    d_in: usize,
    d_sae: usize,
    batch: usize,
    /// Latents per activation, as they came out at the end.
    l0: f64,
    /// Share of latents that were dead.
    dead: f64,
    row_lazy: bool,
    unit_rows: bool,
    tokens_per_s: f64,
    /// Median.
    pub(crate) step_s: f64,
    /// The product `[batch, d_in] · [d_in, d_sae]` alone, at its best.
    pub(crate) encoder_gemm_s: f64,
    /// `step_s / encoder_gemm_s`, the median of the ratios of neighbours in time.
    of_encoder: f64,
    /// The time of a step of the first search that is measured over `step_s`, likewise.
    speed_up: f64,
    gemm_gflops: f64,
    /// Bytes that the device reads in a second, and on a GPU reads and writes.
    memory_gb_s: f64,
    /// Of the process in steps alone, of all runs that are measured.
    peak_rss_mb: f64,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let Options { case, steps, full, .. } = options;
    let device = examples::device::device(&options.device)?;
    let memory = memory_bandwidth(&device) / 1e9;
    examples::allocator::keep_pages();
    if *full && !case.selects() {
        bail!("--full is for --kind topk and batchtopk: the others search in no other way");
    }
    let searches: &[Search] = match (case.selects(), full) {
        (true, true) => &[Search::Full, Search::Proposed],
        (true, false) => &[Search::Proposed],
        (false, _) => &[Search::Full],
    };
    for line in case.measure(searches, *steps, memory, &device)? {
        println!("{}", serde_json::to_string(&line)?);
    }
    Ok(())
}

impl Case {
    /// A TopK step at the sizes at which other libraries are compared.
    pub(crate) fn top_k() -> Self {
        Self {
            d_in: 576,
            d_sae: 4608,
            batch: 4096,
            kind: KindName::Topk,
            k: 32,
            dead: 0.0,
            without_aux: false,
            row_lazy: false,
            unit_rows: false,
        }
    }

    fn selects(&self) -> bool {
        matches!(self.kind, KindName::Topk | KindName::Batchtopk)
    }

    /// Steps, turn about with each other where latents are searched for in several ways, and with the
    /// product of the encoder.
    pub(crate) fn measure(
        &self,
        searches: &[Search],
        steps: usize,
        memory_gb_s: f64,
        device: &Device,
    ) -> Result<Vec<Line>> {
        let &Self { d_in, d_sae, batch, kind, k, dead, row_lazy, unit_rows, .. } = self;
        ensure!(batch >= SAMPLE, "--batch {batch}: at least {SAMPLE}");
        let noise = |shape| Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), device);
        let x = noise([batch, d_in]);
        let w = noise([d_in, d_sae]);
        // In one piece, and tile by tile: the machine's best is the better of them.
        let product = |tile: usize| -> Result<f64> {
            device.sync()?;
            let start = Instant::now();
            for first in (0..batch).step_by(tile) {
                let rows = x.clone().narrow(0, first, tile.min(batch - first));
                black_box(rows.matmul(w.clone()));
            }
            device.sync()?;
            Ok(start.elapsed().as_secs_f64())
        };
        let values: Vec<f32> = x.to_data().try_to_vec().expect("f32");
        let matrix = ActivationMatrix::new(&values, d_in)?;
        let optimizer = match row_lazy {
            true => Optimizer::RowLazyAdam(Betas::new()),
            false => Optimizer::Adam(Betas::new()),
        };
        let decoder = if unit_rows { DecoderNorm::Unit } else { DecoderNorm::Free };
        let aux = dead > 0.0 && !self.without_aux;
        let mut runs = Vec::new();
        for &search in searches {
            let config = TrainConfig::new(d_sae, objective(kind, k, aux, search))
                .with_batch(batch)
                .with_optimizer(optimizer)
                .with_decoder(decoder)
                .with_decoder_norm(if unit_rows { 1.0 } else { 0.1 })
                .with_clip_norm(Some(1.0))
                .with_dead_after(1);
            let mut state = TrainState::initial(&config, &matrix, None, device)?;
            quieten(&mut state, &x, k, (dead * d_sae as f64) as usize);
            runs.push(Run { config, state, times: Vec::new(), l0: 0.0 });
        }
        // Before the product has made a matrix of all pre-activations, of which pages are kept.
        reset_peak();
        for _ in 0..WARM_UP {
            step_each(&mut runs, &x, steps)?;
        }
        let peak_rss_mb = peak_mb();
        runs.iter_mut().for_each(|run| run.times.clear());
        product(batch)?;
        let mut products = Vec::new();
        for _ in 0..steps {
            // Turn about, so that a change of the machine's pace hits all alike.
            products.push(product(512)?.min(product(batch)?));
            step_each(&mut runs, &x, steps)?;
        }
        let encoder_gemm_s = median_of(products.clone());
        let lines = searches.iter().zip(&runs).map(|(&search, run)| {
            let step_s = median_of(run.times.clone());
            Line {
                kind,
                search,
                d_in,
                d_sae,
                batch,
                l0: run.l0,
                dead,
                row_lazy,
                unit_rows,
                tokens_per_s: batch as f64 / step_s,
                step_s,
                encoder_gemm_s,
                of_encoder: median_ratio(&run.times, &products),
                speed_up: median_ratio(&runs[0].times, &run.times),
                gemm_gflops: (2 * batch * d_in * d_sae) as f64 / encoder_gemm_s / 1e9,
                memory_gb_s,
                peak_rss_mb,
            }
        });
        Ok(lines.collect())
    }
}

/// One of the runs that are measured side by side.
struct Run {
    config: TrainConfig,
    state: TrainState,
    times: Vec<f64>,
    /// Of the last step.
    l0: f64,
}

/// A step of every run, which all have to see the same loss.
fn step_each(runs: &mut [Run], x: &Tensor<2>, steps: usize) -> Result<()> {
    let mut losses = Vec::new();
    for run in runs {
        x.device().sync()?;
        let start = Instant::now();
        let outcome = run.state.step(x.clone(), &run.config, WARM_UP + steps);
        x.device().sync()?;
        run.times.push(start.elapsed().as_secs_f64());
        let StepOutcome::Taken(report) = outcome else { bail!("the loss is not finite") };
        run.l0 = report.l0;
        losses.push(report.loss.to_bits());
    }
    ensure!(losses.iter().all(|loss| *loss == losses[0]), "the searches differ");
    Ok(())
}

pub(crate) fn objective(kind: KindName, k: usize, aux: bool, search: Search) -> Objective {
    let sparsity = Sparsity {
        coefficient: 1e-3,
        norm: SparsityNorm::Lp { p: 1.0 },
        weighted_by_decoder_norms: true,
    };
    let aux_k = aux.then_some(AuxK { coefficient: 1.0, k: None, rule: AuxKRule::SaeLens });
    let selecting = |objective: Objective| match objective.kind {
        Kind::Selecting(selecting) => Kind::Selecting(Selecting { aux_k, search, ..selecting }),
        kind => kind,
    };
    Objective::new(match kind {
        KindName::Topk => selecting(Objective::top_k(k)),
        KindName::Batchtopk => selecting(Objective::batch_top_k(k as f64)),
        KindName::Jumprelu => Kind::JumpRelu(JumpRelu::new(1e-3)),
        KindName::Gated => {
            Kind::Gated(Gated { sparsity, auxiliary: GatedAuxiliary::UndetachedDecoder })
        }
        KindName::Standard => Kind::Standard(Standard { sparsity }),
    })
}

/// Sets the encoder's biases so that `k` latents are on, on average, and some never.
fn quieten(state: &mut TrainState, x: &Tensor<2>, k: usize, n_dead: usize) {
    let parameters = &mut state.parameters;
    let d_sae = parameters.d_sae();
    let w_enc = parameters.get(ParameterName::WEnc).expect("an encoder").clone();
    let centre = parameters.get(ParameterName::BDec).expect("a decoder").clone();
    let sample = x.clone().narrow(0, 0, SAMPLE) - centre;
    let pre = sample.matmul(w_enc.transpose()).reshape([1, SAMPLE * d_sae]);
    let (largest, _) = top_k(pre, SAMPLE * k);
    let bar: f32 = largest.narrow(1, SAMPLE * k - 1, 1).into_scalar();
    let bias = Tensor::zeros([1, d_sae], &x.device()) - bar;
    let dead = Tensor::zeros([1, n_dead], &x.device()) - 1e3;
    parameters.insert(ParameterName::BEnc, bias.slice_assign([0..1, 0..n_dead], dead));
}

/// The median of the ratios of neighbours in time.
fn median_ratio(times: &[f64], others: &[f64]) -> f64 {
    median_of(times.iter().zip(others).map(|(time, other)| time / other).collect())
}

pub(crate) fn median_of(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}
