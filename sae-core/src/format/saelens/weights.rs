//! `sae_weights.safetensors`, as SAELens names its tensors.

use std::path::Path;

use burn::tensor::{Device, Tensor};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::config::FileConfig;
use crate::activation::Activation;
use crate::config::SaeConfig;
use crate::format::error::FormatError;
use crate::format::tensors::Tensors;
use crate::sae::{Magnitude, Sae, SaeWeights};

/// Two things under one name: of shape `[d_sae]`, what finetuning multiplies latents by; a number,
/// what activations are to be multiplied by.
const SCALING_FACTOR: &str = "scaling_factor";

/// The SAE of a file. `input_scale` is what activations are to be multiplied by first, where another
/// file says so.
pub(super) fn read(
    path: &Path,
    bytes: &[u8],
    mut config: FileConfig,
    input_scale: Option<f64>,
    device: &Device,
) -> Result<Sae, FormatError> {
    let tensors = Tensors::of_safetensors(path, bytes)?;
    let mut weights = of_kind(&tensors, &config, device)?;
    let input_scale = match (config.is_for_scaled_input, input_scale) {
        (false, _) => None,
        (true, None) if is_number(&tensors) => Some(f64::from(tensors.number(SCALING_FACTOR)?)),
        (true, scale) => scale,
    };
    if let Some(scale) = finetuned(path, &tensors, &mut config, device)? {
        weights.w_dec = weights.w_dec * scale.unsqueeze_dim(1);
    }
    let scale = match (config.is_for_scaled_input, input_scale) {
        (false, _) => None,
        // Far from where weights would leave the numbers of f32.
        (true, scale) => {
            let scale = scale.filter(|scale| (1e-9..=1e9).contains(scale));
            Some(scale.ok_or_else(|| unscaled(path))?)
        }
    };
    match &config.batch {
        None => {
            let sae = Sae::new(config.sae, weights).expect("a validated configuration");
            Ok(match scale {
                Some(scale) => sae.fold_input_scale(scale),
                None => sae,
            })
        }
        Some(batch) => {
            let threshold = f64::from(tensors.number("topk_threshold")?);
            let rescales = batch.rescale_acts_by_decoder_norm;
            Ok(of_batch(config.sae, weights, threshold, rescales, scale))
        }
    }
}

/// What a BatchTopK SAE is saved as for inference: its norms folded, its threshold for all latents.
fn of_batch(
    config: SaeConfig,
    weights: SaeWeights,
    mut threshold: f64,
    rescales: bool,
    input_scale: Option<f64>,
) -> Sae {
    // The threshold is none of the weights that are folded here.
    let relu = SaeConfig { activation: Activation::Relu, ..config.clone() };
    let mut sae = Sae::new(relu, weights).expect("a validated configuration");
    if let Some(scale) = input_scale {
        sae = sae.fold_input_scale(scale);
        if rescales {
            threshold /= scale;
        }
    }
    if rescales {
        sae = sae.fold_decoder_norms().expect("norms that do not choose");
    }
    let weights = sae.weights().clone();
    let threshold = weights.b_enc.full_like(threshold);
    let weights = SaeWeights { threshold: Some(threshold), ..weights };
    Sae::new(config, weights).expect("a validated configuration")
}

/// The tensors of an architecture, and nothing left over.
fn of_kind(
    tensors: &Tensors,
    config: &FileConfig,
    device: &Device,
) -> Result<SaeWeights, FormatError> {
    let SaeConfig { d_in, d_sae, activation, .. } = config.sae;
    let d_out = config.sae.d_out();
    let mut names = vec!["W_dec", "b_dec", SCALING_FACTOR];
    let mut floats = |name| {
        names.push(name);
        tensors.floats(name, [d_sae], device)
    };
    let (b_enc, threshold, magnitude) = match activation {
        Activation::MatchingPursuit { .. } => (None, None, None),
        Activation::Gated => {
            let magnitude = Magnitude { r_mag: floats("r_mag")?, b_mag: floats("b_mag")? };
            (Some(floats("b_gate")?), None, Some(magnitude))
        }
        Activation::JumpRelu if config.batch.is_none() => {
            let threshold = match tensors.has("log_threshold") {
                true => tensors.check_finite("log_threshold", floats("log_threshold")?.exp())?,
                false => floats("threshold")?,
            };
            (Some(floats("b_enc")?), Some(threshold), None)
        }
        _ => (Some(floats("b_enc")?), None, None),
    };
    let w_dec = tensors.floats("W_dec", [d_sae, d_out], device)?;
    let b_dec = tensors.floats("b_dec", [d_out], device)?;
    let Some(b_enc) = b_enc else {
        tensors.only(&["W_dec", "b_dec"])?;
        return Ok(SaeWeights::tied(w_dec, b_dec));
    };
    names.push("W_enc");
    let w_enc = tensors.floats("W_enc", [d_in, d_sae], device)?;
    let w_skip = match config.skips {
        true => Some(tensors.floats("W_skip", [d_out, d_in], device)?),
        false => None,
    };
    names.extend(config.skips.then_some("W_skip"));
    names.extend(config.batch.is_some().then_some("topk_threshold"));
    tensors.only(&names)?;
    Ok(SaeWeights { threshold, magnitude, w_skip, ..SaeWeights::new(w_enc, b_enc, w_dec, b_dec) })
}

fn is_number(tensors: &Tensors) -> bool {
    tensors.has_shape(SCALING_FACTOR, &[]) || tensors.has_shape(SCALING_FACTOR, &[1])
}

/// What latents are multiplied by before decoding. Files of some versions have such a tensor of
/// ones, whatever they say.
fn finetuned(
    path: &Path,
    tensors: &Tensors,
    config: &mut FileConfig,
    device: &Device,
) -> Result<Option<Tensor<1>>, FormatError> {
    let is_input_scale = config.is_for_scaled_input && is_number(tensors);
    if is_input_scale || !(tensors.has(SCALING_FACTOR) || config.is_finetuned()) {
        return Ok(None);
    }
    if config.is_finetuned() && config.sae.activation.rescales_by_decoder_norm() {
        return Err(FormatError::UnsupportedOption {
            path: path.to_owned(),
            key: "finetuning_scaling_factor",
            expected: "false, where decoder norms rank",
            actual: "true".to_owned(),
        });
    }
    let scale = tensors.floats(SCALING_FACTOR, [config.sae.d_sae], device)?;
    if !config.is_finetuned() {
        let is_one = scale.clone().equal_elem(1.0).all().into_scalar::<bool>();
        return match is_one {
            true => Ok(None),
            false => Err(FormatError::UnexpectedTensor {
                path: path.to_owned(),
                tensor: SCALING_FACTOR.to_owned(),
            }),
        };
    }
    config.set_finetuned_folded();
    Ok(Some(scale))
}

/// The scale of the activations is not in the folder.
fn unscaled(path: &Path) -> FormatError {
    FormatError::UnsupportedOption {
        path: path.to_owned(),
        key: "normalize_activations",
        expected: "none, or a scaling factor (1e-9 to 1e9) in activation_scaler.json or in the weights",
        actual: "expected_average_only_in".to_owned(),
    }
}

/// The bytes of the file.
pub(super) fn write(sae: &Sae) -> Result<Vec<u8>, safetensors::SafeTensorError> {
    let SaeWeights { w_enc, b_enc, w_dec, b_dec, threshold, magnitude, w_skip } =
        sae.weights().clone();
    let mut tensors = vec![stored("W_dec", w_dec), stored("b_dec", b_dec)];
    match (sae.config().activation, magnitude) {
        (Activation::MatchingPursuit { .. }, _) => return serialize(tensors),
        (_, Some(Magnitude { r_mag, b_mag })) => {
            let gate = [stored("b_gate", b_enc), stored("b_mag", b_mag), stored("r_mag", r_mag)];
            tensors.extend(gate);
        }
        (_, None) => tensors.push(stored("b_enc", b_enc)),
    }
    tensors.push(stored("W_enc", w_enc));
    tensors.extend(threshold.map(|threshold| stored("threshold", threshold)));
    tensors.extend(w_skip.map(|w_skip| stored("W_skip", w_skip)));
    serialize(tensors)
}

type Array = (&'static str, Vec<usize>, Vec<u8>);

pub(super) fn stored<const D: usize>(name: &'static str, tensor: Tensor<D>) -> Array {
    let shape = tensor.dims().to_vec();
    let data = tensor.into_data();
    (name, shape, data.iter::<f32>().flat_map(f32::to_le_bytes).collect())
}

pub(super) fn serialize(tensors: Vec<Array>) -> Result<Vec<u8>, safetensors::SafeTensorError> {
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
        (*name, view.expect("four bytes an element"))
    });
    safetensors::serialize(views, None)
}
