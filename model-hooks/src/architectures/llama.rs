//! Llama (Touvron et al., 2023): pre-norm, rotary attention, gated MLP. SmolLM2 is one.

use burn::tensor::Tensor;

use super::weights::Weights;
use super::{Network, Pass};
use crate::config::{self, AttentionConfig, MlpConfig, ModelConfig};
use crate::hook::{Hook, fire};
use crate::hook_point::{HookPoint, Site};
use crate::layers::{Attention, GatedMlp, NormPoints, RmsNorm};
use crate::load::LoadError;

/// All sites: attention and MLP run one after the other, and the MLP is gated.
pub(super) const SITES: &[Site] = &Site::ALL;

#[derive(Debug, Clone)]
pub(crate) struct Block {
    ln1: RmsNorm,
    attention: Attention,
    ln2: RmsNorm,
    mlp: GatedMlp,
}

impl Block {
    pub(super) fn forward<H: Hook>(
        &self,
        x: Tensor<3>,
        layer: usize,
        pass: &mut Pass<'_>,
        hook: &mut H,
    ) -> Tensor<3> {
        let positions = pass.positions;
        let point = |site| HookPoint::Block { layer, site };
        let resid_pre = fire(hook, point(Site::ResidPre), x, positions);

        let normed = self.ln1.forward(resid_pre.clone(), NormPoints::first(layer), positions, hook);
        let attn_out =
            self.attention.forward(normed, layer, pass.rotary, positions, pass.cache, hook);
        let attn_out = fire(hook, point(Site::AttnOut), attn_out, positions);
        let resid_mid = fire(hook, point(Site::ResidMid), resid_pre + attn_out, positions);

        let normed =
            self.ln2.forward(resid_mid.clone(), NormPoints::second(layer), positions, hook);
        let mlp_out = self.mlp.forward(normed, layer, positions, hook);
        let mlp_out = fire(hook, point(Site::MlpOut), mlp_out, positions);
        fire(hook, point(Site::ResidPost), resid_mid + mlp_out, positions)
    }
}

pub(super) fn load(config: &ModelConfig, weights: &mut Weights<'_>) -> Result<Network, LoadError> {
    let (d_model, d_vocab) = (config.d_model, config.d_vocab);
    let embedding = weights.take("model.embed_tokens.weight", [d_vocab, d_model])?;
    let blocks = (0..config.n_layers)
        .map(|layer| block(config, weights, layer).map(super::Block::Llama))
        .collect::<Result<_, _>>()?;
    let ln_final = norm(config, weights, "model.norm")?;
    let unembedding = if config.tie_embeddings && !weights.has("lm_head.weight") {
        embedding.clone()
    } else {
        weights.take("lm_head.weight", [d_vocab, d_model])?
    };
    Ok(Network { embedding, blocks, ln_final, unembedding })
}

fn block(
    config: &ModelConfig,
    weights: &mut Weights<'_>,
    layer: usize,
) -> Result<Block, LoadError> {
    let name = |part: &str| format!("model.layers.{layer}.{part}");
    let d_model = config.d_model;
    let AttentionConfig { n_heads, n_kv_heads, d_head, bias, .. } = config.attention;
    let (d_query, d_key) = (n_heads * d_head, n_kv_heads * d_head);
    let attention = Attention {
        query: weights.linear(&name("self_attn.q_proj"), [d_model, d_query], bias)?,
        key: weights.linear(&name("self_attn.k_proj"), [d_model, d_key], bias)?,
        value: weights.linear(&name("self_attn.v_proj"), [d_model, d_key], bias)?,
        output: weights.linear(&name("self_attn.o_proj"), [d_query, d_model], bias)?,
        n_heads,
        n_kv_heads,
        d_head,
    };
    let MlpConfig { d_mlp, activation: config::Activation::Silu, bias } = config.mlp;
    let mlp = GatedMlp {
        gate: weights.linear(&name("mlp.gate_proj"), [d_model, d_mlp], bias)?,
        up: weights.linear(&name("mlp.up_proj"), [d_model, d_mlp], bias)?,
        down: weights.linear(&name("mlp.down_proj"), [d_mlp, d_model], bias)?,
    };
    Ok(Block {
        ln1: norm(config, weights, &name("input_layernorm"))?,
        attention,
        ln2: norm(config, weights, &name("post_attention_layernorm"))?,
        mlp,
    })
}

fn norm(config: &ModelConfig, weights: &mut Weights<'_>, name: &str) -> Result<RmsNorm, LoadError> {
    let gain = weights.take(&format!("{name}.weight"), [config.d_model])?;
    Ok(RmsNorm { gain, epsilon: config.norm_eps })
}
