//! Whether a plan makes sense, and fits what it is used with.

use std::collections::BTreeSet;

use model_hooks::{Axis, HookPoint, LanguageModel};
use sae_core::Sae;

use super::{
    Plan, PlanCondition, PlanError, PlanIntervention, PlanModel, PlanSae, PlanScore, PlanStep,
};
use crate::condition::Over;
use crate::fingerprint::fingerprint;
use crate::latent_edit::{Amount, LatentChange, LatentEdit};
use crate::latent_reader::Reading;

impl Plan {
    pub(super) fn validate(&self) -> Result<(), PlanError> {
        let (expected, actual) = (Self::VERSION, self.steering_plan);
        if actual != expected {
            return Err(PlanError::Version { expected, actual });
        }
        if self.steps.is_empty() {
            return Err(PlanError::NoSteps);
        }
        let mut names = BTreeSet::new();
        for PlanSae { name, .. } in &self.saes {
            if !names.insert(name.as_str()) {
                return Err(PlanError::DuplicateSae { name: name.clone() });
            }
        }
        for (index, step) in self.steps.iter().enumerate() {
            for (place, name) in step.saes(index) {
                if !names.contains(name) {
                    return Err(PlanError::NoSuchSae { place, name: name.to_owned() });
                }
            }
            for (place, values) in step.numbers(index) {
                if let Some(&value) = values.iter().find(|value| !value.is_finite()) {
                    return Err(PlanError::NotFinite { place, value });
                }
            }
        }
        Ok(())
    }

    /// That the model has the step's points, of the widths that it needs, and its marker.
    pub(super) fn check_step(
        &self,
        index: usize,
        step: &PlanStep,
        model: &LanguageModel,
    ) -> Result<(), PlanError> {
        let d_model = model.config().d_model;
        let condition = step.condition.as_ref();
        for &point in step.points.iter().chain(condition.map(|condition| &condition.point)) {
            model.check_point(point).map_err(|source| PlanError::Point { step: index, source })?;
        }
        if let Some(marker) = step.region.marker
            && marker as usize >= self.model.d_vocab
        {
            let d_vocab = self.model.d_vocab;
            return Err(PlanError::NoSuchToken { step: index, marker, d_vocab });
        }
        let check_width = |point: HookPoint, place: &str, actual: usize| {
            let is_residual = point.axes().last() == Some(&Axis::DModel);
            if is_residual && actual != d_model {
                let place = place.to_owned();
                return Err(PlanError::Width { place, point, expected: d_model, actual });
            }
            Ok(())
        };
        let check_layer = |point: HookPoint, place: &str, name: &str| {
            let sae = self.saes.iter().find(|sae| sae.name == name).expect("names were checked");
            match &sae.hook_name {
                Some(expected) if *expected != point.to_string() => Err(PlanError::Layer {
                    place: place.to_owned(),
                    expected: expected.clone(),
                    actual: point,
                }),
                _ => check_width(point, place, sae.d_in),
            }
        };
        let place = format!("the intervention of step {index}");
        for &point in &step.points {
            match &step.intervention {
                PlanIntervention::Latents { sae, .. } => check_layer(point, &place, sae)?,
                PlanIntervention::Add { direction }
                | PlanIntervention::Ablate { direction }
                | PlanIntervention::Affine { direction, .. } => {
                    check_width(point, &place, direction.len())?;
                }
            }
        }
        let Some(PlanCondition { point, score, .. }) = condition else { return Ok(()) };
        let place = format!("the condition of step {index}");
        match score {
            PlanScore::Latent { sae, .. } => check_layer(*point, &place, sae),
            PlanScore::Cosine { direction: values } | PlanScore::Probe { weights: values, .. } => {
                check_width(*point, &place, values.len())
            }
        }
    }
}

impl PlanModel {
    pub(crate) fn check(
        &self,
        model: &LanguageModel,
        sha256: Option<&str>,
    ) -> Result<(), PlanError> {
        let actual = Self::of(model);
        let what = || "a model".to_owned();
        same(
            &what,
            "architecture",
            format!("{:?}", self.architecture),
            format!("{:?}", actual.architecture),
        )?;
        same(&what, "n_layers", self.n_layers, actual.n_layers)?;
        same(&what, "d_model", self.d_model, actual.d_model)?;
        same(&what, "d_vocab", self.d_vocab, actual.d_vocab)?;
        match (&self.sha256, sha256) {
            (None, _) => Ok(()),
            (Some(expected), None) => Err(PlanError::UnknownHash { expected: expected.clone() }),
            (Some(expected), Some(actual)) => same(&what, "SHA-256", expected.as_str(), actual),
        }
    }
}

impl PlanSae {
    pub(super) fn check(&self, sae: &Sae) -> Result<(), PlanError> {
        let what = || format!("the autoencoder {:?}", self.name);
        same(&what, "d_in", self.d_in, sae.config().d_in)?;
        same(&what, "d_sae", self.d_sae, sae.config().d_sae)?;
        let name = |name: &Option<String>| name.clone().unwrap_or_else(|| "(unknown)".into());
        let hook_name = &sae.config().metadata.hook_name;
        same(&what, "hook_name", name(&self.hook_name), name(hook_name))?;
        same(&what, "SHA-256", self.sha256.as_str(), &fingerprint(sae))
    }
}

fn same<T: PartialEq + ToString>(
    what: &dyn Fn() -> String,
    field: &'static str,
    expected: T,
    actual: T,
) -> Result<(), PlanError> {
    if expected == actual {
        return Ok(());
    }
    let (expected, actual) = (expected.to_string(), actual.to_string());
    Err(PlanError::Mismatch { what: what(), field, expected, actual })
}

impl PlanStep {
    /// The autoencoders that it names, each with its place.
    fn saes(&self, index: usize) -> Vec<(String, &str)> {
        let mut saes = Vec::new();
        if let PlanIntervention::Latents { sae, .. } = &self.intervention {
            saes.push((format!("the intervention of step {index}"), sae.as_str()));
        }
        if let Some(PlanCondition { score: PlanScore::Latent { sae, .. }, .. }) = &self.condition {
            saes.push((format!("the condition of step {index}"), sae.as_str()));
        }
        saes
    }

    /// Every number that it goes by, each with its place.
    fn numbers(&self, index: usize) -> Vec<(String, Vec<f32>)> {
        let step = format!("of step {index}");
        let mut numbers = match &self.intervention {
            PlanIntervention::Latents { edits, reading, .. } => {
                let mut numbers =
                    vec![(format!("the threshold {step}"), reading_numbers(*reading))];
                numbers.extend(edits.iter().map(|edit| {
                    (format!("the change of latent {} {step}", edit.latent), edit_numbers(*edit))
                }));
                numbers
            }
            PlanIntervention::Add { direction } | PlanIntervention::Ablate { direction } => {
                vec![(format!("the direction {step}"), direction.clone())]
            }
            PlanIntervention::Affine { direction, mean, strength } => vec![
                (format!("the direction {step}"), direction.clone()),
                (format!("the mean {step}"), mean.clone()),
                (format!("the strength {step}"), vec![*strength]),
            ],
        };
        if let Some(condition) = &self.condition {
            let mut values = vec![condition.threshold];
            if let Over::PromptShare(above) = condition.over {
                values.push(above);
            }
            match &condition.score {
                PlanScore::Cosine { direction } => values.extend(direction),
                PlanScore::Latent { reading, .. } => values.extend(reading_numbers(*reading)),
                PlanScore::Probe { weights, bias } => {
                    values.extend(weights);
                    values.push(*bias);
                }
            }
            numbers.push((format!("a number of the condition {step}"), values));
        }
        numbers
    }
}

fn reading_numbers(reading: Reading) -> Vec<f32> {
    match reading {
        Reading::Exact => Vec::new(),
        Reading::Threshold(threshold) => vec![threshold],
    }
}

fn edit_numbers(edit: LatentEdit) -> Vec<f32> {
    let amount = match edit.change {
        LatentChange::Scale(factor) => return vec![factor],
        LatentChange::Clamp(a) | LatentChange::AtLeast(a) | LatentChange::ClampActive(a) => a,
    };
    match amount {
        Amount::Value(value) => vec![value],
        // Their product may overflow where neither is infinite.
        Amount::OfMaximum { multiple, maximum } => vec![multiple, maximum, amount.value()],
    }
}
