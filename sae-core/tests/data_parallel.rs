//! Workers that step together do what one does.

use std::thread;

use burn::tensor::{Device, Tensor, TensorData};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sae_core::train::*;

const D_IN: usize = 12;
const D_SAE: usize = 48;
const BATCH: usize = 32;
/// The last one resamples.
const N_STEPS: usize = 18;

/// Kinds whose loss is a mean over rows, whatever rows there are beside.
fn separable() -> Vec<(&'static str, Kind)> {
    let sparsity = Sparsity::new(0.05);
    let undetached = GatedAuxiliary::UndetachedDecoder;
    let selecting = |selection| Selecting {
        aux_k: Some(AuxK::new()),
        threshold: Some(RunningThreshold::SaeLens { rate: 0.05 }),
        ..Selecting::new(selection)
    };
    let by_row = RunningThreshold::DictionaryLearningByRow { beta: 0.9, start_step: 3 };
    let top_k = Selecting { threshold: Some(by_row), ..selecting(Selection::TopK { k: 3 }) };
    let log = ThresholdParameter::Logarithm;
    let jump_relu = JumpRelu {
        bandwidth: 0.5,
        initial_threshold: 0.1,
        threshold: log,
        pre_activation: Some(0.01),
        ..JumpRelu::new(0.01)
    };
    vec![
        ("standard", Kind::Standard(Standard { sparsity })),
        ("gated", Kind::Gated(Gated { sparsity, auxiliary: undetached })),
        ("top_k", Kind::Selecting(top_k)),
        ("multi_top_k", Kind::Selecting(selecting(Selection::MultiTopK { k: 3 }))),
        ("abs_top_k", Kind::Selecting(selecting(Selection::AbsTopK { k: 3 }))),
        ("jump_relu", Kind::JumpRelu(jump_relu)),
    ]
}

/// Kinds that look at the batch as a whole.
fn coupled() -> Vec<(&'static str, Kind)> {
    let batch_top_k = |threshold| {
        let selecting = Selecting::new(Selection::BatchTopK { k: 3.0 });
        Kind::Selecting(Selecting { threshold: Some(threshold), ..selecting })
    };
    let mean = RunningThreshold::DictionaryLearning { beta: 0.9, start_step: 2 };
    vec![
        ("batch_top_k", batch_top_k(RunningThreshold::SaeLens { rate: 0.1 })),
        ("batch_top_k, mean", batch_top_k(mean)),
    ]
}

fn config(kind: Kind) -> TrainConfig {
    TrainConfig::new(D_SAE, Objective::new(kind))
        .with_batch(BATCH)
        .with_schedule(Schedule::new().with_learning_rate(1e-3))
        .with_clip_norm(Some(1.0))
        .with_dead_after(1_000_000)
}

fn start(config: &TrainConfig) -> TrainState {
    let values = batch(0).into_data().try_to_vec::<f32>().expect("f32");
    let matrix = ActivationMatrix::new(&values, D_IN).expect("whole rows");
    let trainer = Trainer::new(config.clone(), &matrix, &Device::flex()).expect("valid");
    trainer.state().clone()
}

/// The activations of a step, of which the first rows are the first worker's.
fn batch(step: usize) -> Tensor<2> {
    let mut random = ChaCha8Rng::seed_from_u64(step as u64);
    let sizes = (0..BATCH * 6).map(|_| random.random_range(0f32..1.0).powi(3)).collect();
    let directions = (0..6 * D_IN).map(|at| (1.7 * at as f32).sin()).collect();
    let matrix = |values: Vec<f32>, shape: [usize; 2]| -> Tensor<2> {
        Tensor::from_data(TensorData::new(values, shape), &Device::flex())
    };
    matrix(sizes, [BATCH, 6]).matmul(matrix(directions, [6, D_IN]))
}

fn part(step: usize, rank: usize, n_workers: usize) -> Tensor<2> {
    let n = BATCH / n_workers;
    batch(step).narrow(0, rank * n, n)
}

/// The state of each worker after some steps, and the last losses.
fn among(
    n_workers: usize,
    config: &TrainConfig,
    part: impl Fn(usize, usize) -> Tensor<2> + Sync,
) -> Vec<(TrainState, StepOutcome)> {
    let start = start(config);
    thread::scope(|scope| {
        let spawned = Thread::workers(n_workers).into_iter().map(|mut worker| {
            let (mut state, part) = (start.clone(), &part);
            scope.spawn(move || {
                let mut last = None;
                for step in 0..N_STEPS {
                    let part = part(step, worker.rank());
                    let outcome = state.step_among(part, config, N_STEPS, &mut worker);
                    last = Some(outcome.expect("nobody leaves"));
                }
                // Nobody goes before the others are done.
                (state, last.expect("steps"), worker)
            })
        });
        let spawned: Vec<_> = spawned.collect();
        let done: Vec<_> = spawned.into_iter().map(|it| it.join().expect("no panic")).collect();
        done.into_iter().map(|(state, last, _)| (state, last)).collect()
    })
}

fn alone(config: &TrainConfig, batch: impl Fn(usize) -> Tensor<2>) -> (TrainState, StepOutcome) {
    let mut state = start(config);
    let mut last = None;
    for step in 0..N_STEPS {
        last = Some(state.step(batch(step), config, N_STEPS));
    }
    (state, last.expect("steps"))
}

fn all_of(state: &TrainState) -> Vec<(ParameterName, TensorData)> {
    let Moments { first, second } = &state.moments;
    let sets = [&state.parameters, first, second];
    sets.iter().flat_map(|set| set.named()).map(|(name, t)| (name, t.to_data())).collect()
}

fn assert_same(what: &str, one: &TrainState, other: &TrainState) {
    assert_eq!(all_of(one), all_of(other), "{what}");
    assert_eq!(one.ages, other.ages, "{what}");
    assert_eq!(one.threshold, other.threshold, "{what}");
    assert_eq!((one.step, one.n_skipped), (other.step, other.n_skipped), "{what}");
}

#[test]
fn workers_equal_one_and_stay_the_same() {
    let mut n_resampled = 0;
    for (name, kind) in separable() {
        // Silent after two batches; some begin again.
        let config = config(kind).with_dead_after(2 * BATCH as u64);
        let config = config.with_resampling(Some(Resampling::new(9)));
        let (one, last) = alone(&config, batch);
        let StepOutcome::Taken(last) = last else { panic!("{name}: {last:?}") };
        n_resampled += last.n_resampled;
        for n_workers in [2, 4] {
            let workers = among(n_workers, &config, |step, rank| part(step, rank, n_workers));
            for (state, _) in &workers {
                assert_same(name, state, &workers[0].0);
            }
            let again = among(n_workers, &config, |step, rank| part(step, rank, n_workers));
            assert_same(&format!("{name}, again"), &again[0].0, &workers[0].0);

            let state = &workers[0].0;
            assert_eq!(state.ages, one.ages, "{name}, {n_workers} workers");
            for ((name_of, own), (_, of_one)) in all_of(state).iter().zip(all_of(&one)) {
                let own = own.clone().try_into_vec::<f32>().expect("f32");
                let of_one = of_one.try_into_vec::<f32>().expect("f32");
                let largest = of_one.iter().fold(0f32, |largest, x| largest.max(x.abs()));
                for (a, b) in own.iter().zip(&of_one) {
                    let off = (a - b).abs() / largest;
                    assert!(off < 2e-3, "{name}, {n_workers} workers, {name_of:?}: {a} for {b}");
                }
            }
            if let (Some(a), Some(b)) = (state.threshold, one.threshold) {
                assert!((a - b).abs() < 1e-4 * b.abs(), "{name}: threshold {a} for {b}");
            }
        }
    }
    assert!(n_resampled > 0, "nothing begins again");
}

#[test]
fn workers_with_equal_parts_are_one_to_the_bit() {
    for (name, kind) in separable().into_iter().chain(coupled()) {
        let config = config(kind);
        let (one, of_one) = alone(&config, |step| part(step, 0, 2));
        for (state, last) in among(2, &config, |step, _| part(step, 0, 2)) {
            assert_eq!(all_of(&state), all_of(&one), "{name}");
            let (StepOutcome::Taken(a), StepOutcome::Taken(b)) = (&last, &of_one) else {
                panic!("{name}: {last:?}, {of_one:?}")
            };
            assert_eq!(a.l0, b.l0, "{name}");
            assert!((a.loss - b.loss).abs() <= 1e-6 * b.loss, "{name}: {} for {}", a.loss, b.loss);
            let sum: f64 = a.terms.iter().map(|(_, value)| value).sum();
            assert!((a.loss - sum).abs() <= 1e-5 * sum, "{name}: terms");
        }
    }
}

#[test]
fn what_one_cannot_take_nobody_takes() {
    let config = config(separable().remove(2).1);
    let workers = among(2, &config, |step, rank| match (step, rank) {
        (5, 1) => part(step, rank, 2) * f32::NAN,
        _ => part(step, rank, 2),
    });
    for (state, _) in &workers {
        assert_eq!(state.n_skipped, 1);
        assert!(state.parameters.are_finite());
        assert_same("skipped", state, &workers[0].0);
    }
}

#[test]
fn a_worker_that_leaves_is_an_error_of_the_others() {
    let config = config(separable().remove(2).1);
    let mut state = start(&config);
    let before = all_of(&state);
    let mut workers = Thread::workers(2);
    drop(workers.pop());
    let error = state.step_among(part(0, 0, 2), &config, N_STEPS, &mut workers[0]);
    assert_eq!(error, Err(ReduceError::Gone { n_workers: 2 }));
    assert_eq!(all_of(&state), before);
    assert_eq!(state.step, 0);
}
