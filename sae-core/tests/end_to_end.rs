//! SAEs trained on what a language model makes of their reconstructions, on a small random model.

use burn::tensor::{Device, Distribution, Tensor, TensorData};
use model_hooks::{HookPoint, LanguageModel, Site, TokenBatch, load};
use sae_core::train::*;
use sae_core::{ErrorTerm, SaeWeights, Splice};

const D_IN: usize = 48;
const D_SAE: usize = 96;
const INPUT_SCALE: f64 = 1.7;
const POINT: HookPoint = HookPoint::Block { layer: 1, site: Site::ResidPost };

fn device() -> Device {
    Device::flex()
}

fn model() -> LanguageModel {
    let folder = goldens::own("models/llama_gqa_theta_tied");
    let mut checkpoint = load::open(&folder).expect("a golden");
    LanguageModel::load(checkpoint.config, checkpoint.tensors.as_mut(), &device()).expect("loads")
}

/// Of different lengths, so that there is padding.
fn tokens(model: &LanguageModel) -> TokenBatch {
    let text = |seed: u32, n: u32| -> Vec<u32> {
        (0..n).map(|i| (seed * 31 + i * i * 7 + i) % 131).collect()
    };
    let texts = [text(1, 12), text(2, 1), text(3, 7), text(4, 12), text(5, 2)];
    TokenBatch::new(&texts, model.config(), &device()).expect("of the model")
}

fn config(kind: Kind) -> TrainConfig {
    let config = TrainConfig::new(D_SAE, Objective::new(kind));
    config.with_schedule(Schedule::new().with_learning_rate(3e-3))
}

fn top_k(k: usize) -> TrainConfig {
    config(Objective::top_k(k).kind)
}

fn state(config: &TrainConfig) -> TrainState {
    let device = device();
    device.seed(11);
    let normal =
        |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Normal(0.0, 0.3), &device);
    let w_dec = normal([D_SAE, D_IN]);
    let weights = SaeWeights::new(
        w_dec.clone().transpose(),
        normal([1, D_SAE]).squeeze_dim(0),
        w_dec,
        normal([1, D_IN]).squeeze_dim(0),
    );
    TrainState::new(Parameters::from_weights(weights), INPUT_SCALE, &config.optimizer)
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let from_largest = |x: &f32| f64::from(*x) - f64::from(largest);
    let sum: f64 = logits.iter().map(|x| from_largest(x).exp()).sum();
    logits.iter().map(|x| from_largest(x) - sum.ln()).collect()
}

/// The mean divergence with the SAE spliced in by the hook for inference, in f64 from the logits on.
fn divergence(
    model: &LanguageModel,
    tokens: &TokenBatch,
    state: &TrainState,
    config: &TrainConfig,
    from_position: usize,
) -> f64 {
    let sae = state.sae(config);
    let mut splice = Splice::new(&sae, POINT, ErrorTerm::Drop).from_position(from_position);
    let clean = model.logits(tokens, &mut ()).expect("runs");
    let spliced = model.logits(tokens, &mut splice).expect("runs");
    let [batch, n, d_vocab] = clean.dims();
    let host = |logits: Tensor<3>| -> Vec<f32> { logits.into_data().try_to_vec().expect("f32") };
    let (clean, spliced, positions) = (host(clean), host(spliced), tokens.positions(0));
    let (mut sum, mut count) = (0.0, 0);
    for cell in 0..batch * n {
        if positions.get(cell / n, cell % n).is_none_or(|at| at < from_position) {
            continue;
        }
        let at = |logits: &[f32]| log_softmax(&logits[cell * d_vocab..][..d_vocab]);
        let terms = at(&clean).into_iter().zip(at(&spliced)).map(|(p, q)| p.exp() * (p - q));
        sum += terms.sum::<f64>();
        count += 1;
    }
    sum / f64::from(count)
}

fn moved(state: &TrainState, name: ParameterName, at: usize, by: f32) -> TrainState {
    let mut state = state.clone();
    let tensor = state.parameters.get(name).expect("there").clone();
    let shape = tensor.dims();
    let mut values: Vec<f32> = tensor.into_data().try_to_vec().expect("f32");
    values[at] += by;
    let tensor = Tensor::from_data(TensorData::new(values, shape), &device());
    state.parameters.insert(name, tensor);
    state
}

#[test]
fn the_gradient_is_the_slope_of_the_spliced_models_divergence() {
    let model = model();
    let tokens = tokens(&model);
    // All latents are kept, as far as they are above zero: nothing jumps.
    let config = top_k(D_SAE);
    let state = state(&config);
    for from_position in [0, 1] {
        let end_to_end = EndToEnd::new(&model, POINT, &config).expect("fits");
        let end_to_end = end_to_end.from_position(from_position);
        let found = end_to_end
            .differentiate(&config.objective, &state.parameters, INPUT_SCALE, &tokens, &[])
            .expect("runs");
        let expected = divergence(&model, &tokens, &state, &config, from_position);
        assert!((found.loss / expected - 1.0).abs() < 1e-4, "{} for {expected}", found.loss);
        for (name, gradient) in found.gradient.named() {
            let gradient: Vec<f32> = gradient.to_data().try_to_vec().expect("f32");
            // Where the slope stands out from what f32 adds to the logits.
            let mut order: Vec<usize> = (0..gradient.len()).collect();
            order.sort_by(|&a, &b| gradient[b].abs().total_cmp(&gradient[a].abs()));
            for &at in &order[..3] {
                let by = 2e-3f32;
                let at_moved = |by| {
                    let state = moved(&state, name, at, by);
                    divergence(&model, &tokens, &state, &config, from_position)
                };
                let slope = (at_moved(by) - at_moved(-by)) / (2.0 * f64::from(by));
                let gradient = f64::from(gradient[at]);
                let place = format!("{}[{at}] from {from_position}", name.as_str());
                assert!((gradient / slope - 1.0).abs() < 0.02, "{place}: {gradient} for {slope}");
            }
        }
    }
}

#[test]
fn the_divergence_falls_for_every_kind_that_has_an_encoder() {
    let model = model();
    let tokens = tokens(&model);
    let sparsity = Sparsity::new(1e-3);
    let groups = [24, D_SAE].map(|width| Group { width, weight: 0.1 }).to_vec();
    let aux_k_target = AuxKTarget::Residual;
    let selecting = |selection| {
        let threshold = Some(RunningThreshold::SaeLens { rate: 0.1 });
        Kind::Selecting(Selecting { threshold, ..Selecting::new(selection) })
    };
    let auxiliary = GatedAuxiliary::DetachedDecoder;
    let kinds = [
        Kind::Standard(Standard { sparsity }),
        Kind::Gated(Gated { sparsity, auxiliary }),
        selecting(Selection::TopK { k: 8 }),
        selecting(Selection::MultiTopK { k: 8 }),
        selecting(Selection::BatchTopK { k: 8.0 }),
        selecting(Selection::Matryoshka { k: 8.0, groups, aux_k_target }),
        Kind::JumpRelu(JumpRelu { bandwidth: 0.2, ..JumpRelu::new(1e-4) }),
    ];
    for kind in kinds {
        let config = config(kind);
        let mut state = state(&config);
        let vector = || Tensor::zeros([1, D_SAE], &device());
        match config.objective.kind {
            Kind::Gated(_) => {
                state.parameters.insert(ParameterName::RMag, vector());
                state.parameters.insert(ParameterName::BMag, vector());
            }
            Kind::JumpRelu(_) => state.parameters.insert(ParameterName::Threshold, vector() + 0.01),
            _ => {}
        }
        let mut state = TrainState::new(state.parameters, INPUT_SCALE, &config.optimizer);
        let end_to_end = EndToEnd::new(&model, POINT, &config).expect("fits").from_position(1);
        let mut divergences = Vec::new();
        for _ in 0..50 {
            let outcome = end_to_end.step(&mut state, &config, &tokens, 50).expect("runs");
            let StepOutcome::Taken(report) = outcome else { panic!("{outcome:?}") };
            let term = |term| report.terms.iter().find(|(other, _)| *other == term);
            divergences.push(term(Term::Downstream).expect("it is the loss").1);
            assert_eq!(term(Term::Reconstruction).expect("told").1, 0.0);
        }
        let (first, last) = (divergences[0], divergences[49]);
        // Where more latents have to reconstruct as well, that pulls another way.
        let share = match &config.objective.kind {
            Kind::Selecting(Selecting { selection: Selection::MultiTopK { .. }, .. }) => 0.9,
            _ => 0.5,
        };
        assert!(last < share * first, "{:?}: {first} to {last}", config.objective);
    }
}

#[test]
fn the_error_of_the_reconstruction_may_count_beside_it() {
    let model = model();
    let tokens = tokens(&model);
    let (config, plain) = (top_k(8), top_k(8));
    let state = state(&config);
    let end_to_end = EndToEnd::new(&model, POINT, &config).expect("fits");
    let found = |kl_weight, error_weight| {
        let weighing = end_to_end.weighing(kl_weight, error_weight);
        let objective = &config.objective;
        weighing.differentiate(objective, &state.parameters, INPUT_SCALE, &tokens, &[])
    };
    let [kl, error, both] =
        [(2.0, 0.0), (0.0, 0.5), (2.0, 0.5)].map(|(kl, e)| found(kl, e).expect("runs"));
    assert!((kl.loss + error.loss - both.loss).abs() < 1e-5 * both.loss);
    for (name, both) in both.gradient.named() {
        let sum = [&kl, &error].map(|part| part.gradient.get(name).expect("there").clone());
        let sum = sum[0].clone() + sum[1].clone();
        let tolerance = burn::tensor::Tolerance::<f32>::rel_abs(1e-3, 1e-5);
        both.to_data().assert_approx_eq(&sum.into_data(), tolerance);
    }
    // Half of the plain objective.
    let cache = model.capture(&tokens, [POINT]).expect("runs");
    let x = cache.get::<3>(POINT).expect("captured");
    let [batch, n, _] = x.dims();
    let positions = tokens.positions(0);
    let real: Vec<i32> = (0..batch * n)
        .filter(|cell| positions.get(cell / n, cell % n).is_some())
        .map(|cell| cell as i32)
        .collect();
    let n_real = real.len();
    let real = Tensor::from_data(TensorData::new(real, [n_real]), &device());
    let x = x.reshape([batch * n, D_IN]).select(0, real).mul_scalar(INPUT_SCALE);
    let plain = plain.objective.differentiate(&state.parameters, &x.into(), &[]);
    assert!((error.loss / plain.loss - 0.5).abs() < 1e-5);
}

#[test]
fn what_cannot_be_trained_like_this_is_refused() {
    let model = model();
    let tokens = tokens(&model);
    let refused = |config: &TrainConfig, point| EndToEnd::new(&model, point, config).unwrap_err();
    let pursuit = config(Kind::MatchingPursuit(MatchingPursuit {
        residual_threshold: 0.1,
        max_iterations: None,
        stop_on_duplicate_support: true,
    }));
    let conflict = |error| matches!(error, EndToEndError::Train(TrainError::Conflict { .. }));
    assert!(conflict(refused(&pursuit, POINT)));
    let transcoder = top_k(8).with_transcoder(Some(Transcoder { d_out: 48, skip: false }));
    assert!(conflict(refused(&transcoder, POINT)));
    let error = refused(&top_k(8), HookPoint::resid_post(99));
    assert!(matches!(error, EndToEndError::Forward(_)), "{error}");

    let config = top_k(8);
    let state = state(&config);
    let end_to_end = EndToEnd::new(&model, POINT, &config).expect("fits");
    let mut at = state.clone();
    let late = end_to_end.from_position(12).step(&mut at, &config, &tokens, 1).unwrap_err();
    assert_eq!(late, EndToEndError::NoTokens { from_position: 12 });
    // The hidden layer of the MLP has another width.
    let mlp: HookPoint = "blocks.0.mlp.hook_post".parse().expect("a point");
    let wide = EndToEnd::new(&model, mlp, &config).expect("the model has it");
    let error = wide.step(&mut at, &config, &tokens, 1).unwrap_err();
    assert!(matches!(error, EndToEndError::Forward(_)), "{error}");
    assert_eq!((at.step, at.n_skipped), (0, 0));
}
