//! model-hooks
