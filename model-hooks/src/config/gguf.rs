//! Reads a model's shape from the metadata of a GGUF file.

use std::f64::consts::TAU;

use super::{
    Architecture, AttentionConfig, AttentionScale, ConfigError, MlpConfig, ModelConfig,
    Nonlinearity, RopeConfig, RopeScaling, SpecialTokens, UnembeddingConfig, require,
};
use crate::load::Metadata;

/// What only the tensors of a GGUF file say about the model's shape.
#[derive(Clone, Debug, Default)]
pub(crate) struct TensorEvidence {
    /// Whether there is an unembedding of its own.
    pub has_output: bool,
    /// Whether the attention projections have biases.
    pub has_attention_bias: bool,
    /// Whether the MLP projections have biases.
    pub has_mlp_bias: bool,
    /// `rope_freqs.weight`: by what each rotary frequency is divided.
    pub rope_factors: Option<Vec<f32>>,
}

/// The keys of the `llama.` family that this reader knows. Any other could change what the model
/// computes, so that it is refused.
const KNOWN_KEYS: [&str; 19] = [
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "vocab_size",
    "tensor_data_layout",
    "expert_count",
    "expert_used_count",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
];

impl ModelConfig {
    /// Reads the metadata that llama.cpp writes for a model of the `llama` family.
    ///
    /// # Errors
    /// [`ConfigError`] where a key is missing, of another type or impossible, or the model needs
    /// something that is not built here.
    pub(crate) fn from_gguf(
        metadata: &Metadata,
        evidence: &TensorEvidence,
    ) -> Result<Self, ConfigError> {
        let architecture = match metadata.string("general.architecture")? {
            "llama" => Architecture::Llama,
            other => {
                let (actual, supported) = (other.to_owned(), vec!["llama (in GGUF files)"]);
                return Err(ConfigError::UnknownArchitecture { actual, supported });
            }
        };
        refuse_unsupported(metadata)?;

        let d_model = metadata.usize("llama.embedding_length")?;
        let n_heads = metadata.usize("llama.attention.head_count")?;
        let d_head = match metadata.optional("llama.attention.key_length", Metadata::usize)? {
            Some(d_head) => d_head,
            None => {
                let divides = n_heads > 0 && d_model.is_multiple_of(n_heads);
                require(divides, "head_count", "a divisor of embedding_length", n_heads)?;
                d_model / n_heads
            }
        };
        for (key, field) in [
            ("llama.attention.value_length", "value_length"),
            ("llama.rope.dimension_count", "rope.dimension_count"),
        ] {
            if let Some(actual) = metadata.optional(key, Metadata::usize)? {
                require(actual == d_head, field, "the width of a head", actual)?;
            }
        }

        // llama.cpp's own default for a file that says nothing.
        let theta = metadata.optional("llama.rope.freq_base", Metadata::f64)?.unwrap_or(10_000.0);
        let scaling = rope_scaling(metadata, evidence.rope_factors.as_deref(), theta, d_head)?;
        Self {
            architecture,
            d_model,
            n_layers: metadata.usize("llama.block_count")?,
            d_vocab: match metadata.optional("llama.vocab_size", Metadata::usize)? {
                Some(d_vocab) => d_vocab,
                None => metadata.strings("tokenizer.ggml.tokens")?.len(),
            },
            n_ctx: metadata.usize("llama.context_length")?,
            norm_eps: metadata.f64("llama.attention.layer_norm_rms_epsilon")?,
            parallel: false,
            attention: AttentionConfig {
                n_heads,
                n_kv_heads: metadata
                    .optional("llama.attention.head_count_kv", Metadata::usize)?
                    .unwrap_or(n_heads),
                d_head,
                bias: evidence.has_attention_bias,
                scales: AttentionScale::Same((d_head as f64).powf(-0.5)),
                soft_cap: None,
                sliding: None,
                rope: Some(RopeConfig { scaling, ..RopeConfig::new(theta, d_head) }),
            },
            mlp: MlpConfig {
                d_mlp: metadata.usize("llama.feed_forward_length")?,
                nonlinearity: Nonlinearity::Silu,
                bias: evidence.has_mlp_bias,
            },
            unembedding: UnembeddingConfig { tied: !evidence.has_output, soft_cap: None },
            special_tokens: special_tokens(metadata)?,
        }
        .validated()
    }
}

fn refuse_unsupported(metadata: &Metadata) -> Result<(), ConfigError> {
    for key in metadata.keys() {
        let Some(name) = key.strip_prefix("llama.") else { continue };
        // A mixture of experts is of the same family to llama.cpp.
        let has_experts = name.starts_with("expert_") && metadata.usize(key)? > 0;
        if has_experts || !KNOWN_KEYS.contains(&name) {
            let actual = metadata.get(key).map(ToString::to_string).unwrap_or_default();
            return Err(ConfigError::Unsupported { field: key.to_owned(), actual });
        }
    }
    Ok(())
}

fn special_tokens(metadata: &Metadata) -> Result<SpecialTokens, ConfigError> {
    let id = |name| metadata.optional(&format!("tokenizer.ggml.{name}_token_id"), Metadata::u32);
    let mut eos: Vec<u32> = id("eos")?.into_iter().chain(id("eot")?).collect();
    eos.dedup();
    Ok(SpecialTokens { bos: id("bos")?, eos, pad: id("padding")? })
}

fn rope_scaling(
    metadata: &Metadata,
    factors: Option<&[f32]>,
    theta: f64,
    d_head: usize,
) -> Result<RopeScaling, ConfigError> {
    let by_key = match metadata.optional("llama.rope.scaling.type", Metadata::string)? {
        None | Some("none") => RopeScaling::Default,
        Some("linear") => {
            RopeScaling::Linear { factor: metadata.f64("llama.rope.scaling.factor")? }
        }
        Some(other) => return Err(ConfigError::UnknownRope { actual: other.to_owned() }),
    };
    match factors {
        None => Ok(by_key),
        Some(_) if by_key != RopeScaling::Default => Err(ConfigError::Unsupported {
            field: "llama.rope.scaling.type".to_owned(),
            actual: "`linear` beside the tensor `rope_freqs.weight`".to_owned(),
        }),
        Some(factors) => llama3_scaling(factors, theta, d_head)
            .ok_or(ConfigError::UnknownRope { actual: "rope_freqs.weight".to_owned() }),
    }
}

/// The scaling whose divisors are `factors`, if it is the one of Llama 3.1 and later.
///
/// llama.cpp's conversion writes the divisor of each frequency instead of the parameters. Every
/// Llama 3 has the same ones but for `factor`, which is the largest divisor; that they give the
/// same divisors is checked here, and not assumed.
fn llama3_scaling(factors: &[f32], theta: f64, d_head: usize) -> Option<RopeScaling> {
    const LOW: f64 = 1.0;
    const HIGH: f64 = 4.0;
    const ORIGINAL: usize = 8192;
    let factor = factors.iter().copied().fold(1.0, f32::max) as f64;
    let agrees = factors.iter().enumerate().all(|(pair_idx, &actual)| {
        let wavelength = TAU * theta.powf(2.0 * pair_idx as f64 / d_head as f64);
        let kept = ((ORIGINAL as f64 / wavelength - LOW) / (HIGH - LOW)).clamp(0.0, 1.0);
        let expected = 1.0 / ((1.0 - kept) / factor + kept);
        (actual as f64 - expected).abs() <= 1e-3 * expected
    });
    match agrees && 2 * factors.len() == d_head {
        false => None,
        true if factor == 1.0 => Some(RopeScaling::Default),
        true => Some(RopeScaling::Llama3 {
            factor,
            low_freq_factor: LOW,
            high_freq_factor: HIGH,
            original_n_ctx: ORIGINAL,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::MetadataValue;

    fn metadata(extra: &[(&str, MetadataValue)]) -> Metadata {
        let base = [
            ("general.architecture", MetadataValue::String("llama".into())),
            ("llama.embedding_length", MetadataValue::U32(48)),
            ("llama.block_count", MetadataValue::U32(3)),
            ("llama.feed_forward_length", MetadataValue::U32(88)),
            ("llama.context_length", MetadataValue::U32(64)),
            ("llama.vocab_size", MetadataValue::U32(131)),
            ("llama.attention.head_count", MetadataValue::U32(6)),
            ("llama.attention.head_count_kv", MetadataValue::U32(2)),
            ("llama.attention.layer_norm_rms_epsilon", MetadataValue::F32(1e-5)),
            ("llama.rope.freq_base", MetadataValue::F32(1e5)),
            ("tokenizer.ggml.bos_token_id", MetadataValue::U32(1)),
            ("tokenizer.ggml.eos_token_id", MetadataValue::U32(2)),
            ("tokenizer.ggml.eot_token_id", MetadataValue::U32(2)),
        ];
        base.iter().chain(extra).map(|(key, value)| ((*key).to_owned(), value.clone())).collect()
    }

    fn read(extra: &[(&str, MetadataValue)]) -> Result<ModelConfig, ConfigError> {
        ModelConfig::from_gguf(&metadata(extra), &TensorEvidence::default())
    }

    #[test]
    fn agrees_with_the_config_json_of_the_same_model() {
        let hf = br#"{"model_type": "llama", "hidden_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 88,
            "vocab_size": 131, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
            "hidden_act": "silu", "rope_theta": 1e5, "bos_token_id": 1, "eos_token_id": 2,
            "tie_word_embeddings": true}"#;
        let mut gguf = read(&[]).unwrap();
        assert_eq!(gguf.norm_eps as f32, 1e-5);
        gguf.norm_eps = 1e-5;
        assert_eq!(gguf, ModelConfig::from_hf(hf, None).unwrap());
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        let string = |value: &str| MetadataValue::String(value.into());
        for (key, value, expected) in [
            ("general.architecture", string("mamba"), "unknown architecture `mamba`"),
            ("llama.expert_count", MetadataValue::U32(8), "`llama.expert_count` to 8"),
            ("llama.attention.sliding_window", MetadataValue::U32(8), "sliding_window"),
            ("llama.rope.scaling.type", string("yarn"), "unknown rope type `yarn`"),
            ("llama.rope.scaling.type", string("linear"), "llama.rope.scaling.factor"),
            ("llama.rope.dimension_count", MetadataValue::U32(4), "rope.dimension_count"),
            ("llama.block_count", MetadataValue::F32(3.0), "llama.block_count"),
        ] {
            let message = read(&[(key, value)]).unwrap_err().to_string();
            assert!(message.contains(expected), "{key}: {message}");
        }
    }

    #[test]
    fn llama3_is_recognised_by_its_divisors_and_nothing_else_is() {
        // Llama 3.2 1B: factor 32, theta 5e5, d_head 64. Pair 15 has wavelength
        // 2π·5e5^(15/32) = 2948.8, hence kept = (8192 / 2948.8 − 1) / 3 = 0.5927.
        let divisors: Vec<f32> = (0..32)
            .map(|pair_idx| {
                let wavelength = TAU * 5e5_f64.powf(pair_idx as f64 / 32.0);
                let kept = ((8192.0 / wavelength - 1.0) / 3.0).clamp(0.0, 1.0);
                (1.0 / ((1.0 - kept) / 32.0 + kept)) as f32
            })
            .collect();
        assert!((divisors[15] - 1.651).abs() < 2e-3, "{}", divisors[15]);
        assert_eq!((divisors[0], divisors[31]), (1.0, 32.0));
        let expected = RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_n_ctx: 8192,
        };
        assert_eq!(llama3_scaling(&divisors, 5e5, 64), Some(expected));
        assert_eq!(llama3_scaling(&[1.0; 32], 5e5, 64), Some(RopeScaling::Default));
        assert_eq!(llama3_scaling(&divisors, 1e4, 64), None);
        assert_eq!(llama3_scaling(&divisors, 5e5, 128), None);
        assert_eq!(llama3_scaling(&[f32::NAN; 32], 5e5, 64), None);
    }
}
