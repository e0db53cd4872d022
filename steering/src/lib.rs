//! Steering a language model at inference, and judging what it did.
//!
//! | to | see |
//! |---|---|
//! | clamp latents, add or ablate a direction | [`Steering`], [`Intervention`] |
//! | make directions | [`difference_of_means`], [`random_direction`] |
//! | find the latents behind a behaviour | [`contrast`], [`Contrast`] |
//! | score a prompt without generating | [`log_odds`] |
//! | read answers | [`PhraseJudge`], [`Outcome`] |
//! | report rates | [`Rate`] |

mod direction;
mod find;
mod intervention;
mod judge;
mod log_odds;
mod rate;

pub use direction::{difference_of_means, norm, random_direction};
pub use find::{Contrast, LatentStatistics, contrast};
pub use intervention::{Intervention, Steering, SteeringError};
pub use judge::{Judge, Outcome, PhraseJudge};
pub use log_odds::log_odds;
pub use rate::Rate;
