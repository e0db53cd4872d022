//! Runs a program on the thread pool that its kernels share.
//!
//! A parallel loop that is entered from outside the pool puts its thread to sleep and wakes
//! another, twice; one that is entered on the pool begins at once. Decoding enters some hundred
//! loops a token: 35 tokens a second became 50. Programs do this; libraries do not know where they
//! are called from.

/// Runs a whole program on a thread of the pool.
pub fn on_the_pool<R: Send>(program: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| program())
}
