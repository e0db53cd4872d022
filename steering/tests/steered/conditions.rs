//! Conditions decide for each conversation by itself.

use model_hooks::{HookPoint, RopeLength, TokenBatch};
use sae_core::Normalization;
use steering::{
    Condition, Intervention, Over, Part, Reading, Region, Score, Steering, SteeringError, scores,
};

use super::*;

const BEFORE: HookPoint = HookPoint::Block { layer: 0, site: Site::ResidPost };

/// Scores of every token of each row at the point where conditions are read.
fn token_scores(model: &LanguageModel, score: &Score<'_>) -> Vec<Vec<f32>> {
    let of_row = |row: &&[u32]| {
        let tokens = TokenBatch::new(&[row], model.config(), model.device()).unwrap();
        let x = model.capture(&tokens, [BEFORE]).unwrap().get::<3>(BEFORE).unwrap();
        scores(score.clone(), x.squeeze_dim::<2>(0)).unwrap()
    };
    ROWS.iter().map(of_row).collect()
}

fn over(over: Over, scores: &[f32]) -> f32 {
    let scores = &scores[1..];
    match over {
        Over::LastPromptToken => *scores.last().unwrap(),
        Over::PromptMean => scores.iter().sum::<f32>() / scores.len() as f32,
        Over::PromptMax => scores.iter().copied().fold(f32::MIN, f32::max),
        Over::PromptShare(above) => {
            scores.iter().filter(|&&s| s > above).count() as f32 / scores.len() as f32
        }
        Over::EachToken => unreachable!("no decision about the prompt"),
    }
}

fn all_scores(sae: &Sae) -> Vec<Score<'_>> {
    // The latent that is active most often.
    vec![
        Score::Cosine { direction: direction(40) },
        Score::Latent { sae, latent: 17, reading: Reading::Exact },
        Score::Probe { weights: direction(41), bias: 0.3 },
    ]
}

fn steering<'a>(score: &Score<'a>, over: Over, threshold: f32, region: Region) -> Steering<'a> {
    let add = Intervention::Add { direction: direction(5) * 4.0 };
    let condition = Condition {
        point: BEFORE,
        score: score.clone(),
        over,
        threshold: threshold.into(),
        from_position: 1,
    };
    Steering::new([POINT], add, region).unwrap().when(condition).unwrap()
}

#[test]
fn prompts_are_decided_about_by_themselves() {
    let (model, sae) = (model(), sae_of(Activation::Relu, Normalization::None));
    let everything = || {
        let add = Intervention::Add { direction: direction(5) * 4.0 };
        Steering::new([POINT], add, Region::from_position(1)).unwrap()
    };
    for score in all_scores(&sae) {
        let scores = token_scores(&model, &score);
        let middle = scores[0][3];
        for rule in
            [Over::LastPromptToken, Over::PromptMean, Over::PromptMax, Over::PromptShare(middle)]
        {
            let prompt: Vec<f32> = scores.iter().map(|scores| over(rule, scores)).collect();
            let mut sorted = prompt.clone();
            sorted.sort_by(f32::total_cmp);
            let threshold = (sorted[1] + sorted[2]) / 2.0;
            let expected: Vec<bool> = prompt.iter().map(|&score| score > threshold).collect();
            let mut gated = steering(&score, rule, threshold, Region::from_position(1));
            let together = answers(&model, &ROWS, &[], &mut gated);
            let decided: Vec<bool> = gated.decisions().into_values().collect();
            assert_eq!(decided, expected, "{score:?} {rule:?} {prompt:?}");
            for (row, &holds) in expected.iter().enumerate() {
                let alone = match holds {
                    true => answers(&model, &ROWS[row..=row], &[], &mut everything()),
                    false => answers(&model, &ROWS[row..=row], &[], &mut ()),
                };
                assert_eq!(together[row], alone[0], "{rule:?}, row {row}");
            }
        }
    }
}

#[test]
fn steps_are_decided_about_like_one_pass() {
    let (model, sae) = (model(), sae());
    for score in all_scores(&sae) {
        let scores = token_scores(&model, &score);
        let middle = scores[0][3].max(1e-6) * 0.999;
        for rule in [Over::EachToken, Over::LastPromptToken, Over::PromptShare(middle)] {
            for part in [Part::All, Part::Answer] {
                let region = Region::from_position(1).part(part);
                let gated = || steering(&score, rule, middle, region.clone());
                let together = answers(&model, &ROWS, &[], &mut gated());
                for (answer, ids) in together.iter().zip(ROWS) {
                    let alone = uncached(&model, ids, || {
                        let mut gated = gated();
                        gated.set_prompt_lengths(vec![ids.len()]);
                        gated
                    });
                    assert_eq!(*answer, alone, "{score:?} {rule:?} {part:?}");
                }
            }
        }
    }
}

#[test]
fn each_token_decides_for_itself() {
    let (model, sae) = (model(), sae());
    let score = &all_scores(&sae)[0];
    let scores = &token_scores(&model, score)[0];
    let threshold = scores[3];
    let mut gated = steering(score, Over::EachToken, threshold, Region::default());
    let (_, before) = run(&model, &ROWS[..1], &mut ());
    let (_, after) = run(&model, &ROWS[..1], &mut gated);
    for (position, score) in scores.iter().enumerate() {
        let row = position * D_MODEL..(position + 1) * D_MODEL;
        assert_eq!(after[row.clone()] != before[row], *score > threshold, "{position}");
    }
}

#[test]
fn a_shared_prefix_is_left_alone_until_it_is_decided() {
    let (model, sae) = (model(), sae());
    let prefix = [11, 90, 33];
    // A threshold that any score is above.
    for score in all_scores(&sae) {
        let mut gated = steering(&score, Over::LastPromptToken, -2.0, Region::from_position(1));
        let behind = answers(&model, &ROWS, &prefix, &mut gated);
        assert!(gated.decisions().into_values().eq([true; 3]));
        let add = Intervention::Add { direction: direction(5) * 4.0 };
        let region = Region::from_position(prefix.len());
        let mut always = Steering::new([POINT], add, region).unwrap();
        assert_eq!(behind, answers(&model, &ROWS, &prefix, &mut always));
    }
}

/// Past 20 tokens this model's angles change, and a conversation is run anew from its first token:
/// what was its prompt, and what was decided about it, stays.
#[test]
fn conversations_run_anew_are_steered_as_before() {
    let model = named("models/phi3_partial_longrope_switch");
    let model = model.with_rope_length(RopeLength::Conversation);
    let long: Vec<u32> = (1..=17).collect();
    let rows = [&long[..], ROWS[2]];
    let plain = answers(&model, &rows, &[], &mut ());
    let add = || Intervention::Add { direction: direction(5) * 4.0 };
    for region in [Region::from_position(1), Region::default().part(Part::Answer)] {
        let always = || Steering::new([POINT], add(), region.clone()).unwrap();
        let score = Score::Cosine { direction: direction(40) };
        let decided = || steering(&score, Over::LastPromptToken, -2.0, region.clone());
        for hook in [&always as &dyn Fn() -> Steering<'static>, &decided] {
            let together = answers(&model, &rows, &[], &mut hook());
            assert_ne!(together, plain);
            for (answer, ids) in together.iter().zip(rows) {
                let alone = uncached(&model, ids, || {
                    let mut hook = hook();
                    hook.set_prompt_lengths(vec![ids.len()]);
                    hook
                });
                assert_eq!(*answer, alone, "{region:?}");
            }
        }
        // Behind a prefix that is left alone, too.
        let (prefix, own) = long.split_at(4);
        let mut hook = decided();
        let behind = answers(&model, &[own], prefix, &mut hook);
        let alone = uncached(&model, &long, || {
            let region = Region { from_position: region.from_position.max(4), ..region.clone() };
            let mut hook = Steering::new([POINT], add(), region).unwrap();
            hook.set_prompt_lengths(vec![long.len()]);
            hook
        });
        assert_eq!(behind[0], alone);
    }
}

#[test]
fn what_decides_comes_first() {
    let condition = Condition {
        point: HookPoint::resid_post(2),
        score: Score::Cosine { direction: direction(1) },
        over: Over::LastPromptToken,
        threshold: 0.0,
        from_position: 1,
    };
    let add = || Intervention::Add { direction: direction(5) };
    let new = || Steering::new([POINT], add(), Region::default()).unwrap();
    let expected =
        SteeringError::ConditionAfter { condition: HookPoint::resid_post(2), point: POINT };
    assert_eq!(new().when(condition.clone()).err(), Some(expected));
    let nan = Condition { point: POINT, threshold: f64::NAN, ..condition.clone() };
    assert!(matches!(new().when(nan).err(), Some(SteeringError::NotFinite { .. })));
    let zero = Score::Cosine { direction: Tensor::zeros([D_MODEL], &Device::flex()) };
    let nothing = Condition { point: POINT, score: zero, ..condition };
    assert!(matches!(new().when(nothing).err(), Some(SteeringError::Nothing { .. })));
}
