//! Sparse autoencoders (SAEs): models, training, files, metrics.
//!
//! Everything rests on one identity, `x = decode(encode(x)) + error`: [`Sae::decompose`] gives the
//! latents, the reconstruction and the error of a batch of activations. Latents are sparse
//! ([`SparseLatents`]): nothing here allocates `[tokens, d_sae]` unless it is asked to.
//!
//! | to | see |
//! |---|---|
//! | run an SAE of any kind, or a transcoder | [`Sae`], [`Activation`] |
//! | read one, in any of its formats | [`format::read`] |
//! | write one, as SAELens does | [`format::saelens`] |
//! | train one | [`train::Trainer`] |
//! | train several on one stream, and survive a crash | [`train::Fit`] |
//! | keep activations on disk | [`store`] |
//! | choose its kind and its loss | [`train::Objective`] |
//! | measure one | [`metrics`], and in its model [`evaluate`] |
//! | put one into a forward pass | [`splice::Splice`] |

pub mod activation;
pub mod config;
pub mod evaluate;
pub mod format;
pub mod latents;
pub mod metrics;
pub mod normalization;
pub mod sae;
pub mod source;
pub mod splice;
pub mod store;
pub mod train;

pub use activation::Activation;
pub use config::{ConfigError, SaeConfig, SaeMetadata};
pub use latents::SparseLatents;
pub use normalization::Normalization;
pub use sae::{Decomposition, Magnitude, Sae, SaeError, SaeWeights};
pub use splice::{ErrorTerm, Splice};
