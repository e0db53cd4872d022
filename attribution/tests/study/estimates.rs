//! Effects by gradients: exact where the metric is linear, complete, turned round with a pair.

use std::collections::BTreeMap;

use attribution::{
    AttributionConfig, Baseline, CheckConfig, Cut, CutOf, Effect, ErrorGradient, Integration,
    NextToken, Path, Reward, Rule, SaeMeans, SaeSite, SiteEffects, Study, Target, Weighted,
};
use burn::tensor::{Device, Tensor};
use goldens::assert_close;
use model_hooks::{HookPoint, Probe, RewardModel, load};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sae_core::{ErrorTerm, Splice};

use crate::{
    D_MODEL, D_SAE, Linear, OTHER, ROWS, close, difference, language_model, measured, owned,
    random, reward_model, sae,
};

#[test]
fn where_the_metric_is_linear_estimates_are_exact() {
    let (model, sae) = (language_model(), sae(4));
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let metric = Linear { model: &model, direction: random(&mut rng, D_MODEL) };
    let site = SaeSite::new(&sae, HookPoint::resid_post(2));
    let means = SaeMeans { latents: random(&mut rng, D_SAE), error: random(&mut rng, D_MODEL) };
    let other = owned(&OTHER);
    let study = Study::new(&metric, &ROWS).unwrap().start_at(site.point).unwrap();
    for baseline in [Baseline::Zero, Baseline::Mean(&means), Baseline::Run(&other)] {
        let config = AttributionConfig::GRADIENT_TIMES_ACTIVATION;
        let effects = study.attribute(&[site], baseline, config).unwrap().remove(0);
        let compared = measured(&study, &site, baseline, &effects);
        assert!(compared.len() > 30, "{} effects", compared.len());
        for (estimated, measured) in compared {
            close("effect", estimated.change(), measured.change(), 2e-4);
        }
        let errors: Vec<Cut> =
            (0..3).map(|conversation| Cut { conversation, what: CutOf::Error }).collect();
        let measured = study.measure_cuts(&site, baseline, &errors).unwrap();
        for (estimated, measured) in effects.error_by_conversation().iter().zip(measured) {
            close("error", estimated.change(), measured.change(), 2e-4);
        }
        // And every rule of integration is the same.
        let config = AttributionConfig::integrated(Integration::new(Rule::Midpoint, 3));
        let integrated = study.attribute(&[site], baseline, config).unwrap().remove(0);
        close("residual", integrated.completeness.unwrap().residual(), 0.0, 1e-3);
    }
}

#[test]
fn integrated_gradients_add_up() {
    let (model, sae) = (reward_model("llama_seqcls_reward"), sae(5));
    let metric = Reward::new(&model);
    let site = SaeSite::new(&sae, HookPoint::resid_post(0));
    let study = Study::new(&metric, &ROWS).unwrap().start_at(site.point).unwrap();
    let config = |integration, path| AttributionConfig {
        path,
        ..AttributionConfig::integrated(integration)
    };
    let completeness = |integration, path| {
        let config = config(integration, path);
        let effects = study.attribute(&[site], Baseline::Zero, config).unwrap().remove(0);
        effects.completeness.unwrap()
    };
    for path in [Path::Latents, Path::LatentsAndError] {
        let gauss = completeness(Integration::new(Rule::GaussLegendre, 24), path);
        assert!(gauss.measured.change().abs() > 0.05, "{gauss:?}");
        close("gauss", gauss.residual(), 0.0, 0.01 * gauss.measured.change().abs());
        let residual = |steps| completeness(Integration::new(Rule::Left, steps), path).residual();
        let (coarse, fine) = (residual(4).abs(), residual(64).abs());
        assert!(fine < 0.25 * coarse + 1e-4, "{path:?}: {coarse} in 4 steps, {fine} in 64");
    }
    // The measured sum is that of cutting everything out.
    let cut = |what: &CutOf| -> f64 {
        let cuts: Vec<Cut> =
            (0..3).map(|conversation| Cut { conversation, what: what.clone() }).collect();
        let effects = study.measure_cuts(&site, Baseline::Zero, &cuts).unwrap();
        effects.into_iter().sum::<Effect>().change()
    };
    let gauss = |path| completeness(Integration::new(Rule::GaussLegendre, 2), path).measured;
    close("latents", gauss(Path::Latents).change(), cut(&CutOf::AllLatents), 1e-4);
    close("all", gauss(Path::LatentsAndError).change(), cut(&CutOf::Everything), 1e-4);
}

#[test]
fn latents_that_go_by_themselves_have_the_effects_of_their_ablation() {
    let (model, sae) = (reward_model("llama_seqcls_reward"), sae(5));
    let metric = Reward::new(&model);
    let site = SaeSite::new(&sae, HookPoint::resid_post(0));
    let study = Study::new(&metric, &ROWS).unwrap().start_at(site.point).unwrap();
    let effects = |n_groups| {
        let integrated = AttributionConfig::integrated(Integration::new(Rule::GaussLegendre, 8));
        let config = AttributionConfig { n_groups, ..integrated };
        study.attribute(&[site], Baseline::Zero, config).unwrap().remove(0)
    };
    // What the estimates miss of the measured effects of single latents, in the mean.
    let missed = |effects: &SiteEffects| {
        let by_text = effects.by_conversation();
        let cells: Vec<(usize, usize, f64)> = by_text
            .iter()
            .enumerate()
            .flat_map(|(text, of)| of.iter().map(move |(&l, effect)| (text, l, effect.change())))
            .collect();
        let cuts: Vec<Cut> = cells.iter().map(|&(text, l, _)| Cut::latent(text, l)).collect();
        let measured = study.measure_cuts(&site, Baseline::Zero, &cuts).unwrap();
        let missed = cells.iter().zip(&measured).map(|(cell, m)| (cell.2 - m.change()).abs());
        missed.sum::<f64>() / measured.iter().map(|m| m.change().abs()).sum::<f64>()
    };
    let [together, apart, alone] = [1, 4, sae.config().d_sae].map(effects);
    assert!(missed(&alone) < 1e-2, "{}", missed(&alone));
    let (apart_misses, together_misses) = (missed(&apart), missed(&together));
    assert!(apart_misses < together_misses, "{apart_misses} and {together_misses}");
    assert_eq!(together.by_latent().len(), alone.by_latent().len());
    for effects in [&together, &apart, &alone] {
        let completeness = effects.completeness.unwrap();
        let whole = completeness.measured.change().abs();
        close("residual", completeness.residual(), 0.0, 0.02 * whole + 1e-3);
    }
}

#[test]
fn one_left_step_is_gradient_times_activation() {
    let (model, sae) = (language_model(), sae(4));
    let metric = difference(&model);
    let site = SaeSite::new(&sae, HookPoint::resid_post(1));
    let study = Study::new(&metric, &ROWS).unwrap();
    let effects = |config| study.attribute(&[site], Baseline::Zero, config).unwrap().remove(0);
    let once = effects(AttributionConfig::integrated(Integration::new(Rule::Left, 1)));
    let direct = effects(AttributionConfig::GRADIENT_TIMES_ACTIVATION);
    assert_eq!(once.by_latent(), direct.by_latent());
    // As the plain function has it.
    let mut probe = Probe::new([site.point]);
    let grads = study.metric(&mut probe).unwrap().sum().backward();
    let rows = |x: Tensor<3>| x.flatten::<2>(0, 1);
    let x = rows(probe.value::<3>(site.point).unwrap());
    let gradient = rows(probe.gradient::<3>(site.point, &grads).unwrap());
    let plain = attribution::gradient_times_activation(&sae, &sae.encode(x), gradient);
    let mut sums = BTreeMap::<usize, f64>::new();
    // Padding has activations too; nothing depends on them.
    for entry in plain.entries() {
        *sums.entry(entry.latent_idx).or_default() += f64::from(entry.value);
    }
    for (latent, effect) in direct.by_latent() {
        close("sum", effect.change(), sums[&latent], 1e-5);
    }
}

#[test]
fn swapped_pairs_negate() {
    let (model, sae) = (reward_model("llama_seqcls_reward"), sae(6));
    let metric = Weighted::differences(Reward::new(&model), 1);
    let site = SaeSite::new(&sae, HookPoint::resid_post(0));
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for _ in 0..10 {
        let mut text = || -> Vec<u32> {
            let n = rng.random_range(2..9);
            (0..n).map(|_| rng.random_range(4..131)).collect()
        };
        let (chosen, rejected) = (text(), text());
        let of = |pair: [&Vec<u32>; 2]| {
            let study = Study::new(&metric, &pair).unwrap();
            let config = AttributionConfig::integrated(Integration::new(Rule::Left, 3));
            let effects = study.attribute(&[site], Baseline::Zero, config).unwrap().remove(0);
            let clean = study.clean().unwrap().iter().sum::<f64>();
            let cuts = [0, 1].map(|c| Cut { conversation: c, what: CutOf::AllLatents });
            let cut = study.measure_cuts(&site, Baseline::Zero, &cuts).unwrap();
            (clean, effects.by_latent(), cut.into_iter().sum::<Effect>(), effects)
        };
        let (clean, effects, cut, by_text) = of([&chosen, &rejected]);
        let (swapped_clean, swapped, swapped_cut, swapped_by_text) = of([&rejected, &chosen]);
        close("difference", clean, -swapped_clean, 1e-5);
        close("cut", cut.change(), -swapped_cut.change(), 1e-5);
        assert_eq!(effects.len(), swapped.len());
        for (latent, effect) in effects {
            close("effect", effect.change(), -swapped[&latent].change(), 1e-5);
        }
        // Not only the sums: each text keeps its own.
        let (ours, theirs) = (by_text.by_conversation(), swapped_by_text.by_conversation());
        for (latent, effect) in &ours[0] {
            close("chosen", effect.change(), -theirs[1][latent].change(), 1e-5);
        }
    }
}

#[test]
fn one_backward_pass_is_as_good_as_one_for_each_site() {
    let (model, low, high) = (language_model(), sae(4), sae(5));
    let metric = difference(&model);
    let sites = [
        SaeSite::new(&low, HookPoint::resid_post(0)),
        SaeSite::new(&high, HookPoint::resid_post(1)),
    ];
    let study = Study::new(&metric, &ROWS).unwrap();
    let config = AttributionConfig::GRADIENT_TIMES_ACTIVATION;
    let together = study.attribute(&sites, Baseline::Zero, config).unwrap();
    for (site, together) in sites.iter().zip(&together) {
        let alone = study.attribute(&[*site], Baseline::Zero, config).unwrap().remove(0);
        let together = together.by_latent();
        for (latent, effect) in alone.by_latent() {
            close("effect", effect.change(), together[&latent].change(), 1e-5);
        }
    }
    // With gradients stopped at errors, the upper SAE is what the lower one is seen through.
    let stops = AttributionConfig { error_gradient: ErrorGradient::Stops, ..config };
    let stopped = study.attribute(&sites, Baseline::Zero, stops).unwrap();
    let (upper, expected) = (stopped[1].by_latent(), together[1].by_latent());
    assert_eq!(upper.len(), expected.len());
    for (latent, effect) in upper {
        close("upper", effect.change(), expected[&latent].change(), 1e-5);
    }
    let mut hook =
        (Probe::new([sites[0].point]), Splice::new(&high, sites[1].point, ErrorTerm::KeepDetached));
    let grads = study.metric(&mut hook).unwrap().sum().backward();
    let rows = |x: Tensor<3>| x.flatten::<2>(0, 1);
    let x = rows(hook.0.value::<3>(sites[0].point).unwrap());
    let gradient = rows(hook.0.gradient::<3>(sites[0].point, &grads).unwrap());
    let plain = attribution::gradient_times_activation(&low, &low.encode(x), gradient);
    let total: f64 = plain.entries().map(|entry| f64::from(entry.value)).sum();
    let sum = |effects: &SiteEffects| effects.by_latent().into_values().sum::<Effect>().change();
    close("stopped", sum(&stopped[0]), total, 1e-5);
    assert!((sum(&stopped[0]) - sum(&together[0])).abs() > 1e-3, "stopping changes something");
}

#[test]
fn a_check_compares_with_what_was_measured() {
    let (model, sae) = (language_model(), sae(4));
    let metric = difference(&model);
    let site = SaeSite::new(&sae, HookPoint::resid_post(2));
    let study = Study::new(&metric, &ROWS).unwrap().start_at(site.point).unwrap();
    let config = AttributionConfig::integrated(Integration::new(Rule::GaussLegendre, 8));
    let effects = study.attribute(&[site], Baseline::Zero, config).unwrap().remove(0);
    let config = CheckConfig { n_latents: 10, top_k: 5, seed: 1 };
    let checked = study.check(&site, Baseline::Zero, &effects, config).unwrap();
    assert_eq!(checked.check.n, checked.compared.len());
    // Behind the last block, only latents at the last tokens matter.
    assert!(checked.check.n > 15, "{:?}", checked.check);
    assert!(checked.check.pearson > 0.9, "{:?}", checked.check);
    let again = study.check(&site, Baseline::Zero, &effects, config).unwrap();
    assert_eq!(checked, again);
}

#[test]
fn log_probabilities_are_normalised_logits() {
    let model = language_model();
    let targets =
        [Target::Logit(7), Target::LogProb(7), Target::Difference { wanted: 7, other: 9 }];
    let metric = NextToken::new(&model, targets.to_vec());
    let found = Study::new(&metric, &[ROWS[0]; 3]).unwrap().clean().unwrap();
    let tokens = model_hooks::TokenBatch::new(&[ROWS[0]], model.config(), model.device()).unwrap();
    let logits: Vec<f64> =
        model.last_logits(&tokens, &mut ()).unwrap().into_data().iter().collect();
    let log_sum = logits.iter().map(|logit| logit.exp()).sum::<f64>().ln();
    close("logit", found[0], logits[7], 1e-5);
    close("log-probability", found[1], logits[7] - log_sum, 1e-4);
    close("difference", found[2], logits[7] - logits[9], 1e-5);
}

#[test]
fn golden_gradients_of_rewards() {
    goldens::for_each_case("models", |case| {
        if !case.name().ends_with("seqcls_reward") {
            return Err("no reward model".to_owned());
        }
        let mut checkpoint = load::open(case.folder()).map_err(|error| error.to_string())?;
        let device = Device::flex();
        let model = RewardModel::load(checkpoint.config, checkpoint.tensors.as_mut(), &device);
        let model = model.map_err(|error| error.to_string())?;
        let metric = Reward::new(&model);
        let study = Study::new(&metric, &case.ids("input_ids")).unwrap();
        let (_, expected) = case.floats("logits");
        let clean: Vec<f32> = study.clean().unwrap().iter().map(|&reward| reward as f32).collect();
        assert_close("rewards", &clean, &expected, 1e-4);
        // From the tokens, and from the cached residual stream.
        let point = HookPoint::resid_post(0);
        let (_, expected) = case.floats("grad.hidden_states.1");
        for study in [study.clone(), study.start_at(point).unwrap()] {
            let mut probe = Probe::new([point]);
            let grads = study.metric(&mut probe).unwrap().sum().backward();
            let gradient = probe.gradient::<3>(point, &grads).unwrap();
            let gradient: Vec<f32> = gradient.into_data().try_to_vec().unwrap();
            assert_close("gradient", &gradient, &expected, 1e-4);
        }
        Ok(())
    });
}
