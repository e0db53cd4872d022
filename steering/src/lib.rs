//! Steering a language model at inference, and judging what it did.
//!
//! | to | see |
//! |---|---|
//! | clamp, scale or ablate latents; add, ablate or edit a direction | [`Steering`], [`Intervention`] |
//! | steer some tokens, and on a condition | [`Region`], [`Condition`] |
//! | read a few latents without the others, and watch them | [`LatentReader`], [`LatentWatch`] |
//! | keep all of that in a document, and check it against a model | [`Plan`] |
//! | tell which requests to steer the answers to, before they are answered | [`RequestProbe`] |
//! | read and write llama.cpp's control vectors | [`format::control_vector`] |
//! | make directions | [`difference_of_means`], [`principal_direction`], [`LogisticProbe`], [`latent_direction`], [`LinearEffects`], [`random_direction`] |
//! | choose one, or a bundle of latents | [`select_direction`], [`greedy_bundle`] |
//! | find the latents behind a behaviour | [`LatentStatistics`], [`contrast`], [`output_score`] |
//! | score a prompt without generating | [`log_odds`] |
//! | read answers, and see how far people agree | [`PhraseJudge`], [`Outcome`], [`agreement`] |
//! | measure what it costs | [`choice_scores`], [`mean_kl`] |
//! | report rates, and differences | [`Rate`], [`McNemar`] |

mod capability;
mod condition;
mod direction;
mod error;
mod find;
mod fingerprint;
pub mod format;
mod intervention;
mod judge;
mod latent_edit;
mod latent_reader;
mod log_odds;
mod logistic;
mod mcnemar;
mod output_score;
mod pca;
pub mod plan;
mod rate;
mod region;
mod request;
mod rows;
mod selection;
mod steering;
mod targeted;
mod watch;

pub use capability::{ChoiceScores, TokenQuestion, choice_scores, kl_divergence, mean_kl};
pub use condition::{Condition, Over, Score, scores};
pub use direction::{difference_of_means, latent_direction, norm, random_direction};
pub use error::SteeringError;
pub use find::{Contrast, LatentStatistics, contrast};
pub use fingerprint::fingerprint;
pub use intervention::Intervention;
pub use judge::{Agreement, HumanLabel, Judge, JudgeError, Outcome, PhraseJudge, agreement};
pub use latent_edit::{Amount, LatentChange, LatentEdit, LatentEdits, Remainder};
pub use latent_reader::{LatentReader, Reading, running_threshold};
pub use log_odds::log_odds;
pub use logistic::{LogisticOptions, LogisticProbe};
pub use mcnemar::McNemar;
pub use output_score::output_score;
pub use pca::{Pca, principal_direction};
pub use plan::{Plan, PlanError};
pub use rate::Rate;
pub use region::{Part, Region};
pub use request::{At, Request, RequestFeature, RequestProbe, RequestReading};
pub use selection::{DirectionRule, DirectionTrial, greedy_bundle, select_direction};
pub use steering::{Steering, Steerings, residual_writers};
pub use targeted::LinearEffects;
pub use watch::LatentWatch;
