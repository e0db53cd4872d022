//! How good SAEs become that are trained on the same activations, ours and others'.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use burn::tensor::{Device, Tensor, TensorData};
use sae_core::Sae;
use sae_core::format;
use sae_core::metrics::Reconstruction;
use sae_core::source::{ActivationSource, Rows};
use sae_core::store::{LocalFolder, ReadOrder, StoreSource};
use sae_core::train::{ActivationMatrix, Centre, Objective, Schedule, TrainConfig, Trainer};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors, serialize_to_file};
use serde_json::json;

const BATCH: usize = 4096;
/// Rows that are encoded at a time.
const MEASURED: usize = 8192;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// A store of activations at one hook point, as the program `train` leaves it.
    #[arg(long)]
    store: PathBuf,
    /// Where its rows go for others, shuffled: `train` and `held_out` in one safetensors file.
    #[arg(long, default_value = "target/peers/rows.safetensors", value_name = "FILE")]
    rows: PathBuf,
    /// Rows that nobody trains on.
    #[arg(long, default_value_t = 100_000)]
    n_held_out: usize,
    /// SAEs that others have trained on the same rows, in folders that SAELens writes.
    #[arg(long, num_args = 1.., value_name = "FOLDER")]
    theirs: Vec<PathBuf>,
    /// Seeds of our own runs.
    #[arg(long, num_args = 1.., value_delimiter = ',', default_values_t = [0, 1, 2])]
    seeds: Vec<u64>,
    /// Number of latents.
    #[arg(long, default_value_t = 4608)]
    d_sae: usize,
    /// Latents per activation.
    #[arg(long, default_value_t = 32)]
    k: usize,
    /// Learning rate, the same in every step.
    #[arg(long, default_value_t = 4e-4)]
    lr: f64,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    examples::allocator::keep_pages();
    if !options.rows.is_file() {
        shuffle(options)?;
    }
    let place = || options.rows.display().to_string();
    let bytes = fs::read(&options.rows).with_context(place)?;
    let file = SafeTensors::deserialize(&bytes).with_context(place)?;
    let read = |name: &str| -> Result<(Vec<f32>, usize)> {
        let view = file.tensor(name).with_context(place)?;
        let [_, width] = view.shape()[..] else { bail!("{}: {name} is no matrix", place()) };
        ensure!(view.dtype() == Dtype::F32, "{}: {name} is not F32", place());
        let values = view.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        Ok((values.collect(), width))
    };
    let ((train, d_in), (held_out, _)) = (read("train")?, read("held_out")?);
    let (train, held_out) =
        (ActivationMatrix::new(&train, d_in)?, ActivationMatrix::new(&held_out, d_in)?);
    let device = Device::flex();
    for &seed in &options.seeds {
        // As SAELens has it unless it is told otherwise, but for the learning rate.
        let config = TrainConfig::new(options.d_sae, Objective::top_k(options.k))
            .with_batch(BATCH)
            .with_clip_norm(Some(1.0))
            .with_centre(Centre::Zero)
            .with_schedule(
                Schedule::new().with_learning_rate(options.lr).with_warmup(0.0).with_decay(0.0),
            )
            .with_seed(seed);
        let mut trainer = Trainer::new(config, &train, &device)?;
        trainer.run(&train, |_| ControlFlow::Continue(()))?;
        say("ours", &format!("seed {seed}"), &trainer.sae(), &held_out, &device);
    }
    for folder in &options.theirs {
        let sae = format::read(folder, &device).with_context(|| folder.display().to_string())?;
        say("theirs", &folder.display().to_string(), &sae, &held_out, &device);
    }
    Ok(())
}

/// Reads the store in an order of no text, and writes it into one file.
fn shuffle(options: &Options) -> Result<()> {
    let order = ReadOrder { seed: 0, window: 1 << 21, n_passes: 1 };
    let mut store = StoreSource::open(Arc::new(LocalFolder::new(&options.store)?), order)?;
    ensure!(store.columns().len() == 1, "{}: one hook point", options.store.display());
    let n_rows = store.n_rows().context("a store knows its rows")? as usize;
    ensure!(n_rows > options.n_held_out, "{n_rows} rows, {} held out", options.n_held_out);
    let columns = store.columns().to_vec();
    let mut read = |n: usize| -> Result<Vec<u8>> {
        let mut rows = Rows::empty(&columns);
        while rows.n_rows() < n {
            let wanted = n - rows.n_rows();
            ensure!(store.read(wanted, &mut rows)? > 0, "the store ended before its rows");
        }
        Ok(rows.column(0).iter().flat_map(|x| x.to_le_bytes()).collect())
    };
    let parts = [("held_out", options.n_held_out), ("train", n_rows - options.n_held_out)];
    let width = columns[0].width;
    let bytes: Vec<_> = parts.iter().map(|&(_, n)| read(n)).collect::<Result<_>>()?;
    let tensors = parts
        .iter()
        .zip(&bytes)
        .map(|(&(name, n), bytes)| Ok((name, TensorView::new(Dtype::F32, vec![n, width], bytes)?)));
    let tensors: BTreeMap<_, _> = tensors.collect::<Result<_>>()?;
    let beside = options.rows.with_extension("part");
    serialize_to_file(tensors, None, &beside)?;
    fs::rename(&beside, &options.rows).with_context(|| options.rows.display().to_string())
}

fn say(whose: &str, which: &str, sae: &Sae, rows: &ActivationMatrix<'_>, device: &Device) {
    let mut found = Reconstruction::new(sae.config().d_sae);
    for first in (0..rows.n_rows()).step_by(MEASURED) {
        let end = (first + MEASURED).min(rows.n_rows());
        let values: Vec<f32> = (first..end).flat_map(|row| rows.row(row)).copied().collect();
        let data = TensorData::new(values, [end - first, rows.d_in()]);
        let x = Tensor::<2>::from_data(data, device);
        let (latents, reconstruction) = sae.run(x.clone());
        found.update(x, reconstruction, &latents);
    }
    let line = json!({
        "whose": whose,
        "which": which,
        "fvu": found.fvu(),
        "l0": found.l0(),
        "dead_share": found.n_dead() as f64 / sae.config().d_sae as f64,
        "cosine": found.cosine(),
        "n_rows": rows.n_rows(),
    });
    println!("{line}");
}
