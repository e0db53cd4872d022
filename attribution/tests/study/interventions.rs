//! Effects that are measured.

use attribution::{
    Ablation, AttributionConfig, AttributionError, Baseline, Cut, CutOf, NextToken, Patch, SaeSite,
    Study, Target,
};
use burn::tensor::{Device, Tensor};
use model_hooks::{ForwardError, HookError, HookPoint, Site};

use crate::{D_MODEL, Linear, OTHER, ROWS, close, difference, language_model, owned, sae};

#[test]
fn cuts_are_ablations_however_they_are_batched() {
    let (model, sae) = (language_model(), sae(4));
    let metric = difference(&model);
    let site = SaeSite::new(&sae, HookPoint::resid_post(1));
    let from_tokens = Study::new(&metric, &ROWS).unwrap();
    let config = AttributionConfig::GRADIENT_TIMES_ACTIVATION;
    let effects = from_tokens.attribute(&[site], Baseline::Zero, config).unwrap().remove(0);
    let by_latent = effects.by_latent();
    let alone = from_tokens.clone().with_batch_tokens(1);
    let cached = from_tokens.clone().start_at(site.point).unwrap();
    let clean = from_tokens.clean().unwrap();
    for &latent in by_latent.keys().take(12) {
        let mut ablation = Ablation::new(&sae, site.point, vec![latent], 0);
        let ablated = from_tokens.metric(&mut ablation).unwrap().into_data();
        let cuts: Vec<Cut> = (0..3).map(|row| Cut::latent(row, latent)).collect();
        for study in [&from_tokens, &alone, &cached] {
            let effects = study.measure_cuts(&site, Baseline::Zero, &cuts).unwrap();
            for ((effect, ablated), clean) in effects.iter().zip(ablated.iter::<f64>()).zip(&clean)
            {
                close("effect", effect.change(), ablated - clean, 1e-5);
            }
        }
    }
}

#[test]
fn a_run_put_in_whole_is_the_other_run() {
    let (model, sae) = (language_model(), sae(4));
    let metric = difference(&model);
    let other = owned(&OTHER);
    let clean = Study::new(&metric, &ROWS).unwrap().clean().unwrap();
    let expected: Vec<f64> = Study::new(&metric, &OTHER).unwrap().clean().unwrap();
    let expected: Vec<f64> = expected.iter().zip(&clean).map(|(other, own)| other - own).collect();
    let point = HookPoint::resid_post(1);
    let study = Study::new(&metric, &ROWS).unwrap().start_at(point).unwrap();
    let everything: Vec<Cut> =
        (0..3).map(|conversation| Cut { conversation, what: CutOf::Everything }).collect();
    let site = SaeSite::new(&sae, point);
    let cut = study.measure_cuts(&site, Baseline::Run(&other), &everything).unwrap();
    let whole: Vec<Patch> =
        (0..3).map(|conversation| Patch { conversation, position: None, head: None }).collect();
    let patched = study.measure_patches(point, Baseline::Run(&other), &whole).unwrap();
    for row in 0..3 {
        close("cut", cut[row].change(), expected[row], 1e-4);
        close("patched", patched[row].change(), expected[row], 1e-4);
    }
    // Position by position at the last block, the metric being linear behind it, and by gradient.
    let metric = Linear { model: &model, direction: Tensor::ones([D_MODEL], &Device::flex()) };
    let point = HookPoint::Block { layer: 2, site: Site::MlpOut };
    let study = Study::new(&metric, &ROWS).unwrap().start_at(point).unwrap();
    let estimated = study.attribute_activations(&[point], Baseline::Run(&other)).unwrap().remove(0);
    let by_position: Vec<f64> = estimated.by_position().into_data().iter().collect();
    for (row, ids) in ROWS.iter().enumerate() {
        let patches: Vec<Patch> = (0..ids.len())
            .map(|position| Patch { conversation: row, position: Some(position), head: None })
            .collect();
        let patched = study.measure_patches(point, Baseline::Run(&other), &patches).unwrap();
        for (position, patched) in patched.iter().enumerate() {
            let column = row * 7 + 7 - ids.len() + position;
            close("position", patched.change(), by_position[column], 2e-4);
        }
    }
    // Heads add up where the metric is linear in what they give.
    let z = HookPoint::Block { layer: 1, site: Site::Z };
    let study = Study::new(&metric, &ROWS).unwrap();
    let heads: Vec<Patch> =
        (0..4).map(|head| Patch { conversation: 0, position: Some(6), head: Some(head) }).collect();
    let effects = study.measure_patches(z, Baseline::Zero, &heads).unwrap();
    assert!(effects.iter().all(|effect| effect.change() != 0.0), "{effects:?}");
}

#[test]
fn what_cannot_be_done_is_an_error() {
    let (model, sae) = (language_model(), sae(4));
    let metric = difference(&model);
    let study = Study::new(&metric, &ROWS).unwrap();
    let config = AttributionConfig::GRADIENT_TIMES_ACTIVATION;
    let fails = |study: &Study<'_, NextToken<'_>>, site, baseline| {
        study.attribute(&[site], baseline, config).unwrap_err()
    };
    let missing = SaeSite::new(&sae, HookPoint::resid_post(9));
    assert!(matches!(
        fails(&study, missing, Baseline::Zero),
        AttributionError::Forward(ForwardError::Hook(HookError::NoSuchPoint { .. }))
    ));
    // A point below the start never fires.
    let late = study.clone().start_at(HookPoint::resid_post(1)).unwrap();
    let below = SaeSite::new(&sae, HookPoint::resid_post(0));
    assert!(matches!(
        fails(&late, below, Baseline::Zero),
        AttributionError::Forward(ForwardError::Hook(HookError::NeverFired { .. }))
    ));
    let narrow = SaeSite::new(&sae, HookPoint::Block { layer: 0, site: Site::MlpPost });
    assert!(matches!(
        fails(&study, narrow, Baseline::Zero),
        AttributionError::Forward(ForwardError::Hook(HookError::Width { expected: 48, .. }))
    ));
    let mut other = owned(&OTHER);
    other[1].push(5);
    let site = SaeSite::new(&sae, HookPoint::resid_post(1));
    assert_eq!(
        fails(&study, site, Baseline::Run(&other)),
        AttributionError::RunDiffers { conversation: 1, expected: 3, actual: 4 }
    );
    let pattern = HookPoint::Block { layer: 0, site: Site::Pattern };
    let error = study.measure_patches(pattern, Baseline::Zero, &[]).unwrap_err();
    assert_eq!(error, AttributionError::NotByPosition { point: pattern });
    let unknown = NextToken::new(&model, vec![Target::Logit(131); 3]);
    let error = Study::new(&unknown, &ROWS).unwrap().clean().unwrap_err();
    assert!(error.to_string().contains("131"), "{error}");
    assert!(Study::new(&metric, &[Vec::<u32>::new()]).is_err());
}
