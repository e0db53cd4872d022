//! Folders and models of which one part is wrong: the error names the file, and the tensor.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::Path;

use burn::tensor::Device;
use model_hooks::LanguageModel;
use model_hooks::load::{self, RawTensor, Safetensors, TensorSource};
use safetensors::tensor::{Dtype, TensorView, serialize};
use tempfile::TempDir;

use super::allocations::{peak_of, turn};

/// A copy of a golden model's folder.
fn folder() -> TempDir {
    let (source, folder) = (goldens::own("models/llama_mha"), tempfile::tempdir().unwrap());
    for name in ["config.json", "model.safetensors"] {
        fs::copy(source.join(name), folder.path().join(name)).unwrap();
    }
    folder
}

fn tensors(path: &Path) -> BTreeMap<String, RawTensor> {
    let mut file = Safetensors::open(path).unwrap();
    file.names().into_iter().map(|name| (name.clone(), file.tensor(&name).unwrap())).collect()
}

/// Writes tensors in a dtype of four bytes.
fn write(path: &Path, tensors: &BTreeMap<String, RawTensor>, dtype: Dtype) {
    let bytes: Vec<(&String, &RawTensor, Vec<u8>)> = tensors
        .iter()
        .map(|(name, t)| (name, t, t.values.iter().flat_map(|x| x.to_le_bytes()).collect()))
        .collect();
    let views = bytes
        .iter()
        .map(|(name, t, bytes)| (*name, TensorView::new(dtype, t.shape.clone(), bytes).unwrap()));
    fs::write(path, serialize(views, None).unwrap()).unwrap();
}

fn load(folder: &TempDir) -> Result<(), load::LoadError> {
    let mut checkpoint = load::open(folder.path())?;
    let device = Device::flex();
    LanguageModel::load(checkpoint.config, checkpoint.tensors.as_mut(), &device).map(drop)
}

#[test]
fn a_wrong_tensor_is_named_with_its_file() {
    type Spoil = fn(&mut BTreeMap<String, RawTensor>);
    const NAME: &str = "model.layers.1.mlp.up_proj.weight";
    fn wrong(tensors: &mut BTreeMap<String, RawTensor>) -> &mut RawTensor {
        tensors.get_mut(NAME).unwrap()
    }
    let cases: [(&str, Spoil); 7] = [
        ("no tensor", |tensors| drop(tensors.remove(NAME))),
        ("not use", |tensors| {
            let tensor = tensors[NAME].clone();
            tensors.insert("model.layers.3.mlp.up_proj.weight".into(), tensor);
        }),
        ("not use", |tensors| {
            let tensor = tensors[NAME].clone();
            tensors.insert("model.layers.1.mlp.up_proj.bias".into(), tensor);
        }),
        ("has shape", |tensors| wrong(tensors).shape.reverse()),
        ("has shape", |tensors| wrong(tensors).shape.insert(0, 1)),
        ("not finite", |tensors| wrong(tensors).values[0] = f32::NAN),
        ("not finite", |tensors| wrong(tensors).values[7] = f32::NEG_INFINITY),
    ];
    let folder = folder();
    let path = folder.path().join("model.safetensors");
    let good = tensors(&path);
    for (expected, spoil) in cases {
        let mut tensors = good.clone();
        spoil(&mut tensors);
        write(&path, &tensors, Dtype::F32);
        let message = load(&folder).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
        assert!(message.contains("model.safetensors") && message.contains("mlp.up_proj"));
    }
    write(&path, &good, Dtype::U32);
    let message = load(&folder).unwrap_err().to_string();
    assert!(message.contains("model.safetensors") && message.contains("encoded as U32"));
    write(&path, &good, Dtype::F32);
    load(&folder).unwrap();
}

#[test]
fn a_config_larger_than_its_weights_costs_nothing() {
    let folder = folder();
    let path = folder.path().join("config.json");
    let config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for field in [
        "hidden_size",
        "num_hidden_layers",
        "vocab_size",
        "max_position_embeddings",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ] {
        let mut config = config.clone();
        config[field] = (1u64 << 28).into();
        fs::write(&path, config.to_string()).unwrap();
        let (loaded, peak) = peak_of(&turn(), || load(&folder));
        assert!(peak < 64 << 20, "{field}: {peak} bytes");
        // Only the length of the context is nowhere in the weights.
        assert_eq!(loaded.is_ok(), field == "max_position_embeddings", "{field}");
    }
}

#[test]
fn a_broken_file_is_named() {
    for (name, content) in [
        ("config.json", "{"),
        ("generation_config.json", "{\"eos_token_id\": \"</s>\"}"),
        ("generation_config.json", "{\"eos_token_id\": 131}"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "{\"chat_template\": \"{% for %}\"}"),
        ("tokenizer_config.json", "{\"chat_template\": []}"),
        ("chat_template.jinja", "{% for %}"),
        ("chat_template.jinja", "{{"),
        ("model.safetensors", "{}"),
    ] {
        let folder = folder();
        fs::write(folder.path().join(name), content).unwrap();
        let error = load::open(folder.path()).unwrap_err();
        assert!(error.to_string().contains(name), "{name}: {error}");
        let is_cause_kept = error.source().is_some() || name == "model.safetensors";
        assert!(is_cause_kept, "{name}: {error}");
    }
}

#[test]
fn a_folder_in_the_place_of_a_file_is_named() {
    for name in ["config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"] {
        let folder = folder();
        let path = folder.path().join(name);
        let _ = fs::remove_file(&path);
        fs::create_dir(&path).unwrap();
        let error = load::open(folder.path()).unwrap_err();
        assert!(error.to_string().contains(name), "{name}: {error}");
    }
}
