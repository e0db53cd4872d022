//! SAELens' folders, version 6: `cfg.json` and `sae_weights.safetensors`. Our own format too.
//!
//! | architecture | here |
//! |---|---|
//! | `standard`, `topk`, `abstopk`, `gated`, `jumprelu`, `matching_pursuit` | the [`Activation`](crate::Activation) of that name |
//! | `transcoder`, `skip_transcoder`, `jumprelu_transcoder`, `jumprelu_skip_transcoder` | the same with [`transcodes_to`](SaeConfig::transcodes_to) |
//! | `batchtopk`, `matryoshka_batchtopk` (training checkpoints) | JumpReLU, its decoder norms folded, as SAELens saves them for inference |
//! | `temporal` | refused: it is no function of one activation |
//!
//! Training checkpoints of the others are read as what they train; `log_threshold` becomes a
//! threshold. Flat configurations from before version 6 are read too. `expected_average_only_in` is
//! folded into the weights with the factor of `activation_scaler.json` or of a tensor
//! `scaling_factor`, and refused without one; `covariance_whitening` is refused until SAELens has
//! folded it. Tensors in f64, f32, bf16 and f16 are read; f32 is written. Keys that mean nothing
//! here survive a round trip.

mod config;
mod weights;

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use serde::Deserialize;

use super::error::FormatError;
use super::folder::{self, load, load_if_there};
use super::tensors::Tensors;
use crate::config::SaeConfig;
use crate::sae::Sae;

pub(super) const CONFIG: &str = "cfg.json";
pub(super) const WEIGHTS: &str = "sae_weights.safetensors";
const SPARSITY: &str = "sparsity.safetensors";
const SCALER: &str = "activation_scaler.json";

/// Reads the SAE in a folder.
///
/// # Errors
/// If a file is missing, cut off or malformed, an architecture or an option is not supported, or
/// a tensor is missing, one too many, of another shape or type, or not finite.
pub fn read(folder: &Path, device: &Device) -> Result<Sae, FormatError> {
    let path = folder.join(CONFIG);
    let config = config::read(&path, &load(&path)?)?;
    config.sae.validate().map_err(|source| FormatError::Config { path, source })?;
    let scale = match config.is_for_scaled_input {
        true => read_scale(folder)?,
        false => None,
    };
    let path = folder.join(WEIGHTS);
    weights::read(&path, &load(&path)?, config, scale, device)
}

/// Reads how often each latent is active, as SAELens counts it beside an SAE: the logarithm of the
/// share, to base 10. None where the folder does not say.
///
/// # Shapes
/// `[d_sae]`.
///
/// # Errors
/// If the file is malformed, or is about another number of latents.
pub fn read_log_sparsity(
    folder: &Path,
    d_sae: usize,
    device: &Device,
) -> Result<Option<Tensor<1>>, FormatError> {
    let path = folder.join(SPARSITY);
    let Some(bytes) = load_if_there(&path)? else {
        return Ok(None);
    };
    let tensors = Tensors::of_safetensors(&path, &bytes)?;
    tensors.only(&["sparsity"])?;
    tensors.floats("sparsity", [d_sae], device).map(Some)
}

/// Writes an SAE into a folder, which appears whole or not at all. A folder that holds an SAE is
/// replaced.
///
/// # Errors
/// If SAELens has no architecture for such an SAE, the folder holds anything else, or the system
/// refuses.
pub fn write(sae: &Sae, folder: &Path) -> Result<(), FormatError> {
    let files = files(sae, folder)?;
    folder::write(folder, &files)
}

/// Writes an SAE, and beside it how often its latents are active
/// ([`read_log_sparsity`]).
///
/// # Errors
/// As [`write()`].
///
/// # Panics
/// If there is not one number for each latent.
pub fn write_with_log_sparsity(
    sae: &Sae,
    log_sparsity: &Tensor<1>,
    folder: &Path,
) -> Result<(), FormatError> {
    assert_eq!(log_sparsity.dims(), [sae.config().d_sae], "one frequency for each latent");
    let tensors = vec![weights::stored("sparsity", log_sparsity.clone())];
    let bytes = weights::serialize(tensors).map_err(unserialized(folder.join(SPARSITY)))?;
    let mut files = files(sae, folder)?;
    files.push((SPARSITY, bytes));
    folder::write(folder, &files)
}

/// Whether SAELens has an architecture for such SAEs: it has none for groups, nor for transcoders
/// that select.
pub fn can_write(config: &SaeConfig) -> bool {
    config::has_architecture(config)
}

fn files(sae: &Sae, folder: &Path) -> Result<Vec<(&'static str, Vec<u8>)>, FormatError> {
    let config: &SaeConfig = sae.config();
    let config = config::write(&folder.join(CONFIG), config, sae.weights().w_skip.is_some())?;
    let weights = weights::write(sae).map_err(unserialized(folder.join(WEIGHTS)))?;
    Ok(vec![(CONFIG, config), (WEIGHTS, weights)])
}

fn unserialized(path: PathBuf) -> impl FnOnce(safetensors::SafeTensorError) -> FormatError {
    |source| FormatError::Safetensors { path, source }
}

/// What SAELens multiplies activations by, where a checkpoint says it beside the weights.
fn read_scale(folder: &Path) -> Result<Option<f64>, FormatError> {
    #[derive(Deserialize)]
    struct Scaler {
        scaling_factor: Option<f64>,
    }
    let path = folder.join(SCALER);
    let Some(bytes) = load_if_there(&path)? else {
        return Ok(None);
    };
    let scaler: Scaler =
        serde_json::from_slice(&bytes).map_err(|source| FormatError::Json { path, source })?;
    Ok(scaler.scaling_factor)
}

#[cfg(test)]
mod tests;
