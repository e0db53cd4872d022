//! Edits chosen at run time: the one adapter between trait objects and [`Hook`].

use burn::tensor::Tensor;

use crate::activation::Activation;
use crate::hook::{Hook, HookError};
use crate::hook_point::HookPoint;
use crate::positions::Positions;

/// Replaces an activation; the object-safe face of a hook.
pub trait Edit {
    /// What the pass goes on with in place of `x`. The shape must stay.
    fn edit(&mut self, point: HookPoint, x: Activation, positions: &Positions) -> Activation;
}

impl<F: FnMut(HookPoint, Activation, &Positions) -> Activation> Edit for F {
    fn edit(&mut self, point: HookPoint, x: Activation, positions: &Positions) -> Activation {
        self(point, x, positions)
    }
}

/// A list of edits, each at its point, applied in order. One that never fires is an error.
#[derive(Default)]
pub struct Edits {
    edits: Vec<Entry>,
}

struct Entry {
    point: HookPoint,
    edit: Box<dyn Edit>,
    fired: bool,
}

impl Edits {
    /// No edits.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an edit behind the others.
    pub fn push(&mut self, point: HookPoint, edit: Box<dyn Edit>) {
        self.edits.push(Entry { point, edit, fired: false });
    }
}

impl Hook for Edits {
    fn wants(&self, point: HookPoint) -> bool {
        self.edits.iter().any(|entry| entry.point == point)
    }

    fn at<const D: usize>(
        &mut self,
        point: HookPoint,
        x: Tensor<D>,
        positions: &Positions,
    ) -> Tensor<D> {
        let mut x = Activation::new(x);
        for entry in self.edits.iter_mut().filter(|entry| entry.point == point) {
            x = entry.edit.edit(point, x, positions);
            entry.fired = true;
        }
        x.into_tensor()
    }

    fn finish(&mut self) -> Result<(), HookError> {
        // The next pass counts anew.
        let silent = self.edits.iter().find(|entry| !entry.fired).map(|entry| entry.point);
        self.edits.iter_mut().for_each(|entry| entry.fired = false);
        silent.map_or(Ok(()), |point| Err(HookError::NeverFired { point }))
    }
}
