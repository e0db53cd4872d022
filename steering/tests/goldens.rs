//! Directions and steered passes against steering-vectors and a plain PyTorch hook.

#![expect(clippy::print_stderr, reason = "what is skipped is said aloud")]

use std::io::Cursor;

use burn::tensor::{Device, Tensor, TensorData};
use goldens::{Case, assert_close};
use model_hooks::load::Gguf;
use model_hooks::{HookPoint, LanguageModel, TokenBatch, load};
use steering::format::control_vector::ControlVector;
use steering::{
    Intervention, LogisticOptions, LogisticProbe, Pca, Region, Steering, difference_of_means, norm,
    principal_direction,
};

const TOLERANCE: f32 = 1e-4;
/// The model that the case was made with.
const MODEL: &str = "models/llama_gqa_theta_tied";

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().unwrap()
}

fn case_and_model() -> Option<(Case, LanguageModel)> {
    let (folder, model) = (goldens::folder().join("steering"), goldens::folder().join(MODEL));
    if let Some(missing) = [&folder, &model].into_iter().find(|folder| !folder.exists()) {
        eprintln!("golden steering SKIPPED: {} is not there", missing.display());
        return None;
    }
    let mut checkpoint = load::open(&model).unwrap();
    let model =
        LanguageModel::load(checkpoint.config, checkpoint.tensors.as_mut(), &Device::flex());
    Some((Case::open(&folder), model.unwrap()))
}

fn batch(model: &LanguageModel, case: &Case, name: &str) -> TokenBatch {
    TokenBatch::new(&case.ids(name), model.config(), model.device()).unwrap()
}

/// Activations of the last tokens, after the first two blocks and after the final norm.
fn last_activations(model: &LanguageModel, case: &Case, name: &str) -> Vec<Tensor<2>> {
    let tokens = batch(model, case, name);
    let points = [HookPoint::resid_post(0), HookPoint::resid_post(1)];
    let cache = model.capture(&tokens, points).unwrap();
    let last = tokens.dims()[1] - 1;
    let last = |x: Tensor<3>| x.narrow(1, last, 1).squeeze_dim::<2>(1);
    points.into_iter().map(|point| last(cache.get(point).unwrap())).collect()
}

#[test]
fn golden_difference_of_means() {
    let Some((case, model)) = case_and_model() else { return };
    let positive = last_activations(&model, &case, "pos_ids");
    let negative = last_activations(&model, &case, "neg_ids");
    for (layer, (positive, negative)) in positive.into_iter().zip(negative).enumerate() {
        for (name, actual) in [("pos_last", &positive), ("neg_last", &negative)] {
            let name = format!("{name}.{layer}");
            assert_close(&name, &floats(actual.clone()), &case.floats(&name).1, TOLERANCE);
        }
        let name = format!("steering_vectors.mean.{layer}");
        let mean = floats(difference_of_means(positive, negative));
        assert_close(&name, &mean, &case.floats(&name).1, TOLERANCE);
    }
}

/// Pairs of activations after the first two blocks and after the final norm.
fn pairs(case: &Case, device: &Device) -> [[Tensor<2>; 2]; 3] {
    let matrix = |name: String| {
        let (shape, values) = case.floats(&name);
        Tensor::<2>::from_data(TensorData::new(values, shape), device)
    };
    [0, 1, 2].map(|i| ["pos", "neg"].map(|side| matrix(format!("{side}_last.{i}"))))
}

/// The references leave the sign to chance.
fn assert_close_up_to_sign(name: &str, actual: Vec<f32>, case: &Case, tolerance: f32) {
    let expected = case.floats(name).1;
    let along: f32 = actual.iter().zip(&expected).map(|(a, e)| a * e).sum();
    let actual: Vec<f32> = actual.iter().map(|a| along.signum() * a).collect();
    assert_close(name, &actual, &expected, tolerance);
}

#[test]
fn golden_principal_directions() {
    let Some((case, model)) = case_and_model() else { return };
    for (i, [towards, away]) in pairs(&case, model.device()).iter().enumerate() {
        let direction = |pca| floats(principal_direction(towards, away, pca));
        let name = format!("steering_vectors.pca.{i}");
        assert_close_up_to_sign(&name, direction(Pca::Differences), &case, TOLERANCE);
        // repeng leaves the embeddings' layer out, and so layer 0 of ours.
        if i > 0 {
            let name = format!("repeng.pca_diff.{i}");
            assert_close_up_to_sign(&name, direction(Pca::CentredDifferences), &case, TOLERANCE);
            let name = format!("repeng.pca_center.{i}");
            assert_close_up_to_sign(&name, direction(Pca::Pairs), &case, TOLERANCE);
        }
    }
}

/// The reference stops where its gradient is below 1e-4, which is up to 4.9e-4 from the optimum.
#[test]
fn golden_logistic_directions() {
    let Some((case, model)) = case_and_model() else { return };
    for (i, [towards, away]) in pairs(&case, model.device()).iter().enumerate() {
        let half = (towards.clone() - away.clone()) * 0.5;
        let probe = LogisticProbe::fit(&half, &-half.clone(), LogisticOptions::default());
        assert!(probe.bias.abs() < 1e-5, "{}", probe.bias);
        let direction = probe.direction(model.device());
        let length = norm(&direction);
        let name = format!("steering_vectors.logistic.{i}");
        assert_close(&name, &floats(direction / length), &case.floats(&name).1, 5e-4);
    }
}

#[test]
fn golden_steered_logits() {
    let Some((case, model)) = case_and_model() else { return };
    let tokens = batch(&model, &case, "pos_ids");
    let (shape, mean) = case.floats("steering_vectors.mean.1");
    let mean = Tensor::<1>::from_data(TensorData::new(mean, shape), model.device());
    for (name, intervention) in [
        ("steered_logits_add3_block1", Intervention::Add { direction: mean.clone() * 3.0 }),
        ("ablated_logits_block1", Intervention::Ablate { direction: mean }),
    ] {
        let point = HookPoint::resid_post(1);
        let mut steering = Steering::new([point], intervention, Region::default()).unwrap();
        let logits = floats(model.logits(&tokens, &mut steering).unwrap());
        assert_close(name, &logits, &case.floats(name).1, TOLERANCE);
    }
}

/// The reference hook acts on the output of block 1, counted from 0: so does `direction.1`.
#[test]
fn golden_control_vector() {
    let Some((case, model)) = case_and_model() else { return };
    let tokens = batch(&model, &case, "pos_ids");
    let directions = [(1, case.floats("steering_vectors.mean.1").1)].into();
    let vector = ControlVector { model_hint: "llama".into(), directions };
    let gguf = Gguf::read(Cursor::new(vector.to_bytes().unwrap()), "memory".as_ref()).unwrap();
    let vector = ControlVector::read(gguf).unwrap();
    let mut steering = vector.steer(&model, 3.0, &Region::default()).unwrap();
    let logits = floats(model.logits(&tokens, &mut steering).unwrap());
    let name = "steered_logits_add3_block1";
    assert_close(name, &logits, &case.floats(name).1, TOLERANCE);
}
