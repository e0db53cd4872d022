//! Which latents move a metric, proven by ablation.
//!
//! The [`Effect`] of a latent is `metric(ablated) − metric(clean)`: a latent that raises the metric
//! has a negative effect. The reconstruction error of the autoencoder stays in the pass throughout,
//! `x = decode(encode(x)) + error`: only the decoded latents are taken away.
//!
//! A [`Study`] is some conversations and a [`Metric`] of each: a [`Reward`], a difference of rewards
//! ([`Weighted`]), something about the [`NextToken`], or any other scalar of a pass.
//!
//! | to | see |
//! |---|---|
//! | estimate the effects of all active latents, and of errors | [`Study::attribute`] |
//! | measure those of some, many in a pass | [`Study::measure_cuts`] |
//! | check the first by the second | [`Study::check`] |
//! | estimate effects of activations (attribution patching) | [`Study::attribute_activations`] |
//! | measure them (activation patching) | [`Study::measure_patches`] |
//! | estimate what latents do by way of latents further up | [`Study::attribute_edges`] |
//! | prune all latents but some, and see what is left | [`Study::circuit_shares`] |
//! | leave alone what the texts of a pair share | [`Study::from_positions`], [`Study::to_positions`] |
//! | run what comes before the first change once | [`Study::share_prefix`], [`Study::start_at`] |
//!
//! ```no_run
//! # use model_hooks::{HookPoint, RewardModel};
//! # use sae_core::Sae;
//! use attribution::{
//!     AttributionConfig, Baseline, CheckConfig, Integration, Reward, Rule, SaeSite, Study,
//! };
//!
//! # fn f(model: &RewardModel, sae: &Sae, ids: &[u32]) -> Result<(), attribution::AttributionError> {
//! let metric = Reward::new(model);
//! let site = SaeSite::new(sae, HookPoint::resid_post(15));
//! let study = Study::new(&metric, &[ids])?.start_at(site.point)?;
//! let config = AttributionConfig::integrated(Integration::new(Rule::Left, 10));
//! let effects = study.attribute(&[site], Baseline::Zero, config)?;
//! let check = CheckConfig { n_latents: 80, top_k: 20, seed: 1 };
//! let checked = study.check(&site, Baseline::Zero, &effects[0], check)?;
//! println!("correlation with true ablations: {}", checked.check.pearson);
//! # Ok(()) }
//! ```

mod ablation;
mod activations;
mod attribution;
mod baseline;
mod check;
mod circuit;
mod edges;
mod effect;
mod error;
mod gradient;
mod integration;
mod intervention;
mod metric;
mod shift;
mod site;
mod study;

pub use ablation::Ablation;
pub use activations::ActivationEffects;
pub use attribution::{
    AttributionConfig, Completeness, ErrorGradient, Path, SiteEffects, TokenEffect,
};
pub use baseline::Baseline;
pub use check::{Check, CheckConfig, Checked, Compared, pearson};
pub use circuit::{Circuit, CircuitShare, Errors, Pruned};
pub use edges::Edges;
pub use effect::Effect;
pub use error::AttributionError;
pub use gradient::{clamp_slopes, gradient_times_activation};
pub use integration::{Integration, Rule};
pub use intervention::{Cut, CutOf, Patch};
pub use metric::{End, Metric, NextToken, Reward, Target, Weighted};
pub use site::{SaeMeans, SaeSite};
pub use study::Study;
