//! Latents, losses and gradients of every kind against a plain oracle in f64, on random configurations.
//!
//! The oracle computes a loss from all of `[n, d_sae]`, by the equations alone. What is selected,
//! and what is held fixed (masks, the residual of AuxK, a detached decoder), it takes from the point
//! itself, so that the loss is smooth around it and central differences are gradients. Where a
//! gradient is defined as a straight-through estimate, the loss has a term of value zero with that
//! slope in it.

mod oracle;

use burn::tensor::{Device, Tensor, TensorData};
use oracle::{Matrix, Oracle, Point};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sae_core::train::*;

/// Random configurations of each kind, and the steps of the differences.
const CASES: u64 = 100;
const STEP: f64 = 1e-5;

fn noise(random: &mut impl Rng, n: usize, scale: f64) -> Vec<f64> {
    // Representable in f32, so that both sides see the same numbers.
    (0..n).map(|_| f64::from((random.random_range(-1.0..1.0) * scale) as f32)).collect()
}

fn matrix(random: &mut impl Rng, shape: [usize; 2], scale: f64) -> Matrix {
    Matrix { shape, values: noise(random, shape[0] * shape[1], scale) }
}

fn tensor(matrix: &Matrix) -> Tensor<2> {
    let values: Vec<f32> = matrix.values.iter().map(|&value| value as f32).collect();
    Tensor::from_data(TensorData::new(values, matrix.shape), &Device::flex())
}

/// A random problem for an objective.
struct Problem {
    objective: Objective,
    point: Point,
    dead: Vec<u32>,
}

fn sparsity(random: &mut impl Rng) -> Sparsity {
    let p = random.random_range(0.5..2.5);
    let norm = match random.random_range(0..4) {
        0 => SparsityNorm::Lp { p },
        1 => SparsityNorm::LpToTheP { p },
        _ => SparsityNorm::Lp { p: 1.0 },
    };
    Sparsity { coefficient: 0.7, norm, weighted_by_decoder_norms: random.random() }
}

fn selecting(selection: Selection, random: &mut impl Rng) -> Kind {
    let rules = [AuxKRule::SaeLens, AuxKRule::Sparsify, AuxKRule::OpenAi];
    let k = random.random::<bool>().then_some(2);
    let is_grouped = matches!(selection, Selection::GroupMax { .. });
    let aux_k = AuxK { coefficient: 0.8, k, rule: rules[random.random_range(0..3)] };
    Kind::Selecting(Selecting {
        rescale_by_decoder_norm: random.random::<bool>() && !is_grouped,
        aux_k: random.random_bool(0.7).then_some(aux_k),
        threshold: Some(RunningThreshold::SaeLens { rate: 0.1 }),
        ..Selecting::new(selection)
    })
}

const KINDS: [&str; 10] = [
    "standard",
    "gated",
    "top_k",
    "multi_top_k",
    "abs_top_k",
    "group_max",
    "batch_top_k",
    "matryoshka",
    "jump_relu",
    "matching_pursuit",
];

fn kind(name: &str, d_sae: usize, random: &mut impl Rng) -> Kind {
    let k = random.random_range(1..=d_sae / 2);
    match name {
        "standard" => Kind::Standard(Standard { sparsity: sparsity(random) }),
        "gated" => {
            let rules = [GatedAuxiliary::DetachedDecoder, GatedAuxiliary::UndetachedDecoder];
            let auxiliary = rules[random.random_range(0..2)];
            Kind::Gated(Gated { sparsity: sparsity(random), auxiliary })
        }
        "top_k" => selecting(Selection::TopK { k }, random),
        "multi_top_k" => selecting(Selection::MultiTopK { k: k.min(2) }, random),
        "abs_top_k" => selecting(Selection::AbsTopK { k }, random),
        "group_max" => {
            let k = (1..=k).rfind(|k| d_sae.is_multiple_of(*k)).expect("1 divides");
            selecting(Selection::GroupMax { k }, random)
        }
        "batch_top_k" => {
            let k = random.random_range(0.5..3.0);
            selecting(Selection::BatchTopK { k }, random)
        }
        "matryoshka" => {
            let middle = random.random_range(1..d_sae);
            let groups =
                [middle, d_sae].map(|width| Group { width, weight: random.random_range(0.2..1.5) });
            let targets = [AuxKTarget::Residual, AuxKTarget::OwnResidual];
            let selection = Selection::Matryoshka {
                k: random.random_range(0.5..3.0),
                groups: groups.to_vec(),
                aux_k_target: targets[random.random_range(0..2)],
            };
            selecting(selection, random)
        }
        "jump_relu" => {
            let target = random.random_range(1.0..3.0);
            let losses = [
                L0Loss::Step,
                L0Loss::Tanh { scale: 2.0 },
                L0Loss::Quadratic { target },
                L0Loss::BatchQuadratic { target },
            ];
            let through = [StraightThrough::Threshold, StraightThrough::ThresholdAndInput];
            let parameters = [ThresholdParameter::Itself, ThresholdParameter::Logarithm];
            Kind::JumpRelu(JumpRelu {
                bandwidth: random.random_range(0.3..1.5),
                l0: losses[random.random_range(0..4)],
                straight_through: through[random.random_range(0..2)],
                threshold: parameters[random.random_range(0..2)],
                pre_activation: random.random::<bool>().then_some(0.3),
                ..JumpRelu::new(0.6)
            })
        }
        "matching_pursuit" => Kind::MatchingPursuit(MatchingPursuit {
            residual_threshold: 0.2,
            max_iterations: random.random::<bool>().then_some(3),
            stop_on_duplicate_support: random.random(),
        }),
        other => panic!("no kind {other}"),
    }
}

fn problem(name: &str, seed: u64) -> Problem {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let random = &mut random;
    let (n, d_in) = (random.random_range(1..6), random.random_range(2..6));
    let d_sae = random.random_range(4..11);
    let kind = kind(name, d_sae, random);
    let transcodes = name != "matching_pursuit" && random.random_bool(0.3);
    let d_out = if transcodes { random.random_range(2..6) } else { d_in };
    // A single row has no variance.
    let measures = [ErrorMeasure::Squared, ErrorMeasure::Fvu];
    let error = if n == 1 { measures[0] } else { measures[random.random_range(0..2)] };
    let apply_b_dec_to_input = d_out == d_in && random.random_bool(0.7);
    let mut parameters = vec![
        (ParameterName::WDec, matrix(random, [d_sae, d_out], 1.0)),
        (ParameterName::BDec, matrix(random, [1, d_out], 0.5)),
    ];
    if name != "matching_pursuit" {
        parameters.push((ParameterName::WEnc, matrix(random, [d_sae, d_in], 1.0)));
        parameters.push((ParameterName::BEnc, matrix(random, [1, d_sae], 0.5)));
    }
    match &kind {
        Kind::Gated(_) => {
            parameters.push((ParameterName::RMag, matrix(random, [1, d_sae], 0.5)));
            parameters.push((ParameterName::BMag, matrix(random, [1, d_sae], 0.5)));
        }
        Kind::JumpRelu(JumpRelu { threshold: ThresholdParameter::Itself, .. }) => {
            let mut threshold = matrix(random, [1, d_sae], 0.8);
            threshold.values.iter_mut().for_each(|value| *value = value.abs());
            parameters.push((ParameterName::Threshold, threshold));
        }
        Kind::JumpRelu(_) => {
            parameters.push((ParameterName::LogThreshold, matrix(random, [1, d_sae], 1.0)));
        }
        _ => {}
    }
    if transcodes && random.random() {
        parameters.push((ParameterName::WSkip, matrix(random, [d_out, d_in], 0.5)));
    }
    let x = matrix(random, [n, d_in], 1.5);
    let target = transcodes.then(|| matrix(random, [n, d_out], 1.5));
    let dead = (0..d_sae as u32).filter(|_| random.random_bool(0.4)).collect();
    let has_aux_k = matches!(&kind, Kind::Selecting(Selecting { aux_k: Some(_), .. }));
    let may_have_ghosts = name != "matching_pursuit" && !has_aux_k;
    let ghost_gradients = (may_have_ghosts && random.random_bool(0.4))
        .then(|| GhostGradients { coefficient: random.random_range(0.2..1.5) });
    let objective = Objective { kind, error, apply_b_dec_to_input, ghost_gradients };
    objective.validate(d_sae).expect("a valid objective");
    let parameters = parameters.into_iter().collect();
    Problem { objective, point: Point { parameters, x, target }, dead }
}

#[test]
fn losses_and_gradients_are_those_of_the_oracle() {
    let (mut n_problems, mut n_entries) = (0, 0);
    for name in KINDS {
        for seed in 0..CASES {
            let Problem { objective, point, dead } = problem(name, seed);
            let parameters: Parameters =
                point.parameters.iter().map(|(&name, matrix)| (name, tensor(matrix))).collect();
            let target = point.target.as_ref().map(tensor);
            let batch = Batch { x: tensor(&point.x), target };
            let found = objective.differentiate(&parameters, &batch, &dead);
            let oracle = Oracle::new(&objective, &point, &dead);
            let Some(oracle) = oracle.away_from_edges(1e-4) else { continue };

            let expected = oracle.loss(&point);
            let off = (found.loss - expected).abs();
            let place = format!("{name} {seed}: {objective:?}, dead {dead:?}");
            assert!(off < 1e-5 * (1.0 + expected.abs()), "{place}: {} for {expected}", found.loss);
            let latents: Vec<f32> =
                found.latents.to_dense().into_data().try_into_vec_as().expect("floats");
            for (latent, expected) in latents.into_iter().zip(oracle.latents().concat()) {
                assert!((f64::from(latent) - expected).abs() < 1e-5, "{place}: {latent}");
            }
            for (parameter, tensor) in found.gradient.named() {
                let gradient: Vec<f32> = tensor.to_data().try_into_vec_as().expect("floats");
                for (index, gradient) in gradient.into_iter().enumerate() {
                    let moved = |by: f64| {
                        let mut point = point.clone();
                        let matrix = point.parameters.get_mut(&parameter).expect("there");
                        matrix.values[index] += by;
                        oracle.loss(&point)
                    };
                    let difference = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
                    let off = (f64::from(gradient) - difference).abs();
                    assert!(
                        off < 1e-4 * (1.0 + difference.abs()),
                        "{place}: {}[{index}]: {gradient} for {difference}",
                        parameter.as_str()
                    );
                    n_entries += 1;
                }
            }
            n_problems += 1;
        }
    }
    assert!(n_problems >= 900, "only {n_problems} problems, {n_entries} entries");
}

/// A gradient for dead latents has to come through the encoder's weights, not the decoder's alone.
#[test]
fn aux_k_reaches_the_encoder_of_dead_latents() {
    for rule in [AuxKRule::SaeLens, AuxKRule::Sparsify, AuxKRule::OpenAi] {
        // A single row has no variance that OpenAI's rule could be measured by.
        let problems = (0..).map(|seed| problem("top_k", seed));
        let mut problems = problems.filter(|problem| problem.point.x.shape[0] > 1);
        let Problem { mut objective, mut point, .. } = problems.next().expect("one of many");
        let Kind::Selecting(kind) = &mut objective.kind else { panic!("another kind") };
        kind.aux_k = Some(AuxK { coefficient: 1.0, k: None, rule });
        objective.ghost_gradients = None;
        // Latent 0 is never selected, and its pre-activations lie close to zero on either side.
        let w_enc = point.parameters.get_mut(&ParameterName::WEnc).expect("an encoder");
        let d_in = w_enc.shape[1];
        w_enc.values[..d_in].iter_mut().for_each(|value| *value *= 1e-3);
        let b_enc = point.parameters.get_mut(&ParameterName::BEnc).expect("a bias");
        b_enc.values[0] = 0.01;
        let parameters: Parameters =
            point.parameters.iter().map(|(&name, matrix)| (name, tensor(matrix))).collect();
        let batch = Batch { x: tensor(&point.x), target: point.target.as_ref().map(tensor) };
        let gradient = |dead: &[u32]| {
            let found = objective.differentiate(&parameters, &batch, dead).gradient;
            let rows = found.get(ParameterName::WEnc).expect("an encoder").clone();
            rows.narrow(0, 0, 1).abs().sum().into_scalar::<f32>()
        };
        assert!(gradient(&[0]) > gradient(&[]), "{rule:?}");
    }
}
