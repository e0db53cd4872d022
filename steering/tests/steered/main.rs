//! What must hold of every intervention, on a tiny model with random autoencoders.

mod capability;
mod conditions;
mod edits;
mod latents;
mod markers;
mod plans;
mod requests;

use burn::tensor::{Device, Tensor, TensorData};
use model_hooks::{
    ActivationCache, GenerateConfig, Hook, HookPoint, LanguageModel, SharedPrefix, Site,
    TokenBatch, load, unobserved,
};
use sae_core::{Activation, Magnitude, Normalization, Sae, SaeConfig, SaeWeights};
use steering::{difference_of_means, norm, random_direction};

const POINT: HookPoint = HookPoint::Block { layer: 1, site: Site::ResidPost };
const ROWS: [&[u32]; 3] = [&[5, 9, 40, 77, 12, 8, 101], &[44, 3, 90], &[7, 7, 19, 23, 60]];
const D_MODEL: usize = 48;
const D_SAE: usize = 120;

const TOP_K: Activation = Activation::TopK { k: 8, rescale_by_decoder_norm: false };
const RESCALED_TOP_K: Activation = Activation::TopK { k: 8, rescale_by_decoder_norm: true };

fn model() -> LanguageModel {
    named("models/llama_gqa_theta_tied")
}

fn named(name: &str) -> LanguageModel {
    let mut checkpoint = load::open(&goldens::own(name)).unwrap();
    LanguageModel::load(checkpoint.config, checkpoint.tensors.as_mut(), &Device::flex()).unwrap()
}

/// Latents that read and write random directions, of lengths from 0.5 to 1.5.
fn sae_of(activation: Activation, normalization: Normalization) -> Sae {
    let device = Device::flex();
    let row = |i| {
        let length = 0.5 + i as f64 / D_SAE as f64;
        random_direction(D_MODEL, length, i as u64, &device).unsqueeze()
    };
    let w_dec: Tensor<2> = Tensor::cat((0..D_SAE).map(row).collect(), 0);
    let spread = |length: f64, seed| random_direction(D_SAE, length, seed, &device);
    let b_dec = random_direction(D_MODEL, 0.2, 999, &device);
    let mut weights = SaeWeights::new(w_dec.clone().transpose(), spread(0.5, 1000), w_dec, b_dec);
    if activation == Activation::JumpRelu {
        weights.threshold = Some(spread(2.0, 1001).abs());
    }
    if activation == Activation::Gated {
        weights.magnitude = Some(Magnitude { r_mag: spread(2.0, 1002), b_mag: spread(1.0, 1003) });
    }
    let mut config = SaeConfig::new(D_MODEL, D_SAE, activation);
    config.normalization = normalization;
    Sae::new(config, weights).unwrap()
}

fn sae() -> Sae {
    sae_of(TOP_K, Normalization::None)
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().unwrap()
}

fn matrix(values: Vec<f32>, width: usize) -> Tensor<2> {
    let shape = [values.len() / width, width];
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}

fn direction(seed: u64) -> Tensor<1> {
    random_direction(D_MODEL, 3.0, seed, &Device::flex())
}

/// Logits and the activation at the point, under a hook.
fn run<H: Hook>(model: &LanguageModel, rows: &[&[u32]], hook: &mut H) -> (Vec<f32>, Vec<f32>) {
    let tokens = TokenBatch::new(rows, model.config(), model.device()).unwrap();
    let mut hooks = (hook, ActivationCache::new([POINT]));
    let logits = model.logits(&tokens, &mut hooks).unwrap();
    (floats(logits), floats(hooks.1.get::<3>(POINT).unwrap()))
}

const NEW_TOKENS: usize = 6;

/// Greedy answers behind a prefix, which is run with the same hook.
fn answers<H: Hook>(
    model: &LanguageModel,
    rows: &[&[u32]],
    prefix: &[u32],
    hook: &mut H,
) -> Vec<Vec<u32>> {
    let prefix = match prefix {
        [] => SharedPrefix::default(),
        ids => model.prefix(ids, hook).unwrap(),
    };
    let config = GenerateConfig::greedy(NEW_TOKENS, vec![]);
    model.generate(rows, &prefix, &config, hook, unobserved).unwrap()
}

/// What one uncached pass after the other says to a single prompt.
fn uncached<H: Hook>(
    model: &LanguageModel,
    prompt: &[u32],
    mut hook: impl FnMut() -> H,
) -> Vec<u32> {
    let mut whole = prompt.to_vec();
    for _ in 0..NEW_TOKENS {
        let tokens = TokenBatch::new(&[&whole], model.config(), model.device()).unwrap();
        let logits = floats(model.last_logits(&tokens, &mut hook()).unwrap());
        let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
        whole.push(best.unwrap().0 as u32);
    }
    whole.split_off(prompt.len())
}

#[test]
fn directions_are_what_they_say() {
    let difference =
        difference_of_means(matrix(vec![1.0, 2.0, 3.0, 6.0], 2), matrix(vec![1.0, 1.0], 2));
    assert_eq!(floats(difference), [1.0, 3.0]);
    let direction = random_direction(64, 7.0, 3, &Device::flex());
    assert!((norm(&direction) - 7.0).abs() < 1e-5);
    assert_eq!(floats(direction), floats(random_direction(64, 7.0, 3, &Device::flex())));
}
