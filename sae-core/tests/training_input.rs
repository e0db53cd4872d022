//! Every kind of SAE in training on input at the edge of what makes sense, and behind it.

use burn::tensor::{Device, Tensor, TensorData};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use sae_core::train::*;
use sae_core::{Activation, ConfigError};

/// No multiple of any SIMD width.
const D_IN: usize = 7;
const D_SAE: usize = 12;

fn noise(n: usize) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(3);
    (0..n * D_IN).map(|_| random.sample(StandardNormal)).collect()
}

fn rows(values: &[f32]) -> Tensor<2> {
    rows_on(&Device::flex(), values)
}

fn rows_on(device: &Device, values: &[f32]) -> Tensor<2> {
    let data = TensorData::new(values.to_vec(), [values.len() / D_IN, D_IN]);
    Tensor::from_data(data, device)
}

fn selecting(selection: Selection, rule: AuxKRule) -> Kind {
    Kind::Selecting(Selecting {
        aux_k: Some(AuxK { rule, ..AuxK::new() }),
        threshold: Some(RunningThreshold::SaeLens { rate: 0.05 }),
        ..Selecting::new(selection)
    })
}

fn objectives() -> Vec<Objective> {
    let sparsity = Sparsity::new(0.1);
    let lp = Sparsity { norm: SparsityNorm::Lp { p: 0.5 }, ..sparsity };
    let groups = vec![Group { width: 5, weight: 1.0 }, Group { width: D_SAE, weight: 1.0 }];
    let aux_k_target = AuxKTarget::OwnResidual;
    let auxiliary = GatedAuxiliary::UndetachedDecoder;
    let jump_relu = |l0| Kind::JumpRelu(JumpRelu { l0, ..JumpRelu::new(0.1) });
    let pursuit = MatchingPursuit {
        residual_threshold: 0.01,
        max_iterations: Some(3),
        stop_on_duplicate_support: true,
    };
    let kinds = vec![
        Kind::Standard(Standard { sparsity }),
        Kind::Standard(Standard { sparsity: lp }),
        Kind::Gated(Gated { sparsity, auxiliary }),
        selecting(Selection::TopK { k: 3 }, AuxKRule::SaeLens),
        selecting(Selection::TopK { k: D_SAE }, AuxKRule::OpenAi),
        selecting(Selection::MultiTopK { k: 3 }, AuxKRule::Sparsify),
        selecting(Selection::AbsTopK { k: D_SAE }, AuxKRule::SaeLens),
        selecting(Selection::GroupMax { k: D_SAE }, AuxKRule::SaeLens),
        selecting(Selection::BatchTopK { k: D_SAE as f64 }, AuxKRule::SaeLens),
        selecting(Selection::Matryoshka { k: 3.0, groups, aux_k_target }, AuxKRule::OpenAi),
        jump_relu(L0Loss::Step),
        jump_relu(L0Loss::Tanh { scale: 4.0 }),
        jump_relu(L0Loss::Quadratic { target: 3.0 }),
        jump_relu(L0Loss::BatchQuadratic { target: 3.0 }),
        Kind::MatchingPursuit(pursuit),
    ];
    let mut objectives: Vec<Objective> = kinds.into_iter().map(Objective::new).collect();
    objectives.push(Objective {
        ghost_gradients: Some(GhostGradients::new()),
        ..Objective::new(Kind::Standard(Standard { sparsity }))
    });
    objectives
}

fn config(objective: Objective, batch: usize) -> TrainConfig {
    TrainConfig::new(D_SAE, objective)
        .with_batch(batch)
        .with_clip_norm(Some(1.0))
        .with_dead_after(2 * batch as u64)
}

fn start(config: &TrainConfig) -> TrainState {
    start_on(&Device::flex(), config)
}

fn start_on(device: &Device, config: &TrainConfig) -> TrainState {
    let values = noise(64);
    let matrix = ActivationMatrix::new(&values, D_IN).expect("whole rows");
    TrainState::initial(config, &matrix, None, device).expect("valid")
}

fn bits(state: &TrainState) -> Vec<u32> {
    let tensors = state.parameters.named().map(|(_, tensor)| tensor.to_data());
    tensors.flat_map(|data| data.iter::<f32>().map(f32::to_bits).collect::<Vec<_>>()).collect()
}

#[test]
fn batches_of_one_row_and_of_equal_rows_train() {
    let values = noise(64);
    let row = &values[..D_IN];
    for objective in objectives() {
        for n in [1, 8] {
            let config = config(objective.clone(), n);
            let mut state = start(&config);
            let before = bits(&state);
            for step in 0..6 {
                let outcome = state.step(rows(&row.repeat(n)), &config, 6);
                assert!(matches!(outcome, StepOutcome::Taken(_)), "{objective:?}, step {step}");
            }
            assert!(state.parameters.are_finite() && bits(&state) != before, "{objective:?}");
        }
    }
}

#[test]
fn rows_without_variance_have_no_share_of_it_and_are_skipped() {
    let objective = Objective { error: ErrorMeasure::Fvu, ..Objective::top_k(3) };
    // One row never has any.
    assert!(config(objective.clone(), 1).validate(D_IN).is_err());
    let config = config(objective, 2);
    let mut state = start(&config);
    let before = bits(&state);
    let outcome = state.step(rows(&noise(1).repeat(2)), &config, 6);
    assert!(matches!(outcome, StepOutcome::Skipped { .. }), "{outcome:?}");
    assert!(bits(&state) == before && state.n_skipped == 1);
}

#[test]
fn what_is_not_finite_moves_nothing_of_any_kind() {
    for objective in objectives() {
        let config = config(objective.clone(), 8);
        let mut state = start(&config);
        // By now some latents are dead, where there are such.
        for _ in 0..4 {
            state.step(rows(&noise(1).repeat(8)), &config, 8);
        }
        let before = (bits(&state), state.ages.clone(), state.threshold);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30] {
            let mut values = noise(8);
            values[3 * D_IN + 2] = bad;
            let outcome = state.step(rows(&values), &config, 8);
            let place = format!("{objective:?}, {bad}");
            assert!(matches!(outcome, StepOutcome::Skipped { .. }), "{place}: {outcome:?}");
            assert!((bits(&state), state.ages.clone(), state.threshold) == before, "{place}");
        }
        assert_eq!((state.step, state.n_skipped), (8, 4));
    }
}

#[test]
fn a_transcoder_that_reads_what_is_not_finite_stays_as_it_is() {
    let config = config(Objective { apply_b_dec_to_input: false, ..Objective::top_k(3) }, 8)
        .with_transcoder(Some(Transcoder { d_out: D_IN, skip: false }));
    let values = noise(64);
    let matrix = ActivationMatrix::new(&values, D_IN).expect("whole rows");
    let device = Device::flex();
    let start = TrainState::initial(&config, &matrix, Some(&matrix), &device);
    let mut state = start.expect("valid");
    let before = bits(&state);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut values = noise(8);
        values[D_IN..2 * D_IN].fill(bad);
        let batch = Batch { x: rows(&values), target: Some(rows(&noise(8))) };
        let outcome = state.step(batch, &config, 8);
        assert!(matches!(outcome, StepOutcome::Skipped { .. }), "{bad}: {outcome:?}");
    }
    assert!(bits(&state) == before);
}

/// What the plain defaults of the kernels compute, up to the order of sums.
#[test]
fn every_kind_trains_alike_without_kernels_of_its_own() {
    #[allow(deprecated)]
    let devices = [Device::flex(), Device::ndarray()];
    for objective in objectives() {
        for (decoder, norm) in [(DecoderNorm::Free, 0.1), (DecoderNorm::Unit, 1.0)] {
            let config = config(objective.clone(), 8).with_decoder(decoder).with_decoder_norm(norm);
            let losses = devices.clone().map(|device| {
                let mut state = start_on(&device, &config);
                let values = noise(40);
                let losses = values.chunks(8 * D_IN).map(|rows| {
                    match state.step(rows_on(&device, rows), &config, 5) {
                        StepOutcome::Taken(report) => report.loss,
                        StepOutcome::Skipped { loss } => panic!("{objective:?}: {loss}"),
                    }
                });
                losses.collect::<Vec<_>>()
            });
            for (flex, plain) in losses[0].iter().zip(&losses[1]) {
                let off = (flex - plain).abs();
                assert!(off < 1e-4 * (1.0 + flex.abs()), "{objective:?}: {flex} and {plain}");
            }
        }
    }
}

#[test]
fn numbers_of_latents_that_do_not_fit_are_refused() {
    let groups = |width| vec![Group { width, weight: 1.0 }, Group { width: D_SAE, weight: 1.0 }];
    let aux_k_target = AuxKTarget::Residual;
    let matryoshka = |k| Selection::Matryoshka { k, groups: groups(5), aux_k_target };
    let with = |selection| config(Objective::new(selecting(selection, AuxKRule::SaeLens)), 8);
    let too_many = D_SAE + 1;
    for k in [0, too_many] {
        for selection in [
            Selection::TopK { k },
            Selection::MultiTopK { k },
            Selection::AbsTopK { k },
            Selection::GroupMax { k },
            Selection::BatchTopK { k: k as f64 },
            matryoshka(k as f64),
        ] {
            let error = with(selection.clone()).validate(D_IN).unwrap_err();
            let of_k = matches!(
                error,
                TrainError::Option { option: "k", .. }
                    | TrainError::Sae(ConfigError::K { d_sae: D_SAE, .. })
            );
            assert!(of_k, "{selection:?}: {error}");
        }
    }
    for selection in [Selection::BatchTopK { k: f64::NAN }, matryoshka(f64::INFINITY)] {
        let error = with(selection).validate(D_IN).unwrap_err();
        assert!(matches!(error, TrainError::Option { option: "k", .. }), "{error}");
    }
    for width in [0, D_SAE, too_many] {
        let selection = Selection::Matryoshka { k: 3.0, groups: groups(width), aux_k_target };
        let error = with(selection).validate(D_IN).unwrap_err();
        let of_width = matches!(error, TrainError::Option { option: "matryoshka.width", .. });
        assert!(of_width, "{width}: {error}");
    }
    let aux_k = Some(AuxK { k: Some(0), ..AuxK::new() });
    let kind = Kind::Selecting(Selecting { aux_k, ..Selecting::new(Selection::TopK { k: 3 }) });
    let error = config(Objective::new(kind), 8).validate(D_IN).unwrap_err();
    assert!(matches!(error, TrainError::Option { option: "aux_k.k", .. }), "{error}");
    assert!(config(Objective::top_k(3), 0).validate(D_IN).is_err());
}

#[test]
fn ghost_gradients_are_asked_for_where_they_mean_something() {
    let refused = |kind| {
        let ghost_gradients = Some(GhostGradients::new());
        let objective = Objective { ghost_gradients, ..Objective::new(kind) };
        config(objective, 8).validate(D_IN).unwrap_err()
    };
    let pursuit = objectives().into_iter().find(|o| matches!(o.kind, Kind::MatchingPursuit(_)));
    let conflict = |error| matches!(error, TrainError::Conflict { option: "ghost_gradients", .. });
    assert!(conflict(refused(pursuit.expect("in the list").kind)));
    assert!(conflict(refused(selecting(Selection::TopK { k: 3 }, AuxKRule::OpenAi))));
    let nothing = GhostGradients { coefficient: 0.0 };
    let objective = Objective { ghost_gradients: Some(nothing), ..Objective::top_k(3) };
    let error = config(objective.clone(), 8).validate(D_IN).unwrap_err();
    let named = matches!(error, TrainError::Option { option: "ghost_gradients.coefficient", .. });
    assert!(named, "{error}");
    // Objectives from before there were any read as they did, and are written as they were.
    let json = serde_json::to_string(&Objective::top_k(3)).expect("JSON");
    assert!(!json.contains("ghost"), "{json}");
    assert_eq!(serde_json::from_str::<Objective>(&json).expect("JSON"), Objective::top_k(3));
    let json = serde_json::to_string(&objective).expect("JSON");
    assert_eq!(serde_json::from_str::<Objective>(&json).expect("JSON"), objective);
}

/// One column would be spread over all of them.
#[test]
fn batches_of_another_shape_are_no_batches_of_this_sae() {
    let panics = |objective: &Objective, batch: Batch, dead: &[u32]| -> String {
        let state = start(&config(objective.clone(), 8));
        let run = || objective.differentiate(&state.parameters, &batch, dead);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
        *outcome.expect_err("refused").downcast::<String>().expect("a message")
    };
    let ones = |shape| Tensor::<2>::ones(shape, &Device::flex());
    for objective in objectives() {
        for width in [1, 6, 8] {
            let message = panics(&objective, ones([8, width]).into(), &[]);
            assert!(message.contains("the SAE reads 7"), "{message}");
        }
        for shape in [[8, 1], [1, 7], [7, 7]] {
            let target = Some(ones(shape));
            let message = panics(&objective, Batch { x: ones([8, 7]), target }, &[]);
            assert!(message.contains("a target of shape"), "{message}");
        }
        for dead in [&[3, 3][..], &[4, 3], &[3, D_SAE as u32]] {
            let message = panics(&objective, ones([8, 7]).into(), dead);
            assert!(message.contains("dead latents"), "{message}");
        }
    }
}

/// Counts, and penalties by the equation, as each step has them.
#[test]
fn k_and_p_move_in_the_steps_themselves() {
    let anneal = |from| {
        let anneal = Anneal { from, begin: 0.0, end: 1.0 };
        Schedule::new().with_learning_rate(1e-9).with_anneal(Some(anneal))
    };
    let all_on = noise(64);
    let config_k =
        config(Objective::new(Kind::Selecting(Selecting::new(Selection::AbsTopK { k: 2 }))), 8)
            .with_schedule(anneal(6.0));
    let mut state = start(&config_k);
    let l0s: Vec<f64> = (0..5)
        .map(|_| match state.step(rows(&all_on[..8 * D_IN]), &config_k, 4) {
            StepOutcome::Taken(report) => report.l0,
            skipped => panic!("{skipped:?}"),
        })
        .collect();
    assert_eq!(l0s, [6.0, 5.0, 4.0, 3.0, 2.0]);

    let norm = SparsityNorm::LpToTheP { p: 0.5 };
    let sparsity = Sparsity { coefficient: 2.0, norm, weighted_by_decoder_norms: false };
    let config_p =
        config(Objective::new(Kind::Standard(Standard { sparsity })), 8).with_schedule(anneal(1.0));
    let mut state = start(&config_p);
    for p in [1.0, 0.875, 0.75, 0.625, 0.5] {
        let x = rows(&all_on[..8 * D_IN]);
        let found = config_p.objective.differentiate(&state.parameters, &x.clone().into(), &[]);
        let latents: Vec<f32> = found.latents.to_dense().into_data().try_to_vec().expect("f32");
        let on = latents.iter().filter(|z| **z > 0.0);
        let expected = 2.0 * on.map(|z| f64::from(*z).powf(p)).sum::<f64>() / 8.0;
        let StepOutcome::Taken(report) = state.step(x, &config_p, 4) else { panic!("skipped") };
        let (_, actual) =
            report.terms.iter().find(|(term, _)| *term == Term::Sparsity).expect("told");
        assert!((actual / expected - 1.0).abs() < 1e-4, "{p}: {actual} for {expected}");
    }
}

#[test]
fn a_run_starts_in_the_centre_that_it_names() {
    // Of these, one point is the median, and another one the mean.
    let values = [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [8.0, 5.0]].concat();
    let matrix = ActivationMatrix::new(&values, 2).expect("whole rows");
    for (centre, expected) in [
        (Centre::Zero, [0.0, 0.0]),
        (Centre::Mean, [2.0, 2.0]),
        (Centre::GeometricMedian, [0.0, 1.0]),
    ] {
        let config = TrainConfig::new(4, Objective::top_k(2)).with_centre(centre);
        let state = TrainState::initial(&config, &matrix, None, &Device::flex()).expect("valid");
        let b_dec = state.parameters.get(ParameterName::BDec).expect("there").to_data();
        for (actual, expected) in b_dec.iter::<f32>().zip(expected) {
            let off = f64::from(actual) / state.input_scale - expected;
            assert!(off.abs() < 1e-4, "{centre:?}: {b_dec:?}");
        }
    }
    assert_eq!(
        Objective::top_k(2).activation(),
        Activation::TopK { k: 2, rescale_by_decoder_norm: true }
    );
}
