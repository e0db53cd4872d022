//! Every intervention, everywhere and somewhere.

use goldens::assert_close;
use model_hooks::{ForwardError, HookError, HookPoint};
use sae_core::Normalization;
use steering::{
    Amount, Intervention, LatentChange, LatentEdit, LatentEdits, Part, Reading, Region, Remainder,
    Steering, SteeringError, residual_writers,
};

use super::*;

/// One of each kind, strong enough to be seen.
fn interventions(sae: &Sae) -> Vec<(&'static str, Intervention<'_>)> {
    let device = Device::flex();
    let of_maximum = Amount::OfMaximum { multiple: 2.0, maximum: 3.0 };
    let edits = vec![
        LatentEdit { latent: 3, change: LatentChange::Clamp(of_maximum) },
        LatentEdit { latent: 80, change: LatentChange::AtLeast(Amount::Value(4.0)) },
        LatentEdit { latent: 7, change: LatentChange::Scale(-3.0) },
        LatentEdit { latent: 9, change: LatentChange::ClampActive(Amount::Value(-8.0)) },
    ];
    let latents = |remainder, reading| {
        Intervention::Latents(LatentEdits { sae, edits: edits.clone(), remainder, reading })
    };
    let mean = random_direction(D_MODEL, 5.0, 8, &device);
    vec![
        ("clamp", Intervention::clamp(sae, [(3, 4.0), (80, 6.0)])),
        ("edits", latents(Remainder::Keep, Reading::Exact)),
        ("edits, remainder dropped", latents(Remainder::Drop, Reading::Exact)),
        ("edits, by threshold", latents(Remainder::Keep, Reading::Threshold(0.4))),
        ("add", Intervention::Add { direction: direction(5) }),
        ("ablate", Intervention::Ablate { direction: direction(5) }),
        ("affine", Intervention::Affine { direction: direction(5), mean, strength: 1.5 }),
    ]
}

/// Where each is made: at a block's end, or at all that writes to the residual stream.
fn places(model: &LanguageModel) -> [Vec<HookPoint>; 2] {
    [vec![POINT], residual_writers(model.hook_points())]
}

fn regions() -> [Region; 6] {
    [
        Region::default(),
        Region::from_position(1),
        Region::from_position(8),
        Region { to_position: Some(4), ..Region::default() },
        Region::from_position(1).part(Part::Prompt),
        Region::default().part(Part::Answer),
    ]
}

#[test]
fn steps_and_batches_are_steered_like_one_pass_of_each() {
    let (model, sae) = (model(), sae());
    let mut n_changed = 0;
    let plain = answers(&model, &ROWS, &[], &mut ());
    for (name, intervention) in interventions(&sae) {
        for (region, points) in
            regions().into_iter().flat_map(|r| places(&model).map(|points| (r.clone(), points)))
        {
            let steering =
                || Steering::new(points.clone(), intervention.clone(), region.clone()).unwrap();
            let together = answers(&model, &ROWS, &[], &mut steering());
            n_changed += usize::from(together != plain);
            for (answer, ids) in together.iter().zip(ROWS) {
                let with_length = || {
                    let mut steering = steering();
                    steering.set_prompt_lengths(vec![ids.len()]);
                    steering
                };
                assert_eq!(*answer, uncached(&model, ids, with_length), "{name}, {region:?}");
            }
        }
    }
    assert!(n_changed > 40, "only {n_changed} of 84 changed an answer");
}

#[test]
fn a_prefix_is_steered_like_a_prompt() {
    let (model, sae) = (model(), sae());
    let prefix = [11, 90, 33];
    for (name, intervention) in interventions(&sae) {
        let steering =
            || Steering::new([POINT], intervention.clone(), Region::from_position(1)).unwrap();
        let behind = answers(&model, &ROWS, &prefix, &mut steering());
        let whole: Vec<Vec<u32>> = ROWS.iter().map(|row| [&prefix, *row].concat()).collect();
        let whole: Vec<&[u32]> = whole.iter().map(Vec::as_slice).collect();
        assert_eq!(behind, answers(&model, &whole, &[], &mut steering()), "{name}");
    }
}

#[test]
fn steering_by_nothing_changes_nothing() {
    let (model, sae) = (model(), sae());
    let (logits, _) = run(&model, &ROWS, &mut ());
    let zero = Tensor::zeros([D_MODEL], &Device::flex());
    let unchanged = [
        ("zero", Intervention::Add { direction: zero }, 0.0),
        (
            "scale by one",
            Intervention::edit(&sae, [LatentEdit { latent: 5, change: LatentChange::Scale(1.0) }]),
            1e-5,
        ),
        (
            "at least zero",
            Intervention::edit(
                &sae,
                [LatentEdit { latent: 5, change: LatentChange::AtLeast(Amount::Value(0.0)) }],
            ),
            1e-5,
        ),
    ];
    for (name, intervention, tolerance) in unchanged {
        let mut steering = Steering::new([POINT], intervention, Region::default()).unwrap();
        assert_close(name, &run(&model, &ROWS, &mut steering).0, &logits, tolerance);
    }
}

#[test]
fn nothing_of_an_ablated_direction_is_left() {
    let model = model();
    let unit = floats(direction(5) / norm(&direction(5)));
    let intervention = || Intervention::Ablate { direction: direction(5) };
    let mut ablate = Steering::new([POINT], intervention(), Region::default()).unwrap();
    let along = |after: Vec<f32>| -> Vec<f32> {
        let project = |x: &[f32]| x.iter().zip(&unit).map(|(x, u)| x * u).sum::<f32>();
        after.chunks(D_MODEL).map(project).collect()
    };
    let left = along(run(&model, &ROWS, &mut ablate).1);
    assert_close("at one point", &left, &vec![0.0; left.len()], 1e-4);
    // At every writer, it is in no residual stream.
    let writers = residual_writers(model.hook_points());
    assert_eq!(writers.len(), 1 + 2 * model.config().n_layers);
    let mut ablate = Steering::new(writers, intervention(), Region::default()).unwrap();
    let left = along(run(&model, &ROWS, &mut ablate).1);
    assert_close("at every writer", &left, &vec![0.0; left.len()], 1e-4);
}

#[test]
fn affine_editing_leaves_the_mean_s_share_and_the_strength() {
    let model = model();
    let (r, mean) = (direction(5), direction(6));
    let intervention =
        Intervention::Affine { direction: r.clone(), mean: mean.clone(), strength: 0.5 };
    let mut steering = Steering::new([POINT], intervention, Region::default()).unwrap();
    let (_, before) = run(&model, &ROWS[..1], &mut ());
    let (_, after) = run(&model, &ROWS[..1], &mut steering);
    let (r, mean) = (floats(r), floats(mean));
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    for (before, after) in before.chunks(D_MODEL).zip(after.chunks(D_MODEL)) {
        let share = (dot(&r, before) - dot(&r, &mean)) / dot(&r, &r);
        let edited = before.iter().zip(&r).map(|(x, r)| x - share * r + 0.5 * r);
        assert_close("affine", after, &edited.collect::<Vec<f32>>(), 1e-4);
    }
}

#[test]
fn what_lies_outside_of_the_region_is_left_alone() {
    let (model, sae) = (model(), sae());
    let (_, before) = run(&model, &ROWS[..1], &mut ());
    let region = Region { to_position: Some(5), ..Region::from_position(3) };
    let clamp = Intervention::clamp(&sae, [(3, 50.0)]);
    let mut steering = Steering::new([POINT], clamp, region).unwrap();
    let (_, after) = run(&model, &ROWS[..1], &mut steering);
    assert_eq!(after[..3 * D_MODEL], before[..3 * D_MODEL]);
    assert_eq!(after[5 * D_MODEL..], before[5 * D_MODEL..]);
    assert!((3..5).all(|p| {
        let row = p * D_MODEL..(p + 1) * D_MODEL;
        after[row.clone()] != before[row]
    }));
}

#[test]
fn rows_begin_where_they_are_told_to() {
    let model = model();
    let add = || Intervention::Add { direction: direction(5) * 4.0 };
    let steering = |starts: Vec<Option<usize>>| {
        let mut steering = Steering::new([POINT], add(), Region::default()).unwrap();
        steering.set_starts(starts);
        steering
    };
    let together = answers(&model, &ROWS, &[], &mut steering(vec![Some(3), None, Some(0)]));
    assert_eq!(together[0], uncached(&model, ROWS[0], || steering(vec![Some(3)])));
    assert_eq!(together[1], uncached(&model, ROWS[1], || ()));
    assert_eq!(together[2], uncached(&model, ROWS[2], || steering(vec![Some(0)])));
    assert_ne!(together, answers(&model, &ROWS, &[], &mut ()));
}

#[test]
fn prompts_that_nothing_was_said_of_are_an_error_of_the_pass() {
    let model = model();
    let tokens = TokenBatch::new(&ROWS, model.config(), model.device()).unwrap();
    let add = || Intervention::Add { direction: direction(5) };
    let mut steering = Steering::new([POINT], add(), Region::default()).unwrap();
    steering.set_starts(vec![Some(0); 2]);
    let error = |expected, actual| {
        ForwardError::Hook(HookError::Prompts { point: POINT, expected, actual })
    };
    assert_eq!(model.logits(&tokens, &mut steering).unwrap_err(), error(2, 2));
    steering.set_starts(vec![Some(0); 3]);
    assert!(model.logits(&tokens, &mut steering).is_ok());
}

#[test]
fn rows_that_end_take_what_was_said_of_them_along() {
    let model = model();
    let plain = answers(&model, &ROWS, &[], &mut ());
    // The first row ends with its first token, the others move up.
    let config = GenerateConfig::greedy(NEW_TOKENS, vec![plain[0][0]]);
    let add = Intervention::Add { direction: direction(5) * 4.0 };
    let region = Region::default().part(Part::Answer);
    let mut steering = Steering::new([POINT], add, region).unwrap();
    steering.set_starts(vec![None, None, Some(0)]);
    let none = SharedPrefix::default();
    let together = model.generate(&ROWS, &none, &config, &mut steering, unobserved).unwrap();
    assert_eq!(together[0], plain[0][..1]);
    for row in [1, 2] {
        steering.set_starts(vec![(row == 2).then_some(0)]);
        let alone =
            model.generate(&ROWS[row..=row], &none, &config, &mut steering, unobserved).unwrap();
        assert_eq!(together[row], alone[0], "row {row}");
    }
    assert_ne!(together[2], plain[2]);
}

#[test]
fn what_cannot_steer_is_a_typed_error() {
    let sae = sae();
    let new = |intervention| Steering::new([POINT], intervention, Region::default()).err();
    let clamp = |values: Vec<(usize, f64)>| new(Intervention::clamp(&sae, values));
    let missing = SteeringError::NoSuchLatent { latent: 120, d_sae: 120 };
    assert_eq!(clamp(vec![(0, 1.0), (120, 1.0)]), Some(missing));
    let twice = SteeringError::DuplicateLatent { latent: 5 };
    assert_eq!(clamp(vec![(5, 1.0), (5, 2.0)]), Some(twice));
    for value in [f64::NAN, f64::INFINITY, 1e300] {
        assert!(matches!(clamp(vec![(0, value)]), Some(SteeringError::NotFinite { .. })));
    }
    assert!(matches!(clamp(vec![]), Some(SteeringError::Nothing { .. })));
    let zero = Tensor::zeros([D_MODEL], &Device::flex());
    let ablate = new(Intervention::Ablate { direction: zero });
    assert!(matches!(ablate, Some(SteeringError::Nothing { .. })));
    let mean = random_direction(7, 1.0, 0, &Device::flex());
    let affine = new(Intervention::Affine { direction: direction(5), mean, strength: 1.0 });
    assert!(matches!(affine, Some(SteeringError::Width { expected: D_MODEL, actual: 7, .. })));
    let nowhere =
        Steering::new([], Intervention::Add { direction: direction(5) }, Region::default()).err();
    assert!(matches!(nowhere, Some(SteeringError::Nothing { .. })));
    let never = Region { to_position: Some(3), ..Region::from_position(3) };
    let never = Steering::new([POINT], Intervention::Add { direction: direction(5) }, never).err();
    assert!(matches!(never, Some(SteeringError::Nothing { .. })));
    let relu = sae_of(Activation::Relu, Normalization::None);
    let edits = vec![LatentEdit::ablate(3)];
    let (remainder, reading) = (Remainder::Keep, Reading::Threshold(1.0));
    let by_threshold =
        new(Intervention::Latents(LatentEdits { sae: &relu, edits, remainder, reading }));
    assert!(matches!(by_threshold, Some(SteeringError::NoThreshold { .. })));
    let (edits, remainder) = (vec![LatentEdit::ablate(3)], Remainder::Drop);
    let needless = new(Intervention::Latents(LatentEdits { sae: &sae, edits, remainder, reading }));
    assert!(matches!(needless, Some(SteeringError::NeedlessThreshold)));
}

#[test]
fn an_autoencoder_of_another_width_is_a_typed_error_of_the_pass() {
    let (model, direction) = (model(), random_direction(7, 1.0, 0, &Device::flex()));
    let add = Intervention::Add { direction };
    let mut steering = Steering::new([POINT], add, Region::default()).unwrap();
    let tokens = TokenBatch::new(&ROWS, model.config(), model.device()).unwrap();
    let error = model.logits(&tokens, &mut steering).unwrap_err();
    let width = HookError::Width { point: POINT, expected: 7, actual: D_MODEL };
    assert_eq!(error, ForwardError::Hook(width));
}

#[test]
fn a_point_that_is_never_met_is_an_error() {
    let model = model();
    let far = HookPoint::resid_post(9);
    let add = Intervention::Add { direction: direction(5) };
    let mut steering = Steering::new([POINT, far], add, Region::default()).unwrap();
    let tokens = TokenBatch::new(&ROWS, model.config(), model.device()).unwrap();
    let error = model.logits(&tokens, &mut steering).unwrap_err();
    assert_eq!(error, ForwardError::Hook(HookError::NeverFired { point: far }));
}
