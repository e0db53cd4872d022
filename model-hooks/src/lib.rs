//! A language model you can look into and change while it runs.
//!
//! | to | see |
//! |---|---|
//! | load a model | [`load::open`], [`LanguageModel::load`] |
//! | talk to it | [`text::ChatTemplate`], [`text::Tokenizer`], [`LanguageModel::generate`] |
//! | keep activations | [`ActivationCache`] |
//! | change activations | [`Hook`], and [`Edits`] for lists made at run time |
//! | differentiate | [`Probe`] |
//! | stream activations of many texts | [`LanguageModel::harvest`] |
//!
//! Hook points have TransformerLens' names ([`HookPoint`]); positions are absolute in the
//! conversation ([`Positions`]), whatever the padding and the cache.

mod activation;
mod architectures;
mod cache;
pub mod config;
mod cross_entropy;
mod edit;
mod generate;
mod harvest;
mod hook;
mod hook_point;
mod layers;
pub mod load;
mod model;
mod positions;
mod probe;
mod reward;
mod row_edit;
mod sampling;
pub mod text;
mod tokens;

pub use activation::Activation;
pub use cache::ActivationCache;
pub use config::ModelConfig;
pub use cross_entropy::CrossEntropy;
pub use edit::{Edit, Edits};
pub use generate::{GenerateConfig, NewToken, unobserved};
pub use harvest::{HarvestConfig, HarvestReport, Harvested, Layout, Place};
pub use hook::{Hook, HookError};
pub use hook_point::{Axis, HookPoint, Site, UnknownHookPoint};
pub use layers::{KvCache, RopeLength, SharedPrefix};
pub use model::{ForwardError, LanguageModel};
pub use positions::Positions;
pub use probe::Probe;
pub use reward::{RewardHead, RewardModel};
pub use row_edit::RowEdit;
pub use sampling::{RandomSampling, Sampling, SamplingError};
pub use tokens::{TokenBatch, TokenError};
