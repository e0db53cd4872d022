//! What saving a training run takes, in memory beside the run's own and in time.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use burn::tensor::Device;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sae_core::train::{
    ActivationMatrix, Checkpoints, Event, Fit, FitConfig, MatrixSource, Objective, Run, TrainConfig,
};
use serde::Serialize;

use crate::peak::{peak_mb, reset_peak};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Width of the activations.
    #[arg(long, default_value_t = 576)]
    d_in: usize,
    /// Number of latents.
    #[arg(long, default_value_t = 18_432)]
    d_sae: usize,
    /// Where the checkpoint is written, and removed again.
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    folder: PathBuf,
}

/// The line of output.
#[derive(Serialize)]
struct Line {
    d_in: usize,
    d_sae: usize,
    /// Encoder or decoder.
    largest_tensor_mb: f64,
    file_mb: f64,
    /// Before the save, the run and all.
    rss_mb: f64,
    /// The most during the save.
    peak_rss_mb: f64,
    /// The difference.
    extra_mb: f64,
    save_s: f64,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let Options { d_in, d_sae, .. } = *options;
    let batch = 256;
    let mut random = ChaCha8Rng::seed_from_u64(0);
    let values: Vec<f32> = (0..batch * d_in).map(|_| random.random_range(-1.0..1.0)).collect();
    let matrix = ActivationMatrix::new(&values, d_in)?;
    let mut source = MatrixSource::new(matrix, 0, batch, 4)?;
    let folder = tempfile::tempdir_in(&options.folder)?;
    let config = TrainConfig::new(d_sae, Objective::top_k(32)).with_batch(batch);
    let runs = vec![Run::new("a", MatrixSource::COLUMN, config)];
    let fit_config = FitConfig::new().with_checkpoint_every(2);
    let checkpoints = Checkpoints::open(folder.path())?;
    let mut fit = Fit::resume(runs, &mut source, fit_config, &Device::flex(), checkpoints)?;
    let (mut rss_mb, mut begin, mut saved) = (f64::NAN, Instant::now(), None);
    fit.run(|event| {
        match event {
            Event::Step(_) => {
                reset_peak();
                (rss_mb, begin) = (peak_mb(), Instant::now());
            }
            Event::Checkpoint { name, .. } => {
                saved = Some((name.clone(), begin.elapsed().as_secs_f64(), peak_mb()));
            }
            _ => {}
        }
        ControlFlow::Continue(())
    })?;
    let (name, save_s, peak_rss_mb) = saved.context("nothing was saved")?;
    let file = std::fs::metadata(folder.path().join(name))?;
    let line = Line {
        d_in,
        d_sae,
        largest_tensor_mb: (4 * d_in * d_sae) as f64 / 1e6,
        file_mb: file.len() as f64 / 1e6,
        rss_mb,
        peak_rss_mb,
        extra_mb: peak_rss_mb - rss_mb,
        save_s,
    };
    println!("{}", serde_json::to_string(&line)?);
    Ok(())
}
