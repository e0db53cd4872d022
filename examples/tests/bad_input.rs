//! What is wrong with the input is said in one line, with exit code 2, and nothing is left behind.

use std::path::Path;
use std::process::{Command, Output};

/// Runs the program where neither the network nor a package index can be reached.
fn refusal(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_refusal"))
        .args(arguments)
        .arg("--out")
        .arg(folder.join("out"))
        .env("XDG_CACHE_HOME", folder.join("cache"))
        .env("HF_ENDPOINT", "https://127.0.0.1:9")
        .env("PATH", "")
        .env_remove("BURN_DEVICE")
        .output()
        .expect("the program was built")
}

/// The one line of an error, which must name these things.
fn fails(folder: &Path, arguments: &[&str], named: &[&str]) {
    let output = refusal(folder, arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {stderr}");
    let lines: Vec<&str> = stderr.lines().filter(|line| !line.trim().is_empty()).collect();
    assert_eq!(lines.len(), 1, "{arguments:?}: {stderr}");
    for name in named {
        assert!(lines[0].contains(name), "{arguments:?}: {name:?} is not in {}", lines[0]);
    }
    assert!(!folder.join("out").exists(), "{arguments:?} left something behind");
}

#[test]
fn bad_input_is_one_line_and_exit_code_2() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    let path = |name: &str| folder.join(name).to_string_lossy().into_owned();
    std::fs::write(path("foreign.gguf"), b"PK\x03\x04 not a model at all").unwrap();
    std::fs::write(path("cut.gguf"), b"GGUF\x03\0\0\0\x05\0\0\0").unwrap();
    std::fs::create_dir(path("empty")).unwrap();
    std::fs::write(path("nothing.txt"), "\n\n").unwrap();
    let tiny = goldens::own("models/llama_mha").to_string_lossy().into_owned();

    fails(folder, &[], &["no model", "pip", "--model"]);
    fails(folder, &["--model", &path("missing.gguf")], &["missing.gguf"]);
    fails(folder, &["--model", "someone/some-model"], &["someone/some-model", "127.0.0.1"]);
    fails(folder, &["--model", &path("foreign.gguf")], &["foreign.gguf"]);
    fails(folder, &["--model", &path("cut.gguf")], &["cut.gguf"]);
    fails(folder, &["--model", &path("empty")], &["config.json"]);
    fails(folder, &["--model", &tiny], &["tokenizer", "--model"]);
    fails(folder, &["--device", "abacus"], &["abacus", "flex"]);
    fails(folder, &["--preset", "gpt5"], &["gpt5", "smollm2", "phi3-mini"]);
    fails(folder, &["--full"], &["--full", "--sets"]);
    fails(folder, &["--quick", "--full", "--sets", "x"], &["exclude"]);
    fails(folder, &["--strengths", "NaN"], &["NaN", "finite"]);
}
