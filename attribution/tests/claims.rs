//! An attributed effect is the measured intervention.

use attribution::{Ablation, clamp_slopes, gradient_times_activation};
use burn::tensor::{Device, Tensor, TensorData};
use model_hooks::{HookPoint, LanguageModel, Probe, Site, TokenBatch, load};
use rand::RngExt;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use sae_core::{Activation, Sae, SaeConfig, SaeWeights};

const POINT: HookPoint = HookPoint::Block { layer: 1, site: Site::ResidPost };
const ROWS: [&[u32]; 2] = [&[5, 9, 40, 77, 12, 8, 101], &[44, 3, 90]];
const D_MODEL: usize = 48;
const D_SAE: usize = 96;

fn model() -> LanguageModel {
    let mut checkpoint = load::open(&goldens::own("models/llama_gqa_theta_tied")).unwrap();
    LanguageModel::load(checkpoint.config, checkpoint.tensors.as_mut(), &Device::flex()).unwrap()
}

fn sae() -> Sae {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let values: Vec<f32> = (0..D_SAE * D_MODEL).map(|_| rng.random_range(-0.3..0.3)).collect();
    let device = Device::flex();
    let w_dec = Tensor::<2>::from_data(TensorData::new(values, [D_SAE, D_MODEL]), &device);
    let weights = SaeWeights::new(
        w_dec.clone().transpose(),
        Tensor::zeros([D_SAE], &device),
        w_dec,
        Tensor::zeros([D_MODEL], &device),
    );
    let activation = Activation::TopK { k: 6, rescale_by_decoder_norm: true };
    Sae::new(SaeConfig::new(D_MODEL, D_SAE, activation), weights).unwrap()
}

fn tokens(model: &LanguageModel) -> TokenBatch {
    TokenBatch::new(&ROWS, model.config(), model.device()).unwrap()
}

/// A logit difference at the last position, summed over rows.
fn metric(logits: Tensor<2>) -> Tensor<1> {
    (logits.clone().narrow(1, 7, 1) - logits.narrow(1, 30, 1)).sum()
}

/// The residual stream at the point and the gradient of the metric there, as rows.
fn residual_and_gradient(model: &LanguageModel) -> (Tensor<2>, Tensor<2>) {
    let mut probe = Probe::new([POINT]);
    let metric = metric(model.last_logits(&tokens(model), &mut probe).unwrap());
    let gradient = probe.gradient::<3>(POINT, &metric.backward()).unwrap();
    let rows = |x: Tensor<3>| x.reshape([-1, D_MODEL as i32]);
    (rows(probe.value::<3>(POINT).unwrap()), rows(gradient))
}

#[test]
fn effects_are_the_slopes_of_exact_ablations() {
    let (model, sae) = (model(), sae());
    let (x, gradient) = residual_and_gradient(&model);
    let effects = gradient_times_activation(&sae, &sae.encode(x), gradient);
    let measure = |hook: &mut dyn FnMut() -> Tensor<2>| -> f64 {
        f64::from(metric(hook()).into_scalar::<f32>())
    };
    let mut totals = vec![0f64; D_SAE];
    for entry in effects.entries() {
        totals[entry.latent_idx] += f64::from(entry.value);
    }
    let active: Vec<usize> = (0..D_SAE).filter(|&latent| totals[latent].abs() > 1e-3).collect();
    assert!(active.len() > 5, "only {} latents have an effect", active.len());
    for latent in active {
        // A small share, taken away and added: the slope without the curvature.
        let at = |share: f64| {
            let ablation = Ablation::new(&sae, POINT, vec![latent], 0);
            let mut ablation = ablation.with_share(share);
            measure(&mut || model.last_logits(&tokens(&model), &mut ablation).unwrap())
        };
        let slope = (at(0.02) - at(-0.02)) / 0.04;
        let error = (slope - totals[latent]).abs();
        assert!(error < 0.02 * totals[latent].abs() + 2e-3, "{latent}: {slope} {}", totals[latent]);
    }
}

#[test]
fn a_latent_that_raises_the_metric_has_a_negative_effect() {
    // metric(x) = ⟨g, x⟩ is linear: the estimate is exact.
    let sae = sae();
    let device = Device::flex();
    let (latent, value) = (11, 2.0f32);
    let g = sae.directions().narrow(0, latent, 1);
    let latents = sae_core::SparseLatents::new(
        Tensor::from_data(TensorData::new(vec![latent as i64], [1, 1]), &device),
        Tensor::from_data(TensorData::new(vec![value], [1, 1]), &device),
        D_SAE,
    );
    let effect = gradient_times_activation(&sae, &latents, g.clone());
    let effect = effect.entries().next().unwrap().value;
    let exact = -value * g.square().sum().into_scalar::<f32>();
    assert!(effect < 0.0 && (effect - exact).abs() < 1e-5, "{effect} {exact}");
}

#[test]
fn clamp_slopes_sum_over_positions_for_every_latent() {
    let (model, sae) = (model(), sae());
    let (_, gradient) = residual_and_gradient(&model);
    let slopes: Vec<f32> = clamp_slopes(&sae, gradient.clone()).into_data().try_to_vec().unwrap();
    let dense: Vec<f32> =
        gradient.matmul(sae.directions().transpose()).sum_dim(0).into_data().try_to_vec().unwrap();
    goldens::assert_close("slopes", &slopes, &dense, 1e-5);
}
