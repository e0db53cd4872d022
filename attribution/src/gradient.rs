//! First-order estimates out of the gradient at the residual stream.

use burn::tensor::Tensor;
use sae_core::{Sae, SparseLatents};

/// Estimated effect on a metric of zero-ablating each active latent at each position:
/// `effect = −z · ∂metric/∂z`, with `∂metric/∂z = ⟨∂metric/∂x, W_dec[latent]⟩`.
///
/// This is attribution patching with the patch at zero (Marks et al., 2024), the error term kept,
/// the gradient not passed through the encoder. It is exact where the metric is linear in the
/// residual stream. Work and memory are O(active · d_in).
///
/// # Shapes
/// `gradient`: `∂metric/∂x` as `[n, d_in]`, for the rows that `latents` encodes; the result has the
/// indices of `latents` and effects for values.
///
/// # Panics
/// If the rows differ in number, or the gradient in width from the autoencoder.
pub fn gradient_times_activation(
    sae: &Sae,
    latents: &SparseLatents,
    gradient: Tensor<2>,
) -> SparseLatents {
    let rows = sae.directions();
    let slopes = kernels::sparse_dot(latents.indices.clone(), rows, gradient);
    let effects = -(latents.values.clone() * slopes);
    SparseLatents::new(latents.indices.clone(), effects, latents.d_sae)
}

/// How fast a metric changes as each latent is raised by one unit at every one of the positions,
/// whether it is active there or not: `Σ_positions ⟨∂metric/∂x, W_dec[latent]⟩`.
///
/// The first-order estimate of what clamping a latent does, for all latents at once.
///
/// # Shapes
/// `gradient`: `[n, d_in]`; result: `[d_sae]`.
///
/// # Panics
/// If the gradient's width is not the autoencoder's.
pub fn clamp_slopes(sae: &Sae, gradient: Tensor<2>) -> Tensor<1> {
    let rows = sae.directions();
    let [d_sae, d_in] = rows.dims();
    let total = gradient.sum_dim(0).reshape([d_in, 1]);
    rows.matmul(total).reshape([d_sae])
}
