//! What is measured on: a model, and an autoencoder of random directions.

use anyhow::Result;
use burn::tensor::{Device, Tensor};
use examples::assets::locate_model;
use model_hooks::{LanguageModel, load};
use sae_core::{Activation, Sae, SaeConfig, SaeWeights};
use steering::random_direction;

/// A GGUF file, a Hugging Face folder, or a hub id; SmolLM2-135M-Instruct unless given.
pub(crate) fn model(given: Option<&str>) -> Result<LanguageModel> {
    let mut checkpoint = load::open(&locate_model(given)?)?;
    let tensors = checkpoint.tensors.as_mut();
    let model = LanguageModel::load(checkpoint.config, tensors, &Device::flex())?;
    // Not before: what has been freed by now is to go back to the system.
    examples::allocator::keep_pages();
    Ok(model)
}

/// Latents that read and write random directions.
pub(crate) fn sae(
    d_in: usize,
    d_sae: usize,
    activation: Activation,
    device: &Device,
) -> Result<Sae> {
    let row = |i: usize| random_direction(d_in, 1.0, i as u64, device).unsqueeze::<2>();
    let w_dec = Tensor::cat((0..d_sae).map(row).collect(), 0);
    let w_enc = Tensor::from_data(w_dec.clone().transpose().into_data(), device);
    let zeros = |n: usize| Tensor::<1>::zeros([n], device);
    let mut weights = SaeWeights::new(w_enc, zeros(d_sae), w_dec, zeros(d_in));
    weights.threshold = (activation == Activation::JumpRelu).then(|| zeros(d_sae) + 1.0);
    Ok(Sae::new(SaeConfig::new(d_in, d_sae, activation), weights)?)
}
