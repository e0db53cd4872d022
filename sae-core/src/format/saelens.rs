//! SAELens' folders, version 6: `cfg.json` and `sae_weights.safetensors`. Our own format too.
//!
//! Flat configurations from before version 6 are read where they are TopK. Tensors in f32, bf16
//! and f16 are read; f32 is written. Keys that mean nothing here survive a round trip.

mod config;

use std::fs;
use std::path::Path;

use burn::tensor::{Device, Tensor};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::error::FormatError;
use super::folder;
use super::tensors::Tensors;
use crate::config::SaeConfig;
use crate::sae::{Sae, SaeWeights};

const CONFIG: &str = "cfg.json";
const WEIGHTS: &str = "sae_weights.safetensors";

/// Reads the SAE in a folder.
///
/// # Errors
/// If a file is missing, cut off or malformed, an architecture or an option is not supported, or
/// a tensor is missing, one too many, of another shape or type, or not finite.
pub fn read(folder: &Path, device: &Device) -> Result<Sae, FormatError> {
    let path = folder.join(CONFIG);
    let config = config::read(&path, &load(&path)?)?;
    config.validate().map_err(|source| FormatError::Config { path, source })?;
    let path = folder.join(WEIGHTS);
    let weights = read_weights(&path, &load(&path)?, &config, device)?;
    Ok(Sae::new(config, weights).expect("a validated configuration"))
}

/// Writes an SAE into a folder, which appears whole or not at all. A folder that holds an SAE is
/// replaced.
///
/// # Errors
/// If the folder holds anything else, or the system refuses.
pub fn write(sae: &Sae, folder: &Path) -> Result<(), FormatError> {
    let path = folder.join(CONFIG);
    let config =
        config::write(sae.config()).map_err(|source| FormatError::Json { path, source })?;
    let path = folder.join(WEIGHTS);
    let weights =
        write_weights(sae.weights()).map_err(|source| FormatError::Safetensors { path, source })?;
    folder::write(folder, &[(CONFIG, config), (WEIGHTS, weights)])
}

fn load(path: &Path) -> Result<Vec<u8>, FormatError> {
    fs::read(path).map_err(FormatError::io(path))
}

fn read_weights(
    path: &Path,
    bytes: &[u8],
    config: &SaeConfig,
    device: &Device,
) -> Result<SaeWeights, FormatError> {
    let SaeConfig { d_in, d_sae, .. } = *config;
    let tensors = Tensors::new(path, bytes)?;
    tensors.only(&["W_enc", "b_enc", "W_dec", "b_dec"])?;
    Ok(SaeWeights::new(
        tensors.floats("W_enc", [d_in, d_sae], device)?,
        tensors.floats("b_enc", [d_sae], device)?,
        tensors.floats("W_dec", [d_sae, d_in], device)?,
        tensors.floats("b_dec", [d_in], device)?,
    ))
}

fn write_weights(weights: &SaeWeights) -> Result<Vec<u8>, safetensors::SafeTensorError> {
    let SaeWeights { w_enc, b_enc, w_dec, b_dec, .. } = weights.clone();
    let tensors = [
        ("W_enc", w_enc.dims().to_vec(), bytes(w_enc)),
        ("b_enc", b_enc.dims().to_vec(), bytes(b_enc)),
        ("W_dec", w_dec.dims().to_vec(), bytes(w_dec)),
        ("b_dec", b_dec.dims().to_vec(), bytes(b_dec)),
    ];
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
        (*name, view.expect("four bytes an element"))
    });
    safetensors::serialize(views, None)
}

fn bytes<const D: usize>(tensor: Tensor<D>) -> Vec<u8> {
    let data = tensor.into_data();
    data.iter::<f32>().flat_map(f32::to_le_bytes).collect()
}

#[cfg(test)]
mod tests;
