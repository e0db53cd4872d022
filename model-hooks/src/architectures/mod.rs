//! One file per architecture: wiring and weight names only.

mod gemma;
mod gpt2;
mod gptj;
mod llama;
mod neox;
mod olmo2;
mod opt;
mod phi3;
mod qwen;
mod weights;

use burn::tensor::Device;

use crate::config::{Architecture, ModelConfig};
use crate::layers::{Block, Embedding, Norm, Unembedding};
use crate::load::{LoadError, TensorSource};

pub use weights::WeightDtype;
pub(crate) use weights::Weights;

/// The weights of a model up to its last norm, whatever its architecture.
#[derive(Debug, Clone)]
pub(crate) struct Trunk {
    pub(crate) embedding: Embedding,
    pub(crate) blocks: Vec<Block>,
    pub(crate) ln_final: Norm,
}

type LoadTrunk = fn(&ModelConfig, &mut Weights<'_>) -> Result<Trunk, LoadError>;

/// The parts of an architecture, by their weights' names.
struct Names {
    trunk: LoadTrunk,
    unembedding: &'static str,
    unembedding_bias: bool,
}

impl Names {
    fn of(architecture: Architecture) -> Self {
        let (trunk, unembedding): (LoadTrunk, _) = match architecture {
            Architecture::Gpt2 => (gpt2::trunk, "lm_head"),
            Architecture::GptJ => (gptj::trunk, "lm_head"),
            Architecture::GptNeoX => (neox::trunk, "embed_out"),
            Architecture::Opt => (opt::trunk, "lm_head"),
            Architecture::Llama | Architecture::Mistral => (llama::trunk, "lm_head"),
            Architecture::Qwen2 => (qwen::qwen2, "lm_head"),
            Architecture::Qwen3 => (qwen::qwen3, "lm_head"),
            Architecture::Phi3 => (phi3::trunk, "lm_head"),
            Architecture::Gemma2 => (gemma::gemma2, "lm_head"),
            Architecture::Gemma3 => (gemma::gemma3, "lm_head"),
            Architecture::Olmo2 => (olmo2::trunk, "lm_head"),
        };
        Self { trunk, unembedding, unembedding_bias: architecture == Architecture::GptJ }
    }
}

/// Takes the tensors of a language model; one that is left over is an error.
pub(crate) fn load(
    config: &ModelConfig,
    tensors: &mut dyn TensorSource,
    dtype: WeightDtype,
    device: &Device,
) -> Result<(Trunk, Unembedding), LoadError> {
    let mut weights = Weights::new(tensors, dtype, device)?;
    let names = Names::of(config.architecture);
    let trunk = (names.trunk)(config, &mut weights)?;
    let weight = format!("{}.weight", names.unembedding);
    let weight = match config.unembedding.tied && !weights.has(&weight) {
        true => trunk.embedding.tokens.clone(),
        false => weights.matrix(&weight, [config.d_vocab, config.d_model])?,
    };
    let bias = names.unembedding_bias.then(|| format!("{}.bias", names.unembedding));
    let bias = bias.map(|name| weights.take(&name, [config.d_vocab])).transpose()?;
    weights.finish()?;
    Ok((trunk, Unembedding { weight, bias, soft_cap: config.unembedding.soft_cap }))
}

/// Takes the tensors of a model up to its last norm, and what `head` takes; one that is left over
/// is an error.
pub(crate) fn load_with<T>(
    config: &ModelConfig,
    tensors: &mut dyn TensorSource,
    dtype: WeightDtype,
    device: &Device,
    head: impl FnOnce(&mut Weights<'_>) -> Result<T, LoadError>,
) -> Result<(Trunk, T), LoadError> {
    let mut weights = Weights::new(tensors, dtype, device)?;
    let trunk = (Names::of(config.architecture).trunk)(config, &mut weights)?;
    let head = head(&mut weights)?;
    weights.finish()?;
    Ok((trunk, head))
}
