//! Foreign files.

pub mod control_vector;
