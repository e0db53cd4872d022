//! Hooks see the activations of a forward pass and may replace them.

use burn::tensor::Tensor;

use crate::hook_point::HookPoint;
use crate::positions::Positions;

/// Sees the activations of a forward pass, in order, and may replace them.
///
/// `()` is the plain pass; `(a, b)` runs `a`, then `b` on what `a` left. `at` is generic, so a hook
/// is no trait object: lists made at run time go through [`Edits`](crate::edit::Edits).
pub trait Hook {
    /// Whether this hook looks at `point`. What nobody wants may not be computed at all.
    fn wants(&self, point: HookPoint) -> bool;

    /// Told the tokens of a pass before anything else of it, row by row; those that have no position
    /// are padding, and mean nothing. A pass that begins behind the embedding tells none.
    fn tokens(&mut self, _: &[u32], _: &Positions) {}

    /// The activation that the pass goes on with in place of `x`; axes as [`HookPoint::axes`].
    /// Called only where [`wants`](Self::wants) says so.
    fn at<const D: usize>(
        &mut self,
        point: HookPoint,
        x: Tensor<D>,
        positions: &Positions,
    ) -> Tensor<D>;

    /// Called once after the pass (after the last step of a generation).
    ///
    /// # Errors
    /// A hook that was to see a point and never did says so here.
    fn finish(&mut self) -> Result<(), HookError> {
        Ok(())
    }
}

/// Why a hook could not do what it was asked to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HookError {
    /// The model has no such point.
    #[error("this model has no hook point {point}: {expected}")]
    NoSuchPoint {
        /// The point asked for.
        point: HookPoint,
        /// What the model has.
        expected: String,
    },
    /// The pass never came by the point, so the hook did nothing.
    #[error("the hook at {point} never fired: the pass ended before it, or began after it")]
    NeverFired {
        /// The point asked for.
        point: HookPoint,
    },
    /// The activation does not have the width that the hook works on.
    #[error("the hook at {point} works on width {expected}, the activation has {actual}")]
    Width {
        /// The point asked for.
        point: HookPoint,
        /// The width of the hook.
        expected: usize,
        /// The width of the activation.
        actual: usize,
    },
    /// The hook goes by the tokens, and the pass began behind them.
    #[error("the hook at {point} looks for a token: the pass has to begin with the embedding")]
    NoTokens {
        /// The point asked for.
        point: HookPoint,
    },
    /// The hook was told how to treat each prompt, and met one that it was told nothing of.
    #[error("the hook at {point} was told of {expected} prompts, and met prompt {actual}")]
    Prompts {
        /// The point asked for.
        point: HookPoint,
        /// Prompts that the hook was told of.
        expected: usize,
        /// The index of the prompt met.
        actual: usize,
    },
}

/// Runs `x` through the hook where it wants the point.
#[inline]
pub(crate) fn fire<H: Hook, const D: usize>(
    hook: &mut H,
    point: HookPoint,
    x: Tensor<D>,
    positions: &Positions,
) -> Tensor<D> {
    if !hook.wants(point) {
        return x;
    }
    debug_assert_eq!(D, point.axes().len(), "{point} has another rank");
    let shape = x.dims();
    let x = hook.at(point, x, positions);
    assert_eq!(x.dims(), shape, "the hook at {point} changed the shape");
    x
}

impl Hook for () {
    fn wants(&self, _: HookPoint) -> bool {
        false
    }

    fn at<const D: usize>(&mut self, _: HookPoint, x: Tensor<D>, _: &Positions) -> Tensor<D> {
        x
    }
}

impl<A: Hook, B: Hook> Hook for (A, B) {
    fn wants(&self, point: HookPoint) -> bool {
        self.0.wants(point) || self.1.wants(point)
    }

    fn tokens(&mut self, ids: &[u32], positions: &Positions) {
        self.0.tokens(ids, positions);
        self.1.tokens(ids, positions);
    }

    fn at<const D: usize>(
        &mut self,
        point: HookPoint,
        x: Tensor<D>,
        positions: &Positions,
    ) -> Tensor<D> {
        let x = fire(&mut self.0, point, x, positions);
        fire(&mut self.1, point, x, positions)
    }

    fn finish(&mut self) -> Result<(), HookError> {
        self.0.finish()?;
        self.1.finish()
    }
}

impl<H: Hook> Hook for &mut H {
    fn wants(&self, point: HookPoint) -> bool {
        (**self).wants(point)
    }

    fn tokens(&mut self, ids: &[u32], positions: &Positions) {
        (**self).tokens(ids, positions);
    }

    fn at<const D: usize>(
        &mut self,
        point: HookPoint,
        x: Tensor<D>,
        positions: &Positions,
    ) -> Tensor<D> {
        (**self).at(point, x, positions)
    }

    fn finish(&mut self) -> Result<(), HookError> {
        (**self).finish()
    }
}

impl<H: Hook> Hook for Option<H> {
    fn wants(&self, point: HookPoint) -> bool {
        self.as_ref().is_some_and(|hook| hook.wants(point))
    }

    fn tokens(&mut self, ids: &[u32], positions: &Positions) {
        if let Some(hook) = self {
            hook.tokens(ids, positions);
        }
    }

    fn at<const D: usize>(
        &mut self,
        point: HookPoint,
        x: Tensor<D>,
        positions: &Positions,
    ) -> Tensor<D> {
        match self {
            Some(hook) => hook.at(point, x, positions),
            None => x,
        }
    }

    fn finish(&mut self) -> Result<(), HookError> {
        self.as_mut().map_or(Ok(()), Hook::finish)
    }
}
