//! What a model's checkpoint says about its shape, in one vocabulary whatever the file.

mod error;
mod gguf;
mod hf;
mod rope;

pub use kernels::{Nonlinearity, RotaryPairs};
use serde::{Deserialize, Serialize};

pub use error::ConfigError;
pub(crate) use gguf::TensorEvidence;
pub use rope::{LongRope, RopeConfig, RopeScaling};

/// The families of models that can be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Architecture {
    /// GPT-2: learned positions, layer norms with biases, a plain MLP.
    Gpt2,
    /// GPT-J: attention and MLP in parallel behind one norm, rotary of neighbouring pairs.
    GptJ,
    /// GPT-NeoX and Pythia: parallel or sequential, each half behind a norm of its own.
    GptNeoX,
    /// OPT: learned positions and a ReLU.
    Opt,
    /// Pre-norm decoder with RMS norms, rotary grouped-query attention and a gated MLP.
    Llama,
    /// Llama with a sliding window.
    Mistral,
    /// Llama with biases on queries, keys and values.
    Qwen2,
    /// Llama with norms on queries and keys.
    Qwen3,
    /// Llama with fused projections, and rotary factors for long contexts.
    Phi3,
    /// Norms before and after each half, soft caps, and a window in every other block.
    Gemma2,
    /// Gemma 2 with norms on queries and keys in place of soft caps, and rotary of its own in the
    /// blocks with a window.
    Gemma3,
    /// Llama with its norms behind each half, and norms on queries and keys.
    Olmo2,
}

impl Architecture {
    /// Every architecture with the name that `config.json` has for it in `model_type`.
    pub const NAMES: [(&str, Self); 12] = [
        ("gpt2", Self::Gpt2),
        ("gptj", Self::GptJ),
        ("gpt_neox", Self::GptNeoX),
        ("opt", Self::Opt),
        ("llama", Self::Llama),
        ("mistral", Self::Mistral),
        ("qwen2", Self::Qwen2),
        ("qwen3", Self::Qwen3),
        ("phi3", Self::Phi3),
        ("gemma2", Self::Gemma2),
        ("gemma3_text", Self::Gemma3),
        ("olmo2", Self::Olmo2),
    ];

    /// The architecture that `config.json` calls `model_type`.
    ///
    /// # Errors
    /// [`ConfigError::UnknownArchitecture`] for every name that is not built here.
    pub fn from_name(name: &str) -> Result<Self, ConfigError> {
        let found = Self::NAMES.iter().find(|(known, _)| *known == name);
        found.map(|&(_, architecture)| architecture).ok_or_else(|| {
            ConfigError::UnknownArchitecture {
                actual: name.to_owned(),
                supported: Self::NAMES.map(|(name, _)| name).to_vec(),
            }
        })
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
    /// Whether attention and MLP both read the residual stream as the block finds it.
    pub parallel: bool,
    /// The shape of the attention layers.
    pub attention: AttentionConfig,
    /// The shape of every MLP.
    pub mlp: MlpConfig,
    /// From the residual stream to logits.
    pub unembedding: UnembeddingConfig,
    /// The ids with a meaning of their own.
    pub special_tokens: SpecialTokens,
}

/// The shape of the attention layers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionConfig {
    /// Number of query heads.
    pub n_heads: usize,
    /// Number of key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of one head.
    pub d_head: usize,
    /// Whether the projections have biases, where the architecture leaves the choice.
    pub bias: bool,
    /// By what each layer multiplies its scores.
    pub scales: AttentionScale,
    /// Scores are squashed to `cap · tanh(score / cap)`.
    pub soft_cap: Option<f64>,
    /// The blocks that see only the latest positions.
    pub sliding: Option<SlidingConfig>,
    /// The rotary position embedding; models with learned positions have none.
    pub rope: Option<RopeConfig>,
}

/// By what attention scores are multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttentionScale {
    /// The same in every block.
    Same(f64),
    /// `scale / (layer + 1)` (GPT-2's `scale_attn_by_inverse_layer_idx`).
    ByLayer(f64),
}

/// Attention that sees only the latest positions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SlidingConfig {
    /// Positions seen, the query's own included.
    pub window: usize,
    /// For each block, whether it slides.
    pub layers: Vec<bool>,
    /// The rotary of the sliding blocks, where it differs from that of the others.
    pub rope: Option<RopeConfig>,
}

impl AttentionConfig {
    /// By what a block multiplies its scores.
    pub fn scale(&self, layer: usize) -> f64 {
        match self.scales {
            AttentionScale::Same(scale) => scale,
            AttentionScale::ByLayer(scale) => scale / (layer + 1) as f64,
        }
    }

    /// Positions that a block sees, if not all.
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.sliding(layer).map(|sliding| sliding.window)
    }

    /// The rotaries of the model: that of most blocks, and that of the sliding ones where it
    /// differs.
    pub fn ropes(&self) -> impl Iterator<Item = &RopeConfig> {
        self.rope.iter().chain(self.sliding.iter().filter_map(|sliding| sliding.rope.as_ref()))
    }

    /// Which of [`ropes`](Self::ropes) a block has.
    pub fn rope_idx(&self, layer: usize) -> Option<usize> {
        let has_own = self.sliding(layer).is_some_and(|sliding| sliding.rope.is_some());
        self.rope.as_ref().map(|_| usize::from(has_own))
    }

    /// Widths of all queries and of all keys of a position.
    pub(crate) fn widths(&self) -> [usize; 2] {
        [self.n_heads * self.d_head, self.n_kv_heads * self.d_head]
    }

    fn sliding(&self, layer: usize) -> Option<&SlidingConfig> {
        self.sliding.as_ref().filter(|sliding| sliding.layers[layer])
    }
}

/// The shape of an MLP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MlpConfig {
    /// Width of the hidden layer.
    pub d_mlp: usize,
    /// The non-linearity, of the gate where there is one.
    pub nonlinearity: Nonlinearity,
    /// Whether the projections have biases, where the architecture leaves the choice.
    pub bias: bool,
}

/// From the residual stream to logits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UnembeddingConfig {
    /// Whether it is the embedding, transposed.
    pub tied: bool,
    /// Logits are squashed to `cap · tanh(logit / cap)`.
    pub soft_cap: Option<f64>,
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
        let Self { attention, mlp, unembedding, .. } = &self;
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
        require_positive("norm_eps", self.norm_eps)?;
        attention.validate(self.n_layers)?;
        if let Some(cap) = unembedding.soft_cap {
            require_positive("the soft cap of logits", cap)?;
        }
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

impl AttentionConfig {
    fn validate(&self, n_layers: usize) -> Result<(), ConfigError> {
        require(
            self.n_heads.is_multiple_of(self.n_kv_heads),
            "n_kv_heads",
            "a divisor of the number of heads",
            self.n_kv_heads,
        )?;
        let (AttentionScale::Same(scale) | AttentionScale::ByLayer(scale)) = self.scales;
        require_positive("the scale of attention scores", scale)?;
        if let Some(cap) = self.soft_cap {
            require_positive("the soft cap of attention scores", cap)?;
        }
        let mut ropes = vec![&self.rope];
        if let Some(sliding) = &self.sliding {
            require(sliding.window > 0, "sliding_window", "at least 1", sliding.window)?;
            let n = sliding.layers.len();
            require(n == n_layers, "layer_types", "as long as there are blocks", n)?;
            ropes.push(&sliding.rope);
        }
        ropes.into_iter().flatten().try_for_each(|rope| rope.validate(self.d_head))
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
            parallel: false,
            attention: AttentionConfig {
                n_heads: 4,
                n_kv_heads: 2,
                d_head: 2,
                bias: false,
                scales: AttentionScale::Same(0.5),
                soft_cap: None,
                sliding: None,
                rope: Some(RopeConfig::new(1e4, 2)),
            },
            mlp: MlpConfig { d_mlp: 12, nonlinearity: Nonlinearity::Silu, bias: false },
            unembedding: UnembeddingConfig { tied: false, soft_cap: None },
            special_tokens: SpecialTokens { bos: Some(1), eos: vec![2, 3], pad: None },
        }
    }

    #[test]
    fn a_sound_config_passes_and_survives_serde() {
        let config = tiny().validated().unwrap();
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<ModelConfig>(&json).unwrap(), config);
    }

    fn rope(config: &mut ModelConfig) -> &mut RopeConfig {
        config.attention.rope.as_mut().unwrap()
    }

    fn slide(config: &mut ModelConfig, window: usize, layers: Vec<bool>) {
        config.attention.sliding = Some(SlidingConfig { window, layers, rope: None });
    }

    #[test]
    fn each_impossible_number_is_named() {
        type Spoil = fn(&mut ModelConfig);
        let cases: [(&str, Spoil); 15] = [
            ("d_model", |c| c.d_model = 0),
            ("n_ctx", |c| c.n_ctx = usize::MAX),
            ("n_kv_heads", |c| c.attention.n_kv_heads = 3),
            ("rotary dimensions", |c| rope(c).n_dims = 3),
            ("rotary dimensions", |c| rope(c).n_dims = 4),
            ("norm_eps", |c| c.norm_eps = f64::NAN),
            ("rope theta", |c| rope(c).theta = 0.0),
            ("rope factor", |c| {
                rope(c).scaling = RopeScaling::Linear { factor: f64::INFINITY };
            }),
            ("high_freq_factor", |c| {
                rope(c).scaling = RopeScaling::Llama3 {
                    factor: 8.0,
                    low_freq_factor: 4.0,
                    high_freq_factor: 4.0,
                    original_n_ctx: 16,
                };
            }),
            ("the scale of attention scores", |c| {
                c.attention.scales = AttentionScale::ByLayer(f64::NAN);
            }),
            ("the soft cap of attention scores", |c| c.attention.soft_cap = Some(0.0)),
            ("the soft cap of logits", |c| c.unembedding.soft_cap = Some(-1.0)),
            ("sliding_window", |c| slide(c, 0, vec![true])),
            ("layer_types", |c| slide(c, 4, vec![true, false])),
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
