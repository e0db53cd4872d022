//! Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors` (He et al., 2024).
//!
//! Its SAEs are for activations that have norm `√d_model` on average over a data set. The scale is
//! folded into the weights here, and the threshold is scaled with it, as SAELens does.

use std::path::Path;

use burn::tensor::{Device, Tensor};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::error::FormatError;
use super::folder::{load, load_json};
use super::tensors::Tensors;
use crate::activation::Activation;
use crate::config::{SaeConfig, SaeMetadata};
use crate::sae::{Sae, SaeWeights};

pub(super) const CONFIG: &str = "hyperparams.json";
pub(super) const WEIGHTS: &str = "checkpoints/final.safetensors";

/// The file, key by key.
#[derive(Deserialize)]
struct Mirror {
    d_model: usize,
    d_sae: usize,
    jump_relu_threshold: f64,
    dataset_average_activation_norm: Norms,
    hook_point_in: Option<String>,
    hook_point_out: Option<String>,
    act_fn: Option<String>,
    norm_activation: Option<String>,
    #[serde(default)]
    use_glu_encoder: bool,
    #[serde(default)]
    apply_decoder_bias_to_pre_encoder: bool,
    #[serde(flatten)]
    other: Map<String, Value>,
}

/// The norms that activations have on average.
#[derive(Deserialize)]
struct Norms {
    r#in: f64,
}

/// Reads the SAE in a folder.
///
/// # Errors
/// If a file is missing, cut off or malformed, an option is not supported, or a tensor is missing,
/// one too many, of another shape or type, or not finite.
pub fn read(folder: &Path, device: &Device) -> Result<Sae, FormatError> {
    let path = folder.join(CONFIG);
    let mirror: Mirror = load_json(&path)?;
    mirror.check_options(&path)?;
    let Mirror { d_model: d_in, d_sae, jump_relu_threshold, .. } = mirror;
    let scale = (d_in as f64).sqrt() / mirror.dataset_average_activation_norm.r#in;
    let config = SaeConfig {
        apply_b_dec_to_input: mirror.apply_decoder_bias_to_pre_encoder,
        metadata: SaeMetadata { hook_name: mirror.hook_point_in, ..SaeMetadata::default() },
        other: mirror.other,
        ..SaeConfig::new(d_in, d_sae, Activation::JumpRelu)
    };
    config.validate().map_err(|source| FormatError::Config { path, source })?;

    let path = folder.join(WEIGHTS);
    let bytes = load(&path)?;
    let tensors = Tensors::of_safetensors(&path, &bytes)?;
    tensors.only(&["encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"])?;
    let mut weights = SaeWeights::new(
        tensors.transposed("encoder.weight", [d_in, d_sae], device)?,
        tensors.floats("encoder.bias", [d_sae], device)?,
        tensors.transposed("decoder.weight", [d_sae, d_in], device)?,
        tensors.floats("decoder.bias", [d_in], device)?,
    );
    weights.threshold = Some(Tensor::full([d_sae], jump_relu_threshold * scale, device));
    let sae = Sae::new(config, weights).expect("a validated configuration");
    Ok(sae.fold_input_scale(scale))
}

impl Mirror {
    fn check_options(&self, path: &Path) -> Result<(), FormatError> {
        let refuse = |key, expected, actual: String| {
            Err(FormatError::UnsupportedOption { path: path.to_owned(), key, expected, actual })
        };
        match self.act_fn.as_deref() {
            None | Some("jumprelu") => {}
            Some(other) => return refuse("act_fn", "jumprelu", other.to_owned()),
        }
        match self.norm_activation.as_deref() {
            None | Some("dataset-wise") => {}
            Some(other) => return refuse("norm_activation", "dataset-wise", other.to_owned()),
        }
        if self.use_glu_encoder {
            return refuse("use_glu_encoder", "false", "true".to_owned());
        }
        if let (Some(read), Some(written)) = (&self.hook_point_in, &self.hook_point_out)
            && read != written
        {
            // Transcoders have another scale for what they write.
            return refuse("hook_point_out", "the same as hook_point_in", written.clone());
        }
        let norm = self.dataset_average_activation_norm.r#in;
        // Far from where the quotient would leave the numbers of f32.
        if !(1e-6..=1e9).contains(&norm) {
            let expected = "a norm between 1e-6 and 1e9";
            return refuse("dataset_average_activation_norm.in", expected, norm.to_string());
        }
        if self.jump_relu_threshold.abs() > 1e9 {
            let threshold = self.jump_relu_threshold.to_string();
            return refuse("jump_relu_threshold", "at most 1e9", threshold);
        }
        Ok(())
    }
}
