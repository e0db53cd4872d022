//! `cfg.json`, as SAELens writes it and as we mean it.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::activation::Activation;
use crate::config::{SaeConfig, SaeMetadata};
use crate::format::error::FormatError;
use crate::normalization::Normalization;

/// The architectures of SAELens that we do not run.
const UNSUPPORTED: [&str; 12] = [
    "standard",
    "abstopk",
    "gated",
    "jumprelu",
    "batchtopk",
    "matryoshka_batchtopk",
    "matching_pursuit",
    "temporal",
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
];

/// The file, key by key.
#[derive(Serialize, Deserialize)]
struct Mirror {
    architecture: String,
    d_in: usize,
    d_sae: usize,
    k: usize,
    #[serde(default)]
    rescale_acts_by_decoder_norm: bool,
    #[serde(default = "yes")]
    apply_b_dec_to_input: bool,
    #[serde(default = "none")]
    normalize_activations: String,
    #[serde(default = "none")]
    reshape_activations: String,
    #[serde(default = "float32")]
    dtype: String,
    #[serde(default)]
    metadata: SaeMetadata,
    #[serde(flatten)]
    other: Map<String, Value>,
}

fn yes() -> bool {
    true
}

fn none() -> String {
    "none".to_owned()
}

fn float32() -> String {
    "float32".to_owned()
}

/// Keys that came before version 6 at the top level and belong to the metadata now.
const METADATA: [&str; 14] = [
    "model_name",
    "hook_name",
    "hook_head_index",
    "model_class_name",
    "model_from_pretrained_kwargs",
    "prepend_bos",
    "exclude_special_tokens",
    "neuronpedia_id",
    "context_size",
    "seqpos_slice",
    "dataset_path",
    "sae_lens_training_version",
    "sequence_separator_token",
    "disable_concat_sequences",
];

/// Reads the bytes of `path`.
pub(super) fn read(path: &Path, bytes: &[u8]) -> Result<SaeConfig, FormatError> {
    let json = |source| FormatError::Json { path: path.to_owned(), source };
    let mut keys: Map<String, Value> = serde_json::from_slice(bytes).map_err(json)?;
    if !keys.contains_key("metadata") {
        keys = from_flat(keys);
    }
    // Before all else: another architecture has other keys, and that is what to say.
    check_architecture(path, keys.get("architecture"))?;
    let mirror: Mirror = serde_json::from_value(keys.into()).map_err(json)?;
    mirror.check_options(path)?;
    Ok(mirror.into())
}

/// The bytes of the file.
pub(super) fn write(config: &SaeConfig) -> Result<Vec<u8>, serde_json::Error> {
    let mut bytes = serde_json::to_vec_pretty(&Mirror::from(config.clone()))?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// A flat configuration from before version 6, in the form of version 6.
fn from_flat(mut keys: Map<String, Value>) -> Map<String, Value> {
    for (old, new) in [
        ("hook_point", "hook_name"),
        ("hook_point_head_index", "hook_head_index"),
        ("activation_fn_str", "activation_fn"),
    ] {
        if let Some(value) = keys.shift_remove(old) {
            keys.entry(new).or_insert(value);
        }
    }
    if keys.get("activation_fn").and_then(Value::as_str) == Some("topk") {
        keys.shift_remove("activation_fn");
        let arguments = keys.shift_remove("activation_fn_kwargs");
        if let Some(k) = arguments.and_then(|arguments| arguments.get("k").cloned()) {
            keys.entry("k").or_insert(k);
        }
        keys.insert("architecture".to_owned(), "topk".into());
    }
    // Flat files without the key are of the time when there was one architecture.
    keys.entry("architecture").or_insert("standard".into());
    if let Some(Value::Bool(normalize)) = keys.get("normalize_activations") {
        let name = if *normalize { "expected_average_only_in" } else { "none" };
        keys.insert("normalize_activations".to_owned(), name.into());
    }
    let metadata =
        METADATA.iter().filter_map(|&key| Some((key.to_owned(), keys.shift_remove(key)?)));
    let metadata: Map<String, Value> = metadata.collect();
    keys.insert("metadata".to_owned(), metadata.into());
    keys
}

fn check_architecture(path: &Path, architecture: Option<&Value>) -> Result<(), FormatError> {
    let path = path.to_owned();
    match architecture {
        Some(Value::String(name)) if name == "topk" => Ok(()),
        Some(Value::String(name)) if UNSUPPORTED.contains(&name.as_str()) => {
            Err(FormatError::UnsupportedArchitecture { path, architecture: name.clone() })
        }
        Some(Value::String(name)) => {
            Err(FormatError::UnknownArchitecture { path, architecture: name.clone() })
        }
        // Absent, or no text: the mirror says it better.
        _ => Ok(()),
    }
}

impl Mirror {
    fn check_options(&self, path: &Path) -> Result<(), FormatError> {
        let refuse = |key, expected, actual: &str| {
            let (path, actual) = (path.to_owned(), actual.to_owned());
            Err(FormatError::UnsupportedOption { path, key, expected, actual })
        };
        if self.normalize_activations != "none" {
            return refuse("normalize_activations", "none", &self.normalize_activations);
        }
        if !["none", "hook_z"].contains(&self.reshape_activations.as_str()) {
            return refuse("reshape_activations", "none or hook_z", &self.reshape_activations);
        }
        if self.other.get("finetuning_scaling_factor") == Some(&Value::Bool(true)) {
            return refuse("finetuning_scaling_factor", "false", "true");
        }
        Ok(())
    }
}

impl From<Mirror> for SaeConfig {
    fn from(mirror: Mirror) -> Self {
        let activation = Activation::TopK {
            k: mirror.k,
            rescale_by_decoder_norm: mirror.rescale_acts_by_decoder_norm,
        };
        Self {
            d_in: mirror.d_in,
            d_sae: mirror.d_sae,
            activation,
            apply_b_dec_to_input: mirror.apply_b_dec_to_input,
            normalization: Normalization::None,
            transcodes_to: None,
            joins_heads: mirror.reshape_activations == "hook_z",
            metadata: mirror.metadata,
            other: mirror.other,
        }
    }
}

impl From<SaeConfig> for Mirror {
    fn from(config: SaeConfig) -> Self {
        let Activation::TopK { k, rescale_by_decoder_norm } = config.activation else {
            todo!("other architectures");
        };
        Self {
            architecture: "topk".to_owned(),
            d_in: config.d_in,
            d_sae: config.d_sae,
            k,
            rescale_acts_by_decoder_norm: rescale_by_decoder_norm,
            apply_b_dec_to_input: config.apply_b_dec_to_input,
            normalize_activations: none(),
            reshape_activations: if config.joins_heads { "hook_z".to_owned() } else { none() },
            // Whatever it was read from, f32 is what is written.
            dtype: float32(),
            metadata: config.metadata,
            other: config.other,
        }
    }
}
