//! OpenAI's sparse autoencoders: the state of one in a `.pt` (Gao et al., 2024).

use std::path::Path;

use burn::tensor::Device;

use super::error::FormatError;
use super::folder::load;
use super::pt::{Checkpoint, Plain};
use super::tensors::Tensors;
use crate::activation::Activation;
use crate::config::SaeConfig;
use crate::normalization::Normalization;
use crate::sae::{Sae, SaeWeights};

/// Reads a checkpoint: TopK on rows brought to mean 0 and deviation 1, or ReLU on rows as they are.
///
/// # Errors
/// If the file is missing, cut off or malformed, holds more than tensors and plain values, its
/// activation is not supported, or a tensor is missing, one too many, of another shape or type, or
/// not finite.
pub fn read(path: &Path, device: &Device) -> Result<Sae, FormatError> {
    let bytes = load(path)?;
    let Checkpoint { tensors, mut values, .. } = Checkpoint::read(path, &bytes)?;
    let tensors = Tensors::new(path, tensors);
    let (activation, normalization) = activation(path, &mut values)?;
    if let Some(tensor) = values.into_keys().next() {
        return Err(FormatError::UnexpectedTensor { path: path.to_owned(), tensor });
    }
    let [d_sae, d_in] = tensors.matrix_shape("encoder.weight")?;
    let config = SaeConfig { normalization, ..SaeConfig::new(d_in, d_sae, activation) };
    config.validate().map_err(|source| FormatError::Config { path: path.to_owned(), source })?;
    // The last is a count of training's.
    tensors.only(&[
        "encoder.weight",
        "latent_bias",
        "decoder.weight",
        "pre_bias",
        "stats_last_nonzero",
    ])?;
    let weights = SaeWeights::new(
        tensors.transposed("encoder.weight", [d_in, d_sae], device)?,
        tensors.floats("latent_bias", [d_sae], device)?,
        tensors.transposed("decoder.weight", [d_sae, d_in], device)?,
        tensors.floats("pre_bias", [d_in], device)?,
    );
    Ok(Sae::new(config, weights).expect("a validated configuration"))
}

/// Takes out of the plain values what they say of the activation.
fn activation(
    path: &Path,
    values: &mut std::collections::BTreeMap<String, Plain>,
) -> Result<(Activation, Normalization), FormatError> {
    let refuse = |key, expected, actual: Option<Plain>| {
        let actual = match actual {
            Some(Plain::Text(text)) => text,
            Some(Plain::Integer(integer)) => integer.to_string(),
            Some(Plain::Other) => "another value".to_owned(),
            None => "nothing".to_owned(),
        };
        FormatError::UnsupportedOption { path: path.to_owned(), key, expected, actual }
    };
    match values.remove("activation") {
        None => Ok((Activation::Relu, Normalization::None)),
        Some(Plain::Text(name)) if name == "ReLU" => Ok((Activation::Relu, Normalization::None)),
        Some(Plain::Text(name)) if name == "TopK" => {
            let k = match values.remove("activation_state_dict.k") {
                Some(Plain::Integer(k)) => usize::try_from(k).ok(),
                _ => None,
            };
            let key = "activation_state_dict.k";
            let k = k.ok_or_else(|| refuse(key, "a number of latents", None))?;
            match values.remove("activation_state_dict.postact_fn") {
                None => {}
                Some(Plain::Text(name)) if name == "ReLU" => {}
                other => {
                    return Err(refuse("activation_state_dict.postact_fn", "ReLU", other));
                }
            }
            let activation = Activation::TopK { k, rescale_by_decoder_norm: false };
            Ok((activation, Normalization::LayerNorm))
        }
        other => Err(refuse("activation", "TopK or ReLU", other)),
    }
}

#[cfg(test)]
mod tests;
