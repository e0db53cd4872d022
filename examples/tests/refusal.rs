//! The program `refusal` on a tiny model of random weights: from end to end, and through a kill.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use goldens::checkpoint;
use serde_json::{Value, json};

/// A Phi-3 of eight blocks with a tokenizer of bytes.
fn tiny_phi3(folder: &Path) -> PathBuf {
    let path = folder.join("tiny-phi3");
    fs::create_dir(&path).unwrap();
    let config = fs::read(goldens::own("models/phi3").join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    for (key, value) in [
        ("num_hidden_layers", 8),
        ("vocab_size", 260),
        ("max_position_embeddings", 4096),
        ("original_max_position_embeddings", 4096),
        ("bos_token_id", 259),
        ("eos_token_id", 256),
        ("pad_token_id", 259),
    ] {
        config[key] = json!(value);
    }
    checkpoint::write(&path, &config, 3).unwrap();

    let vocab: serde_json::Map<String, Value> =
        (0..=255u8).map(|byte| (spelt(byte).to_string(), json!(byte))).collect();
    let added = |(id, content): (u32, &str)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    };
    let specials = [(256, "<|end|>"), (257, "<|user|>"), (258, "<|assistant|>"), (259, "<s>")];
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": specials.map(added), "normalizer": null, "pre_tokenizer": bytes,
        "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    fs::write(path.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let template = "<s>{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\
                    <|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}";
    let config = json!({ "chat_template": template });
    fs::write(path.join("tokenizer_config.json"), config.to_string()).unwrap();
    path
}

/// How byte-level tokenizers write a byte.
fn spelt(byte: u8) -> char {
    let is_itself = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    match is_itself(byte) {
        true => char::from(byte),
        false => {
            let nth = (0..byte).filter(|&other| !is_itself(other)).count() as u32;
            char::from_u32(256 + nth).unwrap()
        }
    }
}

fn refusal(folder: &Path, out: &str) -> Command {
    let text = folder.join("text.txt");
    let lines: Vec<String> = (0..120)
        .map(|i| format!("The {i}th visitor asked whether the garden opens at {} today.", i % 24))
        .collect();
    fs::write(&text, lines.join("\n\n")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_refusal"));
    command
        .args(["--preset", "phi3-mini", "--quick", "--model"])
        .arg(folder.join("tiny-phi3"))
        .arg("--text")
        .arg(&text)
        .arg("--out")
        .arg(folder.join(out))
        .env("XDG_CACHE_HOME", folder.join("cache"))
        .env("HF_ENDPOINT", "https://127.0.0.1:9")
        .env("PATH", "")
        .env_remove("BURN_DEVICE")
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

fn finish(child: Child) {
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
}

/// `results.json`, but for what tells how it was made: the time, and what was there before.
fn results(folder: &Path) -> Value {
    let json = fs::read(folder.join("results.json")).unwrap();
    let mut results: Value = serde_json::from_slice(&json).unwrap();
    for how in ["seconds", "steps", "n_reused"] {
        results["settings"].as_object_mut().unwrap().remove(how).expect("how it was made");
    }
    results
}

fn journal(folder: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?;
    let mut paths = entries.map(|entry| entry.unwrap().path());
    paths.find(|path| path.file_name().unwrap().to_str().unwrap().starts_with("journal-"))
}

#[test]
fn phi3_mini_from_end_to_end_and_through_a_kill() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    tiny_phi3(folder);

    finish(refusal(folder, "whole").spawn().unwrap());
    let whole = results(&folder.join("whole"));
    assert_eq!(whole["hook_point"], "blocks.6.hook_resid_post");
    assert_eq!((&whole["sae"]["k"], &whole["sae"]["d_sae"]), (&json!(32), &json!(8 * 48)));
    let rows = whole["rows"].as_array().unwrap();
    for arm in ["zero_shot", "six_shot"] {
        for method in ["base", "latent", "bundle", "mean_difference", "random_direction"] {
            let found = rows.iter().find(|row| row["arm"] == arm && row["method"] == method);
            let found = found.unwrap_or_else(|| panic!("{arm} has no {method}"));
            assert_eq!(found["unsafe_rate"]["n"], 20);
        }
    }
    let gated = rows.iter().filter(|row| row["condition"] == "probe");
    assert!(gated.count() >= 3, "{rows:?}");
    assert!(rows.iter().any(|row| row["capability"]["multiple_choice"].is_array()));
    assert!(folder.join("whole/plans/latent.json").is_file());

    // Killed once some answers are kept, with the last line torn.
    let mut child = refusal(folder, "killed").spawn().unwrap();
    let start = Instant::now();
    let path = loop {
        assert!(start.elapsed() < Duration::from_secs(300), "nothing was kept");
        assert!(child.try_wait().unwrap().is_none(), "it was done before it could be killed");
        match journal(&folder.join("killed")) {
            Some(path) if fs::read(&path).unwrap().len() > 40_000 => break path,
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!folder.join("killed/results.json").exists());
    let mut kept = fs::read(&path).unwrap();
    kept.extend_from_slice(b"{\"key\":\"torn");
    fs::write(&path, &kept).unwrap();
    finish(refusal(folder, "killed").spawn().unwrap());
    assert_eq!(results(&folder.join("killed")), whole);
    let grown = fs::read(&path).unwrap();
    let n_kept = kept.iter().rposition(|&byte| byte == b'\n').unwrap();
    assert_eq!(grown[..n_kept], kept[..n_kept], "what was kept is still there");
}
