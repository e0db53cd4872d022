//! What transformers are made of; hooks fire here.

mod attention;
mod kv_cache;
mod linear;
mod mlp;
mod norm;
mod rotary;

pub(crate) use attention::Attention;
pub use kv_cache::{KvCache, SharedPrefix};
pub(crate) use linear::Linear;
pub(crate) use mlp::GatedMlp;
pub(crate) use norm::{NormPoints, RmsNorm};
pub(crate) use rotary::{Rotary, RotaryTable};
