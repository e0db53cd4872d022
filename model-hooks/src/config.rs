//! What a model's checkpoint says about its shape, in one vocabulary whatever the file.

mod gguf;
mod hf;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::load::MetadataError;
pub(crate) use gguf::TensorEvidence;

/// The families of models that can be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Architecture {
    /// Pre-norm decoder with RMS norms, rotary grouped-query attention and a gated MLP.
    Llama,
}

impl Architecture {
    /// The architecture that `config.json` calls `model_type` and GGUF `general.architecture`.
    ///
    /// # Errors
    /// [`ConfigError::UnknownArchitecture`] for every name that is not built here.
    pub fn from_name(name: &str) -> Result<Self, ConfigError> {
        match name {
            "llama" => Ok(Self::Llama),
            _ => Err(ConfigError::UnknownArchitecture { actual: name.to_owned() }),
        }
    }
}

/// The shape of a language model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// How the parts are wired.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Number of token ids the embedding knows.
    pub d_vocab: usize,
    /// The most positions the model was trained for.
    pub n_ctx: usize,
    /// The ε under the root of every norm.
    pub norm_eps: f64,
    /// Whether the unembedding is the embedding, transposed.
    pub tie_embeddings: bool,
    /// The shape of every attention layer.
    pub attention: AttentionConfig,
    /// The shape of every MLP.
    pub mlp: MlpConfig,
    /// The ids with a meaning of their own.
    pub special_tokens: SpecialTokens,
}

/// The shape of an attention layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionConfig {
    /// Number of query heads.
    pub n_heads: usize,
    /// Number of key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of one head; even, because rotary embedding turns pairs.
    pub d_head: usize,
    /// Whether the query, key, value and output projections have a bias.
    pub bias: bool,
    /// The rotary position embedding.
    pub rope: RopeConfig,
}

/// Rotary position embedding: pair `i` of a head turns by `theta^(-2i / d_head)` per position.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RopeConfig {
    /// The base of the frequencies.
    pub theta: f64,
    /// How the frequencies are changed to reach further than in training.
    pub scaling: RopeScaling,
}

/// A change of the rotary frequencies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RopeScaling {
    /// None.
    Default,
    /// Every frequency divided by `factor`.
    Linear {
        /// How many times further the positions reach.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// How many times further the positions reach.
        factor: f64,
        /// Wavelengths above `original_n_ctx / low_freq_factor` are divided by `factor`.
        low_freq_factor: f64,
        /// Wavelengths below `original_n_ctx / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The context length before the stretch.
        original_n_ctx: usize,
    },
}

/// The shape of an MLP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MlpConfig {
    /// Width of the hidden layer.
    pub d_mlp: usize,
    /// The non-linearity of the gate.
    pub activation: Activation,
    /// Whether the three projections have a bias.
    pub bias: bool,
}

/// The non-linearity of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
}

/// The token ids with a meaning of their own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpecialTokens {
    /// Opens a text.
    pub bos: Option<u32>,
    /// Each of these ends a generation.
    pub eos: Vec<u32>,
    /// Fills a batch's shorter rows.
    pub pad: Option<u32>,
}

impl ModelConfig {
    /// The config itself, if its numbers can describe a model.
    fn validated(self) -> Result<Self, ConfigError> {
        let Self { attention, mlp, .. } = &self;
        for (field, value) in [
            ("d_model", self.d_model),
            ("n_layers", self.n_layers),
            ("d_vocab", self.d_vocab),
            ("n_ctx", self.n_ctx),
            ("n_heads", attention.n_heads),
            ("n_kv_heads", attention.n_kv_heads),
            ("d_head", attention.d_head),
            ("d_mlp", mlp.d_mlp),
        ] {
            // The upper bound keeps every product of two dimensions far from overflow.
            require((1..=1 << 28).contains(&value), field, "between 1 and 2^28", value)?;
        }
        require(
            attention.n_heads.is_multiple_of(attention.n_kv_heads),
            "n_kv_heads",
            "a divisor of the number of heads",
            attention.n_kv_heads,
        )?;
        require(attention.d_head.is_multiple_of(2), "d_head", "even", attention.d_head)?;
        require_positive("norm_eps", self.norm_eps)?;
        attention.rope.validate()?;

        let SpecialTokens { bos, eos, pad } = &self.special_tokens;
        for (field, ids) in [
            ("bos_token_id", bos.as_slice()),
            ("eos_token_id", eos.as_slice()),
            ("pad_token_id", pad.as_slice()),
        ] {
            for &id in ids {
                require((id as usize) < self.d_vocab, field, "below the vocabulary's size", id)?;
            }
        }
        Ok(self)
    }
}

impl RopeConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        require_positive("rope theta", self.theta)?;
        match self.scaling {
            RopeScaling::Default => Ok(()),
            RopeScaling::Linear { factor } => require_positive("rope factor", factor),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_n_ctx } => {
                require_positive("rope factor", factor)?;
                require_positive("low_freq_factor", low_freq_factor)?;
                require(
                    high_freq_factor.is_finite() && high_freq_factor > low_freq_factor,
                    "high_freq_factor",
                    "above low_freq_factor",
                    high_freq_factor,
                )?;
                let field = "original_max_position_embeddings";
                require(original_n_ctx > 0, field, "at least 1", original_n_ctx)
            }
        }
    }
}

fn require(
    holds: bool,
    field: &'static str,
    expected: &'static str,
    actual: impl ToString,
) -> Result<(), ConfigError> {
    match holds {
        true => Ok(()),
        false => Err(ConfigError::Invalid { field, expected, actual: actual.to_string() }),
    }
}

fn require_positive(field: &'static str, value: f64) -> Result<(), ConfigError> {
    require(value.is_finite() && value > 0.0, field, "finite and above zero", value)
}

/// Why a checkpoint's description of its model cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// `config.json` is not the JSON that it should be.
    #[error("the config is not valid JSON of a model's config")]
    Json {
        /// What is wrong with it, and where.
        #[source]
        source: serde_json::Error,
    },
    /// A metadata key is absent, or of another type than it should be.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// A field that has no default is absent.
    #[error("the config lacks `{field}`")]
    MissingField {
        /// The field, as the file would call it.
        field: &'static str,
    },
    /// A model of a family that is not built here.
    #[error("unknown architecture `{actual}`; `llama` is supported")]
    UnknownArchitecture {
        /// The name in the file.
        actual: String,
    },
    /// An activation function that is not built here.
    #[error("unknown activation `{actual}`; `silu` is supported")]
    UnknownActivation {
        /// The name in the file.
        actual: String,
    },
    /// A kind of rotary scaling that is not built here.
    #[error("unknown rope type `{actual}`; `default`, `linear` and `llama3` are supported")]
    UnknownRope {
        /// The name in the file.
        actual: String,
    },
    /// An option that would change what the model computes, and is not built here.
    #[error("the config sets `{field}` to {actual}, which is not supported")]
    Unsupported {
        /// The option, as the file calls it.
        field: String,
        /// Its value.
        actual: String,
    },
    /// A value that no model can have.
    #[error("`{field}` is {actual}, and should be {expected}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// What it should be.
        expected: &'static str,
        /// What it is.
        actual: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny() -> ModelConfig {
        ModelConfig {
            architecture: Architecture::Llama,
            d_model: 8,
            n_layers: 1,
            d_vocab: 16,
            n_ctx: 32,
            norm_eps: 1e-5,
            tie_embeddings: false,
            attention: AttentionConfig {
                n_heads: 4,
                n_kv_heads: 2,
                d_head: 2,
                bias: false,
                rope: RopeConfig { theta: 1e4, scaling: RopeScaling::Default },
            },
            mlp: MlpConfig { d_mlp: 12, activation: Activation::Silu, bias: false },
            special_tokens: SpecialTokens { bos: Some(1), eos: vec![2, 3], pad: None },
        }
    }

    #[test]
    fn a_sound_config_passes_and_survives_serde() {
        let config = tiny().validated().unwrap();
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<ModelConfig>(&json).unwrap(), config);
    }

    #[test]
    fn each_impossible_number_is_named() {
        type Spoil = fn(&mut ModelConfig);
        let cases: [(&str, Spoil); 9] = [
            ("d_model", |c| c.d_model = 0),
            ("n_ctx", |c| c.n_ctx = usize::MAX),
            ("n_kv_heads", |c| c.attention.n_kv_heads = 3),
            ("d_head", |c| c.attention.d_head = 3),
            ("norm_eps", |c| c.norm_eps = f64::NAN),
            ("rope theta", |c| c.attention.rope.theta = 0.0),
            ("rope factor", |c| {
                c.attention.rope.scaling = RopeScaling::Linear { factor: f64::INFINITY };
            }),
            ("high_freq_factor", |c| {
                c.attention.rope.scaling = RopeScaling::Llama3 {
                    factor: 8.0,
                    low_freq_factor: 4.0,
                    high_freq_factor: 4.0,
                    original_n_ctx: 16,
                };
            }),
            ("eos_token_id", |c| c.special_tokens.eos.push(16)),
        ];
        for (expected, spoil) in cases {
            let mut config = tiny();
            spoil(&mut config);
            match config.validated() {
                Err(ConfigError::Invalid { field, .. }) => assert_eq!(field, expected),
                other => panic!("{expected}: {other:?}"),
            }
        }
    }
}
