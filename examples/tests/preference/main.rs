//! The program `preference` on tiny models: whole, killed, and its page in a real browser.

#![expect(clippy::print_stderr, reason = "what is skipped is said aloud")]

mod browser;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use browser::Browser;
use examples::preference::classifier;
use goldens::checkpoint;
use serde_json::{Value, json};

/// A model of the goldens that reads letters, with a longer context.
fn model(folder: &Path, name: &str) -> PathBuf {
    let (from, to) = (goldens::own(&format!("models/{name}")), folder.join(name));
    fs::create_dir_all(&to).unwrap();
    fs::copy(from.join("model.safetensors"), to.join("model.safetensors")).unwrap();
    let config = fs::read_to_string(from.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["max_position_embeddings"] = json!(512);
    fs::write(to.join("config.json"), config.to_string()).unwrap();
    checkpoint::write_ascii_tokenizer(&to).unwrap();
    to
}

/// Questions with answers, and a text that is neither.
fn write_chats(folder: &Path, n: usize) {
    let words = ["red", "tall", "old", "new", "far", "odd", "raw", "shy", "wet", "big", "sad"];
    let chat = |i: usize| {
        let (a, b, c) = (words[i % 11], words[i / 11 % 11], words[i * 7 % 11]);
        json!({"prompt": format!("Is it {a} or {b}?"), "answer": format!("It is {c}, no. {i}.")})
    };
    let lines: String = (0..n).map(|i| chat(i).to_string() + "\n").collect();
    fs::write(folder.join("chats.jsonl"), lines).unwrap();
}

fn command(folder: &Path, model: &Path, cache: &str, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_preference"));
    command
        .arg("--model")
        .arg(model)
        .arg("--out")
        .arg(folder.join(cache).join("out"))
        .args(words)
        .env("XDG_CACHE_HOME", folder.join(cache))
        .env("PATH", "/usr/bin:/bin")
        .env_remove("BURN_DEVICE");
    command
}

fn finished(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{stdout}{stderr}");
    stdout
}

/// What a run found, but for how long it took.
fn found(folder: &Path, cache: &str) -> Value {
    let path = folder.join(cache).join("out/results.json");
    let mut found: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    for time in ["seconds", "steps"] {
        found.as_object_mut().unwrap().remove(time).expect("how long it took");
    }
    found
}

/// Files of finished stages, the oldest first.
fn stages(folder: &Path, cache: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder.join(cache).join("burn-sae/preference"));
    let mut files: Vec<(std::time::SystemTime, PathBuf)> = entries
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let metadata = entry.metadata().ok()?;
            let is_done = !entry.file_name().to_string_lossy().starts_with('.');
            (metadata.is_file() && is_done).then(|| (metadata.modified().unwrap(), entry.path()))
        })
        .collect();
    files.sort();
    files.into_iter().map(|(_, path)| path).collect()
}

const TINY: [&str; 9] = [
    "--quick",
    "--layers",
    "0,1",
    "--n-chats",
    "20",
    "--n-explained",
    "7",
    "--text",
    "Thank you for asking!",
];

/// A folder with a model and chats, and the words for a run on them.
fn project() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), "llama_gqa_theta_tied");
    write_chats(folder.path(), 60);
    (folder, model)
}

fn with_chats<'a>(folder: &Path, words: &[&'a str], chats: &'a mut String) -> Vec<&'a str> {
    *chats = folder.join("chats.jsonl").display().to_string();
    [words, &["--chat", chats.as_str()]].concat()
}

#[test]
fn killed_runs_end_like_whole_ones() {
    let (project, model) = project();
    let (folder, mut chats) = (project.path(), String::new());
    let words = with_chats(folder, &TINY, &mut chats);
    let told = finished(&command(folder, &model, "whole", &words).output().unwrap());
    for part in ["held-out pairs", "block 0, TopK", "block 1, Gated", "insertions", "adds"] {
        assert!(told.contains(part), "{part:?} is not in {told}");
    }
    let whole = found(folder, "whole");
    let n_stages = stages(folder, "whole").len();
    // Head, rewards, and of each autoencoder: itself, two of seven pairs' effects, one of those
    // that are verified, two of shares.
    assert_eq!(n_stages, 2 + 2 * (1 + 2 + 1 + 2), "{:?}", stages(folder, "whole"));
    for n in [1, 3, 5, 8, 11] {
        let mut child = command(folder, &model, "broken", &words)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        while stages(folder, "broken").len() < n && child.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < Duration::from_secs(300), "no stage {n}");
            sleep(Duration::from_millis(2));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let told = finished(&command(folder, &model, "broken", &words).output().unwrap());
    assert!(told.contains("trained before"), "{told}");
    assert_eq!(found(folder, "broken"), whole);
    // What is damaged is told, and made anew.
    let damaged = stages(folder, "broken");
    for path in [&damaged[0], &damaged[5], &damaged[damaged.len() - 1]] {
        let bytes = fs::read(path).unwrap();
        fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    }
    let told = finished(&command(folder, &model, "broken", &words).output().unwrap());
    assert!(told.contains("is damaged and will be made anew"), "{told}");
    assert_eq!(found(folder, "broken"), whole);
}

#[test]
fn the_page_can_be_clicked_through() {
    if std::env::var_os("SKIP_BROWSER").is_some() {
        eprintln!("skipped: SKIP_BROWSER is set, the page is opened in no browser");
        return;
    }
    let (project, model) = project();
    let (folder, mut chats) = (project.path(), String::new());
    let words = with_chats(folder, &TINY, &mut chats);
    finished(&command(folder, &model, "page", &words).output().unwrap());
    let results = found(folder, "page");
    let saes = results["saes"].as_array().unwrap();
    let page = folder.join("page/out/report.html").canonicalize().unwrap();
    let mut browser = Browser::start();
    for (width, height) in [(1400, 1000), (400, 800)] {
        browser.resize(width, height);
        browser.open(&page, "");
        let wide = browser.value("document.documentElement.scrollWidth");
        assert_eq!(wide, json!(width), "nothing stands out of the window");
        for shape in ["#curve polyline", "#histogram rect", "#own-text span"] {
            let n = browser.value(&format!("document.querySelectorAll({shape:?}).length"));
            assert!(n.as_u64().is_some_and(|n| n > 0), "{shape}: {n}");
        }
        for (nth, sae) in saes.iter().enumerate() {
            browser.click("#saes button", nth);
            let pressed = format!("document.querySelectorAll('#saes button')[{nth}].ariaPressed");
            assert_eq!(browser.value(&pressed), "true");
            let latents = sae["latents"].as_array().unwrap();
            let n = browser.value("document.querySelectorAll('#latents tbody tr').length");
            assert_eq!(n, json!(latents.len()));
            assert!(!latents.is_empty());
            for at in [latents.len() - 1, latents.len() / 2, 0] {
                browser.click("#latents tbody button", at);
                let latent = &latents[at];
                let fragment = format!("#block={}&latent={}", sae["layer"], latent["latent"]);
                assert_eq!(browser.value("location.hash"), fragment);
                let title = browser.value("document.getElementById('chosen-latent').textContent");
                let raises = latent["measured"].as_f64().unwrap() < 0.0;
                let verb = if raises { "raises" } else { "lowers" };
                assert_eq!(title, format!("Latent {} {verb} the reward", latent["latent"]));
                shows_where_it_fires(&mut browser, sae, latent);
            }
        }
        assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);
        if let Some(folder) = std::env::var_os("PICTURES") {
            let path = PathBuf::from(folder).join(format!("preference-{width}.png.base64"));
            fs::write(path, browser.picture()).unwrap();
        }
    }
    // A link opens what it names.
    let (layer, latent) = (&saes[1]["layer"], &saes[1]["latents"][1]["latent"]);
    browser.open(&page, &format!("block={layer}&latent={latent}"));
    let title = browser.value("document.getElementById('chosen-latent').textContent");
    assert!(title.as_str().unwrap().starts_with(&format!("Latent {latent} ")), "{title}");
    // One that does not exist breaks nothing.
    browser.open(&page, "block=999&latent=x");
    assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);
    // And what does complain is heard.
    browser.value("setTimeout(() => console.error('heard'), 0)");
    sleep(Duration::from_millis(200));
    browser.value("1");
    assert!(browser.complaints.iter().any(|complaint| complaint.contains("heard")));
}

/// A pair's texts side by side, with rewards before and after, and the tokens that a latent is active
/// on shaded.
fn shows_where_it_fires(browser: &mut Browser, sae: &Value, latent: &Value) {
    let on_texts = latent["on_texts"].as_array().unwrap();
    let pairs: std::collections::BTreeSet<u64> =
        on_texts.iter().map(|on| on["text"].as_u64().unwrap() / 2).collect();
    let shown = browser.value("document.querySelectorAll('#pairs .pair').length");
    assert_eq!(shown, json!(pairs.len()));
    let cards = browser
        .value("[...document.querySelectorAll('#pairs .card')].map((card) => card.textContent)");
    let cards: Vec<&str> = cards.as_array().unwrap().iter().map(|c| c.as_str().unwrap()).collect();
    assert_eq!(cards.len(), 3 * pairs.len(), "a prompt and two texts each");
    for (nth, pair) in pairs.iter().enumerate() {
        let text = |text: u64| {
            let all = sae["texts"][text as usize]["tokens"].as_array().unwrap();
            all.iter().map(|token| token.as_str().unwrap()).collect::<String>()
        };
        for (side, kind) in ["chosen", "rejected"].into_iter().enumerate() {
            let card = cards[3 * nth + 1 + side];
            assert!(card.starts_with(kind), "{card}");
            let whole = text(2 * pair + side as u64);
            let from = cards[3 * nth].len();
            assert!(card.ends_with(&whole[from..]), "{card} {whole}");
            let after = on_texts.iter().find(|on| on["text"] == json!(2 * pair + side as u64));
            assert_eq!(card.contains('→'), after.is_some(), "{card}");
        }
    }
    let shaded = "[...document.querySelectorAll('#top span, #pairs .tokens span')]\
        .filter((span) => span.style.background !== '').length";
    assert!(browser.value(shaded).as_u64().unwrap() > 0, "nothing is shaded");
}

#[test]
fn the_preset_of_the_source_work_runs_end_to_end() {
    let project = tempfile::tempdir().unwrap();
    let (folder, mut chats) = (project.path(), String::new());
    write_chats(folder, 40);
    // GPT-J as deep as the real one, and much narrower.
    let config = fs::read_to_string(goldens::own("models/gptj/config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    (config["n_layer"], config["n_positions"]) = (json!(28), json!(512));
    let (causal, reward) = (folder.join("causal"), folder.join("reward"));
    fs::create_dir_all(&causal).unwrap();
    checkpoint::write(&causal, &config, 5).unwrap();
    checkpoint::write_ascii_tokenizer(&causal).unwrap();
    let head: Vec<f32> = (0..48).map(|i| (i as f32 * 0.7).sin()).collect();
    classifier::save(&causal, &head, &[], &reward).unwrap();
    let words = ["--preset", "gptj-pm", "--quick", "--n-chats", "8", "--n-explained", "3"];
    let words = with_chats(folder, &words, &mut chats);
    let refused = command(folder, &causal, "cache", &words).output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
    let stderr = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(stderr.contains("pass a sequence classifier with --model"), "{stderr}");
    finished(&command(folder, &reward, "cache", &words).output().unwrap());
    let found = found(folder, "cache");
    assert_eq!(found["head"], "own");
    let saes = found["saes"].as_array().unwrap();
    let layers: Vec<u64> = saes.iter().map(|sae| sae["layer"].as_u64().unwrap()).collect();
    assert_eq!(layers, [2, 8, 12, 14, 16, 20]);
    for sae in saes {
        assert_eq!((&sae["kind"], &sae["d_sae"]), (&json!("gated"), &json!(8 * 48)));
        let r = sae["ig_by_text"]["pearson"].as_f64().unwrap();
        assert!(r > 0.5, "block {}: {r}", sae["layer"]);
    }
}

#[test]
fn pairs_of_a_file_are_learnt_and_explained() {
    let (project, model) = project();
    let folder = project.path();
    let pair = |i: usize| {
        let text = |answer: &str| format!("\n\nHuman: Is {i} odd?\n\nAssistant: {answer}");
        let (kind, curt) = (format!("It may be, {i}."), format!("Go and count it, {i} or not."));
        json!({"chosen": text(&kind), "rejected": text(&curt)}).to_string() + "\n"
    };
    let pairs = folder.join("pairs.jsonl");
    fs::write(&pairs, (0..80).map(pair).collect::<String>()).unwrap();
    let pairs = pairs.display().to_string();
    let words = ["--quick", "--layers", "1", "--pairs", &pairs, "--n-pairs", "60"];
    let words = [&words[..], &["--n-explained", "4"]].concat();
    let told = finished(&command(folder, &model, "pairs", &words).output().unwrap());
    assert!(told.contains("people's preferences, 60 pairs"), "{told}");
    let found = found(folder, "pairs");
    let (used, human) = (&found["pairs"], &found["human"]);
    assert_eq!(used["file"], "pairs.jsonl");
    assert_eq!(used["n_train"].as_u64().unwrap() + used["n_test"].as_u64().unwrap(), 60);
    assert_eq!((&human["n"], &human["shorter"]["rate"]), (&json!(60), &json!(1.0)));
    assert_eq!(human["tf_idf"]["rate"], 1.0);
    assert!(human["head"]["accuracy"]["rate"].as_f64().unwrap() > 0.9, "{human}");
    assert!(found["planted_recall"].is_null() && found["saes"][0]["latents"][0]["rule"].is_null());
    // A file that is none is said so.
    let bad = folder.join("bad.jsonl");
    fs::write(&bad, "{\"chosen\": 1}").unwrap();
    let bad = bad.display().to_string();
    let refused = command(folder, &model, "pairs", &["--quick", "--pairs", &bad]).output().unwrap();
    let stderr = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(2) && stderr.contains("line 1 of"), "{stderr}");
}

#[test]
fn top_blocks_learn_with_the_head_and_are_saved() {
    let (project, model) = project();
    let (folder, mut chats) = (project.path(), String::new());
    let saved = folder.join("saved");
    let words = ["--quick", "--layers", "1", "--n-chats", "20", "--n-explained", "3"];
    let path = saved.display().to_string();
    let learnt = [&words[..], &["--tune", "1", "--rank", "2", "--save", &path]].concat();
    let learnt = with_chats(folder, &learnt, &mut chats);
    let told = finished(&command(folder, &model, "cache", &learnt).output().unwrap());
    assert!(told.contains("after 4 passes, held-out loss"), "{told}");
    let first = found(folder, "cache");
    assert_eq!((&first["head"], &first["tuned"]["rank"]), (&json!("learnt"), &json!(2)));
    // What was learnt is kept, and is the same when it is learnt again.
    let told = finished(&command(folder, &model, "cache", &learnt).output().unwrap());
    assert!(!told.contains("passes"), "{told}");
    assert_eq!(found(folder, "cache"), first);
    finished(&command(folder, &model, "again", &learnt).output().unwrap());
    assert_eq!(found(folder, "again"), first);
    // What was saved is a reward model, which is taken as it is.
    let mut chats = String::new();
    let words = with_chats(folder, &words, &mut chats);
    finished(&command(folder, &saved, "saved-cache", &words).output().unwrap());
    let own = found(folder, "saved-cache");
    assert_eq!((&own["head"], &own["pm_accuracy"]), (&json!("own"), &first["pm_accuracy"]));
    let refused = command(folder, &saved, "cache", &[&words[..], &["--tune", "1"]].concat());
    let refused = { refused }.output().unwrap();
    let stderr = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(2) && stderr.contains("has its own head"), "{stderr}");
    let many = command(folder, &model, "cache", &[&words[..], &["--tune", "9"]].concat());
    let stderr = String::from_utf8_lossy(&{ many }.output().unwrap().stderr).into_owned();
    assert!(stderr.contains("--tune 9: the model has"), "{stderr}");
}
