//! What must hold of every intervention, on a tiny model with a random autoencoder.

use burn::tensor::{Device, Tensor, TensorData};
use goldens::assert_close;
use model_hooks::{
    ActivationCache, ForwardError, GenerateConfig, Hook, HookError, HookPoint, LanguageModel,
    SharedPrefix, Site, TokenBatch, load, unobserved,
};
use sae_core::{Activation, Sae, SaeConfig, SaeWeights};
use steering::{
    Intervention, Steering, SteeringError, difference_of_means, norm, random_direction,
};

const POINT: HookPoint = HookPoint::Block { layer: 1, site: Site::ResidPost };
const ROWS: [&[u32]; 3] = [&[5, 9, 40, 77, 12, 8, 101], &[44, 3, 90], &[7, 7, 19, 23, 60]];
const D_MODEL: usize = 48;
const D_SAE: usize = 120;

fn model() -> LanguageModel {
    let mut checkpoint = load::open(&goldens::own("models/llama_gqa_theta_tied")).unwrap();
    LanguageModel::load(checkpoint.config, checkpoint.tensors.as_mut(), &Device::flex()).unwrap()
}

fn sae() -> Sae {
    let device = Device::flex();
    let row = |i| random_direction(D_MODEL, 1.0, i as u64, &device).unsqueeze();
    let w_dec: Tensor<2> = Tensor::cat((0..D_SAE).map(row).collect(), 0);
    let weights = SaeWeights::new(
        w_dec.clone().transpose(),
        Tensor::zeros([D_SAE], &device),
        w_dec,
        Tensor::zeros([D_MODEL], &device),
    );
    let activation = Activation::TopK { k: 8, rescale_by_decoder_norm: false };
    Sae::new(SaeConfig::new(D_MODEL, D_SAE, activation), weights).unwrap()
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().unwrap()
}

fn matrix(values: Vec<f32>, width: usize) -> Tensor<2> {
    let shape = [values.len() / width, width];
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}

/// Logits and the activation at the point, under a hook.
fn run<H: Hook>(model: &LanguageModel, rows: &[&[u32]], hook: &mut H) -> (Vec<f32>, Vec<f32>) {
    let tokens = TokenBatch::new(rows, model.config(), model.device()).unwrap();
    let mut hooks = (hook, ActivationCache::new([POINT]));
    let logits = model.logits(&tokens, &mut hooks).unwrap();
    (floats(logits), floats(hooks.1.get::<3>(POINT).unwrap()))
}

fn clamp(sae: &Sae, values: Vec<(usize, f64)>, from_position: usize) -> Steering<'_> {
    Steering::new(POINT, Intervention::Clamp { sae, values }, from_position).unwrap()
}

#[test]
fn a_clamp_adds_what_is_missing_along_the_decoder_row() {
    let (model, sae) = (model(), sae());
    let (_, before) = run(&model, &ROWS[..1], &mut ());
    // A latent that is active somewhere and not everywhere.
    let latents = sae.encode(matrix(before.clone(), D_MODEL));
    let latent = latents.entries().next().expect("something is active").latent_idx;
    let current = floats(latents.latent(latent));
    let (_, after) = run(&model, &ROWS[..1], &mut clamp(&sae, vec![(latent, 2.5)], 0));
    let direction = floats(sae.directions().narrow(0, latent, 1));
    let expected: Vec<f32> = before
        .chunks(D_MODEL)
        .zip(&current)
        .flat_map(|(x, z)| x.iter().zip(&direction).map(move |(x, d)| x + (2.5 - z) * d))
        .collect();
    assert_close("clamped", &after, &expected, 1e-5);
}

#[test]
fn clamping_to_its_own_value_and_adding_nothing_change_nothing() {
    let (model, sae) = (model(), sae());
    // One position, so that one value is the latent's own.
    let row: &[&[u32]] = &[&[77]];
    let (logits, x) = run(&model, row, &mut ());
    let active = sae.encode(matrix(x, D_MODEL)).entries().next().expect("something is active");
    let own = vec![(active.latent_idx, f64::from(active.value))];
    assert_close("own value", &run(&model, row, &mut clamp(&sae, own, 0)).0, &logits, 1e-5);
    let direction = Tensor::zeros([D_MODEL], &Device::flex());
    let mut nothing = Steering::new(POINT, Intervention::Add { direction }, 0).unwrap();
    assert_close("zero", &run(&model, row, &mut nothing).0, &logits, 0.0);
}

#[test]
fn nothing_of_an_ablated_direction_is_left() {
    let model = model();
    let direction = random_direction(D_MODEL, 3.0, 5, &Device::flex());
    let unit = floats(direction.clone() / norm(&direction));
    let mut ablate = Steering::new(POINT, Intervention::Ablate { direction }, 0).unwrap();
    let (_, after) = run(&model, &ROWS, &mut ablate);
    for x in after.chunks(D_MODEL) {
        let projection: f32 = x.iter().zip(&unit).map(|(x, u)| x * u).sum();
        assert!(projection.abs() < 1e-4, "{projection}");
    }
}

#[test]
fn cached_steps_and_batches_are_steered_like_one_pass() {
    let (model, sae) = (model(), sae());
    let config = GenerateConfig::greedy(6, vec![]);
    for from_position in [0, 1, 4, 8] {
        let steering = || clamp(&sae, vec![(3, 4.0), (80, 6.0)], from_position);
        let none = SharedPrefix::default();
        let together = model.generate(&ROWS, &none, &config, &mut steering(), unobserved).unwrap();
        for (row, ids) in ROWS.iter().enumerate() {
            let mut whole = ids.to_vec();
            for _ in 0..config.max_new_tokens {
                let tokens = TokenBatch::new(&[&whole], model.config(), model.device()).unwrap();
                let logits = floats(model.last_logits(&tokens, &mut steering()).unwrap());
                let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
                whole.push(best.unwrap().0 as u32);
            }
            assert_eq!(together[row], whole[ids.len()..], "row {row} from {from_position}");
        }
    }
}

#[test]
fn early_positions_are_left_alone() {
    let (model, sae) = (model(), sae());
    let (_, before) = run(&model, &ROWS[..1], &mut ());
    let (_, after) = run(&model, &ROWS[..1], &mut clamp(&sae, vec![(3, 50.0)], 3));
    assert_eq!(after[..3 * D_MODEL], before[..3 * D_MODEL]);
    assert_ne!(after[3 * D_MODEL..], before[3 * D_MODEL..]);
}

#[test]
fn what_cannot_steer_is_a_typed_error() {
    let sae = sae();
    let clamp = |values| Steering::new(POINT, Intervention::Clamp { sae: &sae, values }, 0).err();
    let missing = SteeringError::NoSuchLatent { latent: 120, d_sae: 120 };
    assert_eq!(clamp(vec![(0, 1.0), (120, 1.0)]), Some(missing));
    let twice = SteeringError::DuplicateLatent { latent: 5 };
    assert_eq!(clamp(vec![(5, 1.0), (5, 2.0)]), Some(twice));
    for value in [f64::NAN, f64::INFINITY] {
        assert!(matches!(clamp(vec![(0, value)]), Some(SteeringError::NotFinite { .. })));
    }
    assert!(matches!(clamp(vec![]), Some(SteeringError::Nothing { .. })));
    let direction = Tensor::zeros([D_MODEL], &Device::flex());
    let error = Steering::new(POINT, Intervention::Ablate { direction }, 0).err();
    assert!(matches!(error, Some(SteeringError::Nothing { .. })));
}

#[test]
fn an_autoencoder_of_another_width_is_a_typed_error_of_the_pass() {
    let (model, direction) = (model(), random_direction(7, 1.0, 0, &Device::flex()));
    let mut steering = Steering::new(POINT, Intervention::Add { direction }, 0).unwrap();
    let tokens = TokenBatch::new(&ROWS, model.config(), model.device()).unwrap();
    let error = model.logits(&tokens, &mut steering).unwrap_err();
    let width = HookError::Width { point: POINT, expected: 7, actual: D_MODEL };
    assert_eq!(error, ForwardError::Hook(width));
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
