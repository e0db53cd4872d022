//! What makes pre-activations sparse.

/// How an SAE turns pre-activations `p = (x − b_dec) · w_enc + b_enc` into latents.
///
/// BatchTopK and Matryoshka SAEs are trained with a selection over the batch; what is left of it
/// afterwards is a threshold, so they are [`JumpRelu`](Self::JumpRelu) here.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Activation {
    /// `relu(p)` (SAELens' `standard`).
    Relu,
    /// `p` where it is above the latent's threshold and above zero (Rajamanoharan et al., 2024).
    JumpRelu,
    /// `relu(p)` at the `k` largest of each row (Gao et al., 2024).
    TopK {
        /// Latents kept per row.
        k: usize,
        /// Whether latents are measured in units of what they write: the pre-activations are
        /// multiplied by the norms of their decoder rows before the ranking, and the latents are
        /// divided by them again before decoding (SAELens' `rescale_acts_by_decoder_norm`).
        rescale_by_decoder_norm: bool,
    },
    /// `p` at the `k` largest magnitudes of each row: latents may be negative.
    AbsTopK {
        /// Latents kept per row.
        k: usize,
        /// As for TopK.
        rescale_by_decoder_norm: bool,
    },
    /// `relu(p)` at the largest of each of `k` groups of neighbouring latents (sparsify).
    GroupMax {
        /// Groups, each of `d_sae / k` latents.
        k: usize,
    },
    /// `relu(p' · exp(r_mag) + b_mag)` where `p > 0`, with `p'` the pre-activation without its bias
    /// (Rajamanoharan et al., 2024).
    Gated,
    /// Matching pursuit on the decoder rows (Costa et al., 2025): again and again, the row that
    /// explains most of what is left, as SAELens does it.
    MatchingPursuit {
        /// A row ends where the norm of its residual is below this; never, if this is not positive.
        residual_threshold: f64,
        /// Picks per row, at most; as many as `d_in` unless given.
        max_iterations: Option<usize>,
        /// Whether a row also ends where it picks a latent for the second time.
        stop_on_duplicate_support: bool,
    },
}

impl Activation {
    /// Whether latents are measured in units of their decoder norms.
    pub(crate) fn rescales_by_decoder_norm(&self) -> bool {
        match *self {
            Self::TopK { rescale_by_decoder_norm, .. }
            | Self::AbsTopK { rescale_by_decoder_norm, .. } => rescale_by_decoder_norm,
            _ => false,
        }
    }
}
