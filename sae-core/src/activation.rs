//! What makes pre-activations sparse.

/// How an SAE turns pre-activations into latents.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Activation {
    /// `relu(pre)` at the `k` largest of each row, zero elsewhere (Gao et al., 2024).
    TopK {
        /// Latents kept per row.
        k: usize,
        /// Whether latents are measured in units of what they write: the pre-activations are
        /// multiplied by the norms of their decoder rows before the ranking, and the latents are
        /// divided by them again before decoding (SAELens' `rescale_acts_by_decoder_norm`).
        rescale_by_decoder_norm: bool,
    },
}
