//! Gradients at hook points.

use std::collections::BTreeMap;

use burn::tensor::{Gradients, Tensor};

use crate::activation::Activation;
use crate::hook::{Hook, HookError};
use crate::hook_point::HookPoint;
use crate::positions::Positions;

/// Makes `d metric / d activation` available at any set of points, in one backward pass.
///
/// At each point it adds a zero tensor that requires a gradient: the values do not change, and the
/// gradient of the zero tensor is the gradient of the activation (`require_grad` on the activation
/// itself would panic, it is no leaf). The model's weights stay outside the graph, so nothing is
/// kept for what runs before the first point.
#[derive(Debug, Clone, Default)]
pub struct Probe {
    probes: BTreeMap<HookPoint, Option<Probed>>,
}

#[derive(Debug, Clone)]
struct Probed {
    value: Activation,
    zero: Activation,
}

impl Probe {
    /// Probes at these points.
    pub fn new(points: impl IntoIterator<Item = HookPoint>) -> Self {
        Self { probes: points.into_iter().map(|point| (point, None)).collect() }
    }

    /// The activation at a point, outside the graph.
    ///
    /// # Panics
    /// If `D` is not the point's rank.
    pub fn value<const D: usize>(&self, point: HookPoint) -> Option<Tensor<D>> {
        Some(self.probes.get(&point)?.as_ref()?.value.clone().into_tensor())
    }

    /// The gradient at a point, after `metric.backward()`. Zero where the metric does not depend
    /// on it.
    ///
    /// # Panics
    /// If `D` is not the point's rank.
    pub fn gradient<const D: usize>(
        &self,
        point: HookPoint,
        grads: &Gradients,
    ) -> Option<Tensor<D>> {
        let probed = self.probes.get(&point)?.as_ref()?;
        let zero = probed.zero.clone().into_tensor::<D>();
        Some(zero.grad(grads).unwrap_or_else(|| zero.inner().zeros_like()))
    }
}

impl Hook for Probe {
    fn wants(&self, point: HookPoint) -> bool {
        self.probes.contains_key(&point)
    }

    fn at<const D: usize>(&mut self, point: HookPoint, x: Tensor<D>, _: &Positions) -> Tensor<D> {
        let zero = Tensor::zeros(x.dims(), &x.device().autodiff()).require_grad();
        let value = if x.device().is_autodiff() { x.clone().inner() } else { x.clone() };
        let probed = Probed { value: Activation::new(value), zero: Activation::new(zero.clone()) };
        self.probes.insert(point, Some(probed));
        x + zero
    }

    fn finish(&mut self) -> Result<(), HookError> {
        match self.probes.iter().find(|(_, probed)| probed.is_none()) {
            Some((&point, _)) => Err(HookError::NeverFired { point }),
            None => Ok(()),
        }
    }
}
