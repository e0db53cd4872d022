//! The runnable programs, and what they share.
//!
//! | program | what it does |
//! |---|---|
//! | `refusal` | trains a sparse autoencoder on a chat model and steers its refusals with it |
//! | `preference` | opens up a preference model: which latents move its rewards, proven by ablation |
//! | `chat` | chats with a model that a plan steers, and shows a latent at every token |
//! | `train` | trains sparse autoencoders by a config file, and shows how good they are |

pub mod allocator;
pub mod assets;
mod axis;
pub mod chat;
mod clock;
pub mod corpus;
pub mod device;
pub mod pool;
pub mod preference;
pub mod progress;
pub mod prompts;
pub mod refusal;
pub mod report;
pub mod requests;
pub mod results;
pub mod sets;
pub mod storage;
pub mod train;

/// What the README shows has to compile.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct Readme;
