//! A model with a trained head, as a sequence-classification checkpoint.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use burn::tensor::Tensor;
use model_hooks::config::{Architecture, Nonlinearity, RopeScaling};
use model_hooks::load::{self, TensorSource};
use model_hooks::{ModelConfig, WeightOf};
use serde_json::{Map, Value, json};

use crate::storage::write_whole;

/// The weight of the head, as transformers' sequence classifiers call it.
const SCORE: &str = "score.weight";
/// Heads that the new one stands in place of.
const UNEMBEDDINGS: [&str; 2] = ["lm_head.", "embed_out."];
/// Files of a folder that are taken over as they are.
const TEXT_FILES: [&str; 4] =
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"];

/// Writes the model at `source`, a folder or a GGUF file, with this head of one score and some other
/// weights, so that transformers and `RewardModel::load` read it: `config.json` and
/// `model.safetensors`, in f32, and the tokenizer's files where the source is a folder.
///
/// # Errors
/// If the source cannot be read, is a GGUF file of another architecture than Llama, keeps one of the
/// weights with others, or the folder cannot be written.
pub fn save(
    source: &Path,
    head: &[f32],
    changed: &[(WeightOf, Tensor<2>)],
    folder: &Path,
) -> Result<()> {
    let mut checkpoint = load::open(source)?;
    let d_model = checkpoint.config.d_model;
    ensure!(head.len() == d_model, "a head of {} on a model of {d_model}", head.len());
    let changed: BTreeMap<String, Vec<f32>> =
        changed.iter().map(|(of, weight)| as_stored(of, weight)).collect::<Result<_>>()?;
    fs::create_dir_all(folder)
        .with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let config = if source.is_dir() {
        for name in TEXT_FILES {
            let from = source.join(name);
            if from.exists() {
                let bytes = fs::read(&from).with_context(|| from.display().to_string())?;
                write_whole(&folder.join(name), &bytes)?;
            }
        }
        let path = source.join("config.json");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        classifier_config(serde_json::from_str(&text)?)?
    } else {
        llama_config(&checkpoint.config)?
    };
    let path = folder.join("model.safetensors");
    write_tensors(checkpoint.tensors.as_mut(), head, &changed, &path)?;
    write_whole(&folder.join("config.json"), serde_json::to_string_pretty(&config)?.as_bytes())
}

/// The name and the values of a weight in a checkpoint.
fn as_stored(of: &WeightOf, weight: &Tensor<2>) -> Result<(String, Vec<f32>)> {
    let name = of.tensor.clone().with_context(|| {
        format!("the checkpoint keeps {:?} of block {} with others", of.projection, of.layer)
    })?;
    Ok((name, weight.clone().transpose().into_data().iter().collect()))
}

/// The config of a causal model, turned into that of a classifier.
fn classifier_config(mut config: Value) -> Result<Value> {
    let fields = config.as_object_mut().context("config.json is no object")?;
    let architecture = fields.get("architectures").and_then(|names| names[0].as_str());
    let architecture = architecture.context("config.json names no architecture")?;
    let family = ["ForCausalLM", "LMHeadModel", "ForSequenceClassification"]
        .iter()
        .find_map(|head| architecture.strip_suffix(head))
        .with_context(|| format!("{architecture} has no head that could be taken off"))?;
    let name = format!("{family}ForSequenceClassification");
    fields.insert("architectures".into(), json!([name]));
    fields.extend(one_label());
    Ok(config)
}

fn one_label() -> Map<String, Value> {
    let labels =
        json!({"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "dtype": "float32"});
    match labels {
        Value::Object(labels) => labels,
        _ => unreachable!("an object was written"),
    }
}

/// What transformers needs to know of a Llama.
fn llama_config(config: &ModelConfig) -> Result<Value> {
    let ModelConfig { attention, mlp, special_tokens, .. } = config;
    let rope = attention.rope.as_ref();
    let plain = rope.filter(|rope| rope.scaling == RopeScaling::Default);
    let (Architecture::Llama, Some(rope), Nonlinearity::Silu) =
        (config.architecture, plain, mlp.nonlinearity)
    else {
        bail!("only a plain Llama can be saved out of a GGUF file: pass a folder");
    };
    let mut fields = one_label();
    let own = json!({
        "architectures": ["LlamaForSequenceClassification"],
        "model_type": "llama",
        "attention_bias": attention.bias,
        "bos_token_id": special_tokens.bos,
        "eos_token_id": special_tokens.eos.first(),
        "pad_token_id": special_tokens.pad,
        "head_dim": attention.d_head,
        "hidden_act": "silu",
        "hidden_size": config.d_model,
        "intermediate_size": mlp.d_mlp,
        "max_position_embeddings": config.n_ctx,
        "mlp_bias": mlp.bias,
        "num_attention_heads": attention.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": attention.n_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_theta": rope.theta, "rope_type": "default"},
        "tie_word_embeddings": false,
        "vocab_size": config.d_vocab,
    });
    fields.extend(own.as_object().expect("an object was written").clone());
    Ok(Value::Object(fields))
}

/// Writes all tensors but an unembedding, and the head, one at a time.
fn write_tensors(
    tensors: &mut dyn TensorSource,
    head: &[f32],
    changed: &BTreeMap<String, Vec<f32>>,
    path: &Path,
) -> Result<()> {
    let is_body = |name: &String| {
        name != SCORE && !UNEMBEDDINGS.iter().any(|prefix| name.starts_with(prefix))
    };
    let names: Vec<String> = tensors.names().into_iter().filter(is_body).collect();
    // A header comes first, so shapes are read before values are written.
    let (mut header, mut end) = (Map::new(), 0);
    let mut entry = |name: &str, shape: &[usize]| {
        let begin = end;
        end += 4 * shape.iter().product::<usize>();
        let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]});
        header.insert(name.to_owned(), entry);
    };
    for name in &names {
        entry(name, &tensors.tensor(name)?.shape);
    }
    entry(SCORE, &[1, head.len()]);
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');

    let folder = path.parent().context("a file in a folder")?;
    let mut builder = tempfile::Builder::new();
    // Temporary files are private by default; these are to be read by others too.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644));
    let temporary = builder.tempfile_in(folder)?;
    let place = || format!("cannot write {}", path.display());
    let mut file = BufWriter::with_capacity(1 << 20, temporary.as_file());
    file.write_all(&(header.len() as u64).to_le_bytes()).with_context(place)?;
    file.write_all(&header).with_context(place)?;
    for name in &names {
        match changed.get(name) {
            Some(values) => write_values(&mut file, values),
            None => write_values(&mut file, &tensors.tensor(name)?.values),
        }
        .with_context(place)?;
    }
    write_values(&mut file, head).with_context(place)?;
    file.flush().with_context(place)?;
    drop(file);
    temporary.as_file().sync_all().with_context(place)?;
    temporary.persist(path).with_context(place)?;
    Ok(())
}

fn write_values(file: &mut BufWriter<&File>, values: &[f32]) -> std::io::Result<()> {
    values.iter().try_for_each(|value| file.write_all(&value.to_le_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};
    use model_hooks::{LanguageModel, RewardHead, RewardModel, TokenBatch};

    #[test]
    fn what_was_saved_gives_the_same_rewards() {
        let device = Device::flex();
        for name in ["llama_mha", "gptj", "llama_seqcls_reward"] {
            let source = goldens::own("models").join(name);
            let folder = tempfile::tempdir().unwrap();
            let head: Vec<f32> = (0..48).map(|i| (i as f32 * 0.7).sin()).collect();
            save(&source, &head, &[], folder.path()).unwrap();
            let mut saved = load::open(folder.path()).unwrap();
            let saved = RewardModel::load(saved.config, saved.tensors.as_mut(), &device).unwrap();
            let mut own = load::open(&source).unwrap();
            let body = match name {
                "llama_seqcls_reward" => {
                    RewardModel::load(own.config, own.tensors.as_mut(), &device)
                        .unwrap()
                        .body()
                        .clone()
                }
                _ => LanguageModel::load(own.config, own.tensors.as_mut(), &device).unwrap(),
            };
            let weight = Tensor::from_data(TensorData::new(head, [1, 48]), &device);
            let own = RewardModel::new(body, RewardHead::new(weight));
            let rows: [&[u32]; 2] = [&[5, 9, 40, 77], &[44, 3]];
            let rewards = |model: &RewardModel| -> Vec<f32> {
                let tokens = TokenBatch::new(&rows, model.body().config(), &device).unwrap();
                model.scores(&tokens, &mut ()).unwrap().into_data().try_to_vec().unwrap()
            };
            assert_eq!(rewards(&saved), rewards(&own), "{name}");
        }
    }

    #[test]
    fn a_head_of_another_width_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error =
            save(&goldens::own("models/llama_mha"), &[1.0; 7], &[], folder.path()).unwrap_err();
        assert!(error.to_string().contains("a head of 7 on a model of 48"), "{error}");
    }
}
