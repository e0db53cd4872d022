//! `cfg.json`, as SAELens writes it and as we mean it.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::activation::Activation;
use crate::config::{SaeConfig, SaeMetadata};
use crate::format::error::FormatError;
use crate::normalization::Normalization;

/// What a file says: an SAE, and what is to be done to its weights first.
pub(super) struct FileConfig {
    /// The SAE that comes of it.
    pub(super) sae: SaeConfig,
    /// Whether the weights hold a threshold of the whole batch in place of one for each latent:
    /// a training checkpoint of a BatchTopK SAE, which is saved for inference as JumpReLU.
    pub(super) batch: Option<Batch>,
    /// Whether the weights are for activations times a scale that they do not hold.
    pub(super) is_for_scaled_input: bool,
    /// Whether there is a skip connection.
    pub(super) skips: bool,
}

/// How a BatchTopK SAE is trained.
#[derive(Deserialize)]
pub(super) struct Batch {
    /// Whether latents are ranked in units of their decoder norms, and the threshold is one.
    pub(super) rescale_acts_by_decoder_norm: bool,
}

/// The keys that all architectures have.
#[derive(Serialize, Deserialize)]
struct Common {
    d_in: usize,
    d_sae: usize,
    #[serde(default = "yes")]
    apply_b_dec_to_input: bool,
    #[serde(default)]
    normalize_activations: Option<String>,
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
    NONE.to_owned()
}

fn float32() -> String {
    "float32".to_owned()
}

const NONE: &str = "none";
const HOOK_Z: &str = "hook_z";
const AVERAGE: &str = "expected_average_only_in";
const FINETUNED: &str = "finetuning_scaling_factor";

/// The keys of `topk` and `abstopk`.
#[derive(Serialize, Deserialize)]
struct Ranked {
    k: usize,
    #[serde(default)]
    rescale_acts_by_decoder_norm: bool,
}

/// The keys of `matching_pursuit`.
#[derive(Serialize, Deserialize)]
struct Pursuit {
    residual_threshold: f64,
    max_iterations: Option<usize>,
    stop_on_duplicate_support: bool,
}

/// The key of transcoders.
#[derive(Serialize, Deserialize)]
struct Transcoder {
    d_out: usize,
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
pub(super) fn read(path: &Path, bytes: &[u8]) -> Result<FileConfig, FormatError> {
    let json = |source| FormatError::Json { path: path.to_owned(), source };
    let mut keys: Map<String, Value> = serde_json::from_slice(bytes).map_err(json)?;
    if !keys.contains_key("metadata") {
        keys = from_flat(keys);
    }
    // Before all else: another architecture has other keys, and that is what to say.
    let kind = Kind::take(path, &mut keys)?;
    let common: Common = serde_json::from_value(keys.into()).map_err(json)?;
    kind.with(common, path)
}

/// The bytes of the file that describes such an SAE.
pub(super) fn write(path: &Path, config: &SaeConfig, skips: bool) -> Result<Vec<u8>, FormatError> {
    let json = |source| FormatError::Json { path: path.to_owned(), source };
    let (architecture, own) =
        own_keys(config, skips).map_err(json)?.ok_or_else(|| FormatError::NoArchitecture {
            path: path.to_owned(),
            activation: config.activation,
            transcodes: config.transcodes_to.is_some(),
        })?;
    let mut keys = Map::new();
    keys.insert("architecture".to_owned(), architecture.into());
    keys.extend(own);
    let mut common = Common::from(config.clone());
    let other = std::mem::take(&mut common.other);
    keys.extend(object(common).map_err(json)?);
    for (key, value) in other {
        // What another format means by such a key is not what SAELens would read in it.
        keys.entry(key).or_insert(value);
    }
    let mut bytes = serde_json::to_vec_pretty(&keys).map_err(json)?;
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
        let name = if *normalize { AVERAGE } else { NONE };
        keys.insert("normalize_activations".to_owned(), name.into());
    }
    let joins = keys.get("hook_name").and_then(Value::as_str).is_some_and(|n| n.contains(HOOK_Z));
    keys.entry("reshape_activations").or_insert(if joins { HOOK_Z } else { NONE }.into());
    let metadata =
        METADATA.iter().filter_map(|&key| Some((key.to_owned(), keys.shift_remove(key)?)));
    let metadata: Map<String, Value> = metadata.collect();
    keys.insert("metadata".to_owned(), metadata.into());
    keys
}

/// What an architecture is, with its own keys.
enum Kind {
    Sae(Activation),
    Batch { training_architecture: String, batch: Batch },
    Transcoder { activation: Activation, d_out: usize, skips: bool },
}

impl Kind {
    /// Takes out of a file's keys what belongs to one architecture.
    fn take(path: &Path, keys: &mut Map<String, Value>) -> Result<Self, FormatError> {
        let json = |source| FormatError::Json { path: path.to_owned(), source };
        #[derive(Deserialize)]
        struct Named {
            architecture: String,
        }
        let Named { architecture } = take(keys, &["architecture"]).map_err(json)?;
        let transcoder = |keys: &mut _, activation, skips| {
            let Transcoder { d_out } = take(keys, &["d_out"]).map_err(json)?;
            Ok(Self::Transcoder { activation, d_out, skips })
        };
        match architecture.as_str() {
            "standard" => Ok(Self::Sae(Activation::Relu)),
            "gated" => Ok(Self::Sae(Activation::Gated)),
            "jumprelu" => Ok(Self::Sae(Activation::JumpRelu)),
            "topk" | "abstopk" => {
                let names = ["k", "rescale_acts_by_decoder_norm"];
                let Ranked { k, rescale_acts_by_decoder_norm: rescale_by_decoder_norm } =
                    take(keys, &names).map_err(json)?;
                Ok(Self::Sae(match architecture.as_str() {
                    "topk" => Activation::TopK { k, rescale_by_decoder_norm },
                    _ => Activation::AbsTopK { k, rescale_by_decoder_norm },
                }))
            }
            "matching_pursuit" => {
                let names = ["residual_threshold", "max_iterations", "stop_on_duplicate_support"];
                let Pursuit { residual_threshold, max_iterations, stop_on_duplicate_support } =
                    take(keys, &names).map_err(json)?;
                Ok(Self::Sae(Activation::MatchingPursuit {
                    residual_threshold,
                    max_iterations,
                    stop_on_duplicate_support,
                }))
            }
            "batchtopk" | "matryoshka_batchtopk" => {
                let batch = take(keys, &["rescale_acts_by_decoder_norm"]).map_err(json)?;
                Ok(Self::Batch { training_architecture: architecture, batch })
            }
            "transcoder" => transcoder(keys, Activation::Relu, false),
            "skip_transcoder" => transcoder(keys, Activation::Relu, true),
            "jumprelu_transcoder" => transcoder(keys, Activation::JumpRelu, false),
            "jumprelu_skip_transcoder" => transcoder(keys, Activation::JumpRelu, true),
            // It attends to other positions: no function of one activation.
            "temporal" => {
                let path = path.to_owned();
                Err(FormatError::UnsupportedArchitecture { path, architecture })
            }
            _ => Err(FormatError::UnknownArchitecture { path: path.to_owned(), architecture }),
        }
    }

    fn with(self, mut common: Common, path: &Path) -> Result<FileConfig, FormatError> {
        let refuse = |key, expected, actual: &str| {
            let (path, actual) = (path.to_owned(), actual.to_owned());
            FormatError::UnsupportedOption { path, key, expected, actual }
        };
        let normalize = common.normalize_activations.as_deref().unwrap_or(NONE);
        let (normalization, is_for_scaled_input) = match normalize {
            NONE => (Normalization::None, false),
            AVERAGE => (Normalization::None, true),
            "constant_norm_rescale" => (Normalization::ConstantNormRescale, false),
            "layer_norm" => (Normalization::LayerNorm, false),
            other => {
                let expected =
                    "none, expected_average_only_in, constant_norm_rescale or layer_norm";
                return Err(refuse("normalize_activations", expected, other));
            }
        };
        let reshape = &common.reshape_activations;
        if ![NONE, HOOK_Z].contains(&reshape.as_str()) {
            return Err(refuse("reshape_activations", "none or hook_z", reshape));
        }
        // A key of flat files; since version 6 the architecture says it.
        match common.other.get("activation_fn") {
            None => {}
            Some(Value::String(name)) if name == "relu" => {}
            Some(other) => return Err(refuse("activation_fn", "relu or topk", &other.to_string())),
        }
        let (activation, transcodes_to, skips, batch) = match self {
            Self::Sae(activation) => (activation, None, false, None),
            Self::Transcoder { activation, d_out, skips } => (activation, Some(d_out), skips, None),
            Self::Batch { training_architecture, batch } => {
                let metadata = &mut common.metadata.other;
                metadata
                    .entry("training_architecture")
                    .or_insert_with(|| training_architecture.into());
                (Activation::JumpRelu, None, false, Some(batch))
            }
        };
        let sae = SaeConfig {
            d_in: common.d_in,
            d_sae: common.d_sae,
            activation,
            apply_b_dec_to_input: common.apply_b_dec_to_input,
            normalization,
            transcodes_to,
            joins_heads: common.reshape_activations == HOOK_Z,
            metadata: common.metadata,
            other: common.other,
        };
        Ok(FileConfig { sae, batch, is_for_scaled_input, skips })
    }
}

impl FileConfig {
    /// Whether latents are multiplied by a tensor before decoding, as files from before version 6
    /// say that were finetuned.
    pub(super) fn is_finetuned(&self) -> bool {
        self.sae.other.get(FINETUNED) == Some(&Value::Bool(true))
    }

    /// Says that the decoder holds that tensor now.
    pub(super) fn set_finetuned_folded(&mut self) {
        self.sae.other.insert(FINETUNED.to_owned(), false.into());
    }
}

/// The name of an architecture, and the keys that only it has.
type OwnKeys = (&'static str, Map<String, Value>);

/// Whether there is an architecture for it, with a skip or without.
pub(super) fn has_architecture(config: &SaeConfig) -> bool {
    matches!(own_keys(config, false), Ok(Some(_)))
}

/// Those of an SAE; none if SAELens has no architecture for it.
fn own_keys(config: &SaeConfig, skips: bool) -> Result<Option<OwnKeys>, serde_json::Error> {
    if let Some(d_out) = config.transcodes_to {
        let architecture = match (config.activation, skips) {
            (Activation::Relu, false) => "transcoder",
            (Activation::Relu, true) => "skip_transcoder",
            (Activation::JumpRelu, false) => "jumprelu_transcoder",
            (Activation::JumpRelu, true) => "jumprelu_skip_transcoder",
            _ => return Ok(None),
        };
        return Ok(Some((architecture, object(Transcoder { d_out })?)));
    }
    let ranked =
        |k, rescale_acts_by_decoder_norm| object(Ranked { k, rescale_acts_by_decoder_norm });
    Ok(Some(match config.activation {
        Activation::Relu => ("standard", Map::new()),
        Activation::JumpRelu => ("jumprelu", Map::new()),
        Activation::Gated => ("gated", Map::new()),
        Activation::TopK { k, rescale_by_decoder_norm } => {
            ("topk", ranked(k, rescale_by_decoder_norm)?)
        }
        Activation::AbsTopK { k, rescale_by_decoder_norm } => {
            ("abstopk", ranked(k, rescale_by_decoder_norm)?)
        }
        Activation::MatchingPursuit {
            residual_threshold,
            max_iterations,
            stop_on_duplicate_support,
        } => {
            let keys = Pursuit { residual_threshold, max_iterations, stop_on_duplicate_support };
            ("matching_pursuit", object(keys)?)
        }
        Activation::GroupMax { .. } => return Ok(None),
    }))
}

impl From<SaeConfig> for Common {
    fn from(config: SaeConfig) -> Self {
        let normalization = match config.normalization {
            Normalization::None => NONE,
            Normalization::ConstantNormRescale => "constant_norm_rescale",
            Normalization::LayerNorm => "layer_norm",
        };
        Self {
            d_in: config.d_in,
            d_sae: config.d_sae,
            apply_b_dec_to_input: config.apply_b_dec_to_input,
            normalize_activations: Some(normalization.to_owned()),
            reshape_activations: if config.joins_heads { HOOK_Z.to_owned() } else { none() },
            // Whatever it was read from, f32 is what is written.
            dtype: float32(),
            metadata: config.metadata,
            other: config.other,
        }
    }
}

/// Removes some keys, for a mirror of their own.
fn take<T: DeserializeOwned>(
    keys: &mut Map<String, Value>,
    names: &[&str],
) -> Result<T, serde_json::Error> {
    let taken = names.iter().filter_map(|&name| Some((name.to_owned(), keys.shift_remove(name)?)));
    let taken: Map<String, Value> = taken.collect();
    serde_json::from_value(taken.into())
}

/// The keys of a mirror.
fn object(mirror: impl Serialize) -> Result<Map<String, Value>, serde_json::Error> {
    // Through text, which cannot be anything but an object again.
    serde_json::from_slice(&serde_json::to_vec(&mirror)?)
}
