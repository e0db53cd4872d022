//! Normalisation of rows.

use burn::tensor::Tensor;

use crate::hook::{Hook, fire};
use crate::hook_point::{HookPoint, Site};
use crate::positions::Positions;

/// A norm over the last axis: root-mean-square (Zhang & Sennrich, 2019) without a bias,
/// `x / sqrt(mean(x²) + epsilon) ⊙ gain`; a layer norm (Ba et al., 2016) with one,
/// `(x − mean(x)) / sqrt(var(x) + epsilon) ⊙ gain + bias`.
#[derive(Debug, Clone)]
pub(crate) struct Norm {
    pub(crate) gain: Tensor<1>,
    pub(crate) bias: Option<Tensor<1>>,
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

    /// Before attention.
    pub(crate) fn first(layer: usize) -> Self {
        Self::block(layer, Site::Ln1Scale, Site::Ln1Normalized)
    }

    /// Behind attention.
    pub(crate) fn first_post(layer: usize) -> Self {
        Self::block(layer, Site::Ln1PostScale, Site::Ln1PostNormalized)
    }

    /// Before the MLP.
    pub(crate) fn second(layer: usize) -> Self {
        Self::block(layer, Site::Ln2Scale, Site::Ln2Normalized)
    }

    /// Behind the MLP.
    pub(crate) fn second_post(layer: usize) -> Self {
        Self::block(layer, Site::Ln2PostScale, Site::Ln2PostNormalized)
    }

    fn block(layer: usize, scale: Site, normalized: Site) -> Self {
        let point = |site| HookPoint::Block { layer, site };
        Self { scale: point(scale), normalized: point(normalized) }
    }
}

impl Norm {
    pub(crate) fn forward<H: Hook>(
        &self,
        x: Tensor<3>,
        points: NormPoints,
        positions: &Positions,
        hook: &mut H,
    ) -> Tensor<3> {
        let shape @ [batch, pos, d_model] = x.dims();
        if !hook.wants(points.scale) && !hook.wants(points.normalized) {
            return self.rows(x.reshape([batch * pos, d_model])).reshape(shape);
        }
        let x = self.centred(x);
        let scale = fire(hook, points.scale, self.scale(x.clone()), positions);
        let normalized = fire(hook, points.normalized, x / scale, positions);
        self.affine(normalized)
    }

    /// Of rows as wide as the gain.
    pub(crate) fn rows(&self, x: Tensor<2>) -> Tensor<2> {
        let (gain, epsilon) = (self.gain.clone(), self.epsilon);
        match &self.bias {
            None => kernels::rms_norm(x, gain, epsilon),
            Some(bias) => kernels::layer_norm(x, gain, bias.clone(), epsilon),
        }
    }

    /// `x` less its mean, where this norm takes it off.
    pub(crate) fn centred(&self, x: Tensor<3>) -> Tensor<3> {
        match self.bias {
            None => x,
            Some(_) => x.clone() - x.mean_dim(2),
        }
    }

    /// The divisor of what [`centred`](Self::centred) gives.
    ///
    /// # Shapes
    /// `[batch, pos, 1]`.
    pub(crate) fn scale(&self, centred: Tensor<3>) -> Tensor<3> {
        (centred.square().mean_dim(2) + self.epsilon).sqrt()
    }

    fn affine(&self, normalized: Tensor<3>) -> Tensor<3> {
        let x = normalized * self.gain.clone().unsqueeze();
        match &self.bias {
            None => x,
            Some(bias) => x + bias.clone().unsqueeze(),
        }
    }
}
