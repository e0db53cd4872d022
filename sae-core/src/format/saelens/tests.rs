use std::fs;

use burn::tensor::TensorData;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::activation::Activation;
use crate::config::ConfigError;
use crate::normalization::Normalization;
use crate::sae::SaeWeights;

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

    fn set_tensors(&self, tensors: &[Array]) {
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

type Array = (&'static str, Dtype, Vec<usize>, Vec<u8>);

fn tensors() -> Vec<Array> {
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
    assert_same_files(&first, &second);
    let written = fs::read(first.join(CONFIG)).expect("read");
    let written: Value = serde_json::from_slice(&written).expect("JSON");
    assert_eq!(written, config());
}

fn assert_same_files(first: &Path, second: &Path) {
    for name in [CONFIG, WEIGHTS] {
        let bytes = |folder: &Path| fs::read(folder.join(name)).expect("read");
        assert!(bytes(first) == bytes(second), "{name} differs");
    }
}

/// Every architecture that is written, with keys and tensors that only it has.
fn architectures() -> Vec<(&'static str, Value, Vec<Array>)> {
    let numbers = |name, n: usize| {
        let values: Vec<f32> = (0..n).map(|i| i as f32 * 0.5 - 1.0).collect();
        (name, Dtype::F32, vec![n], floats(&values))
    };
    let matrix = |name, [rows, columns]: [usize; 2]| {
        let (name, dtype, _, bytes) = numbers(name, rows * columns);
        (name, dtype, vec![rows, columns], bytes)
    };
    let decoder = |d_out| vec![matrix("W_dec", [3, d_out]), numbers("b_dec", d_out)];
    let sae = |d_out, more: &[&'static str]| {
        let mut tensors = decoder(d_out);
        tensors.push(matrix("W_enc", [2, 3]));
        tensors.extend(more.iter().map(|name| match *name {
            "W_skip" => matrix("W_skip", [d_out, 2]),
            name => numbers(name, 3),
        }));
        tensors
    };
    let k = json!({"k": 2, "rescale_acts_by_decoder_norm": false});
    let d_out = json!({"d_out": 4, "apply_b_dec_to_input": false});
    vec![
        ("standard", json!({"normalize_activations": "layer_norm"}), sae(2, &["b_enc"])),
        ("topk", k.clone(), sae(2, &["b_enc"])),
        ("abstopk", k, sae(2, &["b_enc"])),
        ("gated", json!({}), sae(2, &["b_gate", "b_mag", "r_mag"])),
        ("jumprelu", json!({"reshape_activations": "hook_z"}), sae(2, &["b_enc", "threshold"])),
        (
            "matching_pursuit",
            json!({
                "residual_threshold": 0.01, "max_iterations": null,
                "stop_on_duplicate_support": true,
            }),
            decoder(2),
        ),
        ("transcoder", d_out.clone(), sae(4, &["b_enc"])),
        ("skip_transcoder", d_out.clone(), sae(4, &["b_enc", "W_skip"])),
        ("jumprelu_transcoder", d_out.clone(), sae(4, &["b_enc", "threshold"])),
        ("jumprelu_skip_transcoder", d_out, sae(4, &["b_enc", "threshold", "W_skip"])),
    ]
}

fn plain_config(architecture: &str, own: &Value) -> Value {
    let mut config = config();
    let keys = config.as_object_mut().expect("an object");
    keys.shift_remove("k");
    keys.shift_remove("rescale_acts_by_decoder_norm");
    keys.insert("architecture".to_owned(), architecture.into());
    keys.extend(own.as_object().expect("an object").clone());
    config
}

#[test]
fn every_architecture_survives_a_round_trip() {
    for (architecture, own, tensors) in architectures() {
        let folder = Folder::new();
        let config = plain_config(architecture, &own);
        folder.set_config(&config);
        folder.set_tensors(&tensors);
        let parent = tempfile::tempdir().expect("a folder");
        let (first, second) = (parent.path().join("first"), parent.path().join("second"));
        write(&folder.read().expect(architecture), &first).expect("written");
        write(&read(&first, &Device::flex()).expect(architecture), &second).expect("written");
        assert_same_files(&first, &second);
        let written = fs::read(first.join(CONFIG)).expect("read");
        let written: Value = serde_json::from_slice(&written).expect("JSON");
        assert_eq!(written, config);
        let weights = |folder: &Path| fs::read(folder.join(WEIGHTS)).expect("read");
        assert!(weights(&first) == weights(folder.path()), "{architecture}");
    }
}

#[test]
fn every_architecture_needs_its_tensors_and_no_other() {
    for (architecture, own, tensors) in architectures() {
        let folder = Folder::new();
        folder.set_config(&plain_config(architecture, &own));
        for (at, missing) in tensors.iter().enumerate() {
            let mut others = tensors.clone();
            others.remove(at);
            folder.set_tensors(&others);
            let error = folder.refused();
            assert!(
                matches!(error, FormatError::MissingTensor { tensor, .. } if tensor == missing.0)
            );
        }
        let mut more = tensors;
        more.push(("b_other", Dtype::F32, vec![1], floats(&[1.0])));
        folder.set_tensors(&more);
        assert!(matches!(folder.refused(),
            FormatError::UnexpectedTensor { tensor, .. } if tensor == "b_other"));
    }
}

#[test]
fn what_saelens_has_no_name_for_is_not_written() {
    let folder = tempfile::tempdir().expect("a folder");
    let sae = Folder::new().read().expect("valid");
    let group_max = Activation::GroupMax { k: 1 };
    let top_k = Activation::TopK { k: 1, rescale_by_decoder_norm: false };
    for (expected, transcodes_to) in [(group_max, None), (top_k, Some(2))] {
        let apply_b_dec_to_input = transcodes_to.is_none();
        let config = SaeConfig { apply_b_dec_to_input, transcodes_to, ..sae.config().clone() };
        let config = SaeConfig { activation: expected, ..config };
        let sae = Sae::new(config, sae.weights().clone()).expect("valid");
        let error = write(&sae, &folder.path().join("sae")).unwrap_err();
        assert!(matches!(error, FormatError::NoArchitecture { activation, transcodes, .. }
            if activation == expected && transcodes == transcodes_to.is_some()));
    }
}

#[test]
fn training_checkpoints_by_batch_become_jump_relu() {
    let folder = Folder::new();
    // k may be any average.
    let own = json!({"k": 1.5, "rescale_acts_by_decoder_norm": true});
    folder.set_config(&plain_config("matryoshka_batchtopk", &own));
    let mut all = tensors();
    all.push(("topk_threshold", Dtype::F64, vec![], 0.75f64.to_le_bytes().to_vec()));
    folder.set_tensors(&all);
    let sae = folder.read().expect("valid");
    let SaeWeights { w_enc, threshold, .. } = sae.weights().clone();
    let norm = 0.3125f32.sqrt();
    let tolerance = burn::tensor::Tolerance::<f32>::default();
    let expected = TensorData::from([[2.0, 0.0, norm], [0.0, 1.0, norm]]);
    w_enc.into_data().assert_approx_eq(&expected, tolerance);
    let threshold = threshold.expect("a JumpReLU SAE");
    threshold.into_data().assert_eq(&TensorData::from([0.75f32; 3]), true);
    let training = &sae.config().metadata.other["training_architecture"];
    assert_eq!(training, "matryoshka_batchtopk");
    // Without the key nobody can say whether the threshold is one of norms.
    folder.set_config(&plain_config("batchtopk", &json!({"k": 1.5})));
    assert!(matches!(folder.refused(), FormatError::Json { .. }));
}

#[test]
fn logarithms_of_thresholds_are_read() {
    let folder = Folder::new();
    folder.set_config(&plain_config("jumprelu", &json!({})));
    let mut all = tensors();
    all.push(("log_threshold", Dtype::F32, vec![3], floats(&[0.0, 0.0, 0.0])));
    folder.set_tensors(&all);
    let threshold = folder.read().expect("valid").weights().threshold.clone();
    let threshold = threshold.expect("a JumpReLU SAE").into_data();
    threshold.assert_eq(&TensorData::from([1.0f32; 3]), true);
    all.last_mut().expect("the threshold").3 = floats(&[0.0, 100.0, 0.0]);
    folder.set_tensors(&all);
    assert!(matches!(
        folder.refused(),
        FormatError::NotFinite { tensor: "log_threshold", index: 1, .. }
    ));
}

#[test]
fn keys_of_other_formats_do_not_stand_in_for_ours() {
    let sae = Folder::new().read().expect("valid");
    let mut config = sae.config().clone();
    config.other.insert("dtype".to_owned(), "torch.bfloat16".into());
    config.other.insert("d_in".to_owned(), 7.into());
    let sae = Sae::new(config, sae.weights().clone()).expect("valid");
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("sae");
    write(&sae, &path).expect("written");
    let written = fs::read(path.join(CONFIG)).expect("read");
    let written: Value = serde_json::from_slice(&written).expect("JSON");
    assert_eq!((&written["dtype"], &written["d_in"]), (&json!("float32"), &json!(2)));
}

#[test]
fn a_scale_for_all_activations_is_folded() {
    let folder = Folder::new();
    folder.set_config(&config_with("normalize_activations", json!("expected_average_only_in")));
    let scaler = |text: &str| fs::write(folder.path().join(SCALER), text).expect("written");
    let expected = TensorData::from([[1.0f32, 0.0], [0.0, 0.5], [0.125, 0.25]]);
    let assert_folded = || {
        let sae = folder.read().expect("valid");
        assert_eq!(sae.config().normalization, Normalization::None);
        sae.weights().w_dec.to_data().assert_eq(&expected, true);
    };
    scaler(r#"{"scaling_factor": 2.0, "has_whitening": false}"#);
    assert_folded();
    for refused in [r#"{"scaling_factor": null}"#, r#"{"scaling_factor": 1e300}"#, "{}"] {
        scaler(refused);
        assert!(
            matches!(
                folder.refused(),
                FormatError::UnsupportedOption { key: "normalize_activations", .. }
            ),
            "{refused}"
        );
    }
    scaler("{");
    assert!(matches!(folder.refused(), FormatError::Json { path, .. } if path.ends_with(SCALER)));
    fs::remove_file(folder.path().join(SCALER)).expect("removed");
    let mut all = tensors();
    all.push((SCALING_FACTOR, Dtype::F32, vec![1], floats(&[2.0])));
    folder.set_tensors(&all);
    assert_folded();
}

const SCALING_FACTOR: &str = "scaling_factor";

#[test]
fn what_finetuning_multiplied_latents_by_is_folded() {
    let folder = Folder::new();
    let mut finetuned = config_with("finetuning_scaling_factor", json!(true));
    folder.set_config(&finetuned);
    assert!(matches!(
        folder.refused(),
        FormatError::UnsupportedOption { key: "finetuning_scaling_factor", .. }
    ));
    finetuned["rescale_acts_by_decoder_norm"] = json!(false);
    folder.set_config(&finetuned);
    assert!(matches!(folder.refused(), FormatError::MissingTensor { tensor: SCALING_FACTOR, .. }));
    let with = |scale: &[f32]| {
        let mut all = tensors();
        all.push((SCALING_FACTOR, Dtype::F32, vec![3], floats(scale)));
        folder.set_tensors(&all);
    };
    with(&[1.0, 2.0, 4.0]);
    let sae = folder.read().expect("valid");
    let expected = TensorData::from([[2.0f32, 0.0], [0.0, 2.0], [1.0, 2.0]]);
    sae.weights().w_dec.to_data().assert_eq(&expected, true);
    assert_eq!(sae.config().other["finetuning_scaling_factor"], false);
    // Files of a time had such a tensor of ones, and the key false.
    folder.set_config(&config_with("finetuning_scaling_factor", json!(false)));
    assert!(matches!(folder.refused(),
        FormatError::UnexpectedTensor { tensor, .. } if tensor == SCALING_FACTOR));
    with(&[1.0; 3]);
    folder.read().expect("valid");
}

#[test]
fn frequencies_stand_beside_an_sae() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("sae");
    let sae = Folder::new().read().expect("valid");
    let device = Device::flex();
    let frequencies = Tensor::from_data([-1.0, -2.5, -10.0], &device);
    write(&sae, &path).expect("written");
    assert!(read_log_sparsity(&path, 3, &device).expect("not there").is_none());
    write_with_log_sparsity(&sae, &frequencies, &path).expect("written");
    let again = read_log_sparsity(&path, 3, &device).expect("valid").expect("there");
    again.into_data().assert_eq(&frequencies.into_data(), true);
    read(&path, &device).expect("valid");
    assert!(matches!(read_log_sparsity(&path, 4, &device), Err(FormatError::Shape { .. })));
    // They are another SAE's, once the weights are.
    assert!(matches!(write(&sae, &path), Err(FormatError::Occupied { entry, .. })
        if entry == SPARSITY));
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
fn flat_configurations_of_the_first_architecture_are_read() {
    let folder = Folder::new();
    let mut keys = json!({
        "hook_name": "blocks.1.attn.hook_z", "d_in": 2, "d_sae": 3, "activation_fn_str": "relu",
        "normalize_activations": null,
    });
    folder.set_config(&keys);
    let sae = folder.read().expect("valid");
    assert_eq!(sae.config().activation, Activation::Relu);
    assert!(sae.config().joins_heads, "said by the hook point");
    keys["normalize_activations"] = json!(true);
    folder.set_config(&keys);
    assert!(matches!(folder.refused(),
        FormatError::UnsupportedOption { actual, .. } if actual == "expected_average_only_in"));
}

#[test]
fn other_architectures_are_refused_by_name() {
    let folder = Folder::new();
    folder.set_config(&json!({"architecture": "temporal", "metadata": {}}));
    let error = folder.refused();
    assert!(matches!(&error, FormatError::UnsupportedArchitecture { architecture, .. }
        if architecture == "temporal"));
    assert!(error.to_string().contains("temporal"), "{error}");
    folder.set_config(&config_with("architecture", json!("tpok")));
    assert!(matches!(folder.refused(),
        FormatError::UnknownArchitecture { architecture, .. } if architecture == "tpok"));
}

#[test]
fn options_we_do_not_follow_are_refused_by_name() {
    let folder = Folder::new();
    for (option, value) in [
        ("normalize_activations", json!("covariance_whitening")),
        ("normalize_activations", json!("expected_average_only_in")),
        ("reshape_activations", json!("hook_q")),
        ("activation_fn", json!("tanh-relu")),
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
    assert!(matches!(folder.refused(), FormatError::Dtype { tensor: "b_enc", actual, .. }
        if actual == "I32"));
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
