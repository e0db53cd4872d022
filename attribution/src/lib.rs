//! Which latents move a metric, proven by ablation.
//!
//! The **effect** of a latent is `metric(ablated) − metric(clean)`: a latent that raises the metric
//! has a negative effect. [`gradient_times_activation`] estimates the effects of all active latents
//! from one backward pass; [`Ablation`] measures one, so that estimates can be checked.
//!
//! The reconstruction error of the autoencoder stays in the residual stream throughout:
//! `x = decode(encode(x)) + error`, and only the decoded latents are taken away.

mod ablation;
mod gradient;

pub use ablation::Ablation;
pub use gradient::{clamp_slopes, gradient_times_activation};
