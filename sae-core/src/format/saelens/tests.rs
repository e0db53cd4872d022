use std::path::PathBuf;

use burn::tensor::TensorData;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::activation::Activation;
use crate::config::ConfigError;

/// A folder with an SAE of two inputs and three latents, to be spoilt.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().expect("a folder"));
        folder.set_config(&config());
        folder.set_tensors(&tensors());
        folder
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn set_config(&self, config: &Value) {
        fs::write(self.path().join(CONFIG), config.to_string()).expect("written");
    }

    fn set_tensors(&self, tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) {
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            (*name, TensorView::new(*dtype, shape.clone(), bytes).expect("bytes fit"))
        });
        let bytes = safetensors::serialize(views, None).expect("serialised");
        fs::write(self.path().join(WEIGHTS), bytes).expect("written");
    }

    fn read(&self) -> Result<Sae, FormatError> {
        read(self.path(), &Device::flex())
    }

    fn refused(&self) -> FormatError {
        self.read().expect_err("this must not be read")
    }
}

fn config() -> Value {
    json!({
        "d_in": 2, "d_sae": 3, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": true, "normalize_activations": "none",
        "reshape_activations": "none", "architecture": "topk",
        "metadata": {"sae_lens_version": "6.54.12", "model_name": "tiny", "l0": null},
        "k": 2, "rescale_acts_by_decoder_norm": true, "unheard_of": [1, {"a": 2.5}],
    })
}

fn config_with(key: &str, value: Value) -> Value {
    let mut config = config();
    config[key] = value;
    config
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().copied().flat_map(f32::to_le_bytes).collect()
}

fn tensors() -> Vec<(&'static str, Dtype, Vec<usize>, Vec<u8>)> {
    vec![
        ("W_enc", Dtype::F32, vec![2, 3], floats(&[1.0, 0.0, 1.0, 0.0, 1.0, 1.0])),
        ("b_enc", Dtype::F32, vec![3], floats(&[0.0, 0.5, 0.0])),
        ("W_dec", Dtype::F32, vec![3, 2], floats(&[2.0, 0.0, 0.0, 1.0, 0.25, 0.5])),
        ("b_dec", Dtype::F32, vec![2], floats(&[1.0, -1.0])),
    ]
}

#[test]
fn a_folder_is_read_as_written() {
    let sae = Folder::new().read().expect("valid");
    let rescaled = Activation::TopK { k: 2, rescale_by_decoder_norm: true };
    assert_eq!(sae.config().activation, rescaled);
    assert_eq!(sae.config().metadata.model_name.as_deref(), Some("tiny"));
    let expected = TensorData::from([[2.0f32, 0.0], [0.0, 1.0], [0.25, 0.5]]);
    sae.weights().w_dec.to_data().assert_eq(&expected, true);
}

#[test]
fn save_load_save_is_byte_identical_and_loses_no_key() {
    let parent = tempfile::tempdir().expect("a folder");
    let (first, second) = (parent.path().join("first"), parent.path().join("second"));
    write(&Folder::new().read().expect("valid"), &first).expect("written");
    write(&read(&first, &Device::flex()).expect("valid"), &second).expect("written");
    for name in [CONFIG, WEIGHTS] {
        let bytes = |folder: &PathBuf| fs::read(folder.join(name)).expect("read");
        assert!(bytes(&first) == bytes(&second), "{name} differs");
    }
    let written = fs::read(first.join(CONFIG)).expect("read");
    let written: Value = serde_json::from_slice(&written).expect("JSON");
    assert_eq!(written, config());
}

#[test]
fn half_precision_becomes_f32() {
    let folder = Folder::new();
    let mut all = tensors();
    // 1.5 and −2 in bfloat16, 0.5 and 65504 in IEEE half; 1 0 in bfloat16 twice over.
    all[3] = ("b_dec", Dtype::BF16, vec![2], vec![0xC0, 0x3F, 0x00, 0xC0]);
    all[1] = ("b_enc", Dtype::F16, vec![3], vec![0x00, 0x38, 0xFF, 0x7B, 0x00, 0x00]);
    folder.set_tensors(&all);
    let sae = folder.read().expect("valid");
    sae.weights().b_dec.to_data().assert_eq(&TensorData::from([1.5f32, -2.0]), true);
    sae.weights().b_enc.to_data().assert_eq(&TensorData::from([0.5f32, 65504.0, 0.0]), true);
}

#[test]
fn flat_configurations_are_read() {
    let folder = Folder::new();
    folder.set_config(&json!({
        "model_name": "tiny", "hook_point": "blocks.3.hook_resid_post", "hook_point_layer": 3,
        "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}, "d_in": 2, "d_sae": 3,
        "architecture": "standard", "normalize_activations": false, "context_size": 128,
        "apply_b_dec_to_input": false, "dtype": "torch.bfloat16", "prepend_bos": true,
    }));
    let sae = folder.read().expect("valid");
    let config = sae.config();
    let plain = Activation::TopK { k: 2, rescale_by_decoder_norm: false };
    assert_eq!(config.activation, plain);
    assert!(!config.apply_b_dec_to_input);
    assert_eq!(config.metadata.hook_name.as_deref(), Some("blocks.3.hook_resid_post"));
    assert_eq!(config.metadata.context_size, Some(128));
    assert_eq!(config.metadata.prepend_bos, Some(true));
    assert_eq!(config.other["hook_point_layer"], 3);
}

#[test]
fn other_architectures_are_refused_by_name() {
    let folder = Folder::new();
    for name in UNSUPPORTED_EXAMPLES {
        folder.set_config(&json!({"architecture": name, "metadata": {}}));
        let error = folder.refused();
        assert!(matches!(&error, FormatError::UnsupportedArchitecture { architecture, .. }
            if architecture == name));
        assert!(error.to_string().contains(name), "{error}");
    }
    folder.set_config(&config_with("architecture", json!("tpok")));
    assert!(matches!(folder.refused(),
        FormatError::UnknownArchitecture { architecture, .. } if architecture == "tpok"));
    folder.set_config(&json!({"d_in": 2, "d_sae": 3, "activation_fn": "relu"}));
    assert!(matches!(folder.refused(),
        FormatError::UnsupportedArchitecture { architecture, .. } if architecture == "standard"));
}

const UNSUPPORTED_EXAMPLES: [&str; 3] = ["temporal", "gated", "jumprelu_skip_transcoder"];

#[test]
fn options_we_do_not_follow_are_refused_by_name() {
    let folder = Folder::new();
    for (option, value) in [
        ("normalize_activations", json!("layer_norm")),
        ("normalize_activations", json!("expected_average_only_in")),
        ("reshape_activations", json!("hook_q")),
        ("finetuning_scaling_factor", json!(true)),
    ] {
        folder.set_config(&config_with(option, value));
        assert!(matches!(folder.refused(),
            FormatError::UnsupportedOption { key, .. } if key == option));
    }
}

#[test]
fn impossible_sizes_are_refused() {
    let folder = Folder::new();
    for (key, value, expected) in [
        ("k", 0, ConfigError::K { k: 0, d_sae: 3 }),
        ("k", 4, ConfigError::K { k: 4, d_sae: 3 }),
        ("d_in", 0, ConfigError::Empty { d_in: 0, d_sae: 3 }),
    ] {
        folder.set_config(&config_with(key, json!(value)));
        assert!(matches!(folder.refused(),
            FormatError::Config { source, .. } if source == expected));
    }
}

#[test]
fn malformed_configurations_are_refused() {
    let folder = Folder::new();
    for (key, value) in [("k", json!("2")), ("d_in", json!(-1)), ("metadata", json!(3))] {
        folder.set_config(&config_with(key, value));
        assert!(matches!(folder.refused(), FormatError::Json { .. }), "{key}");
    }
    fs::write(folder.path().join(CONFIG), "{\"d_in\": 2").expect("written");
    assert!(matches!(folder.refused(), FormatError::Json { .. }));
    fs::remove_file(folder.path().join(CONFIG)).expect("removed");
    assert!(matches!(folder.refused(),
        FormatError::Io { path, .. } if path.ends_with(CONFIG)));
}

#[test]
fn missing_and_surplus_tensors_are_refused_by_name() {
    let folder = Folder::new();
    folder.set_tensors(&tensors()[..3]);
    assert!(matches!(folder.refused(), FormatError::MissingTensor { tensor: "b_dec", .. }));
    let mut all = tensors();
    all.push(("threshold", Dtype::F32, vec![1], floats(&[1.0])));
    folder.set_tensors(&all);
    assert!(matches!(folder.refused(),
        FormatError::UnexpectedTensor { tensor, .. } if tensor == "threshold"));
}

#[test]
fn tensors_of_another_kind_are_refused() {
    let folder = Folder::new();
    let mut all = tensors();
    all[0].2 = vec![3, 2];
    folder.set_tensors(&all);
    assert!(
        matches!(folder.refused(), FormatError::Shape { tensor: "W_enc", expected, actual, .. }
        if expected == [2, 3] && actual == [3, 2])
    );
    all = tensors();
    all[1].1 = Dtype::I32;
    folder.set_tensors(&all);
    assert!(matches!(
        folder.refused(),
        FormatError::Dtype { tensor: "b_enc", actual: Dtype::I32, .. }
    ));
    all = tensors();
    all[2].3 = floats(&[2.0, 0.0, f32::NAN, 1.0, 0.25, 0.5]);
    folder.set_tensors(&all);
    assert!(matches!(folder.refused(), FormatError::NotFinite { tensor: "W_dec", index: 2, .. }));
}

#[test]
fn every_cut_of_the_weights_is_refused() {
    let folder = Folder::new();
    let path = folder.path().join(WEIGHTS);
    let whole = fs::read(&path).expect("read");
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).expect("written");
        assert!(matches!(folder.refused(), FormatError::Safetensors { .. }), "{length}");
    }
}

proptest::proptest! {
    /// Whatever is wrong with a file, reading it is a `Result`.
    #[test]
    fn damaged_files_never_panic(which: bool, at: proptest::sample::Index, bits in 1..=255u8) {
        let folder = Folder::new();
        let path = folder.path().join(if which { CONFIG } else { WEIGHTS });
        let mut bytes = fs::read(&path).expect("read");
        let at = at.index(bytes.len());
        bytes[at] ^= bits;
        fs::write(&path, bytes).expect("written");
        let _ = folder.read();
    }
}
