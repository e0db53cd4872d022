//! Kinds of SAEs as a user names them.

use sae_core::train::{Schedule, TrainConfig};
use serde::Deserialize;

use super::options::SaePlan;

/// The kind of SAE, and what it minimises.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Objective {
    /// The `k` largest latents of each activation.
    TopK {
        /// How many.
        k: usize,
    },
}

impl Objective {
    /// What the kind is called.
    pub fn label(&self) -> String {
        match self {
            Self::TopK { k } => format!("TopK {k}"),
        }
    }

    pub(super) fn train_config(&self, plan: &SaePlan, d_sae: usize) -> TrainConfig {
        let schedule = Schedule::new()
            .with_learning_rate(plan.learning_rate)
            .with_warmup(plan.warmup)
            .with_decay(plan.decay);
        let Self::TopK { k } = self;
        TrainConfig::new(d_sae, *k)
            .with_schedule(schedule)
            .with_clip_norm(plan.clip_norm)
            .with_dead_after(plan.dead_after)
    }
}
