//! Steering plans: what to do to which model, in a document.
//!
//! ```json
//! {
//!   "steering_plan": 1,
//!   "model": {"architecture": "llama", "n_layers": 30, "d_model": 576, "d_vocab": 49152},
//!   "saes": [{"name": "refusal", "sha256": "…", "d_in": 576, "d_sae": 4608,
//!             "hook_name": "blocks.12.hook_resid_post"}],
//!   "steps": [{
//!     "points": ["blocks.12.hook_resid_post"],
//!     "intervention": {"latents": {
//!       "sae": "refusal",
//!       "edits": [{"latent": 1234, "change": {"clamp": {"of_maximum":
//!                 {"multiple": 2.0, "maximum": 7.5}}}}],
//!       "remainder": "keep",
//!       "reading": "exact"}},
//!     "region": {"from_position": 1, "part": "all"},
//!     "condition": {
//!       "point": "blocks.8.hook_resid_post",
//!       "score": {"probe": {"weights": [0.25, "…"], "bias": -1.5}},
//!       "over": "last_prompt_token",
//!       "threshold": 0.5,
//!       "from_position": 1}
//!   }]
//! }
//! ```

mod check;
mod error;
mod points;

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};
use model_hooks::config::Architecture;
use model_hooks::{HookPoint, LanguageModel};
use sae_core::Sae;
use serde::{Deserialize, Serialize};

use crate::condition::{Condition, Over, Score};
use crate::error::SteeringError;
use crate::fingerprint::fingerprint;
use crate::intervention::Intervention;
use crate::latent_edit::{LatentEdit, LatentEdits, Remainder};
use crate::latent_reader::Reading;
use crate::region::Region;
use crate::steering::{Steering, Steerings};

pub use error::PlanError;

/// What to do to which model, as a JSON document of this version.
///
/// Everything that a pass needs is in it but the weights of the model and of the autoencoders, which
/// it knows by their shapes and hashes. Numbers are f32, as in the pass, so that reading what was
/// written gives the same plan. A key that is not known is refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// The version of the format: [`Plan::VERSION`].
    pub steering_plan: u32,
    /// The model that it was made for.
    pub model: PlanModel,
    /// The autoencoders whose latents it names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub saes: Vec<PlanSae>,
    /// In the order in which they are applied.
    pub steps: Vec<PlanStep>,
}

/// Which model a plan is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanModel {
    /// For readers; not checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// How its parts are wired.
    pub architecture: Architecture,
    /// Number of blocks.
    pub n_layers: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Size of the vocabulary.
    pub d_vocab: usize,
    /// The SHA-256 of its file, in hex.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

/// An autoencoder of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanSae {
    /// What the plan calls it.
    pub name: String,
    /// Its [`fingerprint`].
    pub sha256: String,
    /// Width of the activations.
    pub d_in: usize,
    /// Number of latents.
    pub d_sae: usize,
    /// Where it was trained, if its file says so: the only point at which its latents are read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hook_name: Option<String>,
}

/// One steering.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanStep {
    /// Where, by names.
    #[serde(with = "points::list")]
    pub points: Vec<HookPoint>,
    /// What.
    pub intervention: PlanIntervention,
    /// To which tokens.
    pub region: Region,
    /// When; always, without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub condition: Option<PlanCondition>,
}

/// An [`Intervention`], in numbers and names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum PlanIntervention {
    /// [`Intervention::Latents`].
    Latents {
        /// The name of the autoencoder.
        sae: String,
        /// What becomes of which latent.
        edits: Vec<LatentEdit>,
        /// The error term, kept or dropped.
        remainder: Remainder,
        /// How the latents are read.
        reading: Reading,
    },
    /// [`Intervention::Add`].
    Add {
        /// What is added.
        direction: Vec<f32>,
    },
    /// [`Intervention::Ablate`].
    Ablate {
        /// What is projected out.
        direction: Vec<f32>,
    },
    /// [`Intervention::Affine`].
    Affine {
        /// The direction of the concept.
        direction: Vec<f32>,
        /// Activations without the concept.
        mean: Vec<f32>,
        /// How much of the direction there is to be.
        strength: f32,
    },
}

/// A [`Condition`], in numbers and names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanCondition {
    /// Where it is read, by name.
    #[serde(with = "points::one")]
    pub point: HookPoint,
    /// What is read.
    pub score: PlanScore,
    /// Over which tokens.
    pub over: Over,
    /// What the score has to exceed.
    pub threshold: f32,
    /// Earlier positions do not count.
    pub from_position: usize,
}

/// A [`Score`], in numbers and names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum PlanScore {
    /// [`Score::Cosine`].
    Cosine {
        /// The direction of the condition.
        direction: Vec<f32>,
    },
    /// [`Score::Latent`].
    Latent {
        /// The name of the autoencoder.
        sae: String,
        /// The latent.
        latent: usize,
        /// How it is read.
        reading: Reading,
    },
    /// [`Score::Probe`].
    Probe {
        /// Its weights.
        weights: Vec<f32>,
        /// Its bias.
        bias: f32,
    },
}

impl Plan {
    /// The version that is read and written.
    pub const VERSION: u32 = 1;

    /// An empty plan for a model.
    pub fn new(model: PlanModel) -> Self {
        Self { steering_plan: Self::VERSION, model, saes: Vec::new(), steps: Vec::new() }
    }

    /// Reads a document.
    ///
    /// # Errors
    /// If it is not a plan of this version, has an unknown key, a number that is not finite, or a
    /// reference to nothing.
    pub fn from_json(json: &str) -> Result<Self, PlanError> {
        #[derive(Deserialize)]
        struct Version {
            steering_plan: u32,
        }
        // The version comes first: another one may well have other keys.
        let version: Version = serde_json::from_str(json).map_err(PlanError::Json)?;
        let (expected, actual) = (Self::VERSION, version.steering_plan);
        if actual != expected {
            return Err(PlanError::Version { expected, actual });
        }
        let plan: Self = serde_json::from_str(json).map_err(PlanError::Json)?;
        plan.validate()?;
        Ok(plan)
    }

    /// The document, which [`from_json`](Self::from_json) reads back to the same plan.
    ///
    /// # Errors
    /// As there: what could not be read is not written.
    pub fn to_json(&self) -> Result<String, PlanError> {
        self.validate()?;
        serde_json::to_string_pretty(self).map_err(PlanError::Json)
    }

    /// Puts the plan to work on a model, of whose file the caller may know the hash, with the
    /// autoencoders under their names.
    ///
    /// # Errors
    /// If the model or an autoencoder is not the one that the plan was made for, is not given, or
    /// a step cannot be made.
    pub fn bind<'a>(
        &self,
        model: &LanguageModel,
        model_sha256: Option<&str>,
        saes: &BTreeMap<String, &'a Sae>,
    ) -> Result<Steerings<'a>, PlanError> {
        self.validate()?;
        self.model.check(model, model_sha256)?;
        for sae in &self.saes {
            let name = sae.name.clone();
            let given = saes.get(&sae.name);
            let given =
                given.ok_or_else(|| PlanError::NoSuchSae { place: "the plan".into(), name })?;
            sae.check(given)?;
        }
        let steps = self.steps.iter().enumerate();
        let steps = steps.map(|(index, step)| {
            self.check_step(index, step, model)?;
            step.bind(saes, model.device())
                .map_err(|source| PlanError::Step { step: index, source })
        });
        Ok(Steerings { steps: steps.collect::<Result<_, _>>()? })
    }
}

impl PlanModel {
    /// What there is to know of a model; its name and hash are the caller's.
    pub fn of(model: &LanguageModel) -> Self {
        let config = model.config();
        Self {
            name: None,
            architecture: config.architecture,
            n_layers: config.n_layers,
            d_model: config.d_model,
            d_vocab: config.d_vocab,
            sha256: None,
        }
    }
}

impl PlanSae {
    /// What there is to know of an autoencoder.
    pub fn of(name: impl Into<String>, sae: &Sae) -> Self {
        Self {
            name: name.into(),
            sha256: fingerprint(sae),
            d_in: sae.config().d_in,
            d_sae: sae.config().d_sae,
            hook_name: sae.config().metadata.hook_name.clone(),
        }
    }
}

impl PlanStep {
    /// With names that were checked.
    fn bind<'a>(
        &self,
        saes: &BTreeMap<String, &'a Sae>,
        device: &Device,
    ) -> Result<Steering<'a>, SteeringError> {
        let vector = |values: &[f32]| {
            Tensor::<1>::from_data(TensorData::new(values.to_vec(), [values.len()]), device)
        };
        let intervention = match &self.intervention {
            PlanIntervention::Latents { sae, edits, remainder, reading } => {
                Intervention::Latents(LatentEdits {
                    sae: saes[sae],
                    edits: edits.clone(),
                    remainder: *remainder,
                    reading: *reading,
                })
            }
            PlanIntervention::Add { direction } => {
                Intervention::Add { direction: vector(direction) }
            }
            PlanIntervention::Ablate { direction } => {
                Intervention::Ablate { direction: vector(direction) }
            }
            PlanIntervention::Affine { direction, mean, strength } => Intervention::Affine {
                direction: vector(direction),
                mean: vector(mean),
                strength: f64::from(*strength),
            },
        };
        let steering =
            Steering::new(self.points.iter().copied(), intervention, self.region.clone())?;
        let Some(condition) = &self.condition else { return Ok(steering) };
        let score = match &condition.score {
            PlanScore::Cosine { direction } => Score::Cosine { direction: vector(direction) },
            PlanScore::Latent { sae, latent, reading } => {
                Score::Latent { sae: saes[sae], latent: *latent, reading: *reading }
            }
            PlanScore::Probe { weights, bias } => {
                Score::Probe { weights: vector(weights), bias: f64::from(*bias) }
            }
        };
        steering.when(Condition {
            point: condition.point,
            score,
            over: condition.over,
            threshold: f64::from(condition.threshold),
            from_position: condition.from_position,
        })
    }
}
