//! Files of SAEs, one foreign format a module. The only code here that touches files.

mod error;
mod folder;
pub mod saelens;
mod tensors;

pub use error::FormatError;
