//! Captures: keeping what was asked for.

use std::collections::BTreeMap;

use burn::tensor::Tensor;

use crate::activation::Activation;
use crate::hook::{Hook, HookError};
use crate::hook_point::HookPoint;
use crate::positions::Positions;

/// Keeps the activations at the points asked for, as they pass by.
///
/// A point that is passed several times (cached steps) keeps its latest activation.
///
/// ```no_run
/// # fn f(model: &model_hooks::LanguageModel, tokens: &model_hooks::TokenBatch) -> Result<(), model_hooks::ForwardError> {
/// use model_hooks::{ActivationCache, HookPoint};
/// let mut cache = ActivationCache::new([HookPoint::resid_post(3)]);
/// model.run_until(tokens, 4, &mut cache)?;
/// let residual = cache.get::<3>(HookPoint::resid_post(3)).expect("asked for");
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Default)]
pub struct ActivationCache {
    kept: BTreeMap<HookPoint, Option<Activation>>,
}

impl ActivationCache {
    /// A cache that will keep these points.
    pub fn new(points: impl IntoIterator<Item = HookPoint>) -> Self {
        Self { kept: points.into_iter().map(|point| (point, None)).collect() }
    }

    /// The activation at a point, if it was asked for and has been passed.
    ///
    /// # Panics
    /// If `D` is not the point's rank.
    pub fn get<const D: usize>(&self, point: HookPoint) -> Option<Tensor<D>> {
        let kept = self.kept.get(&point)?.clone();
        kept.map(Activation::into_tensor)
    }

    /// Takes the activation at a point out of the cache.
    pub(crate) fn take(&mut self, point: HookPoint) -> Option<Activation> {
        self.kept.get_mut(&point)?.take()
    }

    /// The points asked for.
    pub fn points(&self) -> impl Iterator<Item = HookPoint> {
        self.kept.keys().copied()
    }

    /// All that was kept, by point.
    pub fn iter(&self) -> impl Iterator<Item = (HookPoint, &Activation)> {
        self.kept.iter().filter_map(|(&point, kept)| Some((point, kept.as_ref()?)))
    }
}

impl Hook for ActivationCache {
    fn wants(&self, point: HookPoint) -> bool {
        self.kept.contains_key(&point)
    }

    fn at<const D: usize>(&mut self, point: HookPoint, x: Tensor<D>, _: &Positions) -> Tensor<D> {
        self.kept.insert(point, Some(Activation::new(x.clone())));
        x
    }

    fn finish(&mut self) -> Result<(), HookError> {
        match self.kept.iter().find(|(_, kept)| kept.is_none()) {
            Some((&point, _)) => Err(HookError::NeverFired { point }),
            None => Ok(()),
        }
    }
}
