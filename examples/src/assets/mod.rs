//! What the programs work on: a model and text, from where the user says or from a registry.

mod model;
mod text;
mod wheel;

pub use model::{LoadedModel, load_model, locate_model};
pub use text::{Dialogue, load_texts};
