//! Effects by way of latents further up, and what is left of a model without the others.

use attribution::{
    Ablation, AttributionConfig, AttributionError, Baseline, Circuit, Cut, CutOf, Errors, Pruned,
    SaeMeans, SaeSite, Study,
};
use burn::tensor::{Tensor, TensorData};
use model_hooks::{
    ActivationCache, ForwardError, Hook, HookError, HookPoint, Positions, Probe, Site,
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::{D_MODEL, D_SAE, ROWS, close, difference, language_model, random, sae};

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
