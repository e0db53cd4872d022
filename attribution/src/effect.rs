//! What a change does to a metric, with its sign.

use std::ops::Add;

use serde::{Deserialize, Serialize};

/// `metric(changed) − metric(clean)`.
///
/// What is changed is what the effect is of: a latent that is ablated, an activation that is patched.
/// So a latent that **raises** the metric has a **negative** effect.
#[derive(Debug, Clone, Copy, Default, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Effect(f64);

impl Effect {
    /// From `metric(changed) − metric(clean)`.
    pub fn of_change(changed_minus_clean: f64) -> Self {
        Self(changed_minus_clean)
    }

    /// From the metric of both runs.
    pub fn between(changed: f64, clean: f64) -> Self {
        Self(changed - clean)
    }

    /// `metric(changed) − metric(clean)`.
    pub fn change(self) -> f64 {
        self.0
    }

    /// What the thing adds to the metric where it is: the change with its sign turned.
    pub fn contribution(self) -> f64 {
        -self.0
    }

    /// Whether the metric is higher with the thing than without it.
    pub fn raises(self) -> bool {
        self.0 < 0.0
    }
}

impl Add for Effect {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl std::iter::Sum for Effect {
    fn sum<I: Iterator<Item = Self>>(effects: I) -> Self {
        effects.fold(Self::default(), Add::add)
    }
}
