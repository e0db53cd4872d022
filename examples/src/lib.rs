//! The runnable programs, and what they share.
//!
//! | program | what it does |
//! |---|---|
//! | `refusal` | trains a sparse autoencoder on a chat model and steers its refusals with it |
//! | `preference` | opens up a preference model: which latents move its rewards, proven by ablation |
//! | `train` | trains sparse autoencoders by a config file, and shows how good they are |

pub mod allocator;
pub mod assets;
mod axis;
pub mod corpus;
pub mod device;
pub mod pool;
pub mod preference;
pub mod progress;
pub mod prompts;
pub mod refusal;
pub mod report;
pub mod results;
pub mod storage;
pub mod train;
