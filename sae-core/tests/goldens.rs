//! What SAELens, sparsify and dictionary_learning compute, on the same weights.

use std::fs;
use std::io::Write;
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use goldens::{Case, for_each_case};
use sae_core::format::dictionary_learning::{self, Selection};
use sae_core::format::{self, FormatError, gemma_scope, saelens};
use sae_core::{Magnitude, Sae, SaeWeights, SparseLatents};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
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
    assert_close(case, &name("W_dec"), actual.w_dec);
    assert_close(case, &name("b_dec"), actual.b_dec);
    match actual.magnitude {
        Some(Magnitude { r_mag, b_mag }) => {
            assert_close(case, &name("b_gate"), actual.b_enc);
            assert_close(case, &name("r_mag"), r_mag);
            assert_close(case, &name("b_mag"), b_mag);
        }
        None => assert_close(case, &name("b_enc"), actual.b_enc),
    }
    if let Some(threshold) = actual.threshold {
        assert_close(case, &name("threshold"), threshold);
    }
    if let Some(w_skip) = actual.w_skip {
        assert_close(case, &name("W_skip"), w_skip);
    }
}

/// The SAE of a case, or why it is skipped: the one that attends to other positions. Anything else
/// fails.
fn read(case: &Case) -> Result<Sae, String> {
    match saelens::read(case.folder(), &device()) {
        Ok(sae) => Ok(sae),
        Err(error @ FormatError::UnsupportedArchitecture { .. }) if case.name() == "temporal" => {
            Err(error.to_string())
        }
        Err(error) => panic!("{}: {error}", case.name()),
    }
}

/// What SAELens decodes, which leaves a skip connection out.
fn decode(sae: &Sae, latents: &SparseLatents, x: &Tensor<2>) -> Tensor<2> {
    let decoded = sae.decode_for(latents, x.clone());
    match &sae.weights().w_skip {
        Some(w_skip) => decoded - x.clone().matmul(w_skip.clone().transpose()),
        None => decoded,
    }
}

#[test]
fn golden_saelens_inference() {
    for_each_case("sae_lens", |case| {
        let sae = read(case)?;
        let x: Tensor<2> = tensor(case, "x");
        let latents = sae.encode(x.clone());
        assert_close(case, "encode", latents.to_dense());
        assert_close(case, "decode_of_encode", decode(&sae, &latents, &x));
        assert_close(case, "forward", sae.run(x.clone()).1);
        if sae.config().transcodes_to.is_none() {
            let parts = sae.decompose(x.clone());
            assert_close(case, "x", parts.reconstruction + parts.error);
        }
        if case.has("folded.W_enc") {
            let folded = sae.fold_decoder_norms().expect("goldens fold where it is allowed");
            assert_weights_close(case, "folded", folded.weights().clone());
            let latents = folded.encode(x.clone());
            assert_close(case, "folded.encode", latents.to_dense());
            assert_close(case, "folded.decode_of_encode", decode(&folded, &latents, &x));
        }
        Ok(())
    });
}

/// A training checkpoint of a BatchTopK SAE is what SAELens saves of it for inference.
#[test]
fn golden_saelens_batch_checkpoints_are_jump_relu() {
    for_each_case("sae_lens_train", |case| {
        if !case.name().contains("batchtopk") && !case.name().contains("matryoshka") {
            return Err("no training by batch".to_owned());
        }
        let checkpoint = tempfile::tempdir().expect("a folder");
        write_checkpoint(case, checkpoint.path());
        let sae = saelens::read(checkpoint.path(), &device()).expect("valid");
        let saved = format!("../../sae_lens/from_training_{}", case.name());
        let saved = saelens::read(&case.folder().join(saved), &device()).expect("its inference");
        let (mut config, expected) = (sae.config().clone(), saved.config());
        // What only training looks at is kept where it stood.
        config.other.retain(|key, _| expected.other.contains_key(key));
        assert_eq!(&config, expected);
        let floats =
            |tensor: Tensor<1>| -> Vec<f32> { tensor.into_data().try_into_vec_as().expect("f32") };
        let [actual, expected] = [sae, saved].map(|sae| {
            let SaeWeights { w_enc, b_enc, w_dec, b_dec, threshold, .. } = sae.weights().clone();
            let threshold = threshold.expect("a JumpReLU SAE");
            [w_enc.flatten(0, 1), b_enc, w_dec.flatten(0, 1), b_dec, threshold].map(floats)
        });
        let names = ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"];
        for ((name, actual), expected) in names.iter().zip(actual).zip(expected) {
            goldens::assert_close(name, &actual, &expected, 1e-6);
        }
        Ok(())
    });
}

/// The checkpoint behind the step of a case.
fn write_checkpoint(case: &Case, folder: &Path) {
    let threshold = case.json("golden.json")["topk_threshold_after"].as_f64().expect("a number");
    let names = ["W_enc", "b_enc", "W_dec", "b_dec"];
    let mut tensors: Vec<_> = names
        .iter()
        .map(|name| {
            let (shape, values) = case.floats(&format!("after_adam.{name}"));
            let bytes: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
            (*name, Dtype::F32, shape, bytes)
        })
        .collect();
    tensors.push(("topk_threshold", Dtype::F64, vec![], threshold.to_le_bytes().to_vec()));
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (*name, TensorView::new(*dtype, shape.clone(), bytes).expect("bytes fit"))
    });
    let bytes = safetensors::serialize(views, None).expect("serialised");
    fs::write(folder.join("sae_weights.safetensors"), bytes).expect("written");
    fs::copy(case.folder().join("cfg.json"), folder.join("cfg.json")).expect("copied");
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

/// The latents of each row, in the order of their numbers: sparsify gives them in any.
fn sorted(indices: &[i64], values: &[f32], k: usize) -> (Vec<i64>, Vec<f32>) {
    let rows = indices.chunks(k).zip(values.chunks(k));
    let sorted = rows.flat_map(|(indices, values)| {
        let mut row: Vec<_> = indices.iter().copied().zip(values.iter().copied()).collect();
        row.sort_by_key(|(index, _)| *index);
        row
    });
    sorted.unzip()
}

#[test]
fn golden_sparsify_inference() {
    for_each_case("sparsify", |case| {
        let sae = format::read(case.folder(), &device()).expect("valid");
        let x: Tensor<2> = tensor(case, "x");
        let (latents, decoded) = sae.run(x.clone());
        let (shape, indices) = case.ints("top_indices");
        assert_eq!(latents.indices.dims()[..], shape);
        let expected = sorted(&indices, &case.floats("top_acts").1, shape[1]);
        let indices: Vec<i64> = latents.indices.to_data().try_into_vec_as().expect("whole numbers");
        let values: Vec<f32> = latents.values.to_data().try_into_vec_as().expect("f32");
        let actual = sorted(&indices, &values, shape[1]);
        assert_eq!(actual.0, expected.0);
        goldens::assert_close("top_acts", &actual.1, &expected.1, 1e-5);
        assert_close(case, "decode", decode(&sae, &latents, &x));
        // With it, sparsify gives out what four times as many latents decode to.
        if case.json("cfg.json")["multi_topk"] != true {
            assert_close(case, "sae_out", decoded);
        }
        Ok(())
    });
}

#[test]
fn golden_dictionary_learning_inference() {
    for_each_case("dictionary_learning", |case| {
        let read = |selection| {
            dictionary_learning::read(case.folder(), selection, &device()).expect("valid")
        };
        let sae = read(Selection::TopK);
        let x: Tensor<2> = tensor(case, "x");
        let latents = sae.encode(x.clone());
        assert_close(case, "encode", latents.to_dense());
        assert_close(case, "decode_of_encode", sae.decode(&latents));
        assert_close(case, "forward", sae.run(x.clone()).1);
        if case.has("encode_use_threshold") {
            let latents = read(Selection::Threshold).encode(x);
            assert_close(case, "encode_use_threshold", latents.to_dense());
        }
        Ok(())
    });
}

/// Files as others publish theirs, by what SAELens reads in them (OpenAI's by its equations).
#[test]
fn golden_published_formats() {
    // A larger folder need not have them.
    if !goldens::folder().join("published").is_dir() {
        let line = "golden published SKIPPED: not in this folder\n";
        std::io::stderr().write_all(line.as_bytes()).expect("written");
        return;
    }
    for_each_case("published", |case| {
        let folder = case.folder();
        let sae = match case.name().as_str() {
            // The file does not say it.
            "gemma_scope_transcoder" => {
                let role = gemma_scope::Role::Transcoder;
                gemma_scope::read_npz(&folder.join("params.npz"), role, &device())
            }
            "openai" | "openai_relu" => format::read(&folder.join("autoencoder.pt"), &device()),
            _ => format::read(folder, &device()),
        };
        let sae = match sae {
            Err(error @ FormatError::NeedsFeature { .. }) => return Err(error.to_string()),
            sae => sae.unwrap_or_else(|error| panic!("{}: {error}", case.name())),
        };
        let (latents, forward) = sae.run(tensor(case, "x"));
        for (name, actual) in [("encode", latents.to_dense()), ("forward", forward)] {
            let (shape, expected) = case.floats(name);
            assert_eq!(actual.dims()[..], shape, "{name}");
            let actual: Vec<f32> = actual.into_data().try_into_vec_as().expect("f32");
            goldens::assert_close(name, &actual, &expected, 1e-5);
        }
        Ok(())
    });
}

/// The checkpoint that PyTorch wrote has what safetensors wrote of it.
#[cfg(feature = "pt")]
#[test]
fn golden_dictionary_learning_checkpoints() {
    for_each_case("dictionary_learning", |case| {
        let folder = tempfile::tempdir().expect("a folder");
        let copy = |name| fs::copy(case.folder().join(name), folder.path().join(name));
        copy("config.json").expect("copied");
        copy("ae.pt").expect("copied");
        let weights = |folder: &Path| {
            let sae = format::read(folder, &device()).expect("valid");
            let SaeWeights { w_enc, b_enc, w_dec, b_dec, threshold, magnitude, .. } =
                sae.weights().clone();
            let mut all = vec![w_enc.flatten(0, 1), b_enc, w_dec.flatten(0, 1), b_dec];
            all.extend(threshold);
            all.extend(magnitude.into_iter().flat_map(|m| [m.r_mag, m.b_mag]));
            let bits = all.into_iter().flat_map(|tensor: Tensor<1>| {
                let floats: Vec<f32> = tensor.into_data().try_into_vec_as().expect("f32");
                floats.into_iter().map(f32::to_bits)
            });
            bits.collect::<Vec<u32>>()
        };
        assert!(weights(folder.path()) == weights(case.folder()), "other numbers");
        Ok(())
    });
}
