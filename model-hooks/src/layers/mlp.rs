//! The gated MLP of Llama (Shazeer, 2020).

use burn::tensor::Tensor;
use burn::tensor::activation::silu;

use super::Linear;
use crate::hook::{Hook, fire};
use crate::hook_point::{HookPoint, Site};
use crate::positions::Positions;

/// `(silu(x · gate) ⊙ (x · up)) · down`.
#[derive(Debug, Clone)]
pub(crate) struct GatedMlp {
    pub(crate) gate: Linear,
    pub(crate) up: Linear,
    pub(crate) down: Linear,
}

impl GatedMlp {
    pub(crate) fn forward<H: Hook>(
        &self,
        x: Tensor<3>,
        layer: usize,
        positions: &Positions,
        hook: &mut H,
    ) -> Tensor<3> {
        let shape @ [batch, pos, d_model] = x.dims();
        let point = |site| HookPoint::Block { layer, site };
        let rows = x.reshape([batch * pos, d_model]);
        let (gate, up) = (self.gate.forward(rows.clone()), self.up.forward(rows));
        let [n, d_mlp] = gate.dims();

        let sites = [Site::MlpPre, Site::MlpPreLinear, Site::MlpPost];
        let post = if sites.iter().any(|&site| hook.wants(point(site))) {
            let wide = |x: Tensor<2>| x.reshape([batch, pos, d_mlp]);
            let gate = fire(hook, point(Site::MlpPre), wide(gate), positions);
            let up = fire(hook, point(Site::MlpPreLinear), wide(up), positions);
            let post = fire(hook, point(Site::MlpPost), silu(gate) * up, positions);
            post.reshape([n, d_mlp])
        } else {
            kernels::silu_mul(gate, up)
        };
        self.down.forward(post).reshape(shape)
    }
}
