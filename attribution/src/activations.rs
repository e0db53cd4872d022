//! Effects of activations at any hook point.

use burn::tensor::{Tensor, TensorData};
use model_hooks::{Activation, Axis, HookPoint, Probe};

use crate::attribution::gradient_at;
use crate::baseline::Baseline;
use crate::effect::Effect;
use crate::error::AttributionError;
use crate::metric::Metric;
use crate::study::Study;

/// The effects that the numbers of an activation have on the metric of each conversation.
#[derive(Debug, Clone)]
pub struct ActivationEffects {
    /// The point.
    pub point: HookPoint,
    /// An effect for each number: axes as [`HookPoint::axes`].
    pub effects: Activation,
}

impl ActivationEffects {
    /// Summed over all but conversations and positions (of queries, where the activation has them).
    ///
    /// # Shapes
    /// `[conversations, pos]`.
    pub fn by_position(&self) -> Tensor<2> {
        match (self.effects.clone(), position_axis(self.point)) {
            (Activation::Rank3(x), _) => x.sum_dim(2).squeeze_dim(2),
            (Activation::Rank4(x), 1) => x.sum_dim(3).sum_dim(2).flatten::<3>(2, 3).squeeze_dim(2),
            (Activation::Rank4(x), _) => x.sum_dim(3).sum_dim(1).flatten::<3>(2, 3).squeeze_dim(1),
        }
    }

    /// Summed over everything but conversations.
    pub fn by_conversation(&self) -> Vec<Effect> {
        let sums = self.by_position().sum_dim(1).into_data();
        sums.iter::<f64>().map(Effect::of_change).collect()
    }
}

impl<M: Metric> Study<'_, M> {
    /// The effects of activations, estimated by the gradient at the clean run (attribution patching;
    /// Nanda, 2023): all points in one backward pass.
    ///
    /// # Errors
    /// If the model does not have a point, or a pass fails.
    pub fn attribute_activations(
        &self,
        points: &[HookPoint],
        baseline: Baseline<'_, Tensor<1>>,
    ) -> Result<Vec<ActivationEffects>, AttributionError> {
        points.iter().try_for_each(|&point| self.body().check_point(point))?;
        let mut probe = Probe::new(points.iter().copied());
        let grads = self.metric(&mut probe)?.sum().backward();
        let effects = |&point: &HookPoint| {
            let gradient = gradient_at(&probe, point, &grads);
            let shape = gradient.shape();
            let effects = self.activation_deltas(point, baseline)? * widened(gradient);
            let effects = match shape[..] {
                [batch, pos, width] => Activation::new(effects.reshape([batch, pos, width])),
                _ => Activation::new(effects),
            };
            Ok(ActivationEffects { point, effects })
        };
        points.iter().map(effects).collect()
    }

    /// What takes activations to the baseline, zero at positions that are left alone.
    ///
    /// # Shapes
    /// As the activation; `[batch, pos, 1, width]` where that has three axes.
    pub(crate) fn activation_deltas(
        &self,
        point: HookPoint,
        baseline: Baseline<'_, Tensor<1>>,
    ) -> Result<Tensor<4>, AttributionError> {
        let clean = widened(self.captured(point)?);
        let deltas = match baseline {
            Baseline::Zero => -clean,
            Baseline::Mean(mean) => {
                let [.., heads, width] = clean.dims();
                let (expected, [actual]) = (heads * width, mean.dims());
                if position_axis(point) != 1 || expected != actual {
                    return Err(AttributionError::Mean { point, expected, actual });
                }
                mean.clone().reshape([1, 1, heads, width]) - clean
            }
            Baseline::Run(other) => widened(self.captured_other(point, other)?) - clean,
        };
        let positions = self.positions()?;
        let (batch, pos) = (positions.n_rows(), positions.n_columns());
        let shape = if position_axis(point) == 1 { [batch, pos, 1, 1] } else { [batch, 1, pos, 1] };
        let mask: Vec<f32> = self.mask(0)?.into_data().iter().collect();
        Ok(deltas * Tensor::from_data(TensorData::new(mask, shape), self.body().device()))
    }
}

/// Which axis counts positions: of queries, where the activation has them.
pub(crate) fn position_axis(point: HookPoint) -> usize {
    let is_position = |axis: &Axis| matches!(axis, Axis::Pos | Axis::Query);
    point.axes().iter().position(is_position).expect("every activation has positions")
}

/// With an axis of one head, where there are no heads.
fn widened(x: Activation) -> Tensor<4> {
    match x {
        Activation::Rank3(x) => x.unsqueeze_dim(2),
        Activation::Rank4(x) => x,
    }
}
