//! Edits of whole rows: what splices, clamps and ablations have in common.

use burn::tensor::Tensor;

use crate::hook::HookError;
use crate::hook_point::{Axis, HookPoint};
use crate::positions::Positions;

/// Where a hook changes rows of a known width: at one point, from some absolute position of every
/// conversation on.
///
/// It flattens the activation to rows, checks their width, leaves early positions alone, and knows
/// at the end whether anything happened. Rows of heads (`z`) are joined, so that an activation of
/// `[batch, pos, head, d_head]` is as wide as `head · d_head`.
#[derive(Debug, Clone)]
pub struct RowEdit {
    point: HookPoint,
    width: usize,
    from_position: usize,
    outcome: Result<(), HookError>,
}

impl RowEdit {
    /// Of rows `width` wide at `point`, at positions from `from_position` on.
    pub fn new(point: HookPoint, width: usize, from_position: usize) -> Self {
        Self { point, width, from_position, outcome: Err(HookError::NeverFired { point }) }
    }

    /// Leaves the positions of each conversation alone that come before this one.
    #[must_use]
    pub fn from_position(mut self, position: usize) -> Self {
        self.from_position = position;
        self
    }

    /// For [`Hook::wants`](crate::Hook::wants).
    pub fn wants(&self, point: HookPoint) -> bool {
        point == self.point
    }

    /// For [`Hook::at`](crate::Hook::at): `x` with its rows replaced by what `edit` makes of them.
    /// The rows are those of every position of every conversation in turn; what `edit` makes of
    /// rows that are to be left alone is dropped. An activation of another width is returned as it
    /// is, and is an error at the end.
    pub fn apply<const D: usize>(
        &mut self,
        x: Tensor<D>,
        positions: &Positions,
        edit: impl FnOnce(Tensor<2>) -> Tensor<2>,
    ) -> Tensor<D> {
        let shape = x.dims();
        let rows = match self.rows(x.clone()) {
            Ok(rows) => rows,
            Err(error) => {
                self.outcome = Err(error);
                return x;
            }
        };
        // A width that did not fit once is not mended by one that does.
        if matches!(self.outcome, Err(HookError::NeverFired { .. })) {
            self.outcome = Ok(());
        }
        let edited = edit(rows.clone());
        if positions.first() >= self.from_position {
            return edited.reshape(shape);
        }
        let [n, width] = rows.dims();
        let mask = positions.mask_from(self.from_position, &rows.device());
        let mask = mask.reshape([n, 1]).expand([n, width]).bool();
        rows.mask_where(mask, edited).reshape(shape)
    }

    /// For [`Hook::finish`](crate::Hook::finish). The next pass counts anew.
    ///
    /// # Errors
    /// If nothing was edited, or an activation had another width.
    pub fn finish(&mut self) -> Result<(), HookError> {
        std::mem::replace(&mut self.outcome, Err(HookError::NeverFired { point: self.point }))
    }

    fn rows<const D: usize>(&self, x: Tensor<D>) -> Result<Tensor<2>, HookError> {
        let shape = x.dims();
        let [batch, pos, width @ ..] = shape.as_slice() else {
            unreachable!("activations have rank 3 or 4");
        };
        let (point, expected) = (self.point, self.width);
        // Attention patterns have no row for each position.
        let by_position = point.axes()[..2] == [Axis::Batch, Axis::Pos];
        match width.iter().product::<usize>() {
            width if width == expected && by_position => Ok(x.reshape([batch * pos, width])),
            actual => Err(HookError::Width { point, expected, actual }),
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::hook_point::Site;

    const POINT: HookPoint = HookPoint::Block { layer: 1, site: Site::ResidPost };

    /// Two conversations of two positions, the second padded by one.
    fn x() -> Tensor<3> {
        let rows = [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]];
        Tensor::from_data(rows, &Device::flex())
    }

    fn positions() -> Positions {
        Positions::new(0, 0, 2, vec![0, 1])
    }

    fn assert_is<const D: usize>(actual: Tensor<D>, expected: impl Into<TensorData>) {
        actual.into_data().assert_eq(&expected.into(), true);
    }

    #[test]
    fn early_positions_are_left_alone_wherever_they_stand() {
        let mut edit = RowEdit::new(POINT, 2, 1);
        // Position 0 is in column 0 of the first row, and behind the padding of the second.
        let edited = edit.apply(x(), &positions(), |rows| rows * f32::INFINITY);
        let inf = f32::INFINITY;
        assert_is(edited, [[[1.0f32, 2.0], [inf, inf]], [[5.0, 6.0], [7.0, 8.0]]]);
        let step = Positions::new(0, 2, 2, vec![0, 1]);
        let edited = edit.apply(x(), &step, |rows| rows * 2.0);
        assert_is(edited, [[[2.0f32, 4.0], [6.0, 8.0]], [[10.0, 12.0], [14.0, 16.0]]]);
    }

    #[test]
    fn heads_are_joined() {
        let z = HookPoint::Block { layer: 0, site: Site::Z };
        let mut edit = RowEdit::new(z, 2, 0);
        let keep_first = |rows: Tensor<2>| {
            let mask = Tensor::<2>::from_data([[1.0, 0.0]], &rows.device());
            rows * mask
        };
        let edited = edit.apply(x().reshape([2, 2, 2, 1]), &positions(), keep_first);
        assert_is(edited, [[[[1.0f32], [0.0]], [[3.0], [0.0]]], [[[5.0], [0.0]], [[7.0], [0.0]]]]);
        let pattern = HookPoint::Block { layer: 0, site: Site::Pattern };
        let mut edit = RowEdit::new(pattern, 2, 0);
        edit.apply(x().reshape([2, 1, 2, 2]), &positions(), |rows| rows);
        assert!(matches!(edit.finish(), Err(HookError::Width { .. })));
    }

    #[test]
    fn what_did_not_happen_is_an_error_at_the_end() {
        let mut edit = RowEdit::new(POINT, 2, 0);
        assert!(edit.wants(POINT) && !edit.wants(HookPoint::resid_post(2)));
        assert_eq!(edit.finish(), Err(HookError::NeverFired { point: POINT }));
        let wide: Tensor<3> = Tensor::zeros([2, 2, 3], &Device::flex());
        edit.apply(wide, &positions(), |rows| rows);
        edit.apply(x(), &positions(), |rows| rows);
        let error = HookError::Width { point: POINT, expected: 2, actual: 3 };
        assert_eq!(edit.finish(), Err(error));
        // The next pass counts anew.
        edit.apply(x(), &positions(), |rows| rows);
        assert_eq!(edit.finish(), Ok(()));
        assert_eq!(edit.finish(), Err(HookError::NeverFired { point: POINT }));
    }
}
