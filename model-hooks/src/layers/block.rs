//! A block: attention and an MLP, each adding to the residual stream.

use burn::tensor::Tensor;

use super::{Attention, Mlp, Norm, NormPoints, Pass};
use crate::hook::{Hook, fire};
use crate::hook_point::{HookPoint, Site};

/// What all decoders have in common. An architecture says which norms there are, and whether both
/// halves read the residual stream as the block finds it.
#[derive(Debug, Clone)]
pub(crate) struct Block {
    pub(crate) ln1: Option<Norm>,
    pub(crate) attention: Attention,
    pub(crate) ln1_post: Option<Norm>,
    pub(crate) ln2: Option<Norm>,
    pub(crate) mlp: Mlp,
    pub(crate) ln2_post: Option<Norm>,
    pub(crate) parallel: bool,
}

impl Block {
    /// # Shapes
    /// `x` and the result: `[batch, pos, d_model]`.
    pub(crate) fn forward<H: Hook>(
        &self,
        x: Tensor<3>,
        layer: usize,
        pass: &mut Pass<'_>,
        hook: &mut H,
    ) -> Tensor<3> {
        let positions = pass.positions;
        let point = |site| HookPoint::Block { layer, site };
        let resid_pre = fire(hook, point(Site::ResidPre), x, positions);

        let norm = |norm: &Option<Norm>, x, points, hook: &mut H| match norm {
            Some(norm) => norm.forward(x, points, positions, hook),
            None => x,
        };
        let normed = norm(&self.ln1, resid_pre.clone(), NormPoints::first(layer), hook);
        let attn_out = self.attention.forward(normed, layer, pass, hook);
        let attn_out = norm(&self.ln1_post, attn_out, NormPoints::first_post(layer), hook);
        let attn_out = fire(hook, point(Site::AttnOut), attn_out, positions);

        let after = resid_pre.clone() + attn_out;
        let (read, resid_mid) = if self.parallel {
            (resid_pre, after)
        } else {
            let resid_mid = fire(hook, point(Site::ResidMid), after, positions);
            (resid_mid.clone(), resid_mid)
        };
        let normed = norm(&self.ln2, read, NormPoints::second(layer), hook);
        let mlp_out = self.mlp.forward(normed, layer, positions, hook);
        let mlp_out = norm(&self.ln2_post, mlp_out, NormPoints::second_post(layer), hook);
        let mlp_out = fire(hook, point(Site::MlpOut), mlp_out, positions);
        fire(hook, point(Site::ResidPost), resid_mid + mlp_out, positions)
    }

    /// The places that a pass comes by, in order.
    pub(crate) fn sites(&self) -> impl Iterator<Item = Site> {
        Site::ALL.into_iter().filter(|site| match site {
            Site::Ln1Scale | Site::Ln1Normalized => self.ln1.is_some(),
            Site::Ln1PostScale | Site::Ln1PostNormalized => self.ln1_post.is_some(),
            Site::Ln2Scale | Site::Ln2Normalized => self.ln2.is_some(),
            Site::Ln2PostScale | Site::Ln2PostNormalized => self.ln2_post.is_some(),
            Site::RotQ | Site::RotK => self.attention.rotary_idx.is_some(),
            Site::ResidMid => !self.parallel,
            Site::MlpPreLinear => self.mlp.gate.is_some(),
            _ => true,
        })
    }
}
