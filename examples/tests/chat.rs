//! A scripted conversation with the real model.
//!
//! Needs the default model, from the cache or the Python package index; where it cannot be had, the
//! test says so and passes.

#![expect(clippy::print_stderr, reason = "what is skipped is said aloud")]

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor};
use clap::Parser;
use examples::assets::{LoadedModel, load_model, locate_model};
use examples::chat::{Options, Session};
use sae_core::{Activation, Sae, SaeConfig, SaeMetadata, SaeWeights};
use steering::plan::PlanModel;
use steering::{At, LogisticProbe, RequestFeature, RequestProbe, RequestReading, random_direction};

/// Latents that read and write random directions.
fn sae(d_in: usize) -> Sae {
    let (device, d_sae) = (Device::flex(), 32);
    let row = |i: usize| random_direction(d_in, 1.0, i as u64, &device).unsqueeze::<2>();
    let w_dec = Tensor::cat((0..d_sae).map(row).collect(), 0);
    let weights = SaeWeights::new(
        w_dec.clone().transpose(),
        Tensor::zeros([d_sae], &device),
        w_dec,
        Tensor::zeros([d_in], &device),
    );
    let metadata = SaeMetadata::default();
    let mut config = SaeConfig::new(d_in, d_sae, Activation::Relu);
    config.metadata = metadata;
    config.metadata.hook_name = Some("blocks.12.hook_resid_post".into());
    Sae::new(config, weights).unwrap()
}

/// What was said behind each prompt, with it.
fn said(
    options: &[&str],
    loaded: &LoadedModel,
    saes: &BTreeMap<String, Sae>,
    script: &str,
) -> Vec<String> {
    let options = Options::parse_from(["chat", "--max-new-tokens", "6"].iter().chain(options));
    let mut session = Session::new(&options, loaded, saes).unwrap();
    let mut out = Vec::new();
    session.run(script.as_bytes(), &mut out).unwrap();
    let marked = String::from_utf8(out).unwrap().replace("plain> ", "\0plain> ");
    let marked = marked.replace("steered> ", "\0steered> ");
    marked.split('\0').skip(1).map(|said| said.trim_end_matches('\n').to_owned()).collect()
}

#[test]
fn a_scripted_conversation() {
    if let Err(error) = locate_model(None) {
        eprintln!("scripted conversation SKIPPED: {error:#}");
        return;
    }
    let loaded = load_model(None, &Device::flex()).unwrap_or_else(|error| panic!("{error:#}"));
    let saes = BTreeMap::from([("s".to_owned(), sae(loaded.model.config().d_model))]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plan.json");
    let path = path.to_str().unwrap();
    let question = "What is the capital of France?";
    let script = format!(
        "{question}\n/steer\n/clamp 99=1\n/stear\n/new\n/clamp 7=300\n{question}\n/save {path}\n\
         /off\n/new\n{question}\n/new\n/watch 7\n{question}\n/quit\n{question}\n"
    );
    let lines = said(&[], &loaded, &saes, &script);
    let answer = |line: usize, prompt: &str| lines[line].strip_prefix(prompt).unwrap();
    let plain = answer(0, "plain> ");
    assert!(plain.contains("Paris") || plain.len() > 5, "{plain:?}");
    assert!(answer(1, "plain> ").starts_with("nothing steers yet: /steer PATH"), "{lines:?}");
    assert!(answer(2, "plain> ").contains("latent 99 is out of range"), "{lines:?}");
    assert!(answer(3, "plain> ").contains("there is no command /stear"), "{lines:?}");
    assert_eq!(answer(4, "plain> "), "A new conversation.");
    assert_eq!(answer(5, "plain> "), "Clamping 7 to 300.");
    let steered = answer(6, "steered> ");
    assert_ne!(steered, plain);
    assert!(answer(7, "steered> ").starts_with("Saved "), "{lines:?}");
    assert_eq!(answer(8, "steered> "), "Not steering.");
    assert_eq!(answer(10, "plain> "), plain);
    assert_eq!(answer(12, "plain> "), "Watching latent 7.");
    let watched = answer(13, "plain> ");
    let without: String = watched
        .split('⟨')
        .map(|part| part.split_once('⟩').map_or(part, |(_, rest)| rest))
        .collect();
    assert_eq!(without.trim_end(), plain);
    assert!(watched.contains("\n⟨latent 7: active on "), "{watched}");
    // Nothing behind /quit.
    assert_eq!(lines.len(), 15, "{lines:?}");

    let lines = said(&["--plan", path], &loaded, &saes, question);
    assert_eq!(lines[0].strip_prefix("steered> ").unwrap(), steered);

    // The same plan, read while the conversation runs; one that is none changes nothing.
    let script = format!("/steer nowhere.json\n/steer {path}\n/steer nowhere.json\n{question}\n");
    let lines = said(&[], &loaded, &saes, &script);
    assert!(lines[0].starts_with("plain> the plan nowhere.json: "), "{lines:?}");
    assert_eq!(lines[1], format!("plain> Steering by {path}."));
    assert_eq!(lines[3].strip_prefix("steered> ").unwrap(), steered);

    let lines = said(&[], &loaded, &BTreeMap::new(), &format!("/clamp 7=1\n/steer {path}\n"));
    assert!(lines[0].ends_with("start with --sae NAME=PATH"), "{lines:?}");
    assert!(lines[1].ends_with("start with --sae s=PATH"), "{lines:?}");

    // With a probe, only where it fires: one that always does, and one that never does.
    let probe = |name: &str, bias: f32| {
        let probe = RequestProbe {
            request_probe: RequestProbe::VERSION,
            model: PlanModel::of(&loaded.model),
            reading: RequestReading {
                features: vec![RequestFeature { layer: 20, at: At::Mean }],
                n_behind: 5,
            },
            probe: LogisticProbe { weights: vec![0.0; loaded.model.config().d_model], bias },
            threshold: 0.0,
        };
        let path = folder.path().join(name);
        std::fs::write(&path, probe.to_json().unwrap()).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (always, never) = (probe("always.json", 1.0), probe("never.json", -1.0));
    let script = format!(
        "{question}\n/new\n/when {never}\n{question}\n/new\n/when {path}\n/when\n{question}\n"
    );
    let lines = said(&["--plan", path, "--when", &always], &loaded, &saes, &script);
    let answer = |line: usize| lines[line].strip_prefix("steered> ").unwrap();
    assert_eq!(answer(0), format!("⟨the probe fires⟩\n{steered}"));
    assert_eq!(answer(2), format!("Steering where the probe {never} fires."));
    assert_eq!(answer(3), format!("⟨the probe does not fire⟩\n{plain}"));
    assert!(answer(5).starts_with("the probe "), "{lines:?}");
    assert_eq!(answer(6), "Steering every answer.");
    assert_eq!(answer(7), steered);
}
