//! Causal self-attention with grouped keys and values.

use burn::tensor::activation::softmax;
use burn::tensor::{Int, Tensor};
use kernels::KeyValues;

use super::{KvCache, Linear, RotaryTable};
use crate::hook::{Hook, fire};
use crate::hook_point::{HookPoint, Site};
use crate::positions::Positions;

/// Multi-head attention (Vaswani et al., 2017) whose key heads may each serve several query heads.
#[derive(Debug, Clone)]
pub(crate) struct Attention {
    pub(crate) query: Linear,
    pub(crate) key: Linear,
    pub(crate) value: Linear,
    pub(crate) output: Linear,
    pub(crate) n_heads: usize,
    pub(crate) n_kv_heads: usize,
    pub(crate) d_head: usize,
}

impl Attention {
    pub(crate) fn forward<H: Hook>(
        &self,
        x: Tensor<3>,
        layer: usize,
        rotary: &RotaryTable,
        positions: &Positions,
        cache: &mut KvCache,
        hook: &mut H,
    ) -> Tensor<3> {
        let [batch, pos, d_model] = x.dims();
        let point = |site| HookPoint::Block { layer, site };
        let device = x.device();
        let rows = x.reshape([batch * pos, d_model]);
        let heads = |linear: &Linear, n_heads| {
            linear.forward(rows.clone()).reshape([batch, pos, n_heads, self.d_head])
        };
        let q = fire(hook, point(Site::Q), heads(&self.query, self.n_heads), positions);
        let k = fire(hook, point(Site::K), heads(&self.key, self.n_kv_heads), positions);
        let v = fire(hook, point(Site::V), heads(&self.value, self.n_kv_heads), positions);
        let q = fire(hook, point(Site::RotQ), rotary.rotate(q), positions);
        let k = fire(hook, point(Site::RotK), rotary.rotate(k), positions);

        let scale = 1.0 / (self.d_head as f64).sqrt();
        let first_columns = cache.first_columns(&device);
        let key_values = cache.append(layer, k, v);
        let z = if hook.wants(point(Site::AttnScores)) || hook.wants(point(Site::Pattern)) {
            let scores = masked_scores(q, &key_values, first_columns, scale);
            let scores = fire(hook, point(Site::AttnScores), scores, positions);
            let pattern = fire(hook, point(Site::Pattern), pattern(scores), positions);
            weigh(pattern, &key_values)
        } else {
            kernels::attention(q, key_values, first_columns, scale)
        };
        let z = fire(hook, point(Site::Z), z, positions);
        let z = z.reshape([batch * pos, self.n_heads * self.d_head]);
        self.output.forward(z).reshape([batch, pos, d_model])
    }
}

/// What masked scores are set to: finite, so that padding queries, which see nothing, stay finite.
const MASKED: f32 = -1e30;

/// Scores `[batch, head, query, key]`, scaled and masked: the plain path that hooks can see.
fn masked_scores(
    q: Tensor<4>,
    key_values: &KeyValues,
    first_columns: Tensor<1, Int>,
    scale: f64,
) -> Tensor<4> {
    let [batch, n, n_heads, _] = q.dims();
    let device = q.device();
    let keys = joined(&key_values.prefix.as_ref().map(|p| p.0.clone()), &key_values.own.0, n_heads);
    let [_, _, total, _] = keys.dims();
    let own = key_values.own.0.dims()[1];
    let prefix = total - own;
    let scores = q.swap_dims(1, 2).matmul(keys.swap_dims(2, 3)) * scale;

    let shape = [batch, n_heads, n, total];
    let key =
        Tensor::<1, Int>::arange(0..total as i64, &device).reshape([1, 1, 1, total]).expand(shape);
    let query = Tensor::<1, Int>::arange((total - n) as i64..total as i64, &device)
        .reshape([1, 1, n, 1])
        .expand(shape);
    let first = (first_columns + prefix as i64).reshape([batch, 1, 1, 1]).expand(shape);
    let padding = key.clone().lower(first).bool_and(key.clone().greater_equal_elem(prefix as i64));
    let hidden = key.greater(query).bool_or(padding);
    scores.mask_fill(hidden, MASKED)
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
