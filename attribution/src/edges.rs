//! Effects of latents by way of latents further up.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use kernels::sparse_dot;
use model_hooks::{ActivationCache, Probe};
use sae_core::SparseLatents;

use crate::attribution::{At, ErrorGradient, gradient_at};
use crate::baseline::Baseline;
use crate::effect::Effect;
use crate::error::AttributionError;
use crate::metric::Metric;
use crate::site::{Changes, SaeMeans, SaeSite, joined_rows};
use crate::study::Study;

/// What the latents of an SAE do to the metric by way of one latent of an SAE further up.
#[derive(Debug, Clone, PartialEq)]
pub struct Edges {
    /// The latent further up.
    pub target: usize,
    /// For each conversation, the effect of every latent further down, summed over its positions.
    pub by_conversation: Vec<BTreeMap<usize, Effect>>,
    /// For each conversation, the effect of the error further down.
    pub error: Vec<Effect>,
}

impl Edges {
    /// Summed over conversations.
    pub fn by_latent(&self) -> BTreeMap<usize, Effect> {
        let mut sums = BTreeMap::<usize, Effect>::new();
        for (&latent, &effect) in self.by_conversation.iter().flatten() {
            let sum = sums.entry(latent).or_default();
            *sum = *sum + effect;
        }
        sums
    }
}

impl<M: Metric> Study<'_, M> {
    /// The effects that latents of the SAE `from` have on the metric by way of each of some latents of
    /// the SAE `to`, estimated (Marks et al., 2024):
    ///
    /// ```text
    /// effect(u → d) = Σ_positions of d  ∂metric/∂z_d · ∂z_d/∂z_u · δ_u
    /// ```
    ///
    /// where `δ_u` takes `u` to the baseline, and `∂z_d/∂z_u` goes through everything between the two
    /// and the encoder of `to`. One backward pass for many targets.
    ///
    /// # Errors
    /// If an SAE does not fit its point, `to` does not come behind `from`, or a pass fails.
    ///
    /// # Panics
    /// If a target is not a latent of `to`.
    pub fn attribute_edges(
        &self,
        from: &SaeSite<'_>,
        to: &SaeSite<'_>,
        targets: &[usize],
        baseline: Baseline<'_, SaeMeans>,
    ) -> Result<Vec<Edges>, AttributionError> {
        [from, to].into_iter().try_for_each(|site| site.check(self))?;
        let d_sae = to.sae.config().d_sae;
        assert!(
            targets.iter().all(|&t| t < d_sae),
            "targets {targets:?} are not all below {d_sae}"
        );
        let slopes = self.slopes(to)?;
        let (directions, n_conversations) = (to.sae.directions(), self.conversations().len());
        let changes = Changes::new(self, from, baseline, joined_rows(self.captured(from.point)?))?;
        let positions = self.positions()?;
        let pos = positions.n_columns();
        let n = n_conversations * pos;
        let at_once = (self.batch_tokens() / n).max(1);
        let mut edges = Vec::with_capacity(targets.len());
        for targets in targets.chunks(at_once) {
            let rows = self.all().repeat(targets.len());
            let mut hook = (Probe::new([from.point]), ActivationCache::new([to.point]));
            self.measure(&rows, &mut hook)?;
            let (probe, cache) = hook;
            let (_, x) = cache.iter().next().expect("the pass came by");
            let x = joined_rows(x.clone());
            if !x.device().is_autodiff() {
                return Err(AttributionError::NotBehind { from: from.point, to: to.point });
            }
            let latents = to.sae.encode(x);
            let mut sum: Option<Tensor<1>> = None;
            for (nth, &target) in targets.iter().enumerate() {
                let direction = directions.clone().narrow(0, target, 1).transpose();
                // What a unit of the target does to the metric at each position.
                let slope = slopes.clone().matmul(direction).reshape([n]);
                let values = latents.latent(target).narrow(0, nth * n, n);
                let carried = (values * slope.autodiff()).sum();
                sum = Some(match sum {
                    Some(sum) => sum + carried,
                    None => carried,
                });
            }
            let grads = sum.expect("a target").backward();
            let gradient = joined_rows(gradient_at(&probe, from.point, &grads));
            for (nth, &target) in targets.iter().enumerate() {
                let gradient = gradient.clone().narrow(0, nth * n, n);
                let indices = changes.indices.clone();
                let by_latent =
                    sparse_dot(indices.clone(), changes.directions.clone(), gradient.clone());
                let effects = changes.deltas.clone() * by_latent;
                let effects = SparseLatents::new(indices, effects, from.sae.config().d_sae);
                let mut by_conversation = vec![BTreeMap::<usize, Effect>::new(); n_conversations];
                for entry in effects.entries() {
                    let sum = by_conversation[entry.row / pos].entry(entry.latent_idx).or_default();
                    *sum = *sum + Effect::of_change(entry.value.into());
                }
                let error = (changes.error_deltas.clone() * gradient).sum_dim(1);
                let error = error.reshape([n_conversations, pos]).sum_dim(1).into_data();
                let error = error.iter::<f64>().map(Effect::of_change).collect();
                edges.push(Edges { target, by_conversation, error });
            }
        }
        Ok(edges)
    }

    /// `∂metric/∂x` at a site, zero at positions that are left alone.
    ///
    /// # Shapes
    /// `[n, d_in]`.
    fn slopes(&self, site: &SaeSite<'_>) -> Result<Tensor<2>, AttributionError> {
        let mut gradients = self.gradients(&[*site], None, ErrorGradient::Passes)?;
        let At { gradient, .. } = gradients.sites.swap_remove(0);
        Ok(gradient * self.mask(site.first_position())?)
    }
}
