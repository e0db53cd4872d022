//! Files that claim much and hold little, and files that are as costly as their format allows.

use serde_json::{Value, json};

use super::{reader, survive};

fn refusal(name: &str, file: &[u8]) -> String {
    survive(reader(name), file).expect_err("a refusal")
}

/// A GGUF header with `n_tensors` and `n_pairs` in it, followed by `rest`.
fn gguf(n_tensors: u64, n_pairs: u64, rest: &[&[u8]]) -> Vec<u8> {
    let counts = [n_tensors.to_le_bytes(), n_pairs.to_le_bytes()].concat();
    [b"GGUF\x03\0\0\0".as_slice(), &counts, &rest.concat()].concat()
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// The tag, length and content of an array of metadata.
fn array(tag: u32, len: u64, content: &[u8]) -> Vec<u8> {
    [&9u32.to_le_bytes(), &tag.to_le_bytes(), &len.to_le_bytes()[..], content].concat()
}

#[test]
fn counts_are_not_believed() {
    let key = text("k");
    for claim in [1 << 20, 1 << 32, 1 << 61, u64::MAX / 8 + 1, u64::MAX] {
        let length = claim.to_le_bytes();
        for (file, expected) in [
            (gguf(claim, 0, &[]), "the list of tensors"),
            (gguf(0, claim, &[]), "the metadata"),
            (gguf(0, 1, &[&length, &[0; 64]]), "a metadata key"),
            (gguf(0, 1, &[&key, &8u32.to_le_bytes(), &length, &[0; 64]]), "k takes"),
            (gguf(0, 1, &[&key, &array(0, claim, &[0; 64])]), "k takes"),
            (gguf(0, 1, &[&key, &array(8, claim, &[0; 64])]), "k takes"),
            (gguf(0, 1, &[&key, &array(9, claim, &[0; 64])]), "k takes"),
            (gguf(1, 0, &[&length, &[0; 64]]), "the name of a tensor"),
            (gguf(1, 0, &[&tensor("w", &[claim], 0, 0), &[0; 64]]), "tensor `w`"),
            (gguf(1, 0, &[&tensor("w", &[8, claim], 0, 0), &[0; 64]]), "tensor `w`"),
            (gguf(1, 0, &[&tensor("w", &[256, claim], 12, 0), &[0; 64]]), "tensor `w`"),
            (gguf(1, 0, &[&tensor("w", &[1], 0, claim & !31), &[0; 64]]), "tensor `w`"),
        ] {
            let message = refusal("gguf", &file);
            assert!(message.contains(expected), "{claim}: {message}");
        }
        let message = refusal("safetensors", &[&length[..], &[b' '; 64]].concat());
        assert!(message.contains("the header"), "{message}");
    }
}

/// How a GGUF file describes a tensor.
fn tensor(name: &str, sizes: &[u64], ggml_type: u32, offset: u64) -> Vec<u8> {
    let sizes: Vec<u8> = sizes.iter().flat_map(|size| size.to_le_bytes()).collect();
    let rank = (sizes.len() as u32 / 8).to_le_bytes();
    let place = [&ggml_type.to_le_bytes()[..], &offset.to_le_bytes()].concat();
    [&text(name)[..], &rank, &sizes, &place].concat()
}

fn safetensors(header: &str, n_bytes: usize) -> Vec<u8> {
    [&text(header)[..], &vec![0; n_bytes]].concat()
}

#[test]
fn shapes_that_overflow_are_refused_by_name() {
    let header = |shape: &str, begin: u64, end: u64| {
        format!(r#"{{"w":{{"dtype":"F16","shape":{shape},"data_offsets":[{begin},{end}]}}}}"#)
    };
    for (shape, begin, end) in [
        ("[9223372036854775808]", 0, 0),
        ("[4294967296,4294967296]", 0, 64),
        ("[18446744073709551615,18446744073709551615,0]", 0, 0),
        ("[32]", u64::MAX - 63, u64::MAX),
        ("[32]", 0, u64::MAX),
        ("[32]", u64::MAX, 64),
        ("[2305843009213693952]", 0, 1 << 62),
    ] {
        let message = refusal("safetensors", &safetensors(&header(shape, begin, end), 64));
        assert!(message.contains("tensor `w`"), "{shape}: {message}");
    }
}

/// Text that is as deep as it is long.
#[test]
fn depth_does_not_overflow_the_stack() {
    const DEPTH: usize = 100_000;
    for open in ["[", "{\"a\":", "{\"model\":", "{\"normalizer\":", "{\"sliding_window\":["] {
        let deep = open.repeat(DEPTH);
        for name in ["config", "generation_config", "shard_index", "tokenizer", "tokenizer_config"]
        {
            refusal(name, deep.as_bytes());
        }
        refusal("safetensors", &safetensors(&deep, 0));
    }
    // As long as a template may be, and longer. Chains are as deep as brackets to a compiler.
    for (open, part) in [
        ("{{ ", "("),
        ("{{ ", "["),
        ("{{ ", "-"),
        ("{{ ", "not "),
        ("{{ ", "a if "),
        ("{{ a", "(a"),
        ("{{ a", "[a"),
        ("{{ a", ".a"),
        ("{{ a", "|a"),
        ("{{ a", "()"),
        ("{{ a", "~a"),
        ("{{ a", "**a"),
        ("{{ a", "<a"),
        ("{{ a", " is a"),
        ("{{ a", " if a else a"),
        ("", "{% if 1 %}"),
        ("{% if 1 %}", "{% elif 1 %}"),
        ("", "{% for a in a %}"),
    ] {
        // Folding constants takes a time that grows with the square of these chains.
        let longest = if part.contains(['~', '*']) { 1 << 13 } else { (1 << 16) - 16 };
        for n_bytes in [DEPTH, longest] {
            let template = open.to_owned() + &part.repeat(n_bytes / part.len());
            for end in ["", " }}", "{% endif %}"] {
                let _ = survive(reader("chat_template"), (template.clone() + end).as_bytes());
            }
        }
    }
}

/// A `tokenizer.json` whose model is BPE with the letter `a` alone.
fn tokenizer(field: &str, value: &Value) -> Vec<u8> {
    let mut file = json!({"version": "1.0",
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}});
    file[field] = value.clone();
    serde_json::to_vec(&file).unwrap()
}

#[test]
fn a_tokenizer_does_not_grow_without_end() {
    let added = json!([{"id": 1, "content": "aa", "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": true, "special": false}]);
    let double = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
    let doubles = json!({"type": "Sequence", "normalizers": vec![double; 60]});
    let mut file: Value = serde_json::from_slice(&tokenizer("normalizer", &doubles)).unwrap();
    file["added_tokens"] = added;
    let message = refusal("tokenizer", &serde_json::to_vec(&file).unwrap());
    assert!(message.contains("replacements"), "{message}");

    // `/////w==` is 0xffffffff: the length of a table that is not there.
    let table = json!({"type": "Precompiled", "precompiled_charsmap": "/////w=="});
    let message = refusal("tokenizer", &tokenizer("normalizer", &table));
    assert!(message.contains("Precompiled"), "{message}");

    let split = |pattern: &str| {
        json!({"type": "Split", "pattern": {"Regex": pattern},
        "behavior": "Isolated", "invert": false})
    };
    for pattern in [r"(?i)\w{1000}{1000}", r"(?=(a{1000}){1000})\p{L}{500}", &"(".repeat(10_000)] {
        refusal("tokenizer", &tokenizer("pre_tokenizer", &split(pattern)));
    }
    let most = json!({"type": "Sequence", "pretokenizers": vec![split(r"\p{L}{99}|(?!a)"); 16]});
    survive(reader("tokenizer"), &tokenizer("pre_tokenizer", &most)).unwrap();
}

#[test]
fn a_long_unigram_token_does_not_overflow_the_stack() {
    let vocab = json!([["a".repeat(1 << 20), 0.0]]);
    let message = refusal(
        "tokenizer",
        &tokenizer(
            "model",
            &json!({"type": "Unigram",
        "unk_id": 0, "vocab": vocab, "byte_fallback": false}),
        ),
    );
    assert!(message.contains("a token of 1048576 bytes"), "{message}");
}

/// The costliest files of each format: the bound of memory is what [`survive`] checks.
#[test]
fn costly_files_stay_within_their_bound() {
    const N: usize = 20_000;
    let numbers = |n: usize, from: usize| (from..from + n).map(|n| format!("{n:x}"));
    let list = |items: Vec<String>| format!("[{}]", items.join(","));

    // The smallest values and names that GGUF has.
    let key = text("k");
    let _ = survive(reader("gguf"), &gguf(0, 1, &[&key, &array(0, 1 << 20, &vec![0; 1 << 20])]));
    let nested = array(0, 0, &[])[4..].repeat(N);
    let _ = survive(reader("gguf"), &gguf(0, 1, &[&key, &array(9, N as u64, &nested)]));
    let pairs: Vec<u8> = numbers(N, 0).flat_map(|key| [text(&key), vec![0; 5]].concat()).collect();
    let _ = survive(reader("gguf"), &gguf(0, N as u64, &[&pairs]));
    let tensors: Vec<u8> = numbers(N, 0).flat_map(|name| tensor(&name, &[0], 0, 0)).collect();
    survive(reader("gguf"), &gguf(N as u64, 0, &[&tensors, &[0; 32]])).unwrap();

    let entries: Vec<String> = numbers(N, 0)
        .map(|name| format!(r#""{name}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#))
        .collect();
    survive(reader("safetensors"), &safetensors(&format!("{{{}}}", entries.join(",")), 0)).unwrap();
    let shape = "1,".repeat(N);
    let shape = format!(r#"{{"w":{{"dtype":"F32","shape":[{shape}1],"data_offsets":[0,4]}}}}"#);
    assert!(refusal("safetensors", &safetensors(&shape, 4)).contains("20001 dimensions"));

    let shards: Vec<String> = numbers(N, 0).map(|n| format!(r#""{n}":"{n}""#)).collect();
    let index = format!(r#"{{"weight_map":{{{}}}}}"#, shards.join(","));
    survive(reader("shard_index"), index.as_bytes()).unwrap();

    let zeros = list(vec!["0".to_owned(); N]);
    for field in ["sliding_window", "quantization_config", "eos_token_id", "other"] {
        let config = format!(r#"{{"model_type":"llama","{field}":{zeros}}}"#);
        let _ = survive(reader("config"), config.as_bytes());
        let _ = survive(reader("generation_config"), config.as_bytes());
        let _ = survive(reader("tokenizer_config"), config.as_bytes());
    }

    // Tokens of a BPE with their ids, of a Unigram, and tokens added to them.
    let vocab: Vec<String> =
        numbers(N, 0).enumerate().map(|(id, t)| format!(r#""{t}":{id}"#)).collect();
    let bpe = format!(
        r#"{{"version":"1.0","model":{{"type":"BPE","vocab":{{{}}},"merges":[]}}}}"#,
        vocab.join(",")
    );
    survive(reader("tokenizer"), bpe.as_bytes()).unwrap();
    let pieces = (0..200).map(|n| format!(r#"["{n:03}{}",0]"#, "a".repeat(1000))).collect();
    let unigram = format!(
        r#"{{"version":"1.0","model":{{"type":"Unigram","unk_id":0,"vocab":{}}}}}"#,
        list(pieces)
    );
    survive(reader("tokenizer"), unigram.as_bytes()).unwrap();
    let added = numbers(2000, 0).enumerate().map(|(id, content)| {
        format!(
            r#"{{"id":{id},"content":"{content}","single_word":false,"lstrip":false,"rstrip":false,
            "normalized":true,"special":false}}"#
        )
    });
    let added = format!(
        r#"{{"version":"1.0","added_tokens":{},"model":{{"type":"BPE","vocab":{{}},"merges":[]}}}}"#,
        list(added.collect())
    );
    survive(reader("tokenizer"), added.as_bytes()).unwrap();

    for code in ["{{1}}", "{{a.b}}", "{%set a=1%}", "a{#b#}", "{{[1,1,1,1,1,1,1,1]}}"] {
        let _ = survive(reader("chat_template"), code.repeat(65_000 / code.len()).as_bytes());
    }
}
