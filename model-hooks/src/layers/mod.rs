//! What transformers are made of; hooks fire here.

mod attention;
mod block;
mod embedding;
mod kv_cache;
mod linear;
mod mlp;
mod norm;
mod rotary;

use burn::tensor::{Int, Tensor};

use crate::positions::Positions;

pub(crate) use attention::Attention;
pub(crate) use block::Block;
pub(crate) use embedding::{Embedding, LearnedPositions, Unembedding};
pub use kv_cache::{KvCache, SharedPrefix};
pub(crate) use linear::Linear;
pub(crate) use mlp::Mlp;
pub(crate) use norm::{Norm, NormPoints};
pub use rotary::RopeLength;
pub(crate) use rotary::{Rotary, RotaryTable};

/// What all blocks of a pass share.
pub(crate) struct Pass<'a> {
    pub(crate) positions: &'a Positions,
    /// One for each of the model's rotaries.
    pub(crate) rotaries: &'a [RotaryTable],
    /// The first own column that each query may see.
    pub(crate) first_columns: Tensor<2, Int>,
    pub(crate) cache: &'a mut KvCache,
}
