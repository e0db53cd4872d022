//! Gemma Scope: `params.npz`, JumpReLU SAEs that do not centre their input (Lieberum et al., 2024); and
//! Gemma Scope 2: `params.safetensors` with `config.json`, SAEs and transcoders.

use std::path::Path;

use burn::tensor::Device;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::error::FormatError;
use super::folder::{load, load_json};
use super::npz;
use super::tensors::Tensors;
use crate::activation::Activation;
use crate::config::{SaeConfig, SaeMetadata};
use crate::sae::{Sae, SaeWeights};

pub(super) const ARRAYS: &str = "params.npz";
pub(super) const CONFIG: &str = "config.json";
pub(super) const WEIGHTS: &str = "params.safetensors";

/// What the arrays of Gemma Scope are, which the file itself does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Role {
    /// They reconstruct what they read.
    #[default]
    Sae,
    /// They write another activation (`gemma-scope-2b-pt-transcoders`).
    Transcoder,
}

/// Reads a `params.npz`.
///
/// # Errors
/// If the file is missing, cut off or malformed, holds objects, or an array is missing, one too
/// many, of another shape or type, or not finite.
pub fn read_npz(path: &Path, role: Role, device: &Device) -> Result<Sae, FormatError> {
    let bytes = load(path)?;
    // Both spellings are about; the other is that of Gemma Scope 2.
    let tensors = npz::read(path, &bytes, |name| name.replacen("W_", "w_", 1))?;
    let transcodes = role == Role::Transcoder;
    let metadata = SaeMetadata::default();
    sae(path, &tensors, Shape { transcodes, skips: false }, metadata, Map::new(), device)
}

/// The keys of Gemma Scope 2 that say what its tensors are.
#[derive(Deserialize)]
struct Mirror {
    architecture: String,
    model_name: Option<String>,
    hf_hook_point_in: Option<String>,
    hf_hook_point_out: Option<String>,
    affine_connection: Option<bool>,
    #[serde(flatten)]
    other: Map<String, Value>,
}

/// Reads a folder of Gemma Scope 2. It is a transcoder where it writes at another point than it
/// reads.
///
/// # Errors
/// If a file is missing, cut off or malformed, the architecture is not `jump_relu`, or a tensor is
/// missing, one too many, of another shape or type, or not finite.
pub fn read(folder: &Path, device: &Device) -> Result<Sae, FormatError> {
    let path = folder.join(CONFIG);
    let mirror: Mirror = load_json(&path)?;
    if mirror.architecture != "jump_relu" {
        let architecture = mirror.architecture;
        return Err(FormatError::UnknownArchitecture { path, architecture });
    }
    let path = folder.join(WEIGHTS);
    let bytes = load(&path)?;
    let tensors = Tensors::of_safetensors(&path, &bytes)?;
    let (read, written) = (&mirror.hf_hook_point_in, &mirror.hf_hook_point_out);
    let transcodes = written.is_some() && written != read;
    let skips = mirror.affine_connection.unwrap_or_else(|| tensors.has(SKIP));
    let mut metadata = SaeMetadata { model_name: mirror.model_name, ..SaeMetadata::default() };
    metadata.hook_name = read.as_deref().and_then(hook_name);
    for (key, point) in [("hf_hook_name", read), ("hf_hook_name_out", written)] {
        if let Some(point) = point {
            metadata.other.insert(key.to_owned(), point.clone().into());
        }
    }
    let skips = transcodes && skips;
    sae(&path, &tensors, Shape { transcodes, skips }, metadata, mirror.other, device)
}

const SKIP: &str = "affine_skip_connection";

struct Shape {
    transcodes: bool,
    skips: bool,
}

fn sae(
    path: &Path,
    tensors: &Tensors,
    shape: Shape,
    metadata: SaeMetadata,
    other: Map<String, Value>,
    device: &Device,
) -> Result<Sae, FormatError> {
    let [d_in, d_sae] = tensors.matrix_shape("w_enc")?;
    let d_out = match shape.transcodes {
        true => tensors.matrix_shape("w_dec")?[1],
        false => d_in,
    };
    let config = SaeConfig {
        apply_b_dec_to_input: false,
        transcodes_to: shape.transcodes.then_some(d_out),
        metadata,
        other,
        ..SaeConfig::new(d_in, d_sae, Activation::JumpRelu)
    };
    config.validate().map_err(|source| FormatError::Config { path: path.to_owned(), source })?;
    let mut names = vec!["w_enc", "b_enc", "w_dec", "b_dec", "threshold"];
    let mut weights = SaeWeights::new(
        tensors.floats("w_enc", [d_in, d_sae], device)?,
        tensors.floats("b_enc", [d_sae], device)?,
        tensors.floats("w_dec", [d_sae, d_out], device)?,
        tensors.floats("b_dec", [d_out], device)?,
    );
    weights.threshold = Some(tensors.floats("threshold", [d_sae], device)?);
    if shape.skips {
        names.push(SKIP);
        // From the input to the output; ours is the other way round.
        weights.w_skip = Some(tensors.transposed(SKIP, [d_out, d_in], device)?);
    }
    tensors.only(&names)?;
    Ok(Sae::new(config, weights).expect("a validated configuration"))
}

/// The hook point that a module of transformers' is, where that is a block's output.
fn hook_name(point: &str) -> Option<String> {
    let layer = point.strip_prefix("model.layers.")?.strip_suffix(".output")?;
    layer.parse::<usize>().ok().map(|layer| format!("blocks.{layer}.hook_resid_post"))
}
