//! Causal self-attention with grouped keys and values.

use burn::tensor::activation::softmax;
use burn::tensor::{Bool, Tensor};
use kernels::{AttentionConfig, KeyValues};

use super::{Linear, Norm, Pass};
use crate::config;
use crate::hook::{Hook, fire};
use crate::hook_point::{HookPoint, Site};

/// Multi-head attention (Vaswani et al., 2017) whose key heads may each serve several query heads.
#[derive(Debug, Clone)]
pub(crate) struct Attention {
    pub(crate) query: Linear,
    pub(crate) key: Linear,
    pub(crate) value: Linear,
    pub(crate) output: Linear,
    /// Over each head, or over all of them together: as wide as the gain.
    pub(crate) query_norm: Option<Norm>,
    pub(crate) key_norm: Option<Norm>,
    pub(crate) n_heads: usize,
    pub(crate) n_kv_heads: usize,
    pub(crate) d_head: usize,
    /// Which of the model's rotaries turns queries and keys.
    pub(crate) rotary_idx: Option<usize>,
    pub(crate) config: AttentionConfig,
}

impl Attention {
    /// The attention of a block, out of its query, key, value and output projections.
    pub(crate) fn new(
        config: &config::AttentionConfig,
        layer: usize,
        [query, key, value, output]: [Linear; 4],
    ) -> Self {
        Self {
            query,
            key,
            value,
            output,
            query_norm: None,
            key_norm: None,
            n_heads: config.n_heads,
            n_kv_heads: config.n_kv_heads,
            d_head: config.d_head,
            rotary_idx: config.rope_idx(layer),
            config: AttentionConfig {
                scale: config.scale(layer),
                soft_cap: config.soft_cap,
                window: config.window(layer),
            },
        }
    }

    pub(crate) fn forward<H: Hook>(
        &self,
        x: Tensor<3>,
        layer: usize,
        pass: &mut Pass<'_>,
        hook: &mut H,
    ) -> Tensor<3> {
        let [batch, pos, d_model] = x.dims();
        let positions = pass.positions;
        let point = |site| HookPoint::Block { layer, site };
        let rows = x.reshape([batch * pos, d_model]);
        let heads = |linear: &Linear, norm: &Option<Norm>, n_heads| {
            let projected = normed(linear.forward(rows.clone()), norm);
            projected.reshape([batch, pos, n_heads, self.d_head])
        };
        let q = heads(&self.query, &self.query_norm, self.n_heads);
        let q = fire(hook, point(Site::Q), q, positions);
        let k = heads(&self.key, &self.key_norm, self.n_kv_heads);
        let k = fire(hook, point(Site::K), k, positions);
        let v = heads(&self.value, &None, self.n_kv_heads);
        let v = fire(hook, point(Site::V), v, positions);
        let (q, k) = match self.rotary_idx {
            Some(rotary_idx) => {
                let rotary = &pass.rotaries[rotary_idx];
                let q = fire(hook, point(Site::RotQ), rotary.rotate(q), positions);
                (q, fire(hook, point(Site::RotK), rotary.rotate(k), positions))
            }
            None => (q, k),
        };

        let key_values = pass.cache.append(layer, k, v);
        let z = if hook.wants(point(Site::AttnScores)) || hook.wants(point(Site::Pattern)) {
            let hidden = positions.hidden(self.config.window, &q.device());
            let scores = scores(q, &key_values, hidden, &self.config);
            let scores = fire(hook, point(Site::AttnScores), scores, positions);
            let pattern = fire(hook, point(Site::Pattern), pattern(scores), positions);
            weigh(pattern, &key_values)
        } else {
            kernels::attention(q, key_values, pass.first_columns.clone(), self.config)
        };
        let z = fire(hook, point(Site::Z), z, positions);
        let z = z.reshape([batch * pos, self.n_heads * self.d_head]);
        self.output.forward(z).reshape([batch, pos, d_model])
    }
}

fn normed(x: Tensor<2>, norm: &Option<Norm>) -> Tensor<2> {
    let Some(norm) = norm else { return x };
    let shape @ [n, width] = x.dims();
    let [d] = norm.gain.dims();
    norm.rows(x.reshape([n * width / d, d])).reshape(shape)
}

/// What masked scores are set to: finite, so that padding queries, which see nothing, stay finite.
const MASKED: f32 = -1e30;

/// Scores `[batch, head, query, key]`, scaled, capped and masked: the plain path that hooks see.
fn scores(
    q: Tensor<4>,
    key_values: &KeyValues,
    hidden: Tensor<4, Bool>,
    config: &AttentionConfig,
) -> Tensor<4> {
    let [_, _, n_heads, _] = q.dims();
    let keys = joined(&key_values.prefix.as_ref().map(|p| p.0.clone()), &key_values.own.0, n_heads);
    let scores = q.swap_dims(1, 2).matmul(keys.swap_dims(2, 3)) * config.scale;
    let scores = match config.soft_cap {
        Some(cap) => (scores / cap).tanh() * cap,
        None => scores,
    };
    let shape = scores.dims();
    scores.mask_fill(hidden.expand(shape), MASKED)
}

/// Softmax over the keys; a query that sees nothing (padding) weighs nothing.
fn pattern(scores: Tensor<4>) -> Tensor<4> {
    let shape = scores.dims();
    let blind = scores.clone().max_dim(3).lower_elem(MASKED / 2.0).expand(shape);
    softmax(scores, 3).mask_fill(blind, 0.0)
}

/// `z[batch, query, head]`: the values weighed by the pattern.
fn weigh(pattern: Tensor<4>, key_values: &KeyValues) -> Tensor<4> {
    let n_heads = pattern.dims()[1];
    let prefix = key_values.prefix.as_ref().map(|p| p.1.clone());
    pattern.matmul(joined(&prefix, &key_values.own.1, n_heads)).swap_dims(1, 2)
}

/// `[batch, head, column, d_head]`: the prefix before the own columns, key heads repeated.
fn joined(prefix: &Option<Tensor<4>>, own: &Tensor<4>, n_heads: usize) -> Tensor<4> {
    let [batch, _, n_kv_heads, d_head] = own.dims();
    let all = match prefix {
        Some(prefix) => {
            let [_, n, _, _] = prefix.dims();
            let prefix = prefix.clone().expand([batch, n, n_kv_heads, d_head]);
            Tensor::cat(vec![prefix, own.clone()], 1)
        }
        None => own.clone(),
    };
    let [_, total, _, _] = all.dims();
    let group = n_heads / n_kv_heads;
    all.swap_dims(1, 2)
        .reshape([batch, n_kv_heads, 1, total, d_head])
        .expand([batch, n_kv_heads, group, total, d_head])
        .reshape([batch, n_heads, total, d_head])
}
