//! Files that claim much and hold little.

use super::{reader, survive};

fn refusal(name: &str, file: &[u8]) -> String {
    survive(reader(name), file).expect_err("a refusal")
}

/// A configuration and, behind it, what stands where the weights should.
fn pair(config: &str, weights: &[u8]) -> Vec<u8> {
    [config.as_bytes(), b"\0", weights].concat()
}

const CLAIMS: [u64; 5] = [1 << 20, 1 << 32, 1 << 61, (1 << 63) - 1, u64::MAX];

/// A safetensors file with one tensor, which claims a shape and a place, and as many bytes behind.
fn safetensors(name: &str, shape: &str, end: u64, n_bytes: usize) -> Vec<u8> {
    let header =
        format!(r#"{{"{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{end}]}}}}"#);
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; n_bytes]].concat()
}

#[test]
fn numbers_of_latents_are_not_believed() {
    for claim in CLAIMS {
        for (name, config, tensor) in [
            (
                "sae_lens",
                format!(
                    r#"{{"architecture":"jumprelu","d_in":2,"d_sae":{claim},"metadata":{{}}}}"#
                ),
                "W_enc",
            ),
            (
                "sae_lens",
                format!(
                    r#"{{"architecture":"topk","d_in":{claim},"d_sae":{claim},"k":{claim},
                    "metadata":{{}}}}"#
                ),
                "W_enc",
            ),
            (
                "sae_lens",
                format!(
                    r#"{{"architecture":"batchtopk","d_in":{claim},"d_sae":3,"metadata":{{}}}}"#
                ),
                "W_enc",
            ),
            ("sparsify", format!(r#"{{"d_in":2,"k":1,"num_latents":{claim}}}"#), "encoder.weight"),
            (
                "sparsify",
                format!(r#"{{"d_in":{claim},"k":1,"expansion_factor":{claim}}}"#),
                "encoder.weight",
            ),
            (
                "dictionary_learning",
                format!(
                    r#"{{"trainer":{{"dict_class":"BatchTopKSAE","activation_dim":2,
                    "dict_size":{claim},"k":{claim}}}}}"#
                ),
                "encoder.weight",
            ),
            (
                "llama_scope",
                format!(
                    r#"{{"d_model":{claim},"d_sae":{claim},"jump_relu_threshold":0.5,
                    "dataset_average_activation_norm":{{"in":1.0}}}}"#
                ),
                "encoder.weight",
            ),
        ] {
            for (shape, end, n_bytes) in [
                (format!("[{claim},{claim}]"), claim, 64),
                (format!("[2,{claim}]"), 64, 64),
                ("[4,4]".to_owned(), 64, 64),
                ("[0,4]".to_owned(), 0, 0),
            ] {
                refusal(name, &pair(&config, &safetensors(tensor, &shape, end, n_bytes)));
            }
            refusal(name, &pair(&config, &claim.to_le_bytes()));
        }
        refusal("gemma_scope_2", &pair(r#"{"architecture":"jump_relu"}"#, &claim.to_le_bytes()));
    }
}

#[test]
fn shapes_of_arrays_are_not_believed() {
    for claim in CLAIMS {
        for shape in [format!("({claim},)"), format!("({claim}, {claim})"), format!("(2, {claim})")]
        {
            for order in ["True", "False"] {
                let header =
                    format!("{{'descr': '<f4', 'fortran_order': {order}, 'shape': {shape}, }}\n");
                for length in [header.len() as u32, claim as u32] {
                    for version in [b"\x01\0", b"\x02\0"] {
                        let length = &length.to_le_bytes()[..if version[0] == 1 { 2 } else { 4 }];
                        let header = header.as_bytes();
                        let file =
                            [&b"\x93NUMPY"[..], &version[..], length, header, &[0; 24]].concat();
                        refusal("gemma_scope_array", &file);
                    }
                }
            }
        }
    }
}

#[test]
fn a_pickle_is_no_program() {
    let deep = |open: &str, n: usize| [&b"\x80\x02"[..], open.repeat(n).as_bytes(), b"."].concat();
    for n in [1 << 10, 1 << 17] {
        for open in ["(", "]", "}", ")", "N", "(]", "}K\x01K\x01s", "]]a", "Nq\0"] {
            refusal("openai_pickle", &deep(open, n));
        }
    }
    // Tuples of tuples, each of which names the last one twice.
    let doubled = [b"\x80\x02)".as_slice(), &b"q\0h\0\x86".repeat(1 << 17), b"."].concat();
    refusal("openai_pickle", &doubled);
    for program in [
        &b"cos\nsystem\n(X\x04\0\0\0trueetR."[..],
        b"\x80\x02cbuiltins\neval\nX\x01\0\0\x001\x85R.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        // A place in the memo, a text and a number that are not there.
        b"\x80\x02Nr\xff\xff\xff\xff.",
        b"\x80\x02j\xff\xff\xff\xff.",
        b"\x80\x02X\xff\xff\xff\xffa.",
        b"\x80\x02\x8a\xff\xff.",
    ] {
        refusal("openai_pickle", program);
    }
}

/// A zip archive that unpacks to much more than it holds.
#[test]
fn archives_do_not_blow_up() {
    use std::io::{Cursor, Write};
    use zip::write::SimpleFileOptions;
    for name in ["W_enc.npy", "archive/data.pkl"] {
        let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
        zip.start_file(name, SimpleFileOptions::default()).expect("an entry");
        zip.write_all(&vec![0; 4 << 20]).expect("written");
        let archive = zip.finish().expect("an archive").into_inner();
        assert!(archive.len() < 1 << 20);
        for reader in ["gemma_scope", "openai"] {
            refusal(reader, &archive);
        }
    }
}

#[test]
fn counts_of_rows_are_not_believed() {
    let sha = "0".repeat(64);
    for claim in CLAIMS {
        let column = |width: u64| format!(r#"{{"name":"early","width":{width}}}"#);
        let manifest = |columns: &str, n_rows: u64| {
            format!(
                r#"{{"version":1,"dtype":"F32","finished":true,"columns":[{columns}],
                "shards":[{{"n_rows":{n_rows},"sha256":"{sha}"}}]}}"#
            )
        };
        refusal("store_manifest", manifest(&column(2), claim).as_bytes());
        refusal("store_manifest", manifest(&column(claim), 5).as_bytes());
        refusal("store_manifest", manifest(&column(claim), claim).as_bytes());
        for shape in [format!("[5,{claim}]"), format!("[{claim},2]")] {
            refusal("store_shard", &safetensors("early", &shape, 40, 40));
        }
        refusal("store_shard", &safetensors("early", "[5,2]", claim, 40));
    }
}

/// Headers that say more than the tensors beside them are.
#[test]
fn counts_in_checkpoints_are_not_believed() {
    let seeds = super::seeds(reader("checkpoint"));
    let seed = &seeds[0];
    let length = u64::from_le_bytes(seed[..8].try_into().expect("eight bytes")) as usize;
    let header = std::str::from_utf8(&seed[8..8 + length]).expect("JSON");
    for name in ["d_sae", "d_in", "d_out", "n_rows", "step", "part", "row", "version"] {
        let key = format!(r#"\"{name}\":"#);
        let mut from = 0;
        while let Some(at) = header[from..].find(&key) {
            let start = from + at + key.len();
            let end = start + header[start..].bytes().take_while(u8::is_ascii_digit).count();
            for claim in CLAIMS.into_iter().chain([0]) {
                let changed = format!("{}{claim}{}", &header[..start], &header[end..]);
                let length = (changed.len() as u64).to_le_bytes();
                let file = [&length[..], changed.as_bytes(), &seed[8 + header.len()..]].concat();
                let _ = survive(reader("checkpoint"), &file);
            }
            from = end;
        }
        assert!(from > 0, "no {name} in the header");
    }
}
