//! The MLP of a block, plain or gated.

use burn::tensor::Tensor;
use kernels::Nonlinearity;

use super::Linear;
use crate::hook::{Hook, fire};
use crate::hook_point::{HookPoint, Site};
use crate::positions::Positions;

/// `f(x · up) · down`, or with a gate `(f(x · gate) ⊙ (x · up)) · down` (Shazeer, 2020).
#[derive(Debug, Clone)]
pub(crate) struct Mlp {
    pub(crate) gate: Option<Linear>,
    pub(crate) up: Linear,
    pub(crate) down: Linear,
    pub(crate) nonlinearity: Nonlinearity,
}

impl Mlp {
    pub(crate) fn forward<H: Hook>(
        &self,
        x: Tensor<3>,
        layer: usize,
        positions: &Positions,
        hook: &mut H,
    ) -> Tensor<3> {
        let shape @ [batch, pos, d_model] = x.dims();
        let rows = x.reshape([batch * pos, d_model]);
        let mut seen = |site, x: Tensor<2>| {
            let point = HookPoint::Block { layer, site };
            let dims @ [_, d_mlp] = x.dims();
            match hook.wants(point) {
                true => fire(hook, point, x.reshape([batch, pos, d_mlp]), positions).reshape(dims),
                false => x,
            }
        };
        let up = self.up.forward(rows.clone());
        let hidden = match &self.gate {
            Some(gate) => {
                let gate = seen(Site::MlpPre, gate.forward(rows));
                let up = seen(Site::MlpPreLinear, up);
                kernels::gated(gate, up, self.nonlinearity)
            }
            None => kernels::nonlinear(seen(Site::MlpPre, up), self.nonlinearity),
        };
        self.down.forward(seen(Site::MlpPost, hidden)).reshape(shape)
    }
}
