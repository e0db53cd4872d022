//! Interventions in a forward pass.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use model_hooks::{Hook, HookError, HookPoint, Positions, RowEdit, Site};

use crate::condition::{Condition, Decider, begins, mask};
use crate::error::SteeringError;
use crate::intervention::{Change, Intervention};
use crate::region::{Markers, Prompts, Region};

/// An intervention at one or more hook points, on some tokens of every conversation, and, with a
/// condition, only where that holds.
///
/// What is done to a token depends on its own conversation alone, not on the padding, on the other
/// rows, or on how the conversation is cut into prefill and cached steps.
#[derive(Debug, Clone)]
pub struct Steering<'a> {
    change: Change<'a>,
    points: Vec<(HookPoint, RowEdit)>,
    region: Region,
    prompts: Prompts,
    markers: Option<Markers>,
    /// Tokens that the prompts share: what is decided by prompt leaves them alone, in whichever pass.
    n_shared: usize,
    condition: Option<(HookPoint, RowEdit, Decider<'a>)>,
    told: Result<(), HookError>,
}

/// Several steerings in one pass. Where they meet at a point, each sees what those before it left.
#[derive(Debug, Clone, Default)]
pub struct Steerings<'a> {
    /// In the order in which they are applied.
    pub steps: Vec<Steering<'a>>,
}

/// Every point at which something is added to the residual stream: embeddings, attention and MLP.
/// What is ablated at all of them is nowhere in the stream.
pub fn residual_writers(points: impl IntoIterator<Item = HookPoint>) -> Vec<HookPoint> {
    let writes = |point: &HookPoint| match point {
        HookPoint::Embed | HookPoint::PosEmbed => true,
        HookPoint::Block { site, .. } => matches!(site, Site::AttnOut | Site::MlpOut),
        HookPoint::LnFinalScale | HookPoint::LnFinalNormalized => false,
    };
    points.into_iter().filter(writes).collect()
}

impl<'a> Steering<'a> {
    /// Steers at these points, the tokens of a region.
    ///
    /// # Errors
    /// If there is no point, the region has no position, a latent is out of range or given twice, a
    /// value is not finite, or a direction is zero.
    pub fn new(
        points: impl IntoIterator<Item = HookPoint>,
        intervention: Intervention<'a>,
        region: Region,
    ) -> Result<Self, SteeringError> {
        let change = Change::new(intervention)?;
        let edit = |point| (point, RowEdit::new(point, change.width(), 0));
        let points: Vec<_> = points.into_iter().map(edit).collect();
        if points.is_empty() {
            return Err(SteeringError::Nothing { name: "the list of points".into() });
        }
        if region.to_position.is_some_and(|to_position| to_position <= region.from_position) {
            return Err(SteeringError::Nothing { name: "the region".into() });
        }
        let prompts = Prompts::default();
        let markers = region.marker.map(Markers::new);
        let (condition, n_shared) = (None, 0);
        Ok(Self { change, points, region, prompts, markers, n_shared, condition, told: Ok(()) })
    }

    /// Steers only where a condition holds.
    ///
    /// # Errors
    /// If the condition cannot be made, or is read behind a point that it decides about.
    pub fn when(mut self, condition: Condition<'a>) -> Result<Self, SteeringError> {
        let at = condition.point;
        if let Some(&(point, _)) = self.points.iter().find(|&&(point, _)| point < at) {
            return Err(SteeringError::ConditionAfter { condition: at, point });
        }
        let decider = Decider::new(condition)?;
        self.condition = Some((at, RowEdit::new(at, decider.width(), 0), decider));
        Ok(self)
    }

    /// The first position steered of each prompt, if any: the others are left alone. A shared prefix
    /// is left alone too.
    ///
    /// The prompts are those of the passes that follow, until others are set. A pass with more of
    /// them is an error at its end.
    pub fn set_starts(&mut self, starts: Vec<Option<usize>>) {
        self.prompts.starts = Some(starts);
    }

    /// How many tokens of each conversation are its prompt, the prefix counted, where one pass holds
    /// prompts and answers.
    pub fn set_prompt_lengths(&mut self, lengths: Vec<usize>) {
        self.prompts.lengths = Some(lengths);
    }

    /// What the condition decided about each prompt of the last pass or generation, by its number;
    /// empty where there is no condition, or each token decides for itself.
    pub fn decisions(&self) -> BTreeMap<usize, bool> {
        let condition = self.condition.as_ref();
        condition.map(|(_, _, decider)| decider.decisions().clone()).unwrap_or_default()
    }

    /// Whether each token of the pass is steered; padding is as is most convenient.
    fn cells(&self, positions: &Positions) -> Vec<bool> {
        let (n_rows, n) = (positions.n_rows(), positions.n_columns());
        let decider = self.condition.as_ref().map(|(_, _, decider)| decider);
        let is_by_prompt =
            self.prompts.starts.is_some() || decider.is_some_and(Decider::is_by_prompt);
        let first = if is_by_prompt { self.n_shared } else { 0 };
        let mut cells = Vec::with_capacity(n_rows * n);
        for row in 0..n_rows {
            let start = match &self.prompts.starts {
                _ if is_by_prompt && positions.is_prefix() => None,
                None => Some(first),
                Some(starts) => {
                    let start = starts.get(positions.prompt(row)).copied().flatten();
                    start.map(|start| start.max(first))
                }
            };
            cells.extend((0..n).map(|column| {
                let Some(position) = positions.get(row, column) else { return true };
                let is_generated = self.prompts.is_generated(positions, row, column);
                let is_marked = self.markers.as_ref().is_none_or(|markers| {
                    markers.position(positions, row, column).is_some_and(|at| position >= at)
                });
                is_marked
                    && start.is_some_and(|start| position >= start)
                    && self.region.contains(position, is_generated)
                    && decider.is_none_or(|decider| decider.holds(positions, row, column))
            }));
        }
        cells
    }
}

impl Hook for Steering<'_> {
    fn wants(&self, point: HookPoint) -> bool {
        self.points.iter().any(|&(other, _)| other == point)
            || self.condition.as_ref().is_some_and(|&(other, _, _)| other == point)
    }

    fn tokens(&mut self, ids: &[u32], positions: &Positions) {
        if let Some(markers) = &mut self.markers {
            markers.look(ids, positions);
        }
    }

    fn at<const D: usize>(
        &mut self,
        point: HookPoint,
        mut x: Tensor<D>,
        positions: &Positions,
    ) -> Tensor<D> {
        if let Some((expected, actual)) = self.prompts.unknown(positions) {
            self.told = Err(HookError::Prompts { point, expected, actual });
            return x;
        }
        if self.markers.as_ref().is_some_and(|markers| !markers.knows(positions)) {
            self.told = Err(HookError::NoTokens { point });
            return x;
        }
        if begins(positions) {
            self.n_shared = positions.n_prefix();
        }
        if let Some((at, seen, decider)) = &mut self.condition
            && *at == point
        {
            let is_due = decider.is_due(positions);
            x = seen.apply(x, positions, |x| {
                if is_due {
                    decider.decide(x.clone(), positions, &self.prompts);
                }
                x
            });
        }
        let Some(index) = self.points.iter().position(|&(other, _)| other == point) else {
            return x;
        };
        let cells = self.cells(positions);
        let Self { change, points, .. } = self;
        points[index].1.apply(x, positions, |x| {
            let is_real = |row: usize, column: usize| positions.get(row, column).is_some();
            let n = positions.n_columns();
            if cells.iter().all(|&steered| steered) {
                change.apply(x)
            } else if (0..cells.len()).any(|i| cells[i] && is_real(i / n, i % n)) {
                let mask = mask(&cells, x.dims()[1], &x);
                x.clone().mask_where(mask, change.apply(x))
            } else {
                x
            }
        })
    }

    fn finish(&mut self) -> Result<(), HookError> {
        let mut outcome = std::mem::replace(&mut self.told, Ok(()));
        // The next pass counts anew, whatever came of this one.
        if let Some(markers) = &mut self.markers {
            markers.forget_pass();
        }
        if let Some((_, seen, _)) = &mut self.condition {
            outcome = outcome.and(seen.finish());
        }
        for (_, edit) in &mut self.points {
            outcome = outcome.and(edit.finish());
        }
        outcome
    }
}

impl Steerings<'_> {
    /// [`Steering::set_prompt_lengths`] of every step.
    pub fn set_prompt_lengths(&mut self, lengths: &[usize]) {
        self.steps.iter_mut().for_each(|step| step.set_prompt_lengths(lengths.to_vec()));
    }
}

impl Hook for Steerings<'_> {
    fn wants(&self, point: HookPoint) -> bool {
        self.steps.iter().any(|step| step.wants(point))
    }

    fn tokens(&mut self, ids: &[u32], positions: &Positions) {
        self.steps.iter_mut().for_each(|step| step.tokens(ids, positions));
    }

    fn at<const D: usize>(
        &mut self,
        point: HookPoint,
        x: Tensor<D>,
        positions: &Positions,
    ) -> Tensor<D> {
        let wanting = self.steps.iter_mut().filter(|step| step.wants(point));
        wanting.fold(x, |x, step| step.at(point, x, positions))
    }

    fn finish(&mut self) -> Result<(), HookError> {
        let outcomes: Vec<_> = self.steps.iter_mut().map(Hook::finish).collect();
        outcomes.into_iter().collect()
    }
}
