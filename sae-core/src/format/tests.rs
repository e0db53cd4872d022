//! Tests of the foreign formats on made-up files, and of all readers on damaged ones.

use std::fs;
use std::io::{Cursor, Write};
use std::path::PathBuf;

use burn::tensor::{Tensor, TensorData, Tolerance};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;
use zip::CompressionMethod;
use zip::write::SimpleFileOptions;

use super::*;
use crate::activation::Activation;
use crate::sae::SaeWeights;

/// Files by their names.
type Files = Vec<(&'static str, Vec<u8>)>;
type Array = (&'static str, Vec<usize>, Vec<f32>);

/// A folder with these files.
fn folder(files: &[(&str, Vec<u8>)]) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for (name, bytes) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().expect("in the folder")).expect("made");
        fs::write(path, bytes).expect("written");
    }
    folder
}

fn text(config: &Value) -> Vec<u8> {
    config.to_string().into_bytes()
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().copied().flat_map(f32::to_le_bytes).collect()
}

fn weights(arrays: &[Array]) -> Vec<u8> {
    let arrays: Vec<_> = arrays.iter().map(|(name, shape, v)| (name, shape, bytes(v))).collect();
    let views = arrays.iter().map(|(name, shape, bytes)| {
        (**name, TensorView::new(Dtype::F32, (*shape).clone(), bytes).expect("bytes fit"))
    });
    safetensors::serialize(views, None).expect("serialised")
}

pub(super) fn zip(entries: &[(String, Vec<u8>)], method: CompressionMethod) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        let options = SimpleFileOptions::default().compression_method(method);
        zip.start_file(name.as_str(), options).expect("started");
        zip.write_all(bytes).expect("written");
    }
    zip.finish().expect("finished").into_inner()
}

fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n");
    let length = (header.len() as u16).to_le_bytes();
    [b"\x93NUMPY\x01\x00", &length[..], header.as_bytes(), data].concat()
}

fn npz(arrays: &[Array], method: CompressionMethod) -> Vec<u8> {
    let entries: Vec<(String, Vec<u8>)> = arrays
        .iter()
        .map(|(name, shape, values)| {
            let shape: String = shape.iter().map(|axis| format!("{axis},")).collect();
            (format!("{name}.npy"), npy("<f4", &format!("({shape})"), &bytes(values)))
        })
        .collect();
    zip(&entries, method)
}

const W_ENC: [f32; 6] = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0];
const W_DEC: [f32; 6] = [2.0, 0.0, 0.0, 1.0, 0.25, 0.5];
const B_ENC: [f32; 3] = [0.0, 0.5, 0.0];
const B_DEC: [f32; 2] = [1.0, -1.0];
const THRESHOLD: [f32; 3] = [0.5, 0.25, 0.0];

fn transposed([rows, columns]: [usize; 2], values: &[f32]) -> Vec<f32> {
    (0..columns).flat_map(|c| (0..rows).map(move |r| values[r * columns + c])).collect()
}

fn array(name: &'static str, shape: &[usize], values: &[f32]) -> Array {
    (name, shape.to_vec(), values.to_vec())
}

/// The arrays as Gemma Scope lays them out.
fn plain() -> Vec<Array> {
    vec![
        array("W_enc", &[2, 3], &W_ENC),
        array("b_enc", &[3], &B_ENC),
        array("W_dec", &[3, 2], &W_DEC),
        array("b_dec", &[2], &B_DEC),
        array("threshold", &[3], &THRESHOLD),
    ]
}

/// The same as layers of PyTorch.
fn linear() -> Vec<Array> {
    vec![
        array("encoder.weight", &[3, 2], &transposed([2, 3], &W_ENC)),
        array("encoder.bias", &[3], &B_ENC),
        array("decoder.weight", &[2, 3], &transposed([3, 2], &W_DEC)),
        array("decoder.bias", &[2], &B_DEC),
    ]
}

fn lower(arrays: Vec<Array>) -> Vec<Array> {
    let lower = |(name, shape, values)| match name {
        "W_enc" => ("w_enc", shape, values),
        "W_dec" => ("w_dec", shape, values),
        _ => (name, shape, values),
    };
    arrays.into_iter().map(lower).collect()
}

fn sparsify_config() -> Value {
    json!({
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": true,
        "num_latents": 3, "k": 2, "multi_topk": false, "skip_connection": false,
        "transcode": false, "d_in": 2,
    })
}

fn sparsify_arrays() -> Vec<Array> {
    let mut arrays = linear();
    arrays[2] = array("W_dec", &[3, 2], &W_DEC);
    arrays[3] = array("b_dec", &[2], &B_DEC);
    arrays
}

fn dictionary_config() -> Value {
    json!({
        "trainer": {
            "dict_class": "AutoEncoderNew", "activation_dim": 2, "dict_size": 3, "layer": 8,
            "lm_name": "tiny", "submodule_name": "resid_post_layer_8",
        },
        "buffer": {"ctx_len": 128},
    })
}

fn gemma_2_config() -> Value {
    json!({
        "architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt", "l0": 60,
        "hf_hook_point_in": "model.layers.7.output",
        "hf_hook_point_out": "model.layers.7.output",
    })
}

fn llama_config() -> Value {
    json!({
        "d_model": 2, "d_sae": 3, "jump_relu_threshold": 0.5, "act_fn": "jumprelu",
        "hook_point_in": "blocks.3.hook_resid_post", "hook_point_out": "blocks.3.hook_resid_post",
        "norm_activation": "dataset-wise", "top_k": 50,
        // √2 / norm = 2.
        "dataset_average_activation_norm": {"in": 2f64.sqrt() / 2.0, "out": 1.0},
    })
}

/// One small valid folder of each format.
fn examples() -> Vec<(&'static str, Files)> {
    let saelens = json!({
        "architecture": "jumprelu", "d_in": 2, "d_sae": 3, "metadata": {},
        "apply_b_dec_to_input": false,
    });
    vec![
        ("saelens", vec![(saelens::CONFIG, text(&saelens)), (saelens::WEIGHTS, weights(&plain()))]),
        (
            "sparsify",
            vec![
                (sparsify::CONFIG, text(&sparsify_config())),
                (sparsify::WEIGHTS, weights(&sparsify_arrays())),
            ],
        ),
        (
            "dictionary_learning",
            vec![
                (dictionary_learning::CONFIG, text(&dictionary_config())),
                (dictionary_learning::WEIGHTS, weights(&linear())),
            ],
        ),
        ("gemma_scope", vec![(gemma_scope::ARRAYS, npz(&plain(), CompressionMethod::Deflated))]),
        (
            "gemma_scope_2",
            vec![
                (gemma_scope::CONFIG, text(&gemma_2_config())),
                (gemma_scope::WEIGHTS, weights(&lower(plain()))),
            ],
        ),
        (
            "llama_scope",
            vec![
                (llama_scope::CONFIG, text(&llama_config())),
                (llama_scope::WEIGHTS, weights(&linear())),
            ],
        ),
    ]
}

fn read_example(name: &str, change: impl Fn(&mut Value)) -> Result<Sae, FormatError> {
    let (_, mut files) = examples().into_iter().find(|(n, _)| *n == name).expect("an example");
    let (_, config) = &mut files[0];
    let mut value: Value = serde_json::from_slice(config).expect("JSON");
    change(&mut value);
    *config = text(&value);
    read(folder(&files).path(), &Device::flex())
}

fn assert_close<const D: usize>(actual: Tensor<D>, expected: impl Into<TensorData>) {
    let tolerance = Tolerance::<f32>::absolute(1e-6);
    actual.into_data().assert_approx_eq(&expected.into(), tolerance);
}

fn x() -> Tensor<2> {
    Tensor::from_data([[2.0, 3.0], [0.0, 1.25]], &Device::flex())
}

#[test]
fn every_format_is_recognised() {
    for (name, files) in examples() {
        let sae = read(folder(&files).path(), &Device::flex());
        let sae = sae.unwrap_or_else(|error| panic!("{name}: {error}"));
        let SaeWeights { w_enc, w_dec, b_enc, .. } = sae.weights().clone();
        let scale = if name == "llama_scope" { 2.0 } else { 1.0 };
        assert_close(w_enc / scale, [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]);
        assert_close(w_dec * scale, [[2.0, 0.0], [0.0, 1.0], [0.25, 0.5]]);
        assert_close(b_enc, B_ENC);
    }
}

#[test]
fn what_is_no_sae_says_what_was_looked_for() {
    let empty = folder(&[("readme.md", Vec::new())]);
    for path in [empty.path().to_owned(), empty.path().join("readme.md")] {
        let error = read(&path, &Device::flex()).unwrap_err();
        assert!(matches!(&error, FormatError::Unrecognised { .. }), "{error:?}");
        assert!(error.to_string().contains("params.npz"), "{error}");
    }
    let nowhere = read(&empty.path().join("nowhere"), &Device::flex());
    assert!(matches!(nowhere, Err(FormatError::Io { .. })));
}

#[test]
fn two_formats_in_a_folder_are_one_too_many() {
    let files: Vec<_> = examples().into_iter().flat_map(|(_, files)| files).collect();
    let error = read(folder(&files[..1]).path(), &Device::flex()).unwrap_err();
    assert!(matches!(error, FormatError::Unrecognised { .. }), "half an SAE");
    let both = [&files[..2], &[("params.npz", Vec::new())]].concat();
    let error = read(folder(&both).path(), &Device::flex()).unwrap_err();
    assert!(matches!(&error, FormatError::Ambiguous { second, .. } if second == "params.npz"));
}

#[test]
fn sparsify_by_hand() {
    let sae = read_example("sparsify", |_| ()).expect("valid");
    assert_eq!(sae.config().activation, Activation::TopK { k: 2, rescale_by_decoder_norm: false });
    assert!(sae.config().apply_b_dec_to_input);
    assert_eq!(sae.config().other["normalize_decoder"], true);
    // x − b_dec = (1, 4), (−1, 2.25); pre = (1, 4.5, 5), (−1, 2.75, 1.25).
    assert_close(sae.encode(x()).to_dense(), [[0.0, 4.5, 5.0], [0.0, 2.75, 1.25]]);
    let transcoder = read_example("sparsify", |config| config["transcode"] = true.into());
    let transcoder = transcoder.expect("valid");
    assert_eq!(transcoder.config().transcodes_to, Some(2));
    // pre = (2, 3.5, 5), (0, 1.75, 1.25).
    assert_close(transcoder.encode(x()).to_dense(), [[0.0, 3.5, 5.0], [0.0, 1.75, 1.25]]);
    let by_factor = read_example("sparsify", |config| config["num_latents"] = 0.into());
    assert!(matches!(by_factor, Err(FormatError::Shape { expected, .. }) if expected == [64, 2]));
    for (key, value) in
        [("skip_connection", json!(true)), ("signed", json!(true)), ("activation", json!("relu"))]
    {
        let refused = read_example("sparsify", |config| config[key] = value.clone());
        assert!(matches!(refused, Err(FormatError::UnsupportedOption { key: k, .. }) if k == key));
    }
    let huge = read_example("sparsify", |config| {
        config["num_latents"] = 0.into();
        config["expansion_factor"] = u64::MAX.into();
    });
    assert!(matches!(huge, Err(FormatError::UnsupportedOption { .. })));
}

#[test]
fn a_folder_of_sparsify_names_its_hook_points() {
    let (_, files) = examples().remove(1);
    let names = ["layers.3", "layers.10"];
    let paths =
        names.map(|name| files.iter().map(move |(f, b)| (format!("{name}/{f}"), b.clone())));
    let paths: Vec<(String, Vec<u8>)> = paths.into_iter().flatten().collect();
    let paths: Vec<(&str, Vec<u8>)> = paths.iter().map(|(p, b)| (p.as_str(), b.clone())).collect();
    let run = folder(&paths);
    let saes = sparsify::read_all(run.path(), &Device::flex()).expect("valid");
    assert_eq!(saes.keys().collect::<Vec<_>>(), ["layers.10", "layers.3"]);
    let hook_name = saes["layers.3"].config().metadata.hook_name.clone();
    assert_eq!(hook_name.as_deref(), Some("blocks.3.hook_resid_post"));
    let none = sparsify::read_all(&run.path().join("layers.3"), &Device::flex());
    assert!(matches!(none, Err(FormatError::Unrecognised { .. })));
}

#[test]
fn dictionaries_by_hand() {
    let sae = read_example("dictionary_learning", |_| ()).expect("valid");
    assert_eq!(sae.config().activation, Activation::Relu);
    let metadata = &sae.config().metadata;
    assert_eq!(metadata.hook_name.as_deref(), Some("blocks.8.hook_resid_post"));
    assert_eq!(metadata.context_size, Some(128));
    // Not centred: pre = (2, 3.5, 5), (0, 1.75, 1.25).
    assert_close(sae.encode(x()).to_dense(), [[2.0, 3.5, 5.0], [0.0, 1.75, 1.25]]);
    let class = |name: &str| {
        read_example("dictionary_learning", |c| c["trainer"]["dict_class"] = name.into())
    };
    assert!(matches!(class("IdentityDict"), Err(FormatError::UnsupportedArchitecture { .. })));
    assert!(matches!(class("CrossCoder"), Err(FormatError::UnknownArchitecture { .. })));
    assert!(matches!(
        class("AutoEncoderTopK"),
        Err(FormatError::UnsupportedOption { key: "trainer.k", .. })
    ));
    assert!(matches!(class("AutoEncoder"), Err(FormatError::MissingTensor { tensor: "bias", .. })));
}

#[test]
fn gemma_scope_by_hand() {
    for method in [CompressionMethod::Stored, CompressionMethod::Deflated] {
        let folder = folder(&[("params.npz", npz(&plain(), method))]);
        let path = folder.path().join("params.npz");
        let sae = gemma_scope::read_npz(&path, gemma_scope::Role::Sae, &Device::flex());
        let sae = sae.expect("valid");
        assert!(!sae.config().apply_b_dec_to_input);
        // pre = (2, 3.5, 5), (0, 1.75, 1.25), of which 0 is below its threshold.
        assert_close(sae.encode(x()).to_dense(), [[2.0, 3.5, 5.0], [0.0, 1.75, 1.25]]);
        let role = gemma_scope::Role::Transcoder;
        let transcoder = gemma_scope::read_npz(&path, role, &Device::flex()).expect("valid");
        assert_eq!(transcoder.config().transcodes_to, Some(2));
    }
}

#[test]
fn arrays_of_objects_and_bombs_are_refused() {
    let read = |entries: &[(String, Vec<u8>)], method| {
        let folder = folder(&[("params.npz", zip(entries, method))]);
        read(folder.path(), &Device::flex()).unwrap_err()
    };
    let objects = npy("|O", "(2,3)", b"\x80\x04cos\nsystem\n.");
    let error = read(&[("W_enc.npy".to_owned(), objects)], CompressionMethod::Stored);
    assert!(matches!(&error, FormatError::Dtype { tensor: "w_enc", actual, .. } if actual == "|O"));
    let bomb = npy("<f4", "(16777216,)", &vec![0; 64 << 20]);
    let error = read(&[("W_enc.npy".to_owned(), bomb)], CompressionMethod::Deflated);
    assert!(matches!(error, FormatError::ZipEntry { claimed, .. } if claimed > 64 << 20));
    let error = read(&[("W_enc.txt".to_owned(), Vec::new())], CompressionMethod::Stored);
    assert!(matches!(error, FormatError::Npy { .. }));
    let row = npy("<f4", "(6,)", &bytes(&W_ENC));
    let error = read(&[("W_enc.npy".to_owned(), row)], CompressionMethod::Stored);
    assert!(matches!(error, FormatError::Rank { tensor: "w_enc", expected: 2, .. }));
}

#[test]
fn gemma_scope_2_by_hand() {
    let sae = read_example("gemma_scope_2", |_| ()).expect("valid");
    assert_eq!(sae.config().transcodes_to, None);
    assert_eq!(sae.config().other["l0"], 60);
    let hook_name = sae.config().metadata.hook_name.as_deref();
    assert_eq!(hook_name, Some("blocks.7.hook_resid_post"));
    let refused = read_example("gemma_scope_2", |c| c["architecture"] = "relu".into());
    assert!(matches!(refused, Err(FormatError::UnknownArchitecture { .. })));

    let mut config = gemma_2_config();
    config["hf_hook_point_out"] = "model.layers.7.post_feedforward_layernorm.output".into();
    let mut arrays = lower(plain());
    arrays.push(array("affine_skip_connection", &[2, 2], &[1.0, 2.0, 3.0, 4.0]));
    let files = |config: &Value| {
        folder(&[(gemma_scope::CONFIG, text(config)), (gemma_scope::WEIGHTS, weights(&arrays))])
    };
    let sae = read(files(&config).path(), &Device::flex()).expect("valid");
    assert_eq!(sae.config().transcodes_to, Some(2));
    // From the input to the output in the file, from the output to the input here.
    assert_close(sae.weights().w_skip.clone().expect("there"), [[1.0, 3.0], [2.0, 4.0]]);
    config["affine_connection"] = false.into();
    let refused = read(files(&config).path(), &Device::flex());
    assert!(matches!(refused, Err(FormatError::UnexpectedTensor { .. })));
}

#[test]
fn llama_scope_by_hand() {
    let sae = read_example("llama_scope", |_| ()).expect("valid");
    assert_close(sae.weights().threshold.clone().expect("there"), [1.0; 3]);
    // Twice x: pre = (4, 6.5, 10), (0, 3, 2.5); decoded over 2.
    let (latents, decoded) = sae.run(x());
    assert_close(latents.to_dense(), [[4.0, 6.5, 10.0], [0.0, 3.0, 2.5]]);
    assert_close(decoded, [[5.75, 5.25], [0.8125, 1.625]]);
    for (key, value) in [
        ("act_fn", json!("relu")),
        ("norm_activation", json!("token-wise")),
        ("use_glu_encoder", json!(true)),
        ("hook_point_out", json!("blocks.3.hook_mlp_out")),
        ("jump_relu_threshold", json!(1e300)),
    ] {
        let refused = read_example("llama_scope", |config| config[key] = value.clone());
        assert!(matches!(refused, Err(FormatError::UnsupportedOption { key: k, .. }) if k == key));
    }
    for norm in [0.0, -1.0, 1e-300] {
        let refused = read_example("llama_scope", |config| {
            config["dataset_average_activation_norm"]["in"] = norm.into();
        });
        assert!(matches!(refused, Err(FormatError::UnsupportedOption { .. })), "{norm}");
    }
}

/// Reads a folder with one file of it changed.
fn read_changed(files: &[(&'static str, Vec<u8>)], at: usize, file: &[u8]) -> Result<Sae, String> {
    let mut files = files.to_vec();
    files[at].1 = file.to_vec();
    let name = PathBuf::from(files[at].0);
    let folder = folder(&files);
    read(folder.path(), &Device::flex()).map_err(|error| {
        let message = error.to_string();
        let in_its_place = folder.path().join(&name).display().to_string();
        // What is wrong with one file may be found where another is held to it.
        let named =
            files.iter().any(|(n, _)| message.contains(n)) || message.contains(&in_its_place);
        assert!(named, "{message}");
        message
    })
}

#[test]
fn every_cut_of_every_file_is_refused() {
    for (name, files) in examples() {
        for (at, (file_name, whole)) in files.iter().enumerate() {
            for length in 0..whole.len() {
                let read = read_changed(&files, at, &whole[..length]);
                assert!(read.is_err(), "{name}: {length} bytes of {file_name} are read");
            }
        }
    }
}

#[test]
fn no_flipped_bit_makes_a_reader_panic() {
    for (_, files) in examples() {
        for (at, (_, whole)) in files.iter().enumerate() {
            for byte in 0..whole.len() {
                // One bit of each byte, another each time.
                let mut damaged = whole.clone();
                damaged[byte] ^= 1 << (byte % 8);
                let _ = read_changed(&files, at, &damaged);
            }
        }
    }
}
