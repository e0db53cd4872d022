//! The program `train` on a tiny model: whole, killed, stopped, and given nonsense.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use burn::tensor::Device;
use sae_core::format::saelens;
use serde_json::{Value, json};

/// A model of the goldens that reads bytes.
fn model(folder: &Path, name: &str) -> PathBuf {
    let to = folder.join(name);
    fs::create_dir_all(&to).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(goldens::own(&format!("models/{name}")).join(file), to.join(file)).unwrap();
    }
    goldens::checkpoint::write_ascii_tokenizer(&to).unwrap();
    to
}

/// A folder with a model, text, and a config, changed as is asked for.
fn project(change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path(), "llama_gqa_theta_tied");
    let sentence = |i: usize| format!("Sentence {i} of {} says {}.\n", i * i % 97, i % 13 * 1001);
    let text = |from: usize| (from..from + 12).map(sentence).collect::<String>().replace('\n', " ");
    fs::create_dir_all(folder.path().join("text/more")).unwrap();
    for (at, file) in ["text/a.txt", "text/b.md", "text/more/c.txt"].iter().enumerate() {
        fs::write(folder.path().join(file), text(1000 * at)).unwrap();
    }
    let lines: String = (0..40).map(|i| json!({"body": text(i * 12)}).to_string() + "\n").collect();
    fs::write(folder.path().join("text/d.jsonl"), lines).unwrap();
    let mut config = json!({
        "model": "llama_gqa_theta_tied",
        "text": {"paths": ["text"], "field": "body", "held_out_tokens": 600, "row_tokens": 32},
        "stream": {"mixed_rows": 700, "batch_tokens": 256},
        "saes": [
            {"name": "early", "hook_point": "blocks.0.hook_resid_post", "d_sae": 96,
             "objective": {"top_k": {"k": 4}}, "learning_rate": 1e-3},
            {"name": "late", "hook_point": "blocks.2.attn.hook_z", "expansion": 2,
             "objective": {"top_k": {"k": 8}}, "dead_after": 2000},
        ],
        "batch": 64, "checkpoint_every": 7, "evaluate_every": 40, "seed": 3,
    });
    change(&mut config);
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

fn command(folder: &Path, out: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_train"));
    command
        .arg(folder.join("config.json"))
        .arg("--out")
        .arg(folder.join(out))
        .env("XDG_CACHE_HOME", folder.join("cache"))
        .env("PATH", "/usr/bin:/bin")
        .env_remove("BURN_DEVICE");
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn finished(output: &Output) -> String {
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{stdout}{stderr}");
    stdout
}

/// What a run leaves that must not depend on its interruptions.
fn left(folder: &Path, out: &str) -> Vec<(String, Vec<u8>)> {
    let names = [
        "early/sae_weights.safetensors",
        "early/cfg.json",
        "late/sae_weights.safetensors",
        "late/cfg.json",
        "evaluation.json",
        "report.html",
    ];
    let mut left: Vec<(String, Vec<u8>)> = names
        .iter()
        .map(|name| ((*name).to_owned(), fs::read(folder.join(out).join(name)).unwrap()))
        .collect();
    // Checkpoints are made where a run is stopped, too.
    let metrics = fs::read_to_string(folder.join(out).join("metrics.jsonl")).unwrap();
    let lines = metrics.lines().filter(|line| !line.contains("\"checkpoint\""));
    left.push(("metrics".to_owned(), lines.collect::<Vec<_>>().join("\n").into_bytes()));
    left
}

/// Waits until so many checkpoints have been made, by the step of the newest.
fn wait_for_step(child: &mut Child, out: &Path, step: u64) {
    let start = Instant::now();
    loop {
        let newest = fs::read_dir(out.join("checkpoints")).into_iter().flatten().filter_map(|e| {
            let name = e.ok()?.file_name().into_string().ok()?;
            name.strip_prefix("step-")?.get(..12)?.parse::<u64>().ok()
        });
        if newest.max().is_some_and(|newest| newest >= step) {
            return;
        }
        assert!(child.try_wait().unwrap().is_none(), "it ended before step {step}");
        assert!(start.elapsed() < Duration::from_secs(120), "no step {step}");
        sleep(Duration::from_millis(1));
    }
}

fn started(folder: &Path, out: &str) -> Child {
    command(folder, out).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn killed_and_stopped_runs_end_like_whole_ones() {
    let project = project(|_| ());
    let folder = project.path();
    let told = finished(&command(folder, "whole").output().unwrap());
    for part in ["tokens to train on", "early: L0 4.0, FVU", "CE recovered", "report.html"] {
        assert!(told.contains(part), "{part:?} is not in {told}");
    }
    let whole = left(folder, "whole");

    let mut child = started(folder, "broken");
    wait_for_step(&mut child, &folder.join("broken"), 14);
    child.kill().unwrap();
    child.wait().unwrap();
    let mut child = started(folder, "broken");
    wait_for_step(&mut child, &folder.join("broken"), 35);
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let told = text(&output.stdout);
    assert_eq!(output.status.code(), Some(3), "{told}{}", text(&output.stderr));
    assert!(told.contains("going on behind step") && told.contains("run it again"), "{told}");
    let told = finished(&command(folder, "broken").output().unwrap());
    assert!(told.contains("going on behind step"), "{told}");
    for ((name, whole), (_, broken)) in whole.iter().zip(left(folder, "broken")) {
        assert!(*whole == broken, "{name} differs");
    }

    // What is left is what it says it is.
    let sae = saelens::read(&folder.join("whole/late"), &Device::flex()).unwrap();
    let metadata = &sae.config().metadata;
    assert_eq!((sae.config().d_in, sae.config().d_sae, sae.config().joins_heads), (48, 96, true));
    assert_eq!(metadata.hook_name.as_deref(), Some("blocks.2.attn.hook_z"));
    assert_eq!(metadata.first_position(), Some(1));
    let evaluation = fs::read(folder.join("whole/evaluation.json")).unwrap();
    let evaluation: Value = serde_json::from_slice(&evaluation).unwrap();
    let early = &evaluation["saes"][0];
    assert_eq!((&early["name"], &early["d_sae"]), (&json!("early"), &json!(96)));
    assert!(early["reconstruction"]["fvu"]["global_centred"].as_f64().unwrap() < 0.7, "{early}");
    assert!(early["next_tokens"]["kl"].as_f64().unwrap() > 0.0, "{early}");
    let page = fs::read_to_string(folder.join("whole/report.html")).unwrap();
    assert_eq!(page.matches("role=\"img\"").count(), 4);
    let outside = page.replace("http://www.w3.org/2000/svg", "").matches("http").count();
    assert_eq!((outside, page.matches("<script").count()), (0, 0));
}

#[test]
fn a_store_is_filled_once_and_belongs_to_its_model() {
    let project = project(|config| config["stream"]["store"] = json!("activations"));
    let folder = project.path();
    let mut child = started(folder, "broken");
    let first = folder.join("activations/harvest.manifest.json");
    while !first.exists() && child.try_wait().unwrap().is_none() {
        sleep(Duration::from_millis(1));
    }
    // Held where it is, so that it is at work for as long as it takes.
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-STOP", &id]).status().unwrap().success());
    fails(folder, "other", &["activations is being filled", "wait for"]);
    child.kill().unwrap();
    child.wait().unwrap();
    finished(&command(folder, "broken").output().unwrap());
    let shards = |folder: &Path| {
        let entries = fs::read_dir(folder.join("activations")).unwrap().map(|e| e.unwrap().path());
        let mut files: Vec<_> = entries.map(|path| (fs::read(&path).unwrap(), path)).collect();
        files.sort();
        files
    };
    let filled = shards(folder);
    finished(&command(folder, "whole").output().unwrap());
    assert_eq!(shards(folder), filled);
    for ((name, whole), (_, broken)) in left(folder, "whole").iter().zip(left(folder, "broken")) {
        assert!(*whole == broken, "{name} differs");
    }
    // Other text.
    let config = fs::read_to_string(folder.join("config.json")).unwrap();
    fs::write(folder.join("config.json"), config.replace("\"text\"]", "\"text/d.jsonl\"]"))
        .unwrap();
    fails(folder, "whole", &["another model, text or hook point", "stream.store"]);
}

#[test]
fn a_reward_model_is_measured_by_its_rewards() {
    let project = project(|config| {
        config["model"] = json!("llama_seqcls_reward");
        config["preferences"] = json!("pairs.jsonl");
        config["saes"].as_array_mut().unwrap().pop();
    });
    let folder = project.path();
    model(folder, "llama_seqcls_reward");
    let pair =
        |i: usize| json!({"chosen": format!("yes {i}"), "rejected": "no"}).to_string() + "\n";
    fs::write(folder.join("pairs.jsonl"), (0..6).map(pair).collect::<String>()).unwrap();
    let told = finished(&command(folder, "out").output().unwrap());
    assert!(told.contains("reward error"), "{told}");
    let evaluation = fs::read(folder.join("out/evaluation.json")).unwrap();
    let evaluation: Value = serde_json::from_slice(&evaluation).unwrap();
    assert_eq!(evaluation["saes"][0]["rewards"]["n_pairs"], 6);
}

/// Every kind, at a size that takes a moment.
#[test]
fn every_kind_can_be_trained() {
    let objectives = json!([
        {"top_k": {"k": 4, "aux_k": false}},
        {"batch_top_k": {"k": 4}},
        {"matryoshka": {"k": 4, "widths": [16, 48]}},
        {"jump_relu": {"l0_coefficient": 0.1, "l0_target": 6}},
        {"standard": {"l1_coefficient": 0.5}},
        {"gated": {"l1_coefficient": 0.5}},
        {"multi_top_k": {"k": 4}},
        {"abs_top_k": {"k": 4}},
        {"matching_pursuit": {"residual_threshold": 0.1, "max_iterations": 8}},
    ]);
    let project = project(|config| {
        let kinds = objectives.as_array().unwrap().iter().enumerate();
        let mut saes: Vec<Value> = kinds
            .map(|(i, objective)| {
                json!({"name": format!("kind{i}"), "hook_point": "blocks.1.hook_resid_post",
                    "d_sae": 96, "objective": objective})
            })
            .collect();
        saes.push(json!({
            "name": "transcoder", "hook_point": "blocks.1.ln2.hook_normalized",
            "target": "blocks.1.hook_mlp_out", "skip": true, "d_sae": 96,
            "objective": {"batch_top_k": {"k": 4}},
        }));
        config["saes"] = json!(saes);
        config["n_steps"] = json!(12);
    });
    let folder = project.path();
    finished(&command(folder, "out").output().unwrap());
    let evaluation = fs::read(folder.join("out/evaluation.json")).unwrap();
    let evaluation: Value = serde_json::from_slice(&evaluation).unwrap();
    let saes = evaluation["saes"].as_array().unwrap();
    assert_eq!(saes.len(), 10);
    for sae in saes {
        let name = sae["name"].as_str().unwrap();
        assert!(sae["next_tokens"]["ce_spliced"].as_f64().is_some_and(f64::is_finite), "{sae}");
        saelens::read(&folder.join("out").join(name), &Device::flex()).unwrap();
    }
    assert_eq!(saes[9]["target_hook_point"], "blocks.1.hook_mlp_out");
}

#[test]
fn the_examples_are_configs() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let mut n = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let plan = examples::train::Plan::read(&path).unwrap_or_else(|error| panic!("{error:#}"));
        for sae in &plan.saes {
            let d_out = sae.target().unwrap().map(|_| 576);
            let config = sae.train_config(576, d_out);
            config.validate(576).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            assert!(saelens::can_write(&config.sae(576)), "{}", path.display());
        }
        n += 1;
    }
    assert!(n > 0);
}

/// The one line of an error, which must name these things.
fn fails(folder: &Path, out: &str, named: &[&str]) {
    let output = command(folder, out).output().unwrap();
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
    for name in named {
        assert!(stderr.contains(name), "{name:?} is not in {stderr}");
    }
}

#[test]
fn what_is_wrong_is_said_in_one_line_with_what_to_do() {
    let wrong = |change: fn(&mut Value), named: &[&str]| {
        let project = project(change);
        fails(project.path(), "out", named);
        assert!(!project.path().join("out/metrics.jsonl").exists());
    };
    wrong(|c| c["bach"] = json!(1), &["config.json", "bach", "batch"]);
    wrong(|c| c["saes"][0]["kk"] = json!(1), &["kk"]);
    wrong(|c| c["saes"] = json!([]), &["saes", "at least one"]);
    wrong(|c| c["text"]["paths"] = json!(["there"]), &["there", "config's folder"]);
    wrong(|c| c["model"] = json!("none"), &["none", "hub id"]);
    wrong(
        |c| c["saes"][0]["objective"] = json!({"top_k": {"k": 97}}),
        &["early", "k = 97", "d_sae = 96"],
    );
    wrong(
        |c| c["saes"][0]["hook_point"] = json!("blocks.9.hook_resid_post"),
        &["early", "blocks.9"],
    );
    let target = |c: &mut Value| c["saes"][0]["target"] = json!("blocks.0.hook_mlp_out");
    wrong(target, &["early", "TopK 4", "batch_top_k"]);
    wrong(|c| c["saes"][0]["skip"] = json!(true), &["early", "skip", "target"]);
    wrong(|c| c["saes"][0]["hook_point"] = json!("resid"), &["early", "resid"]);
    wrong(|c| c["saes"][0]["name"] = json!("../x"), &["../x", "letters"]);
    wrong(|c| c["saes"][1]["name"] = json!("early"), &["early", "a name of its own"]);
    wrong(|c| c["text"]["row_tokens"] = json!(65), &["65", "64", "shorter"]);
    wrong(
        |c| c["text"]["held_out_tokens"] = json!(1_000_000),
        &["held_out_tokens", "hold out less"],
    );
    wrong(|c| c["text"]["field"] = json!("words"), &["d.jsonl", "line 1", "words", "text.field"]);
    wrong(|c| c["batch"] = json!(1_000_000), &["too little text", "lower batch"]);
    wrong(|c| c["stream"]["mixed_share"] = json!(1.0), &["mixed_share"]);
    wrong(|c| c["stream"]["max_norm"] = json!(0.5), &["max_norm", "above 1"]);
    wrong(|c| c["stream"]["max_nrom"] = json!(2), &["max_nrom", "max_norm", "skip_positions"]);
    let sae = |c: &mut Value, key: &str, value: Value| c["saes"][0][key] = value;
    wrong(|c| c["saes"][0]["optimizer"] = json!({"adamw": {}}), &["adamw", "row_lazy_adam"]);
    wrong(|c| c["saes"][0]["optimizer"] = json!({"adam": {"beta": 1}}), &["beta", "beta_1"]);
    wrong(|c| c["saes"][0]["resampling"] = json!({"often": 1}), &["often", "every", "rule"]);
    wrong(|c| c["saes"][0]["anneal"] = json!({"from": 200}), &["early", "200", "d_sae"]);
    wrong(|c| c["saes"][0]["decoder"] = json!("held"), &["held", "free", "unit"]);
    let with = |key: &'static str, value: Value, named: &[&str]| {
        let project = project(|config| sae(config, key, value));
        fails(project.path(), "out", named);
    };
    with("decoder_norm", json!(-1), &["early", "decoder_norm"]);
    with("resampling", json!({"every": 0}), &["early", "resampling.every"]);
    let empty = tempfile::tempdir().unwrap();
    fails(empty.path(), "out", &["config.json", "examples/configs"]);
}

#[test]
fn another_run_in_the_same_folder_is_refused() {
    let project = project(|config| config["n_steps"] = json!(3));
    let folder = project.path();
    finished(&command(folder, "out").output().unwrap());
    let again = finished(&command(folder, "out").output().unwrap());
    assert!(again.contains("going on behind step 3 of 3"), "{again}");
    model(folder, "llama_mha");
    let config = fs::read_to_string(folder.join("config.json")).unwrap();
    let other = config.replace("llama_gqa_theta_tied", "llama_mha").replace("\"k\":4", "\"k\":5");
    fs::write(folder.join("config.json"), other).unwrap();
    let named = ["another run", "another --out", "model", "llama_mha", "runs.early.config"];
    fails(folder, "out", &named);
}

/// Runs on a file of this name and content beside the other text, or in its place.
fn with_text(name: &str, bytes: &[u8], alone: bool) -> tempfile::TempDir {
    let project = project(|config| {
        if alone {
            config["text"]["paths"] = json!([name]);
        }
    });
    let path = project.path().join(if alone { name.to_owned() } else { format!("text/{name}") });
    fs::write(path, bytes).unwrap();
    project
}

#[test]
fn text_that_is_none_is_named() {
    let project = with_text("latin.txt", b"caf\xe9 au lait", false);
    fails(project.path(), "out", &["latin.txt", "byte 3", "UTF-8", "convert"]);
    let project = with_text("empty.txt", b" \n", true);
    fails(project.path(), "out", &["text.paths", "no text", "name some"]);
    let project = with_text("short.txt", b"A few words.", true);
    fails(project.path(), "out", &["12 tokens", "held_out_tokens = 600", "hold out less"]);
}

#[test]
fn a_folder_that_cannot_be_written_is_found_out_at_once() {
    let project = project(|_| ());
    fs::write(project.path().join("file"), "").unwrap();
    fails(project.path(), "file", &["file cannot be used", "choose an --out"]);
    // Where even the superuser may make nothing.
    if Path::new("/proc/self").exists() {
        fails(project.path(), "/proc/none", &["/proc/none cannot be used", "choose an --out"]);
    }
}

#[test]
fn two_trainers_on_one_folder_do_not_meet() {
    let project = project(|_| ());
    let folder = project.path();
    let mut child = started(folder, "out");
    wait_for_step(&mut child, &folder.join("out"), 7);
    fails(folder, "out", &["out is in use", "another --out"]);
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(0));
}

#[test]
fn a_damaged_checkpoint_is_passed_over_and_told() {
    let project = project(|config| config["n_steps"] = json!(20));
    let folder = project.path();
    finished(&command(folder, "out").output().unwrap());
    let whole = left(folder, "out");
    let mut names: Vec<PathBuf> = fs::read_dir(folder.join("out/checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some())
        .collect();
    names.sort();
    let newest = names.last().unwrap();
    let bytes = fs::read(newest).unwrap();
    fs::write(newest, &bytes[..bytes.len() / 2]).unwrap();
    let told = finished(&command(folder, "out").output().unwrap());
    for part in ["passed over step-000000000020", "damaged", "going on behind step 14 of 20"] {
        assert!(told.contains(part), "{part:?} is not in {told}");
    }
    assert!(left(folder, "out") == whole);
    let newest = fs::read_dir(folder.join("out/checkpoints")).unwrap();
    for path in newest.map(|entry| entry.unwrap().path()).filter(|p| p.extension().is_some()) {
        fs::write(path, "none").unwrap();
    }
    fails(folder, "out", &["no checkpoint", "can be read", "another --out"]);
}

/// A limit on the size of files stands in for a disk that is full.
#[test]
#[cfg(unix)]
fn a_full_disk_loses_nothing() {
    let project = project(|config| config["n_steps"] = json!(20));
    let folder = project.path();
    finished(&command(folder, "whole").output().unwrap());
    let limited = |out: &str, blocks: usize| {
        let train = command(folder, out);
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(format!("ulimit -f {blocks}; exec \"$0\" \"$@\""));
        shell.arg(train.get_program()).args(train.get_args());
        shell.envs(train.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let output = shell.output().unwrap();
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
        for part in ["make room", "run it again"] {
            assert!(stderr.contains(part), "{stderr}");
        }
    };
    // Too little for a checkpoint; then, the training done, for the SAEs.
    limited("broken", 100);
    let told = finished(&command(folder, "broken").output().unwrap());
    assert!(!told.contains("going on"), "{told}");
    for name in ["early/sae_weights.safetensors", "report.html"] {
        fs::remove_file(folder.join("broken").join(name)).unwrap();
    }
    limited("broken", 20);
    finished(&command(folder, "broken").output().unwrap());
    for ((name, whole), (_, broken)) in left(folder, "whole").iter().zip(left(folder, "broken")) {
        assert!(*whole == broken, "{name} differs");
    }
}

#[test]
fn whatever_differs_from_the_run_before_is_named() {
    let project = project(|config| config["n_steps"] = json!(3));
    let folder = project.path();
    finished(&command(folder, "out").output().unwrap());
    let before = fs::read(folder.join("out/metrics.jsonl")).unwrap();
    let config: Value =
        serde_json::from_str(&fs::read_to_string(folder.join("config.json")).unwrap()).unwrap();
    type Change = fn(&mut Value);
    let changes: [(Change, &str); 5] = [
        (|c| c["saes"][0]["d_sae"] = json!(112), "runs.early.config.d_sae is 112, expected 96"),
        (|c| c["seed"] = json!(4), "seed is 4, expected 3"),
        (|c| c["text"]["n_tokens"] = json!(4000), "data is"),
        (|c| c["stream"]["max_norm"] = json!(null), "max_norm is absent, expected 10"),
        (|c| c["saes"][0]["optimizer"] = json!({"signum": {}}), "runs.early.config.optimizer"),
    ];
    for (change, named) in changes {
        let mut config = config.clone();
        change(&mut config);
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        fails(folder, "out", &["another run", "another --out", named]);
    }
    assert_eq!(fs::read(folder.join("out/metrics.jsonl")).unwrap(), before);
}

#[test]
fn what_the_config_can_say_is_in_the_long_help() {
    let output = Command::new(env!("CARGO_BIN_EXE_train")).arg("--help").output().unwrap();
    let help = finished(&output);
    for key in ["optimizer", "resampling", "stream.max_norm", "matching_pursuit", "anneal"] {
        assert!(help.contains(key), "{key} is not in {help}");
    }
}
