//! Probes of requests, against activations captured one by one.

use goldens::assert_close;
use model_hooks::{ForwardError, HookError};
use steering::plan::PlanModel;
use steering::{
    At, LogisticProbe, PlanError, Request, RequestFeature, RequestProbe, RequestReading,
};

use super::*;

/// All begin alike; the words of each begin behind that, and one token stands behind them.
fn requests() -> Vec<Request> {
    let words: [&[u32]; 3] = [&[9, 40, 77, 12], &[3], &[9, 40, 23, 60, 8, 8, 1]];
    let ids = |words: &[u32]| [&[5, 6, 7], words, &[99]].concat();
    words.iter().map(|words| Request { ids: ids(words), start: 3 }).collect()
}

fn reading() -> RequestReading {
    let feature = |layer, at| RequestFeature { layer, at };
    let features =
        vec![feature(1, At::Mean), feature(0, At::FromEnd(0)), feature(1, At::FromEnd(1))];
    RequestReading { features, n_behind: 1 }
}

fn probe(model: &LanguageModel) -> RequestProbe {
    let weights = random_direction(3 * D_MODEL, 1.0, 3, &Device::flex()).into_data();
    RequestProbe {
        request_probe: RequestProbe::VERSION,
        model: PlanModel::of(model),
        reading: reading(),
        probe: LogisticProbe { weights: weights.try_to_vec().unwrap(), bias: 0.25 },
        threshold: 0.0,
    }
}

/// What is read behind a block at some positions of one request alone, in the mean.
fn captured(model: &LanguageModel, request: &Request, layer: usize, at: &[usize]) -> Vec<f32> {
    let point = HookPoint::resid_post(layer);
    let tokens = TokenBatch::new(&[&request.ids], model.config(), model.device()).unwrap();
    let cache = model.capture(&tokens, [point]).unwrap();
    let all = cache.get::<3>(point).unwrap().into_data().try_to_vec::<f32>().unwrap();
    let rows: Vec<&[f32]> = at.iter().map(|&at| &all[at * D_MODEL..][..D_MODEL]).collect();
    let sum = |i: usize| rows.iter().map(|row| row[i]).sum::<f32>();
    (0..D_MODEL).map(|i| sum(i) / rows.len() as f32).collect()
}

#[test]
fn features_are_those_of_each_request_alone() {
    let (model, requests) = (model(), requests());
    let expected = |request: &Request| {
        let n = request.ids.len();
        let words: Vec<usize> = (request.start..n - 1).collect();
        [
            captured(&model, request, 1, &words),
            captured(&model, request, 0, &[n - 1]),
            captured(&model, request, 1, &[n - 2]),
        ]
        .concat()
    };
    for batch_tokens in [4, 1000] {
        let mut n_read = 0;
        let read = reading().read(&model, &requests, batch_tokens, |n| n_read += n).unwrap();
        assert_eq!(n_read, requests.len());
        for (request, read) in requests.iter().zip(&read) {
            assert_close("features", read, &expected(request), 1e-5);
        }
    }
    let alone = reading().read(&model, &requests[1..2], 1000, |_| ()).unwrap();
    assert_close("alone", &alone[0], &expected(&requests[1]), 1e-5);
    assert!(reading().read(&model, &[], 1000, |_| ()).unwrap().is_empty());
    // Words that begin elsewhere make another mean.
    let shifted = Request { start: 5, ..requests[0].clone() };
    let read = reading().read(&model, std::slice::from_ref(&shifted), 1000, |_| ()).unwrap();
    assert_close("shifted", &read[0], &expected(&shifted), 1e-5);
}

#[test]
fn probes_fire_where_the_logit_is_above_the_threshold() {
    let (model, requests) = (model(), requests());
    let mut probe = probe(&model);
    let read = probe.reading.read(&model, &requests, 1000, |_| ()).unwrap();
    let logits: Vec<f64> = read.iter().map(|x| probe.probe.logit(x)).collect();
    for &threshold in &logits {
        probe.threshold = threshold - 1e-3;
        let expected: Vec<bool> = logits.iter().map(|&logit| logit > threshold - 1e-3).collect();
        assert_eq!(probe.fires(&model, &requests).unwrap(), expected);
    }
}

#[test]
fn probes_read_back_the_same_and_fit_their_own_model_alone() {
    let model = model();
    let probe = probe(&model);
    let json = probe.to_json().unwrap();
    assert_eq!(RequestProbe::from_json(&json).unwrap(), probe);
    probe.check(&model, None).unwrap();

    let refused = |json: &str| RequestProbe::from_json(json).unwrap_err();
    assert!(matches!(refused("{}"), PlanError::Json(_)));
    let newer = json.replacen("\"request_probe\": 1", "\"request_probe\": 2", 1);
    assert!(matches!(refused(&newer), PlanError::Version { expected: 1, actual: 2 }));
    let unknown = json.replacen("\"threshold\"", "\"treshold\": 1.0,\n  \"threshold\"", 1);
    assert!(matches!(refused(&unknown), PlanError::Json(_)));

    let mut narrow = probe.clone();
    narrow.probe.weights.pop();
    let refused = narrow.to_json().unwrap_err();
    assert!(matches!(refused, PlanError::ProbeWidth { expected: 144, actual: 143 }), "{refused}");
    let mut boundless = probe.clone();
    boundless.model.d_model = usize::MAX;
    assert!(matches!(boundless.to_json().unwrap_err(), PlanError::ProbeWidth { .. }));
    // Before the first token there is nothing to read.
    let mut early = probe.clone();
    early.reading.features[1].at = At::FromEnd(usize::MAX);
    let read = early.reading.read(&model, &requests(), 1000, |_| ()).unwrap();
    assert!(read.iter().all(|x| x[D_MODEL..2 * D_MODEL].iter().all(|&x| x == 0.0)));
    let infinite = RequestProbe { threshold: f64::INFINITY, ..probe.clone() };
    assert!(matches!(infinite.to_json().unwrap_err(), PlanError::NotFinite { .. }));
    let mut deep = probe.clone();
    deep.reading.features[0].layer = 70;
    let refused = deep.check(&model, None).unwrap_err();
    let PlanError::Probe { source: HookError::NoSuchPoint { .. } } = refused else {
        panic!("{refused}")
    };
    assert!(matches!(deep.fires(&model, &requests()), Err(ForwardError::Hook(_))));
    let mut other = probe;
    other.model.sha256 = Some("0".repeat(64));
    assert!(matches!(other.check(&model, None).unwrap_err(), PlanError::UnknownHash { .. }));
    assert!(matches!(other.check(&model, Some("1")).unwrap_err(), PlanError::Mismatch { .. }));
}
