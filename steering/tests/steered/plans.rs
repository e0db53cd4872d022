//! Plans and control vectors: documents that say what to do.

use std::collections::BTreeMap;
use std::io::Cursor;

use goldens::assert_close;
use model_hooks::load::Gguf;
use proptest::prelude::*;
use sae_core::SaeMetadata;
use serde_json::{Value, json};
use steering::format::control_vector::{ControlVector, ControlVectorError};
use steering::plan::{
    Plan, PlanCondition, PlanError, PlanIntervention, PlanModel, PlanSae, PlanScore, PlanStep,
};
use steering::{
    Amount, Condition, Intervention, LatentChange, LatentEdit, LatentEdits, Over, Part, Reading,
    Region, Remainder, Score, Steering, Steerings, fingerprint,
};

use super::*;

fn placed_sae() -> Sae {
    let mut metadata = SaeMetadata::default();
    metadata.hook_name = Some(POINT.to_string());
    sae().with_metadata(metadata)
}

/// A plan with one of everything.
fn plan(model: &LanguageModel, sae: &Sae) -> Plan {
    let edits = vec![
        LatentEdit {
            latent: 3,
            change: LatentChange::Clamp(Amount::OfMaximum { multiple: 2.0, maximum: 2.1 }),
        },
        LatentEdit { latent: 80, change: LatentChange::AtLeast(Amount::Value(4.5)) },
        LatentEdit { latent: 7, change: LatentChange::Scale(-0.1) },
        LatentEdit { latent: 9, change: LatentChange::ClampActive(Amount::Value(-8.0)) },
    ];
    let latents = PlanIntervention::Latents {
        sae: "refusal".into(),
        edits,
        remainder: Remainder::Keep,
        reading: Reading::Exact,
    };
    let direction = floats(direction(5));
    let step = |intervention| PlanStep {
        points: vec![POINT],
        intervention,
        region: Region::from_position(1),
        condition: None,
    };
    let condition = |score, over| PlanCondition {
        point: POINT,
        score,
        over,
        threshold: -0.7,
        from_position: 1,
    };
    let cosine = PlanScore::Cosine { direction: direction.clone() };
    let latent =
        PlanScore::Latent { sae: "refusal".into(), latent: 3, reading: Reading::Threshold(0.3) };
    let probe = PlanScore::Probe { weights: direction.clone(), bias: 0.1 };
    let region =
        Region { from_position: 2, to_position: Some(900), part: Part::Answer, marker: None };
    let mut plan = Plan::new(PlanModel {
        name: Some("a tiny one".into()),
        sha256: Some("ab".into()),
        ..PlanModel::of(model)
    });
    plan.saes = vec![PlanSae::of("refusal", sae)];
    plan.steps = vec![
        PlanStep { condition: Some(condition(cosine, Over::LastPromptToken)), ..step(latents) },
        PlanStep {
            condition: Some(condition(latent, Over::PromptShare(0.2))),
            region,
            ..step(PlanIntervention::Add { direction: direction.clone() })
        },
        PlanStep {
            condition: Some(condition(probe, Over::EachToken)),
            ..step(PlanIntervention::Ablate { direction: direction.clone() })
        },
        step(PlanIntervention::Affine { mean: direction.clone(), direction, strength: 0.25 }),
    ];
    plan
}

#[test]
fn a_plan_does_what_it_says() {
    let (model, sae) = (model(), placed_sae());
    let saes = BTreeMap::from([("refusal".to_owned(), &sae)]);
    let mut plan = plan(&model, &sae);
    plan.steps.truncate(2);
    let mut bound = plan.bind(&model, Some("ab"), &saes).unwrap();
    let PlanIntervention::Latents { edits, .. } = &plan.steps[0].intervention else {
        panic!("the first step changes latents")
    };
    let condition = |score, over| Condition {
        point: POINT,
        score,
        over,
        threshold: f64::from(-0.7f32),
        from_position: 1,
    };
    let latents = LatentEdits {
        sae: &sae,
        edits: edits.clone(),
        remainder: Remainder::Keep,
        reading: Reading::Exact,
    };
    let cosine = Score::Cosine { direction: direction(5) };
    let first =
        Steering::new([POINT], Intervention::Latents(latents), Region::from_position(1)).unwrap();
    let first = first.when(condition(cosine, Over::LastPromptToken)).unwrap();
    let latent = Score::Latent { sae: &sae, latent: 3, reading: Reading::Threshold(0.3) };
    let add = Intervention::Add { direction: direction(5) };
    let second = Steering::new([POINT], add, plan.steps[1].region.clone()).unwrap();
    let second = second.when(condition(latent, Over::PromptShare(0.2))).unwrap();
    let mut by_hand = Steerings { steps: vec![first, second] };
    let expected = answers(&model, &ROWS, &[], &mut by_hand);
    assert_eq!(answers(&model, &ROWS, &[], &mut bound), expected);
    assert_ne!(expected, answers(&model, &ROWS, &[], &mut ()));
}

#[test]
fn what_is_written_reads_back_the_same() {
    let (model, sae) = (model(), placed_sae());
    let plan = plan(&model, &sae);
    let json = plan.to_json().unwrap();
    let read = Plan::from_json(&json).unwrap();
    assert_eq!(read, plan);
    assert_eq!(read.to_json().unwrap(), json);
}

proptest! {
    /// Damaged files are read or refused; nothing else happens.
    #[test]
    fn damage_is_an_error_or_another_document(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let damaged = |mut bytes: Vec<u8>| {
            for (at, byte) in &changes {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            bytes
        };
        if let Ok(read) = reread(damaged(vector().to_bytes().unwrap())) {
            prop_assert!(read.to_bytes().is_ok());
        }
        let json = r#"{"steering_plan": 1, "model": {"architecture": "llama", "n_layers": 3,
            "d_model": 4, "d_vocab": 9}, "steps": [{"points": ["blocks.1.hook_resid_post"],
            "intervention": {"add": {"direction": [1, -2.5e-3]}},
            "region": {"from_position": 1}}]}"#;
        prop_assert!(Plan::from_json(json).is_ok());
        if let Ok(json) = String::from_utf8(damaged(json.into()))
            && let Ok(plan) = Plan::from_json(&json)
        {
            prop_assert!(plan.to_json().is_ok());
        }
    }

    #[test]
    fn every_finite_number_survives(bits in prop::collection::vec(any::<u32>(), 1..40)) {
        let direction: Vec<f32> =
            bits.into_iter().map(f32::from_bits).filter(|value| value.is_finite()).collect();
        let model = PlanModel {
            name: None,
            architecture: model_hooks::config::Architecture::Llama,
            n_layers: 1,
            d_model: 1,
            d_vocab: 1,
            sha256: None,
        };
        let mut plan = Plan::new(model);
        plan.steps = vec![PlanStep {
            points: vec![POINT],
            intervention: PlanIntervention::Add { direction },
            region: Region::default(),
            condition: None,
        }];
        let read = Plan::from_json(&plan.to_json().unwrap()).unwrap();
        let bits = |plan: &Plan| match &plan.steps[0].intervention {
            PlanIntervention::Add { direction } => {
                direction.iter().map(|value| value.to_bits()).collect::<Vec<_>>()
            }
            _ => unreachable!("it adds"),
        };
        prop_assert_eq!(bits(&read), bits(&plan));
    }
}

/// The plan's document with something replaced.
fn changed(plan: &Plan, pointer: &str, value: Value) -> String {
    let mut json: Value = serde_json::from_str(&plan.to_json().unwrap()).unwrap();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    match json.pointer_mut(parent).unwrap() {
        Value::Object(map) => {
            map.insert(key.to_owned(), value);
        }
        Value::Array(list) => list[key.parse::<usize>().unwrap()] = value,
        other => panic!("{other} has nothing in it"),
    }
    json.to_string()
}

#[test]
fn what_is_no_plan_is_a_typed_error() {
    let (model, sae) = (model(), placed_sae());
    let plan = plan(&model, &sae);
    let error =
        |pointer: &str, value: Value| Plan::from_json(&changed(&plan, pointer, value)).unwrap_err();
    let places = [
        "/extra",
        "/model/extra",
        "/saes/0/extra",
        "/steps/0/extra",
        "/steps/0/region/extra",
        "/steps/0/condition/extra",
        "/steps/0/condition/score/extra",
        "/steps/0/condition/score/cosine/extra",
        "/steps/0/intervention/extra",
        "/steps/0/intervention/latents/extra",
        "/steps/0/intervention/latents/edits/0/extra",
        "/steps/0/intervention/latents/edits/0/change/extra",
        "/steps/0/intervention/latents/edits/0/change/clamp/extra",
        "/steps/0/intervention/latents/edits/0/change/clamp/of_maximum/extra",
    ];
    for place in places {
        assert!(matches!(error(place, json!(1)), PlanError::Json(_)), "{place}");
    }
    let version = error("/steering_plan", json!(2));
    assert!(matches!(version, PlanError::Version { expected: 1, actual: 2 }));
    let point = error("/steps/0/points/0", json!("blocks.1.hook_resid"));
    assert!(matches!(point, PlanError::Json(_)));
    let unnamed = error("/steps/0/intervention/latents/sae", json!("other"));
    assert!(matches!(unnamed, PlanError::NoSuchSae { .. }));
    // Past the largest f32, and what two of them come to.
    let large = error("/steps/0/condition/threshold", json!(1e39));
    assert!(matches!(large, PlanError::NotFinite { .. }), "{large}");
    let change = "/steps/0/intervention/latents/edits/0/change/clamp";
    let product = error(change, json!({"of_maximum": {"multiple": 1e30, "maximum": 1e30}}));
    assert!(matches!(product, PlanError::NotFinite { .. }), "{product}");
    assert!(matches!(error("/steps", json!([])), PlanError::NoSteps));
    for text in ["", "{}", "[]", "{\"steering_plan\": 1}", "\u{0}", "{\"steering_plan\": 1e99}"] {
        assert!(matches!(Plan::from_json(text), Err(PlanError::Json(_))), "{text}");
    }

    let mut nan = plan.clone();
    nan.steps[3].intervention =
        PlanIntervention::Affine { direction: vec![f32::NAN], mean: vec![1.0], strength: 1.0 };
    assert!(matches!(nan.to_json(), Err(PlanError::NotFinite { .. })));
    let mut twice = plan.clone();
    twice.saes.push(twice.saes[0].clone());
    assert!(matches!(twice.to_json(), Err(PlanError::DuplicateSae { .. })));
}

#[test]
fn a_plan_fits_its_own_model_and_autoencoder_alone() {
    let (model, sae) = (model(), placed_sae());
    let saes = BTreeMap::from([("refusal".to_owned(), &sae)]);
    let plan = plan(&model, &sae);
    assert!(plan.bind(&model, Some("ab"), &saes).is_ok());
    let error = |plan: &Plan| plan.bind(&model, Some("ab"), &saes).unwrap_err();
    let mismatch = |error: PlanError| match error {
        PlanError::Mismatch { field, .. } => field,
        other => panic!("{other}"),
    };
    assert_eq!(mismatch(plan.bind(&model, Some("cd"), &saes).unwrap_err()), "SHA-256");
    let unknown = plan.bind(&model, None, &saes).unwrap_err();
    assert!(matches!(unknown, PlanError::UnknownHash { .. }));
    let missing = plan.bind(&model, Some("ab"), &BTreeMap::new()).unwrap_err();
    assert!(matches!(missing, PlanError::NoSuchSae { .. }));
    for (field, change) in [
        ("n_layers", (|plan| plan.model.n_layers += 1) as fn(&mut Plan)),
        ("d_model", |plan| plan.model.d_model += 1),
        ("d_vocab", |plan| plan.model.d_vocab += 1),
        ("architecture", |plan| {
            plan.model.architecture = model_hooks::config::Architecture::Gpt2;
        }),
        ("SHA-256", |plan| plan.saes[0].sha256 = "00".into()),
        ("d_in", |plan| plan.saes[0].d_in += 1),
        ("d_sae", |plan| plan.saes[0].d_sae += 1),
        ("hook_name", |plan| plan.saes[0].hook_name = None),
    ] {
        let mut other = plan.clone();
        change(&mut other);
        assert_eq!(mismatch(error(&other)), field);
    }
    let mut elsewhere = plan.clone();
    elsewhere.steps[0].points = vec![HookPoint::resid_post(2)];
    assert!(matches!(error(&elsewhere), PlanError::Layer { .. }));
    let mut nowhere = plan.clone();
    nowhere.steps[3].points = vec![HookPoint::resid_post(99)];
    assert!(matches!(error(&nowhere), PlanError::Point { step: 3, .. }));
    let mut narrow = plan.clone();
    narrow.steps[1].intervention = PlanIntervention::Add { direction: vec![1.0; 7] };
    assert!(matches!(error(&narrow), PlanError::Width { expected: D_MODEL, actual: 7, .. }));
    let mut unheard = plan.clone();
    let d_vocab = model.config().d_vocab;
    unheard.steps[1].region.marker = Some(d_vocab as u32);
    assert!(matches!(error(&unheard), PlanError::NoSuchToken { step: 1, .. }));
    unheard.steps[1].region.marker = Some(d_vocab as u32 - 1);
    assert!(unheard.bind(&model, Some("ab"), &saes).is_ok());
    let mut zero = plan.clone();
    zero.steps[2].intervention = PlanIntervention::Ablate { direction: vec![0.0; D_MODEL] };
    assert!(matches!(error(&zero), PlanError::Step { step: 2, .. }));
}

#[test]
fn a_fingerprint_is_of_equation_and_weights() {
    let sae = sae();
    assert_eq!(fingerprint(&sae), fingerprint(&placed_sae()));
    assert_eq!(fingerprint(&sae).len(), 64);
    let mut weights = sae.weights().clone();
    weights.b_enc = weights.b_enc + 1e-3;
    let other = Sae::new(sae.config().clone(), weights).unwrap();
    assert_ne!(fingerprint(&sae), fingerprint(&other));
    let mut config = sae.config().clone();
    config.apply_b_dec_to_input = false;
    let other = Sae::new(config, sae.weights().clone()).unwrap();
    assert_ne!(fingerprint(&sae), fingerprint(&other));
}

fn vector() -> ControlVector {
    let directions = BTreeMap::from([(1, floats(direction(5))), (2, floats(direction(6)))]);
    ControlVector { model_hint: "llama".into(), directions }
}

fn reread(bytes: Vec<u8>) -> Result<ControlVector, ControlVectorError> {
    ControlVector::read(Gguf::read(Cursor::new(bytes), "memory".as_ref())?)
}

#[test]
fn control_vectors_are_added_to_the_output_of_their_block() {
    let model = model();
    let mut by_vector = vector().steer(&model, -2.0, &Region::default()).unwrap();
    let step = |layer, seed| {
        let add = Intervention::Add { direction: direction(seed) * -2.0 };
        Steering::new([HookPoint::resid_post(layer)], add, Region::default()).unwrap()
    };
    let mut by_hand = (step(1, 5), step(2, 6));
    let expected = run(&model, &ROWS, &mut by_hand).0;
    assert_close("by vector", &run(&model, &ROWS, &mut by_vector).0, &expected, 0.0);
    let mut beyond = vector();
    beyond.directions.insert(3, vec![1.0; D_MODEL]);
    let error = beyond.steer(&model, 1.0, &Region::default()).unwrap_err();
    assert!(matches!(error, ControlVectorError::NoSuchLayer { layer: 3, last: 2 }));
}

#[test]
fn control_vectors_read_back_the_same() {
    let bytes = vector().to_bytes().unwrap();
    assert_eq!(reread(bytes.clone()).unwrap(), vector());
    assert_eq!(reread(bytes.clone()).unwrap().to_bytes().unwrap(), bytes);
}

#[test]
fn what_is_no_control_vector_is_a_typed_error() {
    let bytes = vector().to_bytes().unwrap();
    // Cut anywhere but in the padding at its end, it is an error.
    for n in 0..bytes.len() {
        if let Ok(read) = reread(bytes[..n].to_vec()) {
            assert_eq!(read, vector());
            assert!(n + 32 > bytes.len(), "{n}");
        }
    }
    let replaced = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let mut bytes = bytes.clone();
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        reread(bytes).unwrap_err()
    };
    for name in ["direction.0", "direction.x", "direction_1", "Direction.1"] {
        let error = replaced("direction.1", name);
        assert!(matches!(error, ControlVectorError::Name { .. }), "{name}: {error}");
    }
    let architecture = replaced("controlvector", "controlvectoR");
    assert!(matches!(architecture, ControlVectorError::Architecture { .. }));
    let hint = replaced("controlvector.model_hint", "controlvector.model_hinT");
    assert!(matches!(hint, ControlVectorError::Metadata { .. }));

    let with = |change: fn(&mut ControlVector)| {
        let mut vector = vector();
        change(&mut vector);
        vector.to_bytes().unwrap_err()
    };
    let error = with(|v| v.directions.get_mut(&1).unwrap()[3] = f32::NAN);
    assert!(matches!(error, ControlVectorError::NotFinite { layer: 1 }));
    let error = with(|v| {
        v.directions.insert(2, vec![1.0]);
    });
    assert!(matches!(error, ControlVectorError::Shape { layer: 2, .. }));
    assert!(matches!(with(|v| v.directions.clear()), ControlVectorError::Empty));
    let error = with(|v| {
        v.directions.insert(0, vec![1.0; D_MODEL]);
    });
    assert!(matches!(error, ControlVectorError::Name { .. }));
}
