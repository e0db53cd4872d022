//! The dictionary_learning library: `config.json` and the state of a dictionary, `ae.safetensors` or
//! (with the feature `pt`) `ae.pt`.
//!
//! | `dict_class` | here |
//! |---|---|
//! | `AutoEncoder`, `AutoEncoderNew` | ReLU |
//! | `GatedAutoEncoder` | gated |
//! | `JumpReluAutoEncoder` | JumpReLU |
//! | `AutoEncoderTopK` | TopK, or JumpReLU with its threshold ([`Selection`]) |
//! | `BatchTopKSAE`, `MatryoshkaBatchTopKSAE` | JumpReLU with their threshold |

use std::path::Path;

use burn::tensor::{Device, Tensor};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::error::FormatError;
use super::folder::{load, load_if_there, load_json};
use super::tensors::Tensors;
use crate::activation::Activation;
use crate::config::{SaeConfig, SaeMetadata};
use crate::sae::{Magnitude, Sae, SaeWeights};

pub(super) const CONFIG: &str = "config.json";
pub(super) const WEIGHTS: &str = "ae.safetensors";
pub(super) const CHECKPOINT: &str = "ae.pt";

/// How an `AutoEncoderTopK` chooses its latents, of which it can do both. Other dictionaries can do
/// one of them for a row by itself, whatever is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Selection {
    /// The `k` largest of each row, as the library does unless told otherwise.
    #[default]
    TopK,
    /// All above the running threshold of training (`use_threshold`).
    Threshold,
}

/// The file, as far as it says what the dictionary is.
#[derive(Deserialize)]
struct Mirror {
    trainer: Trainer,
    #[serde(default)]
    buffer: Option<Buffer>,
}

#[derive(Deserialize)]
struct Trainer {
    dict_class: String,
    activation_dim: usize,
    dict_size: usize,
    k: Option<usize>,
    layer: Option<usize>,
    lm_name: Option<String>,
    submodule_name: Option<String>,
}

#[derive(Deserialize)]
struct Buffer {
    ctx_len: Option<usize>,
}

/// Reads the dictionary in a folder.
///
/// # Errors
/// If a file is missing, cut off or malformed, the class is not supported, or a tensor is missing,
/// one too many, of another shape or type, not finite, or contradicts the configuration.
pub fn read(folder: &Path, selection: Selection, device: &Device) -> Result<Sae, FormatError> {
    let config_path = folder.join(CONFIG);
    let keys: Map<String, Value> = load_json(&config_path)?;
    let mirror: Mirror = serde_json::from_value(keys.clone().into())
        .map_err(|source| FormatError::Json { path: config_path.clone(), source })?;
    let path = folder.join(WEIGHTS);
    if let Some(bytes) = load_if_there(&path)? {
        let tensors = Tensors::of_safetensors(&path, &bytes)?;
        return sae(&config_path, mirror, keys, &tensors, selection, device);
    }
    let path = folder.join(CHECKPOINT);
    let bytes = load(&path)?;
    let tensors = checkpoint(&path, &bytes)?;
    sae(&config_path, mirror, keys, &tensors, selection, device)
}

#[cfg(feature = "pt")]
fn checkpoint<'a>(path: &'a Path, bytes: &'a [u8]) -> Result<Tensors<'a>, FormatError> {
    super::pt::Checkpoint::read(path, bytes)?.tensors()
}

#[cfg(not(feature = "pt"))]
fn checkpoint<'a>(path: &'a Path, _: &'a [u8]) -> Result<Tensors<'a>, FormatError> {
    Err(FormatError::NeedsFeature { path: path.to_owned(), feature: "pt" })
}

/// How a class names and lays out its tensors.
#[derive(Clone, Copy)]
struct Layout {
    /// Whether they are those of `nn.Linear`, transposed, or plain parameters.
    is_linear: bool,
    /// The decoder's bias.
    b_dec: &'static str,
    /// Whether it is taken off the input.
    centres: bool,
}

const LINEAR: Layout = Layout { is_linear: true, b_dec: "b_dec", centres: true };
const PLAIN: Layout = Layout { is_linear: false, b_dec: "b_dec", centres: true };

fn sae(
    path: &Path,
    mirror: Mirror,
    keys: Map<String, Value>,
    tensors: &Tensors,
    selection: Selection,
    device: &Device,
) -> Result<Sae, FormatError> {
    let Trainer { dict_class, activation_dim: d_in, dict_size: d_sae, k, .. } = &mirror.trainer;
    let (d_in, d_sae) = (*d_in, *d_sae);
    let number_kept = || {
        k.ok_or_else(|| FormatError::UnsupportedOption {
            path: path.to_owned(),
            key: "trainer.k",
            expected: "a number of latents",
            actual: "null".to_owned(),
        })
    };
    let (layout, activation, more): (_, _, &[&str]) = match dict_class.as_str() {
        "AutoEncoder" => (Layout { b_dec: "bias", ..LINEAR }, Activation::Relu, &[]),
        "AutoEncoderNew" => {
            let layout = Layout { b_dec: "decoder.bias", centres: false, ..LINEAR };
            (layout, Activation::Relu, &[])
        }
        "GatedAutoEncoder" => {
            let layout = Layout { b_dec: "decoder_bias", ..LINEAR };
            (layout, Activation::Gated, &["r_mag", "mag_bias"])
        }
        "JumpReluAutoEncoder" => {
            (Layout { centres: false, ..PLAIN }, Activation::JumpRelu, &["threshold"])
        }
        "AutoEncoderTopK" if selection == Selection::TopK => {
            let k = number_kept()?;
            let activation = Activation::TopK { k, rescale_by_decoder_norm: false };
            (LINEAR, activation, &["threshold", "k"])
        }
        "AutoEncoderTopK" | "BatchTopKSAE" => (LINEAR, Activation::JumpRelu, &["threshold", "k"]),
        "MatryoshkaBatchTopKSAE" => {
            (PLAIN, Activation::JumpRelu, &["threshold", "k", "group_sizes"])
        }
        "IdentityDict" => {
            let (path, architecture) = (path.to_owned(), dict_class.clone());
            return Err(FormatError::UnsupportedArchitecture { path, architecture });
        }
        _ => {
            let (path, architecture) = (path.to_owned(), dict_class.clone());
            return Err(FormatError::UnknownArchitecture { path, architecture });
        }
    };
    if tensors.has("k") && more.contains(&"k") {
        let (expected, actual) = (number_kept()? as i64, tensors.integer("k")?);
        if expected != actual {
            let path = path.to_owned();
            return Err(FormatError::Contradiction { path, tensor: "k", expected, actual });
        }
    }
    let config = SaeConfig {
        apply_b_dec_to_input: layout.centres,
        metadata: metadata(&mirror),
        other: keys,
        ..SaeConfig::new(d_in, d_sae, activation)
    };
    config.validate().map_err(|source| FormatError::Config { path: path.to_owned(), source })?;
    let weights = layout.read(tensors, &config, more, device)?;
    Ok(Sae::new(config, weights).expect("a validated configuration"))
}

impl Layout {
    fn read(
        self,
        tensors: &Tensors,
        config: &SaeConfig,
        more: &[&str],
        device: &Device,
    ) -> Result<SaeWeights, FormatError> {
        let SaeConfig { d_in, d_sae, activation, .. } = *config;
        let floats = |name| tensors.floats(name, [d_sae], device);
        let (encoder, decoder) = match self.is_linear {
            true => ("encoder.weight", "decoder.weight"),
            false => ("W_enc", "W_dec"),
        };
        let b_enc = match (activation, self.is_linear) {
            (Activation::Gated, _) => "gate_bias",
            (_, true) => "encoder.bias",
            (_, false) => "b_enc",
        };
        let mut names = vec![encoder, decoder, b_enc, self.b_dec];
        names.extend(more);
        let (w_enc, w_dec) = match self.is_linear {
            true => (
                tensors.transposed(encoder, [d_in, d_sae], device)?,
                tensors.transposed(decoder, [d_sae, d_in], device)?,
            ),
            false => (
                tensors.floats(encoder, [d_in, d_sae], device)?,
                tensors.floats(decoder, [d_sae, d_in], device)?,
            ),
        };
        let b_dec = tensors.floats(self.b_dec, [d_in], device)?;
        let mut weights = SaeWeights::new(w_enc, floats(b_enc)?, w_dec, b_dec);
        match activation {
            Activation::Gated => {
                let magnitude = Magnitude { r_mag: floats("r_mag")?, b_mag: floats("mag_bias")? };
                weights.magnitude = Some(magnitude);
            }
            // One for all latents, where training has one for the batch.
            Activation::JumpRelu if tensors.has_shape("threshold", &[]) => {
                let threshold = tensors.number("threshold")?;
                weights.threshold = Some(Tensor::full([d_sae], threshold, device));
            }
            Activation::JumpRelu => weights.threshold = Some(floats("threshold")?),
            _ => {}
        }
        tensors.only(&names)?;
        Ok(weights)
    }
}

fn metadata(mirror: &Mirror) -> SaeMetadata {
    let Trainer { layer, lm_name, submodule_name, .. } = &mirror.trainer;
    let is_residual = submodule_name.as_deref().is_none_or(|name| name.starts_with("resid_post"));
    let hook_name = layer.filter(|_| is_residual);
    SaeMetadata {
        model_name: lm_name.clone(),
        hook_name: hook_name.map(|layer| format!("blocks.{layer}.hook_resid_post")),
        context_size: mirror.buffer.as_ref().and_then(|buffer| buffer.ctx_len),
        ..SaeMetadata::default()
    }
}
