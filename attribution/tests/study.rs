//! What must hold of effects: exact where the metric is linear, complete, measured as estimated.

use std::collections::BTreeMap;

use attribution::{
    Ablation, AttributionConfig, AttributionError, Baseline, CheckConfig, Circuit, Cut, CutOf,
    Effect, End, ErrorGradient, Errors, Integration, Metric, NextToken, Patch, Path, Pruned,
    Reward, Rule, SaeMeans, SaeSite, SiteEffects, Study, Target, TokenEffect, Weighted,
};
use burn::tensor::{Device, Tensor, TensorData};
use goldens::assert_close;
use model_hooks::{
    ActivationCache, ForwardError, Hook, HookError, HookPoint, LanguageModel, Positions, Probe,
    RewardModel, Site, load,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sae_core::{Activation, ErrorTerm, Sae, SaeConfig, SaeMetadata, SaeWeights, Splice};

const ROWS: [&[u32]; 3] = [&[5, 9, 40, 77, 12, 8, 101], &[44, 3, 90], &[7, 7, 19, 23, 60]];
const OTHER: [&[u32]; 3] = [&[5, 9, 41, 70, 12, 9, 100], &[44, 4, 90], &[7, 8, 19, 23, 61]];
const D_MODEL: usize = 48;
const D_SAE: usize = 96;

fn language_model() -> LanguageModel {
    let mut checkpoint = load::open(&goldens::own("models/llama_gqa_theta_tied")).unwrap();
    LanguageModel::load(checkpoint.config, checkpoint.tensors.as_mut(), &Device::flex()).unwrap()
}

fn reward_model(name: &str) -> RewardModel {
    let mut checkpoint = load::open(&goldens::own("models").join(name)).unwrap();
    RewardModel::load(checkpoint.config, checkpoint.tensors.as_mut(), &Device::flex()).unwrap()
}

fn sae(seed: u64) -> Sae {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..D_SAE * D_MODEL).map(|_| rng.random_range(-0.3..0.3)).collect();
    let device = Device::flex();
    let w_dec = Tensor::<2>::from_data(TensorData::new(values, [D_SAE, D_MODEL]), &device);
    let weights = SaeWeights::new(
        w_dec.clone().transpose(),
        Tensor::zeros([D_SAE], &device),
        w_dec,
        // Not zero: a norm jumps where its input vanishes, and no integral sees that.
        random(&mut rng, D_MODEL),
    );
    let activation = Activation::TopK { k: 6, rescale_by_decoder_norm: true };
    Sae::new(SaeConfig::new(D_MODEL, D_SAE, activation), weights).unwrap()
}

fn random(rng: &mut ChaCha8Rng, n: usize) -> Tensor<1> {
    let values: Vec<f32> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_data(TensorData::new(values, [n]), &Device::flex())
}

fn owned(rows: &[&[u32]]) -> Vec<Vec<u32>> {
    rows.iter().map(|row| row.to_vec()).collect()
}

fn difference(model: &LanguageModel) -> NextToken<'_> {
    NextToken::new(model, vec![Target::Difference { wanted: 7, other: 30 }; 3])
}

/// `⟨direction, residual⟩` behind the last block, summed over the tokens: linear there.
struct Linear<'a> {
    model: &'a LanguageModel,
    direction: Tensor<1>,
}

impl Metric for Linear<'_> {
    fn body(&self) -> &LanguageModel {
        self.model
    }

    fn measure<H: Hook>(&self, end: End<'_>, _: &mut H) -> Result<Tensor<1>, ForwardError> {
        let mask = end.positions.mask_from(0, &end.residual.device());
        let product = end.residual * self.direction.clone().unsqueeze() * mask;
        Ok(product.sum_dim(2).sum_dim(1).flatten::<2>(1, 2).squeeze_dim(1))
    }
}

fn close(what: &str, actual: f64, expected: f64, tolerance: f64) {
    let error = (actual - expected).abs();
    assert!(error <= tolerance, "{what}: {actual} is not {expected} (error {error:e})");
}

/// Every latent that is changed anywhere, measured alone.
fn measured<M: Metric>(
    study: &Study<'_, M>,
    site: &SaeSite<'_>,
    baseline: Baseline<'_, SaeMeans>,
    effects: &SiteEffects,
) -> Vec<(Effect, Effect)> {
    let estimates: Vec<(Cut, Effect)> = effects
        .by_conversation()
        .into_iter()
        .enumerate()
        .flat_map(|(c, effects)| effects.into_iter().map(move |(l, e)| (Cut::latent(c, l), e)))
        .collect();
    let (cuts, estimates): (Vec<Cut>, Vec<Effect>) = estimates.into_iter().unzip();
    let measured = study.measure_cuts(site, baseline, &cuts).unwrap();
    estimates.into_iter().zip(measured).collect()
}

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
fn an_attributed_edge_is_the_measured_intervention_as_the_step_shrinks() {
    let (model, low, high) = (language_model(), sae(4), sae(5));
    let metric = difference(&model);
    let from = SaeSite::new(&low, HookPoint::resid_post(0));
    let to = SaeSite::new(&high, HookPoint::resid_post(1));
    let study = Study::new(&metric, &ROWS).unwrap().from_positions(vec![2, 0, 1]);
    let config = AttributionConfig::GRADIENT_TIMES_ACTIVATION;
    let upper = study.attribute(&[to], Baseline::Zero, config).unwrap().remove(0);
    let mut targets: Vec<(usize, f64)> =
        upper.by_latent().into_iter().map(|(latent, effect)| (latent, effect.change())).collect();
    targets.sort_by(|a, b| b.1.abs().total_cmp(&a.1.abs()));
    let targets: Vec<usize> = targets.into_iter().take(5).map(|(latent, _)| latent).collect();
    let edges = study.attribute_edges(&from, &to, &targets, Baseline::Zero).unwrap();
    // However many targets share a pass.
    let alone = study.clone().with_batch_tokens(1);
    let alone = alone.attribute_edges(&from, &to, &targets, Baseline::Zero).unwrap();
    // What a unit of each target does to the metric, at each position.
    let mut probe = Probe::new([to.point]);
    let grads = study.metric(&mut probe).unwrap().sum().backward();
    let gradient = probe.gradient::<3>(to.point, &grads).unwrap();
    let tokens = model_hooks::TokenBatch::new(&ROWS, model.config(), model.device()).unwrap();
    let positions = tokens.positions(0);
    let mut n_checked = 0;
    for (edge, alone) in edges.iter().zip(&alone) {
        assert_eq!(edge.target, alone.target);
        let direction = high.directions().narrow(0, edge.target, 1).reshape([1, 1, D_MODEL]);
        let slopes: Vec<f64> =
            (gradient.clone() * direction).sum_dim(2).into_data().iter().collect();
        // The target's values, weighed by that, with a share of a latent further down taken out.
        let carried = |latent: usize, share: f64| -> Vec<f64> {
            let first = Ablation::new(&low, from.point, vec![latent], 0).with_share(share);
            let mut hook = (OnlyFrom(first, vec![2, 0, 1]), ActivationCache::new([to.point]));
            study.metric(&mut hook).unwrap();
            let x = hook.1.get::<3>(to.point).unwrap().flatten::<2>(0, 1);
            let values: Vec<f64> = high.encode(x).latent(edge.target).into_data().iter().collect();
            let n = positions.n_columns();
            let of_row = |row: usize| {
                (0..n)
                    .filter(|&column| {
                        positions.get(row, column).is_some_and(|p| p >= [2, 0, 1][row])
                    })
                    .map(|column| values[row * n + column] * slopes[row * n + column])
                    .sum()
            };
            (0..3).map(of_row).collect()
        };
        for (row, effects) in edge.by_conversation.iter().enumerate() {
            let mut effects: Vec<(usize, f64)> =
                effects.iter().map(|(&latent, effect)| (latent, effect.change())).collect();
            effects.sort_by(|a, b| b.1.abs().total_cmp(&a.1.abs()));
            for (latent, effect) in effects.into_iter().take(4) {
                close("alone", alone.by_conversation[row][&latent].change(), effect, 1e-5);
                let error = |share: f64| {
                    let slope = (carried(latent, share)[row] - carried(latent, -share)[row])
                        / (2.0 * share);
                    (slope - effect).abs()
                };
                let tolerance = 0.02 * effect.abs() + 2e-3;
                let (coarse, fine) = (error(0.3), error(0.01));
                assert!(fine < tolerance, "{latent} → {}: {effect}, off by {fine}", edge.target);
                assert!(
                    fine < coarse + tolerance,
                    "{fine} in a small step, {coarse} in a large one"
                );
                n_checked += usize::from(effect.abs() > 1e-2);
            }
        }
    }
    assert!(n_checked > 10, "{n_checked} edges that are not about zero");
    let error = study.attribute_edges(&to, &from, &[1], Baseline::Zero).unwrap_err();
    assert_eq!(error, AttributionError::NotBehind { from: to.point, to: from.point });
}

/// A hook's changes at positions of each row from its first on.
struct OnlyFrom<H>(H, Vec<usize>);

impl<H: Hook> Hook for OnlyFrom<H> {
    fn wants(&self, point: HookPoint) -> bool {
        self.0.wants(point)
    }

    fn at<const D: usize>(
        &mut self,
        point: HookPoint,
        x: Tensor<D>,
        positions: &Positions,
    ) -> Tensor<D> {
        let shape = x.dims();
        let changed = self.0.at(point, x.clone(), positions);
        let n = positions.n_columns();
        let mask = self.1.iter().enumerate().flat_map(|(row, &first)| {
            (0..n).map(move |column| positions.get(row, column).is_some_and(|p| p >= first))
        });
        let mask: Vec<f32> = mask.map(f32::from).collect();
        let mask = Tensor::<2>::from_data(TensorData::new(mask, [shape[0] * n, 1]), &x.device());
        let rows = |x: Tensor<D>| x.reshape([shape[0] * n, D_MODEL]);
        let (x, changed) = (rows(x), rows(changed));
        (x.clone() + (changed - x) * mask).reshape(shape)
    }

    fn finish(&mut self) -> Result<(), HookError> {
        self.0.finish()
    }
}

#[test]
fn circuits_are_what_is_left_of_the_model() {
    let (model, low, high) = (language_model(), sae(4), sae(5));
    let metric = difference(&model);
    let sites = [
        SaeSite::new(&low, HookPoint::resid_post(0)),
        SaeSite::new(&high, HookPoint::resid_post(1)),
    ];
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let means = [0, 1]
        .map(|_| SaeMeans { latents: random(&mut rng, D_SAE), error: random(&mut rng, D_MODEL) });
    let study = Study::new(&metric, &ROWS).unwrap().from_positions(vec![1, 0, 2]);
    let clean = study.clean().unwrap();
    let everything = Circuit { latents: vec![(0..D_SAE).collect(); 2] };
    let nothing = Circuit { latents: vec![Default::default(); 2] };
    for pruned in [Pruned::Zero, Pruned::Mean(&means)] {
        let whole = study.measure_circuit(&sites, &everything, pruned, Errors::Kept).unwrap();
        for (whole, clean) in whole.iter().zip(&clean) {
            close("everything", *whole, *clean, 1e-5);
        }
    }
    // One SAE without any latent is all its latents cut.
    let one = Circuit { latents: vec![Default::default()] };
    let cut = |what: &CutOf| -> Vec<f64> {
        let cuts: Vec<Cut> =
            (0..3).map(|conversation| Cut { conversation, what: what.clone() }).collect();
        let effects = study.measure_cuts(&sites[1], Baseline::Zero, &cuts).unwrap();
        effects.iter().zip(&clean).map(|(effect, clean)| clean + effect.change()).collect()
    };
    for (errors, what) in [(Errors::Kept, CutOf::AllLatents), (Errors::Pruned, CutOf::Everything)] {
        let left = study.measure_circuit(&sites[1..], &one, Pruned::Zero, errors).unwrap();
        for (left, expected) in left.iter().zip(cut(&what)) {
            close("nothing", *left, expected, 1e-5);
        }
    }
    // Of means, by hand: what stands there is the mean of all latents, and the error.
    let left = study.measure_circuit(&sites[1..], &one, Pruned::Mean(&means[1..]), Errors::Kept);
    let mean = study.measure_cuts(
        &sites[1],
        Baseline::Zero,
        &[Cut { conversation: 1, what: CutOf::AllLatents }],
    );
    let zeroed = clean[1] + mean.unwrap()[0].change();
    assert!((left.unwrap()[1] - zeroed).abs() > 1e-3, "a mean is not zero");
    let config = AttributionConfig::GRADIENT_TIMES_ACTIVATION;
    let effects = study.attribute(&sites, Baseline::Zero, config).unwrap();
    let largest = Circuit::largest(&effects, 3);
    assert_eq!(largest.n_latents(), 3);
    let n_active = effects.iter().map(|effects| effects.by_latent().len()).sum::<usize>();
    let sizes = [0, 10, n_active];
    let shares =
        study.circuit_shares(&sites, &effects, &sizes, Pruned::Zero, Errors::Kept).unwrap();
    close("of nothing", shares[0].faithfulness, 0.0, 1e-4);
    close("the rest of nothing", shares[0].completeness, 1.0, 1e-4);
    let sum = |metrics: Vec<f64>| metrics.into_iter().sum::<f64>();
    let of = |circuit: &Circuit| {
        sum(study.measure_circuit(&sites, circuit, Pruned::Zero, Errors::Kept).unwrap())
    };
    let (ten, rest) = (Circuit::largest(&effects, 10), of(&nothing));
    let rest_of_ten = Circuit {
        latents: ten
            .latents
            .iter()
            .map(|kept| (0..D_SAE).filter(|l| !kept.contains(l)).collect())
            .collect(),
    };
    let whole = sum(clean.clone()) - rest;
    close("faithfulness", shares[1].faithfulness, (of(&ten) - rest) / whole, 1e-4);
    close("completeness", shares[1].completeness, (of(&rest_of_ten) - rest) / whole, 1e-4);
    assert!(matches!(
        study.measure_circuit(
            &[SaeSite::new(&low, HookPoint::Block { layer: 0, site: Site::MlpPost })],
            &one,
            Pruned::Zero,
            Errors::Kept
        ),
        Err(AttributionError::Forward(ForwardError::Hook(HookError::Width { .. })))
    ));
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
