//! How much memory a model takes in its full size, with random weights: while it is loaded, and in
//! a pass.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Error, Result};
use burn::tensor::Device;
use clap::ValueEnum;
use goldens::checkpoint;
use model_hooks::{LanguageModel, ModelConfig, TokenBatch, WeightDtype, load};
use serde::Serialize;
use serde_json::Value;

use crate::peak::{peak_mb, reset_peak};

/// Tokens of the pass.
const N_TOKENS: u32 = 16;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// A `config.json` as transformers has it; known ones are in `goldens/configs`.
    #[arg(long)]
    config: PathBuf,
    /// How matrices of weights are kept in memory. In the file they are bf16.
    #[arg(long)]
    dtype: Dtype,
    /// Where the checkpoint is written, and removed again; two bytes a weight.
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    folder: PathBuf,
}

#[derive(Clone, Copy, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
enum Dtype {
    F32,
    Bf16,
}

/// The line of output.
#[derive(Serialize)]
struct Line {
    name: String,
    dtype: Dtype,
    /// Computed from the shapes; biases and norms are kept in f32.
    weights_mb: f64,
    load_peak_rss_mb: f64,
    forward_peak_rss_mb: f64,
    load_s: f64,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let bytes = fs::read(&options.config)
        .with_context(|| format!("cannot read {}", options.config.display()))?;
    ModelConfig::from_hf(&bytes, None)?;
    let config: Value = serde_json::from_slice(&bytes)?;
    let weight_bytes: usize = checkpoint::tensors(&config)
        .map_err(Error::msg)?
        .iter()
        .map(|(_, shape)| match (options.dtype, shape.len()) {
            (Dtype::Bf16, 2) => 2 * shape.iter().product::<usize>(),
            _ => 4 * shape.iter().product::<usize>(),
        })
        .sum();
    let folder = tempfile::tempdir_in(&options.folder)?;
    checkpoint::write(folder.path(), &config, 0)?;

    reset_peak();
    let start = Instant::now();
    let model = load_model(folder.path(), options.dtype)?;
    let (load_s, load_peak_rss_mb) = (start.elapsed().as_secs_f64(), peak_mb());
    folder.close()?;

    // As the programs do once their model is loaded.
    examples::allocator::keep_pages();
    reset_peak();
    let ids: Vec<u32> = (1..=N_TOKENS).collect();
    let tokens = TokenBatch::new(&[ids], model.config(), model.device())?;
    let logits = model.logits(&tokens, &mut ())?.into_data().try_to_vec::<f32>()?;
    anyhow::ensure!(logits.iter().all(|x| x.is_finite()), "logits that are not finite");
    let name = options.config.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let line = Line {
        name,
        dtype: options.dtype,
        weights_mb: weight_bytes as f64 / 1e6,
        load_peak_rss_mb,
        forward_peak_rss_mb: peak_mb(),
        load_s,
    };
    println!("{}", serde_json::to_string(&line)?);
    Ok(())
}

fn load_model(folder: &Path, dtype: Dtype) -> Result<LanguageModel> {
    let dtype = match dtype {
        Dtype::F32 => WeightDtype::F32,
        Dtype::Bf16 => WeightDtype::Bf16,
    };
    let mut checkpoint = load::open(folder)?;
    let (config, tensors) = (checkpoint.config, checkpoint.tensors.as_mut());
    Ok(LanguageModel::load_as(dtype, config, tensors, &Device::flex())?)
}
