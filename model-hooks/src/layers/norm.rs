//! Root-mean-square normalisation.

use burn::tensor::Tensor;

use crate::hook::{Hook, fire};
use crate::hook_point::{HookPoint, Site};
use crate::positions::Positions;

/// `x / sqrt(mean(x²) + epsilon) ⊙ gain`.
#[derive(Debug, Clone)]
pub(crate) struct RmsNorm {
    pub(crate) gain: Tensor<1>,
    pub(crate) epsilon: f64,
}

/// The two hook points of a norm.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NormPoints {
    scale: HookPoint,
    normalized: HookPoint,
}

impl NormPoints {
    pub(crate) const FINAL: Self =
        Self { scale: HookPoint::LnFinalScale, normalized: HookPoint::LnFinalNormalized };

    /// Of the norm before attention.
    pub(crate) fn first(layer: usize) -> Self {
        Self {
            scale: HookPoint::Block { layer, site: Site::Ln1Scale },
            normalized: HookPoint::Block { layer, site: Site::Ln1Normalized },
        }
    }

    /// Of the norm before the MLP.
    pub(crate) fn second(layer: usize) -> Self {
        Self {
            scale: HookPoint::Block { layer, site: Site::Ln2Scale },
            normalized: HookPoint::Block { layer, site: Site::Ln2Normalized },
        }
    }
}

impl RmsNorm {
    pub(crate) fn forward<H: Hook>(
        &self,
        x: Tensor<3>,
        points: NormPoints,
        positions: &Positions,
        hook: &mut H,
    ) -> Tensor<3> {
        let shape @ [batch, pos, d_model] = x.dims();
        if !hook.wants(points.scale) && !hook.wants(points.normalized) {
            let rows = x.reshape([batch * pos, d_model]);
            return kernels::rms_norm(rows, self.gain.clone(), self.epsilon).reshape(shape);
        }
        let scale = (x.clone().square().mean_dim(2) + self.epsilon).sqrt();
        let scale = fire(hook, points.scale, scale, positions);
        let normalized = fire(hook, points.normalized, x / scale, positions);
        normalized * self.gain.clone().unsqueeze()
    }
}
