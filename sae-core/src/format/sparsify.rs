//! EleutherAI's sparsify: a folder for each hook point, with `cfg.json` and `sae.safetensors`.
//!
//! TopK and groupmax, autoencoders and transcoders, with a skip connection or without.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::tensor::Device;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::error::FormatError;
use super::folder::{load, load_json};
use super::tensors::Tensors;
use crate::activation::Activation;
use crate::config::SaeConfig;
use crate::sae::{Sae, SaeWeights};

pub(super) const CONFIG: &str = "cfg.json";
pub(super) const WEIGHTS: &str = "sae.safetensors";

/// The file, key by key; what is absent is as in sparsify's dataclass.
#[derive(Deserialize)]
struct Mirror {
    d_in: usize,
    k: usize,
    #[serde(default = "topk")]
    activation: String,
    #[serde(default)]
    num_latents: usize,
    #[serde(default = "thirty_two")]
    expansion_factor: usize,
    #[serde(default)]
    skip_connection: bool,
    #[serde(default)]
    transcode: bool,
    /// Of older files: whether the largest magnitudes are kept, without a ReLU.
    #[serde(default)]
    signed: bool,
    #[serde(flatten)]
    other: Map<String, Value>,
}

fn topk() -> String {
    "topk".to_owned()
}

fn thirty_two() -> usize {
    32
}

/// Reads the SAE in a folder.
///
/// # Errors
/// If a file is missing, cut off or malformed, an option is not supported, or a tensor is missing,
/// one too many, of another shape or type, or not finite.
pub fn read(folder: &Path, device: &Device) -> Result<Sae, FormatError> {
    let path = folder.join(CONFIG);
    let mirror: Mirror = load_json(&path)?;
    let skips = mirror.skip_connection;
    let mut config = config(mirror, &path)?;
    config.metadata.hook_name = hook_name(folder);
    config.validate().map_err(|source| FormatError::Config { path, source })?;

    let path = folder.join(WEIGHTS);
    let bytes = load(&path)?;
    let tensors = Tensors::of_safetensors(&path, &bytes)?;
    let SaeConfig { d_in, d_sae, .. } = config;
    let mut weights = SaeWeights::new(
        tensors.transposed("encoder.weight", [d_in, d_sae], device)?,
        tensors.floats("encoder.bias", [d_sae], device)?,
        tensors.floats("W_dec", [d_sae, d_in], device)?,
        tensors.floats("b_dec", [d_in], device)?,
    );
    let mut names = vec!["encoder.weight", "encoder.bias", "W_dec", "b_dec"];
    if skips {
        names.push("W_skip");
        weights.w_skip = Some(tensors.floats("W_skip", [d_in, d_in], device)?);
    }
    tensors.only(&names)?;
    Ok(Sae::new(config, weights).expect("a validated configuration"))
}

/// Reads all SAEs of a run, under the names of their folders: sparsify's hook points.
///
/// # Errors
/// As [`read`], if the folder cannot be listed, or holds none.
pub fn read_all(folder: &Path, device: &Device) -> Result<BTreeMap<String, Sae>, FormatError> {
    let io = FormatError::io(folder);
    let mut saes = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(&io)? {
        let path = entry.map_err(&io)?.path();
        if path.join(CONFIG).is_file() {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            saes.insert(name, read(&path, device)?);
        }
    }
    match saes.is_empty() {
        false => Ok(saes),
        true => Err(FormatError::Unrecognised {
            path: folder.to_owned(),
            looked_for: vec![format!("*/{CONFIG}")],
        }),
    }
}

fn config(mirror: Mirror, path: &Path) -> Result<SaeConfig, FormatError> {
    let refuse = |key, expected, actual: &str| {
        let (path, actual) = (path.to_owned(), actual.to_owned());
        FormatError::UnsupportedOption { path, key, expected, actual }
    };
    let Mirror { d_in, k, transcode, other, .. } = mirror;
    if mirror.skip_connection && !transcode {
        return Err(refuse("skip_connection", "false, or true of a transcoder", "true"));
    }
    if mirror.signed {
        return Err(refuse("signed", "false", "true"));
    }
    let activation = match mirror.activation.as_str() {
        "topk" => Activation::TopK { k, rescale_by_decoder_norm: false },
        "groupmax" => Activation::GroupMax { k },
        actual => return Err(refuse("activation", "topk or groupmax", actual)),
    };
    let d_sae = match mirror.num_latents {
        0 => d_in.checked_mul(mirror.expansion_factor).ok_or_else(|| {
            refuse("expansion_factor", "a number of latents", &mirror.expansion_factor.to_string())
        })?,
        num_latents => num_latents,
    };
    Ok(SaeConfig {
        apply_b_dec_to_input: !transcode,
        transcodes_to: transcode.then_some(d_in),
        other,
        ..SaeConfig::new(d_in, d_sae, activation)
    })
}

/// The hook point that a folder is named after, where that is a block's output.
fn hook_name(folder: &Path) -> Option<String> {
    let layer = folder.file_name()?.to_str()?.strip_prefix("layers.")?;
    layer.parse::<usize>().ok().map(|layer| format!("blocks.{layer}.hook_resid_post"))
}
