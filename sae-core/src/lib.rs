//! sae-core
