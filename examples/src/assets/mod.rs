//! What the programs work on: a model and text, from where the user says or from a registry.

mod model;
mod text;
mod wheel;

pub use model::{
    Head, HeadedModel, LoadedModel, TextModel, load_model, load_text_model, locate_model,
};
pub use text::{Dialogue, load_texts};
