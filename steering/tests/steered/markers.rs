//! Steering from a token on, wherever it comes.

use model_hooks::{ForwardError, HookError, RopeLength};
use steering::{Intervention, Region, Steering};

use super::*;

fn steering(region: Region) -> Steering<'static> {
    let add = Intervention::Add { direction: direction(5) * 4.0 };
    Steering::new([POINT], add, region).unwrap()
}

fn marked(marker: u32) -> Steering<'static> {
    steering(Region { marker: Some(marker), ..Region::default() })
}

/// 12 stands at position 4 of the first row only, and is not generated.
#[test]
fn a_marker_in_the_prompt_is_where_steering_begins() {
    let model = model();
    let mut starts = steering(Region::default());
    starts.set_starts(vec![Some(4), None, None]);
    let expected = answers(&model, &ROWS, &[], &mut starts);
    let mut marked = marked(12);
    assert_eq!(answers(&model, &ROWS, &[], &mut marked), expected);
    // Nothing is left of one generation in the next.
    let others = [ROWS[1], ROWS[0]];
    let turned = answers(&model, &others, &[], &mut marked);
    assert_eq!(turned, [expected[1].clone(), expected[0].clone()]);
    let plain = answers(&model, &ROWS, &[], &mut ());
    assert_ne!(expected, plain);
    assert_eq!(expected[1..], plain[1..]);
}

#[test]
fn a_marker_that_is_generated_is_where_steering_begins() {
    let model = model();
    let plain = answers(&model, &ROWS, &[], &mut ());
    let mut n_changed = 0;
    for (row, step) in (0..ROWS.len()).flat_map(|row| [0, 2].map(|step| (row, step))) {
        let marker = plain[row][step];
        let together = answers(&model, &ROWS, &[], &mut marked(marker));
        for ((answer, plain), ids) in together.iter().zip(&plain).zip(ROWS) {
            assert_eq!(*answer, uncached(&model, ids, || marked(marker)), "{marker}");
            let own = ids.iter().chain(plain).position(|&id| id == marker);
            let n_same = own.map_or(plain.len(), |at| (at + 1).saturating_sub(ids.len()));
            assert_eq!(answer[..n_same.min(plain.len())], plain[..n_same.min(plain.len())]);
            n_changed += usize::from(answer != plain);
        }
    }
    assert!(n_changed > 3, "only {n_changed} answers changed");
}

#[test]
fn a_marker_in_a_prefix_counts_for_all() {
    let model = model();
    let prefix = [11, 90, 33];
    let whole: Vec<Vec<u32>> = ROWS.iter().map(|row| [&prefix, *row].concat()).collect();
    let whole: Vec<&[u32]> = whole.iter().map(Vec::as_slice).collect();
    let mut hook = marked(90);
    let behind = answers(&model, &ROWS, &prefix, &mut hook);
    assert_eq!(behind, answers(&model, &whole, &[], &mut marked(90)));
    assert_ne!(behind, answers(&model, &ROWS, &prefix, &mut ()));
    // Without the prefix, 90 stands in the second row alone.
    let own = answers(&model, &ROWS, &[], &mut hook);
    assert_eq!(own, answers(&model, &ROWS, &[], &mut marked(90)));
}

#[test]
fn a_marker_stays_where_it_was_when_a_conversation_is_run_anew() {
    let model = named("models/phi3_partial_longrope_switch");
    let model = model.with_rope_length(RopeLength::Conversation);
    let long: Vec<u32> = (1..=17).collect();
    let plain = answers(&model, &[&long], &[], &mut ());
    for marker in [9, plain[0][0], plain[0][4]] {
        let cached = answers(&model, &[&long], &[], &mut marked(marker));
        assert_eq!(cached[0], uncached(&model, &long, || marked(marker)), "{marker}");
    }
}

#[test]
fn a_pass_without_tokens_is_an_error() {
    let model = model();
    let tokens = TokenBatch::new(&ROWS, model.config(), model.device()).unwrap();
    let residual = model.run_until(&tokens, 1, &mut ()).unwrap();
    let mut hook = marked(77);
    model.logits(&tokens, &mut hook).unwrap();
    let error = model.logits_from(residual, 1, &tokens, &mut hook).unwrap_err();
    assert_eq!(error, ForwardError::Hook(HookError::NoTokens { point: POINT }));
    // The next pass counts anew.
    model.logits(&tokens, &mut (Some(&mut hook), ())).unwrap();
}
