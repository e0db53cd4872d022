//! Taking latents out, to measure what they do.

use burn::tensor::Tensor;
use model_hooks::{Hook, HookError, HookPoint, Positions};
use sae_core::Sae;

/// Removes latents from the residual stream, keeping the error term:
/// `x' = x − share · Σ z_latent · W_dec[latent]`.
///
/// `share = 1` is zero-ablation; a small share measures the slope that the gradient estimates.
#[derive(Debug, Clone)]
pub struct Ablation<'a> {
    sae: &'a Sae,
    point: HookPoint,
    latents: Vec<usize>,
    share: f64,
    from_position: usize,
    outcome: Result<(), HookError>,
}

impl<'a> Ablation<'a> {
    /// Zero-ablation of some latents of an autoencoder at `point`, at positions from
    /// `from_position` on.
    ///
    /// # Panics
    /// If a latent is not below `d_sae`.
    pub fn new(sae: &'a Sae, point: HookPoint, latents: Vec<usize>, from_position: usize) -> Self {
        let d_sae = sae.config().d_sae;
        assert!(
            latents.iter().all(|&latent| latent < d_sae),
            "latents {latents:?} are not all below {d_sae}"
        );
        let outcome = Err(HookError::NeverFired { point });
        Self { sae, point, latents, share: 1.0, from_position, outcome }
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
        point == self.point
    }

    fn at<const D: usize>(
        &mut self,
        _: HookPoint,
        x: Tensor<D>,
        positions: &Positions,
    ) -> Tensor<D> {
        let shape = x.dims();
        let (d_in, actual) = (self.sae.config().d_in, shape[D - 1]);
        if actual != d_in {
            let point = self.point;
            self.outcome = Err(HookError::Width { point, expected: d_in, actual });
            return x;
        }
        self.outcome = Ok(());
        let n = shape.iter().product::<usize>() / d_in;
        let mask = positions.mask_from(self.from_position, &x.device()).reshape([n, 1]);
        let latents = self.sae.encode(x.clone().reshape([n, d_in]));
        let rows = self.sae.directions();
        let removed = self.latents.iter().map(|&latent| {
            let values = latents.latent(latent).reshape([n, 1]) * self.share;
            values.matmul(rows.clone().narrow(0, latent, 1))
        });
        let removed = removed.reduce(|a, b| a + b);
        match removed {
            Some(removed) => x - (removed * mask).reshape(shape),
            None => x,
        }
    }

    fn finish(&mut self) -> Result<(), HookError> {
        std::mem::replace(&mut self.outcome, Err(HookError::NeverFired { point: self.point }))
    }
}
