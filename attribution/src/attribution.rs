//! Effects of all latents at once, out of gradients.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use kernels::sparse_dot;
use model_hooks::{Activation, Hook, HookError, HookPoint, Positions, Probe};
use sae_core::{ErrorTerm, SparseLatents, Splice};

use crate::baseline::Baseline;
use crate::effect::Effect;
use crate::error::AttributionError;
use crate::integration::Integration;
use crate::metric::Metric;
use crate::shift::Shift;
use crate::site::{Changes, SaeMeans, SaeSite, joined_rows};
use crate::study::Study;

/// How effects are estimated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttributionConfig {
    /// Where on the way to the baseline the gradient is taken.
    pub integration: Integration,
    /// What goes that way.
    pub path: Path,
    /// In how many groups the latents go, each group by itself from the clean run; at least one.
    /// Latents of one group are as many apart.
    ///
    /// All together, as in Marks et al. (2024), they leave the model with nothing to work on, and
    /// gradients there say little about a latent that goes alone, as ablation has it: the more
    /// groups, the nearer to that, each at the price of all steps. Where the gradient is taken at the
    /// clean run alone, they are all the same.
    pub n_groups: usize,
    /// Which way gradients pass an SAE further up.
    pub error_gradient: ErrorGradient,
}

/// What moves from the clean run to the baseline; the rest stays as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// All latents of the SAE. The error stays, as it does when latents are ablated.
    Latents,
    /// All latents and the error (Marks et al., 2024).
    LatentsAndError,
}

/// Which way gradients pass an SAE on their way down to another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorGradient {
    /// Through its latents and its error, which together are the model as it is.
    Passes,
    /// Through its latents alone (Marks et al., 2024): what reaches an SAE further down is what it
    /// does by way of those.
    Stops,
}

impl AttributionConfig {
    /// Gradient × activation: one backward pass for the latents of all SAEs.
    pub const GRADIENT_TIMES_ACTIVATION: Self = Self {
        integration: Integration::GRADIENT_TIMES_ACTIVATION,
        path: Path::Latents,
        n_groups: 1,
        error_gradient: ErrorGradient::Passes,
    };

    /// Integrated gradients, the error kept.
    pub fn integrated(integration: Integration) -> Self {
        Self { integration, ..Self::GRADIENT_TIMES_ACTIVATION }
    }
}

/// The effects that the latents and the error of one SAE have on the metric of each conversation,
/// position by position.
#[derive(Debug, Clone)]
pub struct SiteEffects {
    /// Where the SAE stands.
    pub point: HookPoint,
    /// Effects for values: one row for every position of every conversation in turn, padding
    /// included (nothing has an effect there).
    pub latents: SparseLatents,
    /// The effect of the error, `[conversations, pos]`.
    pub error: Tensor<2>,
    /// How far the effects add up to what moving all of it does: measured where gradients are
    /// integrated, which claims that they do.
    pub completeness: Option<Completeness>,
    positions: Positions,
}

/// Whether effects add up, over all conversations.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Completeness {
    /// The sum of the effects of what was moved.
    pub attributed: Effect,
    /// What moving all of it at once does, or each group of it by itself.
    pub measured: Effect,
}

impl Completeness {
    /// `attributed − measured`.
    pub fn residual(&self) -> f64 {
        self.attributed.change() - self.measured.change()
    }
}

/// The effect of one latent at one token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenEffect {
    /// Index of the conversation.
    pub conversation: usize,
    /// Absolute position in it.
    pub position: usize,
    /// Which latent.
    pub latent_idx: usize,
    /// Its effect.
    pub effect: Effect,
}

impl SiteEffects {
    /// Together with the effects of other latents of the same SAE on the same texts.
    fn plus(self, other: Self) -> Self {
        let Self { point, latents, error, completeness, positions } = self;
        let SparseLatents { indices, values, d_sae } = latents;
        let both = completeness.zip(other.completeness).map(|(a, b)| Completeness {
            attributed: a.attributed + b.attributed,
            measured: a.measured + b.measured,
        });
        Self {
            point,
            latents: SparseLatents::new(indices, values + other.latents.values, d_sae),
            error: error + other.error,
            completeness: both,
            positions,
        }
    }

    /// All effects that are not zero.
    pub fn tokens(&self) -> impl Iterator<Item = TokenEffect> {
        let n = self.positions.n_columns();
        self.latents.entries().map(move |entry| {
            let (conversation, column) = (entry.row / n, entry.row % n);
            let position = self.positions.get(conversation, column);
            TokenEffect {
                conversation,
                position: position.expect("nothing has an effect on padding"),
                latent_idx: entry.latent_idx,
                effect: Effect::of_change(entry.value.into()),
            }
        })
    }

    /// The effect of every latent of each conversation, summed over its positions. In order of the
    /// latents.
    pub fn by_conversation(&self) -> Vec<BTreeMap<usize, Effect>> {
        let mut sums = vec![BTreeMap::<usize, Effect>::new(); self.positions.n_rows()];
        for token in self.tokens() {
            let sum = sums[token.conversation].entry(token.latent_idx).or_default();
            *sum = *sum + token.effect;
        }
        sums
    }

    /// The effect of every latent, summed over positions and conversations.
    pub fn by_latent(&self) -> BTreeMap<usize, Effect> {
        let mut sums = BTreeMap::<usize, Effect>::new();
        for (latent, effect) in self.by_conversation().into_iter().flatten() {
            let sum = sums.entry(latent).or_default();
            *sum = *sum + effect;
        }
        sums
    }

    /// The effect of the error of each conversation, summed over its positions.
    pub fn error_by_conversation(&self) -> Vec<Effect> {
        let sums = self.error.clone().sum_dim(1).into_data();
        sums.iter::<f64>().map(Effect::of_change).collect()
    }
}

impl<M: Metric> Study<'_, M> {
    /// The effects of all active latents and of the errors of some SAEs, estimated: on the metric of
    /// each conversation, of changing each to the baseline.
    ///
    /// Gradient × activation runs one backward pass for all sites. Integrated gradients run one for
    /// each step of each group of each site, moving one SAE at a time. Work on latents is
    /// O(active · d_in).
    ///
    /// # Errors
    /// If an SAE does not fit its point, or a pass fails.
    ///
    /// # Panics
    /// If two sites are at one point, or there are no groups.
    pub fn attribute(
        &self,
        sites: &[SaeSite<'_>],
        baseline: Baseline<'_, SaeMeans>,
        config: AttributionConfig,
    ) -> Result<Vec<SiteEffects>, AttributionError> {
        assert!(config.n_groups > 0, "no groups of latents");
        sites.iter().try_for_each(|site| site.check(self))?;
        let clean = self.gradients(sites, None, config.error_gradient)?;
        let mut effects = Vec::with_capacity(sites.len());
        for (site_idx, site) in sites.iter().enumerate() {
            let At { x, gradient } = clean.sites[site_idx].clone();
            let changes = Changes::new(self, site, baseline, x)?;
            if config.integration.is_at_clean_run() {
                effects.push(self.effects(site.point, changes, gradient, None)?);
                continue;
            }
            let groups = (0..config.n_groups).map(|group| {
                let part = changes.group(group, config.n_groups);
                self.integrated(sites, site_idx, part, &clean, config)
            });
            let sum = groups.reduce(|sum, part| Ok(sum?.plus(part?)));
            effects.push(sum.expect("at least one group")?);
        }
        Ok(effects)
    }

    /// The effects of some changes at one of the sites, which go their way by themselves.
    fn integrated(
        &self,
        sites: &[SaeSite<'_>],
        site_idx: usize,
        changes: Changes,
        clean: &Gradients,
        config: AttributionConfig,
    ) -> Result<SiteEffects, AttributionError> {
        let point = sites[site_idx].point;
        let with_error = config.path == Path::LatentsAndError;
        let way = changes.whole(with_error);
        let gradient = &clean.sites[site_idx].gradient;
        let mut mean = gradient.zeros_like();
        for (alpha, weight) in config.integration.nodes() {
            let gradient = if alpha == 0.0 {
                gradient.clone()
            } else {
                let shift = (point, way.clone() * alpha);
                let mut there = self.gradients(sites, Some(shift), config.error_gradient)?;
                there.sites.swap_remove(site_idx).gradient
            };
            mean = mean + gradient * weight;
        }
        let moved = self.metric(&mut self.shift(point, way)?)?;
        let measured = Effect::between(sum(moved), clean.metric);
        self.effects(point, changes, mean, Some((measured, with_error)))
    }

    /// `delta ⊙ gradient`, for latents and the error.
    fn effects(
        &self,
        point: HookPoint,
        changes: Changes,
        gradient: Tensor<2>,
        measured: Option<(Effect, bool)>,
    ) -> Result<SiteEffects, AttributionError> {
        let Changes { indices, deltas, error_deltas, directions } = changes;
        let [d_sae, _] = directions.dims();
        let slopes = sparse_dot(indices.clone(), directions, gradient.clone());
        let latents = SparseLatents::new(indices, deltas * slopes, d_sae);
        let positions = self.positions()?;
        let error = (error_deltas * gradient).sum_dim(1);
        let error = error.reshape([positions.n_rows(), positions.n_columns()]);
        let completeness = measured.map(|(measured, with_error)| {
            let of_error = if with_error { sum(error.clone()) } else { 0.0 };
            let attributed = Effect::of_change(sum(latents.values.clone()) + of_error);
            Completeness { attributed, measured }
        });
        Ok(SiteEffects { point, latents, error, completeness, positions })
    }

    /// One backward pass: activations and gradients at all sites, one of them shifted.
    pub(crate) fn gradients(
        &self,
        sites: &[SaeSite<'_>],
        shift: Option<(HookPoint, Tensor<2>)>,
        error_gradient: ErrorGradient,
    ) -> Result<Gradients, AttributionError> {
        let points: Vec<HookPoint> = sites.iter().map(|site| site.point).collect();
        let distinct = (1..points.len()).all(|i| !points[..i].contains(&points[i]));
        assert!(distinct, "two SAEs at one point of {points:?}");
        let shift = shift.map(|(point, shift)| self.shift(point, shift)).transpose()?;
        let stops = match error_gradient {
            ErrorGradient::Passes => None,
            ErrorGradient::Stops => Some(StopErrors::new(sites)),
        };
        let mut hook = (shift, (stops, Probe::new(points.iter().copied())));
        let metric = self.metric(&mut hook)?.sum();
        let (_, (_, probe)) = hook;
        let value = sum(metric.clone().inner());
        let grads = metric.backward();
        let at = |&point: &HookPoint| {
            let x = match point.axes().len() {
                3 => probe.value::<3>(point).map(Activation::new),
                _ => probe.value::<4>(point).map(Activation::new),
            };
            let x = joined_rows(x.expect("the probe was passed"));
            At { x, gradient: joined_rows(gradient_at(&probe, point, &grads)) }
        };
        Ok(Gradients { metric: value, sites: points.iter().map(at).collect() })
    }

    /// # Shapes
    /// `rows`: one for every position of every conversation in turn.
    pub(crate) fn shift(
        &self,
        point: HookPoint,
        rows: Tensor<2>,
    ) -> Result<Shift, AttributionError> {
        let positions = self.positions()?;
        let [_, width] = rows.dims();
        let shape = [positions.n_rows(), positions.n_columns(), width];
        Ok(Shift::new(point, Activation::new(rows.reshape(shape))))
    }
}

pub(crate) struct Gradients {
    /// Summed over conversations.
    metric: f64,
    pub(crate) sites: Vec<At>,
}

/// At one site, `[n, d_in]`.
#[derive(Clone)]
pub(crate) struct At {
    x: Tensor<2>,
    pub(crate) gradient: Tensor<2>,
}

/// The gradient at a point that a pass came by.
pub(crate) fn gradient_at(
    probe: &Probe,
    point: HookPoint,
    grads: &burn::tensor::Gradients,
) -> Activation {
    let gradient = match point.axes().len() {
        3 => probe.gradient::<3>(point, grads).map(Activation::new),
        _ => probe.gradient::<4>(point, grads).map(Activation::new),
    };
    gradient.expect("the probe was passed")
}

/// Runs activations that carry gradients through SAEs whose errors carry none.
struct StopErrors<'a> {
    splices: Vec<(HookPoint, Splice<'a>)>,
}

impl<'a> StopErrors<'a> {
    fn new(sites: &[SaeSite<'a>]) -> Self {
        let splice = |site: &SaeSite<'a>| {
            (site.point, Splice::new(site.sae, site.point, ErrorTerm::KeepDetached))
        };
        Self { splices: sites.iter().map(splice).collect() }
    }
}

impl Hook for StopErrors<'_> {
    fn wants(&self, point: HookPoint) -> bool {
        self.splices.iter().any(|&(at, _)| at == point)
    }

    fn at<const D: usize>(
        &mut self,
        point: HookPoint,
        x: Tensor<D>,
        positions: &Positions,
    ) -> Tensor<D> {
        let splice = self.splices.iter_mut().find(|(at, _)| *at == point);
        match splice {
            Some((_, splice)) if x.device().is_autodiff() => splice.at(point, x, positions),
            // Nothing below asks for a gradient.
            _ => x,
        }
    }

    fn finish(&mut self) -> Result<(), HookError> {
        // The probes at the same points say whether the pass came by.
        Ok(())
    }
}

/// The sum of a tensor, on the host.
pub(crate) fn sum<const D: usize>(x: Tensor<D>) -> f64 {
    x.into_data().iter::<f64>().sum()
}
