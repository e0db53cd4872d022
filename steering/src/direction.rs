//! Directions in the residual stream.

use burn::tensor::{Device, Tensor, TensorData};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use sae_core::Sae;

use crate::error::SteeringError;

/// `mean(towards) − mean(away)` (Arditi et al., 2024).
///
/// # Shapes
/// `towards` and `away`: `[n, d_model]`, any number of rows each; result: `[d_model]`.
///
/// # Panics
/// If one is empty or the widths differ.
pub fn difference_of_means(towards: Tensor<2>, away: Tensor<2>) -> Tensor<1> {
    let mean = |x: Tensor<2>| {
        let [n, d_model] = x.dims();
        assert!(n > 0, "a mean of no activations");
        x.mean_dim(0).reshape([d_model])
    };
    mean(towards) - mean(away)
}

/// What one unit of a latent writes.
///
/// # Errors
/// If there is no such latent, or the autoencoder is a transcoder, which writes elsewhere.
///
/// # Panics
/// If the autoencoder normalises each activation by itself: what a unit writes then depends on it.
pub fn latent_direction(sae: &Sae, latent: usize) -> Result<Tensor<1>, SteeringError> {
    let d_sae = sae.config().d_sae;
    if latent >= d_sae {
        return Err(SteeringError::NoSuchLatent { latent, d_sae });
    }
    if sae.config().transcodes_to.is_some() {
        return Err(SteeringError::Transcoder);
    }
    Ok(sae.directions().narrow(0, latent, 1).squeeze_dim(0))
}

/// A direction drawn uniformly from the sphere of the given norm.
pub fn random_direction(d_model: usize, length: f64, seed: u64, device: &Device) -> Tensor<1> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..d_model).map(|_| StandardNormal.sample(&mut rng)).collect();
    let direction = Tensor::<1>::from_data(TensorData::new(values, [d_model]), device);
    let scale = length / norm(&direction);
    direction * scale
}

/// The Euclidean norm.
pub fn norm(direction: &Tensor<1>) -> f64 {
    f64::from(direction.clone().square().sum().into_scalar::<f32>()).sqrt()
}
