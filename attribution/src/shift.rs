//! Adding something to an activation.

use burn::tensor::Tensor;
use model_hooks::{Activation, Hook, HookError, HookPoint, Positions};

/// `x' = x + shift`, at one point.
#[derive(Debug, Clone)]
pub(crate) struct Shift {
    point: HookPoint,
    shift: Activation,
    fired: bool,
}

impl Shift {
    /// # Shapes
    /// `shift`: as the activation.
    pub(crate) fn new(point: HookPoint, shift: Activation) -> Self {
        Self { point, shift, fired: false }
    }
}

impl Hook for Shift {
    fn wants(&self, point: HookPoint) -> bool {
        point == self.point
    }

    fn at<const D: usize>(&mut self, _: HookPoint, x: Tensor<D>, _: &Positions) -> Tensor<D> {
        self.fired = true;
        let shape = x.dims();
        // What an SAE writes to heads comes joined.
        let shift = match self.shift.clone() {
            Activation::Rank3(shift) => shift.reshape(shape),
            Activation::Rank4(shift) => shift.reshape(shape),
        };
        x + shift
    }

    fn finish(&mut self) -> Result<(), HookError> {
        let point = self.point;
        if std::mem::take(&mut self.fired) { Ok(()) } else { Err(HookError::NeverFired { point }) }
    }
}
