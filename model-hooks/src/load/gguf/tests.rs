//! A whole model in a few hundred bytes, and what happens when any of them is wrong.

use std::io::Cursor;

use proptest::prelude::*;

use super::*;

type Tensor<'a> = (&'a str, u32, &'a [u64], Vec<u8>);

/// Writes a file of version 3 as ggml does; gives it and the length of its header.
fn write(pairs: &[(&str, MetadataValue)], tensors: &[Tensor<'_>]) -> (Vec<u8>, usize) {
    let mut file = b"GGUF".to_vec();
    file.extend(3u32.to_le_bytes());
    file.extend((tensors.len() as u64).to_le_bytes());
    file.extend((pairs.len() as u64).to_le_bytes());
    for (key, value) in pairs {
        write_text(&mut file, key);
        file.extend(tag(value).to_le_bytes());
        write_value(&mut file, value);
    }
    let mut data = Vec::new();
    for (name, ggml_type, sizes, bytes) in tensors {
        write_text(&mut file, name);
        file.extend((sizes.len() as u32).to_le_bytes());
        sizes.iter().for_each(|size| file.extend(size.to_le_bytes()));
        file.extend(ggml_type.to_le_bytes());
        file.extend((data.len() as u64).to_le_bytes());
        data.extend(bytes);
        data.resize(data.len().next_multiple_of(32), 0);
    }
    let header_len = file.len();
    file.resize(header_len.next_multiple_of(32), 0);
    file.extend(data);
    (file, header_len)
}

fn write_text(file: &mut Vec<u8>, text: &str) {
    file.extend((text.len() as u64).to_le_bytes());
    file.extend(text.as_bytes());
}

fn tag(value: &MetadataValue) -> u32 {
    match value {
        MetadataValue::U8(_) => 0,
        MetadataValue::I8(_) => 1,
        MetadataValue::U16(_) => 2,
        MetadataValue::I16(_) => 3,
        MetadataValue::U32(_) => 4,
        MetadataValue::I32(_) => 5,
        MetadataValue::F32(_) => 6,
        MetadataValue::Bool(_) => 7,
        MetadataValue::String(_) => 8,
        MetadataValue::Array(_) => 9,
        MetadataValue::U64(_) => 10,
        MetadataValue::I64(_) => 11,
        MetadataValue::F64(_) => 12,
    }
}

fn write_value(file: &mut Vec<u8>, value: &MetadataValue) {
    match value {
        MetadataValue::U8(value) => file.extend(value.to_le_bytes()),
        MetadataValue::I8(value) => file.extend(value.to_le_bytes()),
        MetadataValue::U16(value) => file.extend(value.to_le_bytes()),
        MetadataValue::I16(value) => file.extend(value.to_le_bytes()),
        MetadataValue::U32(value) => file.extend(value.to_le_bytes()),
        MetadataValue::I32(value) => file.extend(value.to_le_bytes()),
        MetadataValue::F32(value) => file.extend(value.to_le_bytes()),
        MetadataValue::Bool(value) => file.push((*value).into()),
        MetadataValue::String(value) => write_text(file, value),
        MetadataValue::Array(values) => {
            file.extend(values.first().map_or(0, tag).to_le_bytes());
            file.extend((values.len() as u64).to_le_bytes());
            values.iter().for_each(|value| write_value(file, value));
        }
        MetadataValue::U64(value) => file.extend(value.to_le_bytes()),
        MetadataValue::I64(value) => file.extend(value.to_le_bytes()),
        MetadataValue::F64(value) => file.extend(value.to_le_bytes()),
    }
}

fn text(text: &str) -> MetadataValue {
    MetadataValue::String(text.into())
}

/// A Llama of one block, d_model 4 and one head, with a tokenizer and a chat template.
fn tiny_pairs() -> Vec<(&'static str, MetadataValue)> {
    let tokens = ["<s>", "a", "b", "ab"].map(text).to_vec();
    let types = [3, 1, 1, 1].map(MetadataValue::I32).to_vec();
    vec![
        ("general.architecture", text("llama")),
        ("llama.embedding_length", MetadataValue::U32(4)),
        ("llama.block_count", MetadataValue::U32(1)),
        ("llama.feed_forward_length", MetadataValue::U32(2)),
        ("llama.context_length", MetadataValue::U32(8)),
        ("llama.attention.head_count", MetadataValue::U32(1)),
        ("llama.attention.layer_norm_rms_epsilon", MetadataValue::F32(1e-5)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("gpt-2")),
        ("tokenizer.ggml.tokens", MetadataValue::Array(tokens)),
        ("tokenizer.ggml.token_type", MetadataValue::Array(types)),
        ("tokenizer.ggml.merges", MetadataValue::Array(vec![text("a b")])),
        ("tokenizer.ggml.bos_token_id", MetadataValue::U32(0)),
        ("tokenizer.chat_template", text("{{ bos_token }}{{ messages[0].content }}")),
    ]
}

fn f32s(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

fn tiny_tensors() -> Vec<Tensor<'static>> {
    let half = [0x00, 0x3c].repeat(4);
    let square = || f32s((0..16).map(|n| n as f32));
    vec![
        ("token_embd.weight", 0, &[4, 4], square()),
        ("output_norm.weight", 1, &[4], half),
        ("blk.0.attn_q.weight", 0, &[4, 4], square()),
        ("blk.0.ffn_down.weight", 0, &[2, 4], f32s([0.5; 8])),
    ]
}

/// Everything that can be read of a file.
fn read_all(bytes: &[u8]) -> Result<(Checkpoint, Vec<RawTensor>), LoadError> {
    let gguf = Gguf::read(Cursor::new(bytes.to_vec()), Path::new("tiny.gguf"))?;
    let mut checkpoint = Checkpoint::from_gguf(gguf)?;
    let names = checkpoint.tensors.names();
    let tensors: Result<_, _> = names.iter().map(|name| checkpoint.tensors.tensor(name)).collect();
    Ok((checkpoint, tensors?))
}

fn refusal(pairs: &[(&str, MetadataValue)], tensors: &[Tensor<'_>]) -> String {
    read_all(&write(pairs, tensors).0).unwrap_err().to_string()
}

#[test]
fn a_model_comes_with_all_its_parts() {
    let (file, _) = write(&tiny_pairs(), &tiny_tensors());
    let (checkpoint, tensors) = read_all(&file).unwrap();
    assert_eq!(checkpoint.config.d_vocab, 4);
    assert!(checkpoint.config.unembedding.tied);
    let tokenizer = checkpoint.tokenizer.unwrap();
    assert_eq!(tokenizer.encode("<s>ab").unwrap(), [0, 3]);
    let message = crate::text::Message::new(crate::text::Role::User, "hi");
    assert_eq!(checkpoint.chat_template.unwrap().render(&[message], true).unwrap(), "<s>hi");

    let names = [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.norm.weight",
    ];
    assert_eq!(checkpoint.tensors.names(), names);
    assert_eq!(tensors[1].shape, [4, 2]);
    // Rows 0 1 2 3 of the file are rows 0 2 1 3 of the model.
    let rows = [0, 2, 1, 3].iter().flat_map(|row| (4 * row..4 * row + 4).map(|n| n as f32));
    assert_eq!(tensors[2].values, rows.collect::<Vec<_>>());
    assert_eq!(tensors[3].values, [1.0; 4]);

    let mut checkpoint = read_all(&file).unwrap().0;
    let missing = checkpoint.tensors.tensor("lm_head.weight");
    assert!(matches!(missing, Err(LoadError::MissingTensor { .. })));
}

#[test]
fn no_truncation_panics_and_all_are_refused() {
    let (file, _) = write(&tiny_pairs(), &tiny_tensors());
    for len in 0..file.len() - 32 {
        assert!(read_all(&file[..len]).is_err(), "{len} bytes");
    }
}

#[test]
fn no_flipped_bit_panics() {
    let (mut file, header_len) = write(&tiny_pairs(), &tiny_tensors());
    for byte_idx in 0..header_len {
        for bit in 0..8 {
            file[byte_idx] ^= 1 << bit;
            let _ = read_all(&file);
            file[byte_idx] ^= 1 << bit;
        }
    }
}

proptest! {
    #[test]
    fn no_scrambled_header_panics(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)
    ) {
        let (mut file, header_len) = write(&tiny_pairs(), &tiny_tensors());
        for (place, byte) in edits {
            file[place.index(header_len)] = byte;
        }
        let _ = read_all(&file);
    }
}

#[test]
fn damaged_headers_are_refused_by_what_is_wrong() {
    let (good, _) = write(&tiny_pairs(), &tiny_tensors());
    let patched = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        read_all(&file).unwrap_err().to_string()
    };
    assert!(patched(0, b"GGML").contains("not a GGUF file"));
    assert!(patched(4, &1u32.to_le_bytes()).contains("GGUF version 1"));
    assert!(patched(4, &3u32.to_be_bytes()).contains("little-endian"));
    assert!(patched(8, &u64::MAX.to_le_bytes()).contains("the list of tensors takes"));
    assert!(patched(16, &u64::MAX.to_le_bytes()).contains("the metadata takes"));
    assert!(patched(24, &u64::MAX.to_le_bytes()).contains("a metadata key takes"));
    assert!(patched(32, b"\xff").contains("a metadata key is not UTF-8"));
    assert!(patched(52, &99u32.to_le_bytes()).contains("unknown type 99"));

    let mut version_2 = good.clone();
    version_2[4] = 2;
    assert!(read_all(&version_2).is_ok());
}

#[test]
fn contradictory_metadata_is_refused() {
    let with = |key, value| {
        let mut pairs = tiny_pairs();
        pairs.push((key, value));
        refusal(&pairs, &tiny_tensors())
    };
    assert!(with("general.architecture", text("llama")).contains("`general.architecture` twice"));
    assert!(with("general.alignment", MetadataValue::U32(0)).contains("to 0 bytes"));
    assert!(with("general.alignment", MetadataValue::U32(24)).contains("not a power of two"));
    assert!(with("general.alignment", MetadataValue::U32(1 << 31)).contains("a multiple of 2147"));
    let nested = (0..9).fold(MetadataValue::U8(1), |inner, _| MetadataValue::Array(vec![inner]));
    assert!(with("x", nested).contains("unknown depth of arrays 5"));
}

#[test]
fn impossible_tensors_are_refused() {
    let with = |tensor: Tensor<'_>| {
        let mut tensors = tiny_tensors();
        tensors.push(tensor);
        refusal(&tiny_pairs(), &tensors)
    };
    let name = "blk.0.attn_v.weight";
    assert!(with((name, 20, &[32], vec![0; 18])).contains("encoded as IQ4_NL; F64, F32"));
    assert!(with((name, 12, &[128, 2], vec![0; 144])).contains("rows of whole blocks of 256"));
    assert!(with((name, 99, &[1], vec![])).contains("ggml type 99"));
    assert!(with((name, 3, &[31, 32], vec![0; 640])).contains("rows of whole blocks of 32"));
    assert!(with((name, 0, &[], vec![])).contains("has 0 dimensions"));
    assert!(with((name, 0, &[1; 5], vec![0; 4])).contains("has 5 dimensions"));
    assert!(with((name, 0, &[u64::MAX, 2], vec![])).contains("has shape"));
    assert!(with((name, 0, &[1 << 40], vec![0; 4])).contains("truncated"));
    assert!(with(("output_norm.weight", 0, &[1], vec![0; 4])).contains("twice"));
    assert!(with(("blk.1.attn_v.weight", 0, &[1], vec![0; 4])).contains("not use: blk."));
    assert!(with(("blk.0.ssm_in.weight", 0, &[1], vec![0; 4])).contains("not use: blk."));
    assert!(with(("blk.0.attn_k.weight", 0, &[4, 3], vec![0; 48])).contains("even number of rows"));
}

#[test]
fn tensors_that_overlap_or_are_not_aligned_are_refused() {
    let pairs = tiny_pairs();
    let tensors = tiny_tensors();
    let (good, header_len) = write(&pairs, &tensors);
    // The last eight bytes of the header are the offset of the last tensor.
    for (offset, expected) in [(1u64, "a multiple of 32"), (0, "after the one before it")] {
        let mut file = good.clone();
        file[header_len - 8..header_len].copy_from_slice(&offset.to_le_bytes());
        let message = read_all(&file).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}
