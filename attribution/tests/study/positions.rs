//! Which positions are changed, and what makes no difference.

use std::collections::BTreeMap;

use attribution::{
    AttributionConfig, AttributionError, Baseline, Cut, CutOf, Integration, NextToken, Patch, Rule,
    SaeSite, SiteEffects, Study, Target, TokenEffect,
};
use model_hooks::{HookPoint, Site};
use sae_core::SaeMetadata;

use crate::{ROWS, close, difference, language_model, measured, owned, sae};

#[test]
fn padding_changes_nothing() {
    let (model, sae) = (language_model(), sae(4));
    let metric = difference(&model);
    let site = SaeSite::new(&sae, HookPoint::resid_post(1));
    let config = AttributionConfig::integrated(Integration::new(Rule::Midpoint, 2));
    let of = |rows: &[&[u32]], firsts: &[usize]| {
        let study = Study::new(&metric, rows).unwrap().from_positions(firsts.to_vec());
        let study = study.start_at(site.point).unwrap();
        let effects = study.attribute(&[site], Baseline::Zero, config).unwrap().remove(0);
        let measured = measured(&study, &site, Baseline::Zero, &effects);
        (effects.by_conversation(), effects.error_by_conversation(), measured)
    };
    let firsts = [2, 1, 0];
    let (together, errors, _) = of(&ROWS, &firsts);
    for (row, ids) in ROWS.iter().enumerate() {
        let (alone, error, compared) = of(&[ids], &firsts[row..=row]);
        assert_eq!(alone[0].keys().collect::<Vec<_>>(), together[row].keys().collect::<Vec<_>>());
        for (latent, effect) in &alone[0] {
            close("effect", effect.change(), together[row][latent].change(), 1e-5);
        }
        close("error", error[0].change(), errors[row].change(), 1e-5);
        // In what was measured together, rows stand in batches of all lengths.
        let (_, _, all) = of(&ROWS, &firsts);
        let before: usize = together[..row].iter().map(BTreeMap::len).sum();
        for (alone, batched) in compared.iter().zip(&all[before..]) {
            close("measured", alone.1.change(), batched.1.change(), 1e-5);
        }
    }
}

#[test]
fn only_positions_between_the_first_and_the_end_are_changed() {
    let (model, sae) = (language_model(), sae(4));
    let metric = difference(&model);
    let site = SaeSite::new(&sae, HookPoint::resid_post(1));
    let firsts: Vec<usize> = vec![1; ROWS.len()];
    let whole = Study::new(&metric, &ROWS).unwrap().from_positions(firsts.clone());
    let config = AttributionConfig::GRADIENT_TIMES_ACTIVATION;
    let of = |study: &Study<'_, _>| {
        let effects = study.attribute(&[site], Baseline::Zero, config).unwrap().remove(0);
        let cuts: Vec<Cut> = (0..ROWS.len())
            .map(|conversation| Cut { conversation, what: CutOf::Everything })
            .collect();
        (effects, study.measure_cuts(&site, Baseline::Zero, &cuts).unwrap())
    };
    let (of_whole, everything) = of(&whole);
    let ends: Vec<usize> = ROWS.iter().map(|ids| ids.len()).collect();
    let (_, same) = of(&whole.clone().to_positions(ends.clone()));
    assert_eq!(everything, same, "all positions");
    let before_last: Vec<usize> = ends.iter().map(|end| end - 1).collect();
    let (of_words, without_last) = of(&whole.clone().to_positions(before_last.clone()));
    assert!(everything.iter().zip(&without_last).all(|(a, b)| a != b), "the last matters");
    let key = |token: &TokenEffect| (token.conversation, token.position, token.latent_idx);
    let words: BTreeMap<_, f64> =
        of_words.tokens().map(|token| (key(&token), token.effect.change())).collect();
    for token in of_whole.tokens() {
        let is_word = token.position < before_last[token.conversation];
        let kept = words.get(&key(&token)).copied().unwrap_or(0.0);
        close("effect", kept, if is_word { token.effect.change() } else { 0.0 }, 1e-6);
    }
    let (_, none) = of(&whole.to_positions(firsts));
    none.iter().for_each(|effect| close("nothing is changed", effect.change(), 0.0, 1e-6));
}

#[test]
fn sharing_a_prefix_changes_nothing() {
    let (model, sae) = (language_model(), sae(4));
    let metric = difference(&model);
    let rows: [&[u32]; 3] =
        [&[5, 9, 40, 77, 12, 8, 101], &[5, 9, 40, 77, 3], &[5, 9, 40, 77, 23, 60]];
    let other: Vec<Vec<u32>> = owned(&rows)
        .into_iter()
        .map(|mut row| {
            *row.last_mut().unwrap() += 1;
            row[1] = 30;
            row
        })
        .collect();
    let site = SaeSite::new(&sae, HookPoint::resid_post(1));
    // The first conversation is changed from its fourth token on: three are shared.
    let whole = Study::new(&metric, &rows).unwrap().from_positions(vec![3, 4, 4]);
    let shared = whole.clone().share_prefix().unwrap();
    let started = shared.clone().start_at(site.point).unwrap();
    for shared in [&shared, &started] {
        for (own, clean) in shared.clean().unwrap().iter().zip(whole.clean().unwrap()) {
            close("clean", *own, clean, 1e-5);
        }
        for baseline in [Baseline::Zero, Baseline::Run(&other)] {
            for config in [
                AttributionConfig::GRADIENT_TIMES_ACTIVATION,
                AttributionConfig::integrated(Integration::new(Rule::GaussLegendre, 3)),
            ] {
                let of = |study: &Study<'_, NextToken<'_>>| {
                    study.attribute(&[site], baseline, config).unwrap().remove(0)
                };
                let (own, expected) = (of(shared), of(&whole));
                let places = |effects: &SiteEffects| -> Vec<(usize, usize, usize)> {
                    let tokens = effects.tokens();
                    let mut places: Vec<_> =
                        tokens.map(|t| (t.conversation, t.position, t.latent_idx)).collect();
                    places.sort_unstable();
                    places
                };
                assert_eq!(places(&own), places(&expected));
                for (own, expected) in own.by_conversation().iter().zip(expected.by_conversation())
                {
                    for (latent, effect) in expected {
                        close("effect", own[&latent].change(), effect.change(), 1e-5);
                    }
                }
                let errors = own.error_by_conversation().into_iter();
                for (own, expected) in errors.zip(expected.error_by_conversation()) {
                    close("error", own.change(), expected.change(), 1e-5);
                }
                let compared = measured(shared, &site, baseline, &own);
                for (own, expected) in
                    compared.iter().zip(measured(&whole, &site, baseline, &expected))
                {
                    close("measured", own.1.change(), expected.1.change(), 1e-5);
                }
            }
            let point = HookPoint::Block { layer: 2, site: Site::MlpOut };
            let patches: Vec<Patch> = (0..3)
                .map(|row| Patch { conversation: row, position: Some(4), head: None })
                .collect();
            let baseline = match baseline {
                Baseline::Run(other) => Baseline::Run(other),
                _ => Baseline::Zero,
            };
            let of = |study: &Study<'_, NextToken<'_>>| {
                let effects = study.attribute_activations(&[point], baseline).unwrap().remove(0);
                (
                    study.measure_patches(point, baseline, &patches).unwrap(),
                    effects.by_conversation(),
                )
            };
            let (own, expected) = (of(shared), of(&whole));
            for (own, expected) in
                own.0.iter().chain(&own.1).zip(expected.0.iter().chain(&expected.1))
            {
                close("activation", own.change(), expected.change(), 1e-5);
            }
        }
    }
    let pattern = HookPoint::Block { layer: 2, site: Site::Pattern };
    let error = shared.attribute_activations(&[pattern], Baseline::Zero).unwrap_err();
    assert_eq!(error, AttributionError::NotByPosition { point: pattern });
    // What is changed from the first token on shares nothing, and one text alone keeps its last.
    let from_start = Study::new(&metric, &rows).unwrap().share_prefix().unwrap();
    close("clean", from_start.clean().unwrap()[0], whole.clean().unwrap()[0], 1e-5);
    let alone = NextToken::new(&model, vec![Target::Logit(7)]);
    let alone = Study::new(&alone, &[rows[0]]).unwrap().from_positions(vec![9]);
    let expected = alone.clean().unwrap()[0];
    close("alone", alone.share_prefix().unwrap().clean().unwrap()[0], expected, 1e-5);
}

#[test]
fn positions_that_the_sae_was_not_trained_on_are_left_alone() {
    let (model, sae) = (language_model(), sae(4));
    let mut metadata = SaeMetadata::default();
    metadata.seqpos_slice = Some(vec![Some(2), None]);
    let sae = sae.with_metadata(metadata);
    let metric = difference(&model);
    let site = SaeSite::new(&sae, HookPoint::resid_post(1));
    let study = Study::new(&metric, &ROWS).unwrap().from_positions(vec![4, 0, 0]);
    let config = AttributionConfig::GRADIENT_TIMES_ACTIVATION;
    let effects = study.attribute(&[site], Baseline::Zero, config).unwrap().remove(0);
    let mut firsts = [usize::MAX; 3];
    for token in effects.tokens() {
        firsts[token.conversation] = firsts[token.conversation].min(token.position);
    }
    assert_eq!(firsts, [4, 2, 2]);
    let pattern = HookPoint::Block { layer: 1, site: Site::Pattern };
    let patterns = study.attribute_activations(&[pattern], Baseline::Zero).unwrap().remove(0);
    let by_query: Vec<f64> = patterns.by_position().into_data().iter().collect();
    assert!(by_query[..4].iter().all(|&effect| effect == 0.0), "{by_query:?}");
}
