//! ndarray runs the plain defaults: Burn deprecates it, so it gets no kernels of its own.
#![allow(deprecated)]

impl crate::KernelOps for burn::backend::NdArray {}
