//! The tensors of a `llama` GGUF file under their Hugging Face names, in that library's layout.

use std::collections::BTreeMap;
use std::io::{Read, Seek};
use std::path::Path;

use super::Gguf;
use crate::config::{ModelConfig, TensorEvidence};
use crate::load::{LoadError, RawTensor, TensorSource};

/// The divisors of the rotary frequencies: a part of the config rather than a weight.
const ROPE_FREQS: &str = "rope_freqs.weight";

/// What the tensors say about the model's shape.
pub(super) fn evidence<R: Read + Seek>(gguf: &mut Gguf<R>) -> Result<TensorEvidence, LoadError> {
    Ok(TensorEvidence {
        has_output: gguf.has("output.weight"),
        has_attention_bias: gguf.has("blk.0.attn_q.bias"),
        has_mlp_bias: gguf.has("blk.0.ffn_up.bias"),
        rope_factors: match gguf.has(ROPE_FREQS) {
            true => Some(gguf.tensor(ROPE_FREQS)?.values),
            false => None,
        },
    })
}

/// A GGUF file whose tensors answer to their Hugging Face names.
pub(super) struct HfNames<R> {
    gguf: Gguf<R>,
    entries: BTreeMap<String, Entry>,
}

/// Where a Hugging Face tensor comes from.
struct Entry {
    gguf_name: String,
    /// The number of heads whose rows llama.cpp has reordered.
    n_permuted_heads: Option<usize>,
}

impl<R: Read + Seek> HfNames<R> {
    /// # Errors
    /// [`LoadError::UnexpectedTensors`] if the file has tensors that such a model does not.
    pub fn new(gguf: Gguf<R>, config: &ModelConfig) -> Result<Self, LoadError> {
        let mut entries = BTreeMap::new();
        let mut names = Vec::new();
        for gguf_name in gguf.names().filter(|&name| name != ROPE_FREQS) {
            match hf_name(gguf_name, config) {
                None => names.push(gguf_name.to_owned()),
                Some((hf_name, n_permuted_heads)) => {
                    let gguf_name = gguf_name.to_owned();
                    entries.insert(hf_name, Entry { gguf_name, n_permuted_heads });
                }
            }
        }
        match names.is_empty() {
            true => Ok(Self { gguf, entries }),
            false => Err(LoadError::UnexpectedTensors { path: gguf.path().into(), names }),
        }
    }
}

impl<R: Read + Seek> TensorSource for HfNames<R> {
    fn names(&self) -> Vec<String> {
        self.entries.keys().cloned().collect()
    }

    fn tensor(&mut self, name: &str) -> Result<RawTensor, LoadError> {
        let Some(entry) = self.entries.get(name) else {
            return Err(LoadError::MissingTensor { path: self.path().into(), name: name.into() });
        };
        let tensor = self.gguf.tensor(&entry.gguf_name)?;
        match entry.n_permuted_heads {
            None => Ok(tensor),
            Some(n_heads) => unpermute(tensor, n_heads).map_err(|shape| LoadError::TensorShape {
                path: self.gguf.path().into(),
                name: name.to_owned(),
                expected: format!("an even number of rows for each of {n_heads} heads"),
                actual: shape.iter().map(|&size| size as u64).collect(),
            }),
        }
    }

    fn path(&self) -> &Path {
        self.gguf.path()
    }
}

/// The Hugging Face name of a tensor, and the number of heads if its rows are permuted.
fn hf_name(gguf_name: &str, config: &ModelConfig) -> Option<(String, Option<usize>)> {
    let outside_blocks = match gguf_name {
        "token_embd.weight" => Some("model.embed_tokens.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        "output.weight" => Some("lm_head.weight"),
        _ => None,
    };
    if let Some(hf_name) = outside_blocks {
        return Some((hf_name.to_owned(), None));
    }
    let (layer, rest) = gguf_name.strip_prefix("blk.")?.split_once('.')?;
    let layer_idx: usize = layer.parse().ok()?;
    let is_canonical = layer_idx < config.n_layers && layer_idx.to_string() == layer;
    let (part, kind) = rest.rsplit_once('.')?;
    let (module, n_permuted_heads) = match part {
        "attn_norm" => ("input_layernorm", None),
        "attn_q" => ("self_attn.q_proj", Some(config.attention.n_heads)),
        "attn_k" => ("self_attn.k_proj", Some(config.attention.n_kv_heads)),
        "attn_v" => ("self_attn.v_proj", None),
        "attn_output" => ("self_attn.o_proj", None),
        "ffn_norm" => ("post_attention_layernorm", None),
        "ffn_gate" => ("mlp.gate_proj", None),
        "ffn_up" => ("mlp.up_proj", None),
        "ffn_down" => ("mlp.down_proj", None),
        _ => return None,
    };
    let is_known = is_canonical && matches!(kind, "weight" | "bias");
    is_known.then(|| (format!("model.layers.{layer}.{module}.{kind}"), n_permuted_heads))
}

/// Undoes llama.cpp's reordering of the query and key rows.
///
/// Rotary embedding turns pairs of rows. Hugging Face pairs row `i` of a head with row
/// `i + d_head/2`, llama.cpp the neighbours `2i` and `2i + 1`, to which its conversion moves them:
/// a reshape to `[n_heads, 2, d_head/2, …]` with axes 1 and 2 swapped. This swaps them back. The
/// tensor's shape comes back as the error if it does not divide so.
fn unpermute(tensor: RawTensor, n_heads: usize) -> Result<RawTensor, Vec<usize>> {
    let RawTensor { shape, values } = tensor;
    let n_rows = shape.first().copied().unwrap_or(0);
    if values.is_empty() || !n_rows.is_multiple_of(2 * n_heads) {
        return Err(shape);
    }
    let row_len = values.len() / n_rows;
    let d_head = n_rows / n_heads;
    let mut unpermuted = Vec::with_capacity(values.len());
    for head in values.chunks_exact(d_head * row_len) {
        for half in 0..2 {
            for pair in head.chunks_exact(2 * row_len) {
                unpermuted.extend_from_slice(&pair[half * row_len..][..row_len]);
            }
        }
    }
    Ok(RawTensor { shape, values: unpermuted })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpermute_separates_neighbours_into_halves() {
        // Two heads of four rows, one column; llama.cpp stores pairs side by side.
        let tensor = |values: &[f32]| RawTensor { shape: vec![8, 1], values: values.to_vec() };
        let stored = tensor(&[0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
        let expected = tensor(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
        assert_eq!(unpermute(stored, 2).unwrap(), expected);
    }

    #[test]
    fn unpermute_inverts_the_conversion() {
        let (n_heads, half, n_columns) = (3, 5, 7);
        let n_values = n_heads * 2 * half * n_columns;
        let shape = vec![n_heads * 2 * half, n_columns];
        let original: Vec<f32> = (0..n_values).map(|n| n as f32).collect();
        // reshape(n_heads, 2, half, n_columns).swapaxes(1, 2), by its definition.
        let mut permuted = vec![0.0; n_values];
        for head in 0..n_heads {
            for which in 0..2 {
                for row in 0..half {
                    for column in 0..n_columns {
                        let from = ((head * 2 + which) * half + row) * n_columns + column;
                        let to = ((head * half + row) * 2 + which) * n_columns + column;
                        permuted[to] = original[from];
                    }
                }
            }
        }
        let tensor = unpermute(RawTensor { shape, values: permuted }, n_heads).unwrap();
        assert_eq!(tensor.values, original);
    }

    #[test]
    fn unpermute_refuses_what_does_not_divide() {
        let odd = RawTensor { shape: vec![6], values: vec![0.0; 6] };
        assert_eq!(unpermute(odd, 2), Err(vec![6]));
    }
}
