//! An activation without what it says.

use burn::tensor::Tensor;
use model_hooks::{Hook, HookError, HookPoint, Positions, RowEdit};

use super::Subject;

/// One row in place of all.
#[derive(Debug, Clone)]
pub(super) struct Ablation {
    /// `[1, width]`.
    row: Tensor<2>,
    rows: RowEdit,
}

impl Ablation {
    /// Where the subject would be spliced in.
    ///
    /// # Shapes
    /// `row`: `[1, width]`.
    pub(super) fn new(subject: &Subject, row: Tensor<2>) -> Self {
        let rows = RowEdit::new(subject.replaced(), row.dims()[1], subject.from_position);
        Self { row, rows }
    }
}

impl Hook for Ablation {
    fn wants(&self, point: HookPoint) -> bool {
        self.rows.wants(point)
    }

    fn at<const D: usize>(
        &mut self,
        _: HookPoint,
        x: Tensor<D>,
        positions: &Positions,
    ) -> Tensor<D> {
        let Self { row, rows } = self;
        rows.apply(x, positions, |x| row.clone().expand(x.dims()))
    }

    fn finish(&mut self) -> Result<(), HookError> {
        self.rows.finish()
    }
}
