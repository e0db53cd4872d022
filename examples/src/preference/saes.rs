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

use super::options::Scale;
use crate::progress::bar;

/// High, because the run is short.
const LEARNING_RATE: f64 = 1e-3;
/// Activations of a step.
const BATCH: usize = 1024;
/// Latents active on a token, of a TopK.
const K: usize = 32;
/// The penalty on the gates of a Gated one, for activations of unit variance.
const L1_COEFFICIENT: f64 = 5.0;
/// Activations encoded at a time.
const ENCODE_ROWS: usize = 4096;

/// An autoencoder, and how good it is on text that it was not trained on.
pub(super) struct TrainedSae {
    pub(super) sae: Sae,
    pub(super) kind: String,
    pub(super) layer: usize,
    pub(super) reconstruction: Reconstruction,
}

impl TrainedSae {
    pub(super) fn point(&self) -> HookPoint {
        HookPoint::resid_post(self.layer)
    }
}

/// Kinds in turn, with their names. A penalty comes slowly, or latents die of it.
fn kind(nth: usize) -> (Objective, Schedule, String) {
    let schedule = Schedule::new().with_learning_rate(LEARNING_RATE);
    match nth % 2 {
        0 => (Objective::top_k(K), schedule, format!("TopK {K}")),
        _ => {
            let sparsity = Sparsity::new(L1_COEFFICIENT);
            let gated = Gated { sparsity, auxiliary: GatedAuxiliary::DetachedDecoder };
            let schedule = schedule.with_sparsity_warmup(0.1);
            (Objective::new(Kind::Gated(gated)), schedule, format!("Gated {L1_COEFFICIENT}"))
        }
    }
}

/// Trains the `nth` autoencoder, and measures it.
///
/// # Errors
/// If there are too few activations for a step.
pub(super) fn train(
    nth: usize,
    layer: usize,
    [training, held_out]: [&[f32]; 2],
    d_in: usize,
    scale: &Scale,
    seed: u64,
    device: &Device,
) -> Result<TrainedSae> {
    let (objective, schedule, kind) = kind(nth);
    let d_sae = scale.expansion * d_in;
    let config = TrainConfig::new(d_sae, objective)
        .with_batch(BATCH)
        .with_n_passes(scale.n_passes)
        .with_clip_norm(Some(1.0))
        .with_schedule(schedule)
        .with_dead_after(200_000)
        .with_seed(seed);
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
    let mut reconstruction = Reconstruction::new(d_sae);
    for rows in held_out.chunks(ENCODE_ROWS * d_in) {
        let shape = [rows.len() / d_in, d_in];
        let x = Tensor::<2>::from_data(TensorData::new(rows.to_vec(), shape), device);
        let parts = sae.decompose(x.clone());
        reconstruction.update(x, parts.reconstruction, &parts.latents);
    }
    Ok(TrainedSae { sae, kind, layer, reconstruction })
}
