//! Checkpoints of random weights, of any size: a published config can be loaded and run without the
//! weights that belong to it.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use serde_json::{Map, Value, json};

/// A tensor's name in transformers, and its shape.
pub type NamedShape = (String, Vec<usize>);

/// The tensors of a model of this `config.json`.
///
/// # Errors
/// The reason, if the architecture's names are not known here or the config lacks a size.
pub fn tensors(config: &Value) -> Result<Vec<NamedShape>, String> {
    let config = Fields(config);
    match config.0["model_type"].as_str() {
        Some("llama") => llama(&config),
        Some("phi3") => phi3(&config),
        Some("gptj") => gptj(&config),
        Some(other) => Err(format!("the names of `{other}`'s tensors are not known here")),
        None => Err("the config lacks `model_type`".to_owned()),
    }
}

/// Writes a `tokenizer.json` of printable ASCII, a token a letter, behind four special ids: for any
/// checkpoint with a vocabulary of at least 99.
///
/// # Errors
/// If the file cannot be written.
pub fn write_ascii_tokenizer(folder: &Path) -> io::Result<()> {
    let letter = |byte: u8| (char::from(byte + 32).to_string(), json!(byte + 4));
    let vocab: Map<String, Value> = (0..95).map(letter).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": []},
    });
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string())
}

struct Fields<'a>(&'a Value);

impl Fields<'_> {
    fn size(&self, field: &str) -> Result<usize, String> {
        let size = self.0[field].as_u64().ok_or_else(|| format!("the config lacks `{field}`"))?;
        usize::try_from(size).map_err(|error| format!("`{field}`: {error}"))
    }
}

/// Of all heads of queries, and of all heads of keys.
fn attention_widths(config: &Fields<'_>) -> Result<[usize; 2], String> {
    let n_heads = config.size("num_attention_heads")?;
    let d_head = match config.size("head_dim") {
        Ok(d_head) => d_head,
        Err(_) => {
            let d_model = config.size("hidden_size")?;
            d_model.checked_div(n_heads).ok_or("`num_attention_heads` is 0")?
        }
    };
    Ok([n_heads * d_head, d_head * config.size("num_key_value_heads")?])
}

fn llama(config: &Fields<'_>) -> Result<Vec<NamedShape>, String> {
    let ([d_query, d_key], d_mlp) = (attention_widths(config)?, config.size("intermediate_size")?);
    llama_like(config, |d_model| {
        vec![
            ("self_attn.q_proj", vec![d_query, d_model]),
            ("self_attn.k_proj", vec![d_key, d_model]),
            ("self_attn.v_proj", vec![d_key, d_model]),
            ("self_attn.o_proj", vec![d_model, d_query]),
            ("mlp.gate_proj", vec![d_mlp, d_model]),
            ("mlp.up_proj", vec![d_mlp, d_model]),
            ("mlp.down_proj", vec![d_model, d_mlp]),
        ]
    })
}

fn phi3(config: &Fields<'_>) -> Result<Vec<NamedShape>, String> {
    let ([d_query, d_key], d_mlp) = (attention_widths(config)?, config.size("intermediate_size")?);
    llama_like(config, |d_model| {
        vec![
            ("self_attn.qkv_proj", vec![d_query + 2 * d_key, d_model]),
            ("self_attn.o_proj", vec![d_model, d_query]),
            ("mlp.gate_up_proj", vec![2 * d_mlp, d_model]),
            ("mlp.down_proj", vec![d_model, d_mlp]),
        ]
    })
}

/// Llama's names around a block's matrices.
fn llama_like(
    config: &Fields<'_>,
    matrices: impl Fn(usize) -> Vec<(&'static str, Vec<usize>)>,
) -> Result<Vec<NamedShape>, String> {
    let (d_model, d_vocab) = (config.size("hidden_size")?, config.size("vocab_size")?);
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![d_vocab, d_model])];
    for layer in 0..config.size("num_hidden_layers")? {
        let norms = ["input_layernorm", "post_attention_layernorm"].map(|n| (n, vec![d_model]));
        for (part, shape) in norms.into_iter().chain(matrices(d_model)) {
            tensors.push((format!("model.layers.{layer}.{part}.weight"), shape));
        }
    }
    tensors.push(("model.norm.weight".to_owned(), vec![d_model]));
    if config.0["tie_word_embeddings"] != true {
        tensors.push(("lm_head.weight".to_owned(), vec![d_vocab, d_model]));
    }
    Ok(tensors)
}

fn gptj(config: &Fields<'_>) -> Result<Vec<NamedShape>, String> {
    let (d_model, d_vocab) = (config.size("n_embd")?, config.size("vocab_size")?);
    let d_mlp = config.size("n_inner").unwrap_or(4 * d_model);
    let mut tensors = vec![("transformer.wte.weight".to_owned(), vec![d_vocab, d_model])];
    for layer in 0..config.size("n_layer")? {
        for (part, shape) in [
            ("ln_1.weight", vec![d_model]),
            ("ln_1.bias", vec![d_model]),
            ("attn.q_proj.weight", vec![d_model, d_model]),
            ("attn.k_proj.weight", vec![d_model, d_model]),
            ("attn.v_proj.weight", vec![d_model, d_model]),
            ("attn.out_proj.weight", vec![d_model, d_model]),
            ("mlp.fc_in.weight", vec![d_mlp, d_model]),
            ("mlp.fc_in.bias", vec![d_mlp]),
            ("mlp.fc_out.weight", vec![d_model, d_mlp]),
            ("mlp.fc_out.bias", vec![d_model]),
        ] {
            tensors.push((format!("transformer.h.{layer}.{part}"), shape));
        }
    }
    for (name, shape) in [
        ("transformer.ln_f.weight", vec![d_model]),
        ("transformer.ln_f.bias", vec![d_model]),
        ("lm_head.weight", vec![d_vocab, d_model]),
        ("lm_head.bias", vec![d_vocab]),
    ] {
        tensors.push((name.to_owned(), shape));
    }
    Ok(tensors)
}

/// Writes `config.json`, and `model.safetensors` with random weights in bf16. Matrices keep the size
/// of what they multiply, so that activations stay finite at any depth; gains are near 1 and biases
/// near 0. Only a chunk is held in memory.
///
/// # Errors
/// If a file cannot be written, or [`tensors`] fails.
pub fn write(folder: &Path, config: &Value, seed: u64) -> io::Result<()> {
    let tensors = tensors(config).map_err(io::Error::other)?;
    fs::write(folder.join("config.json"), config.to_string())?;
    let mut file =
        BufWriter::with_capacity(1 << 20, File::create(folder.join("model.safetensors"))?);
    let mut header = header(&tensors).into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut state = seed;
    for (name, shape) in &tensors {
        let (centre, spread) = match shape[..] {
            [_] if name.ends_with(".weight") => (1.0, 0.1),
            [_] => (0.0, 0.1),
            // A uniform distribution of variance 1 / d_in.
            _ => (0.0, (3.0 / shape[1] as f32).sqrt()),
        };
        let n_values: usize = shape.iter().product();
        for chunk_start in (0..n_values).step_by(4) {
            let draws = split_mix(&mut state).to_le_bytes();
            let (draws, _) = draws.as_chunks::<2>();
            for &draw in &draws[..4.min(n_values - chunk_start)] {
                let unit = f32::from(i16::from_le_bytes(draw)) / 32768.0;
                // The upper half of an f32 is the bf16 below it.
                let [_, _, bytes @ ..] = (centre + spread * unit).to_le_bytes();
                file.write_all(&bytes)?;
            }
        }
    }
    file.flush()
}

/// Where each tensor lies, as safetensors has it.
fn header(tensors: &[NamedShape]) -> String {
    let mut end = 0;
    let entries: Map<String, Value> = tensors
        .iter()
        .map(|(name, shape)| {
            let begin = end;
            end += 2 * shape.iter().product::<usize>();
            let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]});
            (name.clone(), entry)
        })
        .collect();
    Value::Object(entries).to_string()
}

/// SplitMix64 (Steele et al., 2014).
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
