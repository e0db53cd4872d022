//! What SAELens computes, on the same weights.

use std::fs;
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use goldens::{Case, for_each_case};
use sae_core::format::{FormatError, saelens};
use sae_core::{Sae, SaeWeights};
use serde_json::Value;

fn device() -> Device {
    Device::flex()
}

fn tensor<const D: usize>(case: &Case, name: &str) -> Tensor<D> {
    let (shape, values) = case.floats(name);
    Tensor::from_data(TensorData::new(values, shape), &device())
}

fn assert_close<const D: usize>(case: &Case, name: &str, actual: Tensor<D>) {
    let (shape, expected) = case.floats(name);
    assert_eq!(actual.dims()[..], shape, "{name}");
    let actual: Vec<f32> = actual.into_data().try_into_vec_as().expect("f32");
    goldens::assert_close(name, &actual, &expected, 1e-4);
}

fn assert_weights_close(case: &Case, prefix: &str, actual: SaeWeights) {
    let name = |tensor| format!("{prefix}.{tensor}");
    assert_close(case, &name("W_enc"), actual.w_enc);
    assert_close(case, &name("b_enc"), actual.b_enc);
    assert_close(case, &name("W_dec"), actual.w_dec);
    assert_close(case, &name("b_dec"), actual.b_dec);
}

/// The SAE of a case, or why it is skipped. Anything but lack of support fails.
fn read(case: &Case) -> Result<Sae, String> {
    match saelens::read(case.folder(), &device()) {
        Ok(sae) => Ok(sae),
        Err(
            error @ (FormatError::UnsupportedArchitecture { .. }
            | FormatError::UnsupportedOption { .. }),
        ) => Err(error.to_string()),
        Err(error) => panic!("{}: {error}", case.name()),
    }
}

#[test]
fn golden_saelens_inference() {
    for_each_case("sae_lens", |case| {
        let sae = read(case)?;
        let x: Tensor<2> = tensor(case, "x");
        let latents = sae.encode(x.clone());
        assert_close(case, "encode", latents.to_dense());
        assert_close(case, "decode_of_encode", sae.decode(&latents));
        let parts = sae.decompose(x.clone());
        assert_close(case, "forward", parts.reconstruction.clone());
        assert_close(case, "x", parts.reconstruction + parts.error);
        if case.has("folded.W_enc") {
            let folded = sae.fold_decoder_norms().expect("goldens fold where it is allowed");
            assert_weights_close(case, "folded", folded.weights().clone());
            let latents = folded.encode(x);
            assert_close(case, "folded.encode", latents.to_dense());
            assert_close(case, "folded.decode_of_encode", folded.decode(&latents));
        }
        Ok(())
    });
}

#[test]
fn golden_saelens_files_round_trip() {
    for_each_case("sae_lens", |case| {
        let sae = read(case)?;
        let parent = tempfile::tempdir().expect("a folder");
        let (first, second) = (parent.path().join("first"), parent.path().join("second"));
        saelens::write(&sae, &first).expect("written");
        let again = saelens::read(&first, &device()).expect("what we wrote");
        saelens::write(&again, &second).expect("written");
        let bytes = |folder: &Path, name: &str| fs::read(folder.join(name)).expect("read");
        let weights = "sae_weights.safetensors";
        assert!(bytes(&first, "cfg.json") == bytes(&second, "cfg.json"));
        assert!(bytes(&first, weights) == bytes(&second, weights));
        assert!(bytes(&first, weights) == bytes(case.folder(), weights), "not SAELens' bytes");
        let config: Value = serde_json::from_slice(&bytes(&first, "cfg.json")).expect("JSON");
        assert_eq!(config, case.json("cfg.json"));
        Ok(())
    });
}
