//! What is done to the model, as documents.

use anyhow::Result;
use burn::tensor::Tensor;
use model_hooks::HookPoint;
use steering::plan::{Plan, PlanIntervention, PlanModel, PlanSae, PlanStep};
use steering::{
    Amount, LatentChange, LatentEdit, Reading, Region, Remainder, random_direction,
    residual_writers,
};

use super::FIRST_POSITION;
use super::find::Found;
use super::generator::{SAE, values};
use super::options::Scale;
use super::sae::TrainedSae;
use crate::assets::LoadedModel;
use crate::results::{Arm, Condition, Method, Treatment};

/// Writes plans for a model and its autoencoder.
pub(super) struct Planner<'a> {
    loaded: &'a LoadedModel,
    pub(super) trained: &'a TrainedSae,
    pub(super) point: HookPoint,
    sae: PlanSae,
}

impl<'a> Planner<'a> {
    pub(super) fn new(loaded: &'a LoadedModel, trained: &'a TrainedSae, point: HookPoint) -> Self {
        Self { loaded, trained, point, sae: PlanSae::of(SAE, &trained.sae) }
    }

    /// Latents clamped to `strength` times their largest value in training.
    pub(super) fn clamp(&self, latents: &[usize], strength: f64) -> Plan {
        let edit = |&latent: &usize| {
            let maximum = self.trained.max_activation(latent) as f32;
            let amount = Amount::OfMaximum { multiple: strength as f32, maximum };
            LatentEdit { latent, change: LatentChange::Clamp(amount) }
        };
        self.edit(latents.iter().map(edit).collect(), Remainder::Keep)
    }

    /// A latent clamped to a value.
    pub(super) fn clamp_to(&self, latent: usize, value: f64) -> Plan {
        self.edit(vec![LatentEdit::clamp(latent, value as f32)], Remainder::Keep)
    }

    /// The reconstruction in place of the activation.
    fn splice(&self) -> Plan {
        let unchanged = LatentEdit { latent: 0, change: LatentChange::Scale(1.0) };
        self.edit(vec![unchanged], Remainder::Drop)
    }

    fn edit(&self, edits: Vec<LatentEdit>, remainder: Remainder) -> Plan {
        let (sae, reading) = (SAE.to_owned(), Reading::Exact);
        let latents = PlanIntervention::Latents { sae, edits, remainder, reading };
        let mut plan = self.plan(vec![self.point], latents);
        plan.saes.push(self.sae.clone());
        plan
    }

    fn add(&self, point: HookPoint, direction: Tensor<1>) -> Result<Plan> {
        let direction = values(direction)?;
        Ok(self.plan(vec![point], PlanIntervention::Add { direction }))
    }

    fn ablate(&self, direction: Tensor<1>) -> Result<Plan> {
        let direction = values(direction)?;
        let writers = residual_writers(self.loaded.model.hook_points());
        Ok(self.plan(writers, PlanIntervention::Ablate { direction }))
    }

    fn plan(&self, points: Vec<HookPoint>, intervention: PlanIntervention) -> Plan {
        let LoadedModel { model, name, hash, .. } = self.loaded;
        let (name, sha256) = (Some(name.clone()), Some(hash.clone()));
        let mut plan = Plan::new(PlanModel { name, sha256, ..PlanModel::of(model) });
        let region = Region::from_position(FIRST_POSITION);
        plan.steps = vec![PlanStep { points, intervention, region, condition: None }];
        plan
    }
}

/// Treatments and their plans.
pub(super) struct Treatments<'a> {
    pub(super) planner: &'a Planner<'a>,
    pub(super) found: &'a Found,
    pub(super) seed: u64,
}

impl Treatments<'_> {
    /// All that are measured, the unsteered model first.
    pub(super) fn all(&self, scale: &Scale) -> Vec<Treatment> {
        let best = [self.found.headline.strength];
        let raising = [
            (Method::Latent, &scale.strengths[..]),
            (Method::Bundle, &scale.bundle_strengths[..]),
            (Method::MeanDifference, &scale.mean_difference_strengths[..]),
        ];
        let controls = [Method::UnrelatedLatent, Method::RandomLatent, Method::RandomDirection];
        let controls = controls.map(|method| (method, &best[..]));
        let splice = (Method::SpliceOnly, &[0.0][..]);
        let base = [Arm::ZeroShot, Arm::SixShot].map(|arm| Treatment {
            arm,
            method: Method::Base,
            strength: 0.0,
            condition: Condition::Always,
        });
        let mut all = base.to_vec();
        let mut add = |arm, condition, doses: &[(Method, &[f64])]| {
            for &(method, strengths) in doses {
                let treatment = |&strength| Treatment { arm, method, strength, condition };
                all.extend(strengths.iter().map(treatment));
            }
        };
        add(Arm::ZeroShot, Condition::Always, &raising);
        add(Arm::ZeroShot, Condition::Always, &[(Method::SaeTargeted, &best[..]), splice]);
        add(Arm::ZeroShot, Condition::Always, &controls);
        add(Arm::ZeroShot, Condition::Probe, &raising);
        // There, refusal is to be modulated: every other strength shows how.
        let fewer = raising.map(|(method, strengths)| {
            (method, strengths.iter().copied().step_by(2).collect::<Vec<_>>())
        });
        for (method, strengths) in &fewer {
            add(Arm::SixShot, Condition::Always, &[(*method, strengths.as_slice())]);
        }
        let lowering = [
            (Method::LatentAblated, &scale.ablation_strengths[..]),
            (Method::DirectionAblated, &[1.0][..]),
        ];
        add(Arm::SixShot, Condition::Always, &lowering);
        add(Arm::SixShot, Condition::Always, &[splice]);
        add(Arm::SixShot, Condition::Always, &controls);
        all
    }

    /// Those whose cost to everything else is measured: what was chosen, always and under the
    /// condition, and what it is compared with.
    pub(super) fn chosen(&self) -> Vec<Treatment> {
        let Found { latent_strength, bundle_strength, headline, .. } = *self.found;
        let of = |method, strength, condition| Treatment {
            arm: Arm::ZeroShot,
            method,
            strength,
            condition,
        };
        let (always, probe) = (Condition::Always, Condition::Probe);
        let control = headline.strength;
        vec![
            of(Method::Base, 0.0, always),
            of(Method::Latent, latent_strength, always),
            of(Method::Latent, latent_strength, probe),
            of(Method::Bundle, bundle_strength, always),
            of(Method::Bundle, bundle_strength, probe),
            of(Method::SpliceOnly, 0.0, always),
            of(Method::UnrelatedLatent, control, always),
            of(Method::RandomLatent, control, always),
            of(Method::RandomDirection, control, always),
        ]
    }

    /// What is done, where the condition holds if there is one; nothing to the model left alone.
    pub(super) fn plan(&self, treatment: Treatment) -> Result<Option<Plan>> {
        let Treatment { method, strength, .. } = treatment;
        let Found { latent, bundle, unrelated, random, mean_difference, targeted, .. } = self.found;
        let planner = self.planner;
        let device = planner.loaded.model.device();
        let plan = match method {
            Method::Base => return Ok(None),
            Method::Latent => planner.clamp(&[*latent], strength),
            Method::Bundle => planner.clamp(bundle, strength),
            Method::LatentAblated => planner.clamp(bundle, 0.0 - strength),
            Method::UnrelatedLatent => self.matched(*unrelated, strength),
            Method::RandomLatent => self.matched(*random, strength),
            Method::RandomDirection => {
                let length = strength * self.unit_length();
                let d_model = planner.loaded.model.config().d_model;
                let direction = random_direction(d_model, length, self.seed ^ 0xD1CE, device);
                planner.add(planner.point, direction)?
            }
            Method::MeanDifference => {
                planner.add(planner.point, mean_difference.clone() * strength)?
            }
            Method::DirectionAblated => planner.ablate(mean_difference.clone())?,
            Method::SaeTargeted => {
                let (point, direction) = targeted;
                planner.add(*point, direction.clone() * (strength * self.unit_length()))?
            }
            Method::SpliceOnly => planner.splice(),
        };
        Ok(Some(plan))
    }

    /// How far the latents that did best on the selection split reach in the residual stream at
    /// strength 1: controls reach as far at the same strength.
    fn unit_length(&self) -> f64 {
        let latents = match self.found.headline.method {
            Method::Bundle => self.found.bundle.as_slice(),
            _ => std::slice::from_ref(&self.found.latent),
        };
        self.planner.trained.reach(latents)
    }

    /// A control latent, clamped so that it reaches as far as the headline's latents do.
    fn matched(&self, latent: usize, strength: f64) -> Plan {
        let value = strength * self.unit_length() / self.planner.trained.direction_norm(latent);
        self.planner.clamp_to(latent, value)
    }
}
