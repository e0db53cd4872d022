//! The losses of a run that begins with given weights and sees given batches, to be put beside those of
//! another trainer.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use burn::tensor::{Device, Tensor, TensorData};
use sae_core::train::{
    ParameterName, Parameters, Schedule, Search, StepOutcome, TrainConfig, TrainState,
};
use safetensors::{Dtype, SafeTensors};
use serde_json::json;

use crate::sae_step::{KindName, objective};

/// Parameters as SAELens names them, and whether they lie transposed there.
const PLACES: [(ParameterName, &str, bool); 8] = [
    (ParameterName::WEnc, "W_enc", true),
    (ParameterName::BEnc, "b_enc", false),
    (ParameterName::BEnc, "b_gate", false),
    (ParameterName::WDec, "W_dec", false),
    (ParameterName::BDec, "b_dec", false),
    (ParameterName::Threshold, "threshold", false),
    (ParameterName::RMag, "r_mag", false),
    (ParameterName::BMag, "b_mag", false),
];

#[derive(clap::Args)]
pub(crate) struct Options {
    /// A safetensors file of the initial weights under SAELens' names, and `x`: `[batches, n, d_in]`,
    /// taken in turn.
    start: PathBuf,
    /// The kind of SAE.
    #[arg(long, value_enum, default_value_t = KindName::Topk)]
    kind: KindName,
    /// Latents per activation.
    #[arg(long, default_value_t = 32)]
    k: usize,
    /// Learning rate, the same in every step.
    #[arg(long, default_value_t = 4e-4)]
    lr: f64,
    /// Steps of Adam, with gradients clipped to norm 1.
    #[arg(long, default_value_t = 200)]
    steps: usize,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let place = || options.start.display().to_string();
    let bytes = fs::read(&options.start).with_context(place)?;
    let file = SafeTensors::deserialize(&bytes).with_context(place)?;
    let device = Device::flex();
    let read = |name: &str| -> Result<Option<(Vec<usize>, Vec<f32>)>> {
        let Ok(view) = file.tensor(name) else { return Ok(None) };
        ensure!(view.dtype() == Dtype::F32, "{}: {name} is {:?}, not F32", place(), view.dtype());
        let values = view.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        Ok(Some((view.shape().to_vec(), values.collect())))
    };
    let mut parameters = Parameters::default();
    for (name, file_name, is_transposed) in PLACES {
        let Some((shape, values)) = read(file_name)? else { continue };
        let shape = match shape[..] {
            [m] => [1, m],
            [n, m] => [n, m],
            _ => bail!("{}: {file_name} has shape {shape:?}", place()),
        };
        let tensor = Tensor::<2>::from_data(TensorData::new(values, shape), &device);
        // Copied, so that rows lie in one piece.
        let tensor = match is_transposed {
            true => (tensor.transpose() + 0.0).reshape([shape[1], shape[0]]),
            false => tensor,
        };
        parameters.insert(name, tensor);
    }
    let (shape, values) = read("x")?.with_context(|| format!("{}: there is no x", place()))?;
    let [n_batches, n, d_in] = shape[..] else { bail!("{}: x has shape {shape:?}", place()) };
    ensure!(n_batches > 0 && n > 0, "{}: x has shape {shape:?}", place());
    let batches: Vec<Tensor<2>> = values
        .chunks(n * d_in)
        .map(|batch| Tensor::from_data(TensorData::new(batch.to_vec(), [n, d_in]), &device))
        .collect();

    let config = TrainConfig::new(
        parameters.d_sae(),
        objective(options.kind, options.k, false, Search::Proposed),
    )
    .with_batch(n)
    .with_clip_norm(Some(1.0))
    .with_dead_after(u64::MAX)
    .with_schedule(Schedule::new().with_learning_rate(options.lr).with_warmup(0.0).with_decay(0.0));
    config.validate(d_in)?;
    let mut state = TrainState::new(parameters, 1.0, &config.optimizer);
    let mut losses = Vec::new();
    for step in 0..options.steps {
        let batch = batches[step % n_batches].clone();
        match state.step(batch, &config, options.steps) {
            StepOutcome::Taken(report) => losses.push(report.loss),
            StepOutcome::Skipped { loss } => bail!("the loss is {loss} in step {step}"),
        }
    }
    println!("{}", json!({ "kind": options.kind, "losses": losses }));
    Ok(())
}
