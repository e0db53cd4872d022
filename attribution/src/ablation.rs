//! Taking latents out, to measure what they do.

use burn::tensor::Tensor;
use model_hooks::{Hook, HookError, HookPoint, Positions, RowEdit};
use sae_core::{Sae, SaeConfig};

/// Removes latents from the residual stream, keeping the error term:
/// `x' = x − share · Σ z_latent · W_dec[latent]`.
///
/// `share = 1` is zero-ablation; a small share measures the slope that the gradient estimates.
#[derive(Debug, Clone)]
pub struct Ablation<'a> {
    sae: &'a Sae,
    latents: Vec<usize>,
    share: f64,
    rows: RowEdit,
}

impl<'a> Ablation<'a> {
    /// Zero-ablation of some latents of an autoencoder at `point`, at positions from
    /// `from_position` on.
    ///
    /// # Panics
    /// If a latent is not below `d_sae`.
    pub fn new(sae: &'a Sae, point: HookPoint, latents: Vec<usize>, from_position: usize) -> Self {
        let SaeConfig { d_in, d_sae, .. } = *sae.config();
        assert!(
            latents.iter().all(|&latent| latent < d_sae),
            "latents {latents:?} are not all below {d_sae}"
        );
        Self { sae, latents, share: 1.0, rows: RowEdit::new(point, d_in, from_position) }
    }

    /// Removes only a share of the latents' values.
    #[must_use]
    pub fn with_share(mut self, share: f64) -> Self {
        self.share = share;
        self
    }
}

impl Hook for Ablation<'_> {
    fn wants(&self, point: HookPoint) -> bool {
        self.rows.wants(point)
    }

    fn at<const D: usize>(
        &mut self,
        _: HookPoint,
        x: Tensor<D>,
        positions: &Positions,
    ) -> Tensor<D> {
        let Self { sae, latents: ref ablated, share, ref mut rows } = *self;
        rows.apply(x, positions, |x| {
            let latents = sae.encode(x.clone());
            let directions = sae.directions();
            ablated.iter().fold(x, |x, &latent| {
                let values = latents.latent(latent).unsqueeze_dim::<2>(1) * share;
                x - values.matmul(directions.clone().narrow(0, latent, 1))
            })
        })
    }

    fn finish(&mut self) -> Result<(), HookError> {
        self.rows.finish()
    }
}
