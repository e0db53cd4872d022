//! Autoencoders on the residual stream of a preference model.

use std::ops::ControlFlow;

use anyhow::Result;
use burn::tensor::{Device, Tensor, TensorData};
use model_hooks::HookPoint;
use sae_core::Sae;
use sae_core::metrics::Reconstruction;
use sae_core::train::{
    ActivationMatrix, Gated, GatedAuxiliary, Kind, Objective, Schedule, Sparsity, TrainConfig,
    Trainer,
};
use serde::{Deserialize, Serialize};

use super::options::{SaeKind, Scale};
use super::stages::Fingerprint;
use crate::progress::bar;

/// High, because the run is short.
const LEARNING_RATE: f64 = 1e-3;
/// Higher yet: all latents of a Gated one are active at first, until their biases have sunk.
const GATED_LEARNING_RATE: f64 = 7e-3;
/// Activations of a step: few, for many steps.
const BATCH: usize = 128;
/// Latents active on a token, of a TopK.
const K: usize = 32;
/// The penalty on the gates of a Gated one, for activations of unit variance.
const L1_COEFFICIENT: f64 = 5.0;
/// Activations are not learnt from whose norm is above the median this many times.
const OUTLYING: f32 = 8.0;
/// Activations encoded at a time.
const ENCODE_ROWS: usize = 4096;

/// An autoencoder, and how good it is on text that it was not trained on.
pub(super) struct TrainedSae {
    pub(super) sae: Sae,
    pub(super) kind: SaeKind,
    pub(super) layer: usize,
    pub(super) quality: Quality,
    pub(super) key: Fingerprint,
}

/// How good an autoencoder is on text that it was not trained on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Quality {
    pub(super) n_tokens: usize,
    pub(super) l0: f64,
    pub(super) fvu: f64,
    pub(super) fvu_without_outliers: f64,
    pub(super) n_outliers: usize,
    /// By latent.
    pub(super) densities: Vec<f64>,
}

impl TrainedSae {
    pub(super) fn point(&self) -> HookPoint {
        HookPoint::resid_post(self.layer)
    }
}

impl SaeKind {
    /// What to call it.
    pub fn label(self) -> &'static str {
        match self {
            Self::TopK => "TopK",
            Self::Gated => "Gated",
        }
    }

    fn objective(self) -> Objective {
        match self {
            Self::TopK => Objective::top_k(K),
            Self::Gated => {
                let sparsity = Sparsity::new(L1_COEFFICIENT);
                let auxiliary = GatedAuxiliary::DetachedDecoder;
                Objective::new(Kind::Gated(Gated { sparsity, auxiliary }))
            }
        }
    }
}

/// How an autoencoder is trained on so many activations.
pub(super) fn config(
    kind: SaeKind,
    d_in: usize,
    n_rows: usize,
    scale: &Scale,
    seed: u64,
) -> TrainConfig {
    let schedule = match kind {
        SaeKind::TopK => Schedule::new().with_learning_rate(LEARNING_RATE),
        // Latents die of a penalty that comes at once.
        SaeKind::Gated => {
            Schedule::new().with_learning_rate(GATED_LEARNING_RATE).with_sparsity_warmup(0.1)
        }
    };
    TrainConfig::new(scale.expansion * d_in, kind.objective())
        .with_batch(BATCH.min(n_rows.max(1)))
        .with_n_passes(scale.n_passes)
        .with_clip_norm(Some(1.0))
        .with_schedule(schedule)
        .with_dead_after(200_000)
        .with_seed(seed)
}

/// The rows of no outlying norm. A model's massive activations are few and would be most of the
/// loss, so that nothing would be learnt of the others.
pub(super) fn ordinary(rows: &[f32], d_in: usize) -> Vec<f32> {
    let square = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>();
    let mut squares: Vec<f32> = rows.chunks_exact(d_in).map(square).collect();
    squares.sort_unstable_by(f32::total_cmp);
    let median = squares.get(squares.len() / 2).copied().unwrap_or(0.0);
    let most = OUTLYING * OUTLYING * median;
    rows.chunks_exact(d_in).filter(|row| square(row) <= most).flatten().copied().collect()
}

/// Trains an autoencoder, and measures it.
///
/// # Errors
/// If there are too few activations for a step.
pub(super) fn train(
    config: &TrainConfig,
    layer: usize,
    [training, held_out]: [&[f32]; 2],
    d_in: usize,
    device: &Device,
) -> Result<(Sae, Quality)> {
    let matrix = ActivationMatrix::new(training, d_in)?;
    let mut trainer = Trainer::new(config.clone(), &matrix, device)?;
    let bar = bar("training", (config.n_passes * (matrix.n_rows() / config.batch)) as u64);
    trainer.run(&matrix, |progress| {
        bar.set_position(progress.step as u64);
        bar.set_message(format!("loss {:.1}", progress.loss));
        ControlFlow::Continue(())
    })?;
    bar.finish();
    let sae = trainer.sae();
    let mut metadata = sae.config().metadata.clone();
    metadata.hook_name = Some(HookPoint::resid_post(layer).to_string());
    metadata.seqpos_slice = Some(vec![Some(1), None]);
    let sae = sae.with_metadata(metadata);
    let mut reconstruction = Reconstruction::new(config.d_sae);
    for rows in held_out.chunks(ENCODE_ROWS * d_in) {
        let shape = [rows.len() / d_in, d_in];
        let x = Tensor::<2>::from_data(TensorData::new(rows.to_vec(), shape), device);
        let parts = sae.decompose(x.clone());
        reconstruction.update(x, parts.reconstruction, &parts.latents);
    }
    let quality = Quality {
        n_tokens: reconstruction.n_rows(),
        l0: reconstruction.l0(),
        fvu: reconstruction.fvu(),
        fvu_without_outliers: reconstruction.fvu_without_outliers(),
        n_outliers: reconstruction.n_outliers(),
        densities: reconstruction.densities(),
    };
    Ok((sae, quality))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outlying_rows_are_left_out() {
        // Norms 1, 5, 4, 1 and 50, of which 4 is the median: 32 would be too much.
        let rows = [0.0, 1.0, 3.0, 4.0, 4.0, 0.0, 1.0, 0.0, 30.0, 40.0];
        assert_eq!(ordinary(&rows, 2), rows[..8]);
        assert_eq!(ordinary(&[], 2), [0f32; 0]);
    }
}
