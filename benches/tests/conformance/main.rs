//! Conformance: everything that runs on a device, on the one that `BURN_DEVICE` names (`flex` if it
//! names none) beside a reference, with the same numbers going in.
//!
//! ```sh
//! BURN_DEVICE=wgpu cargo test --release -p benches --features wgpu --test conformance
//! ```
//!
//! The reference is `flex`, whose kernels have an oracle of their own in the libraries' tests; and
//! for `flex` itself, the plain defaults on ndarray.

mod attributed;
mod beside;
mod forward;
mod gradients;
mod operations;
mod steered;
mod trained;
