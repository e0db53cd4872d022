//! Directions and steered passes against steering-vectors and a plain PyTorch hook.

#![expect(clippy::print_stderr, reason = "what is skipped is said aloud")]

use burn::tensor::{Device, Tensor, TensorData};
use goldens::{Case, assert_close};
use model_hooks::{HookPoint, LanguageModel, TokenBatch, load};
use steering::{Intervention, Steering, difference_of_means};

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
        let mut steering = Steering::new(HookPoint::resid_post(1), intervention, 0).unwrap();
        let logits = floats(model.logits(&tokens, &mut steering).unwrap());
        assert_close(name, &logits, &case.floats(name).1, TOLERANCE);
    }
}
