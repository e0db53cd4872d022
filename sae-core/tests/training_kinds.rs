//! Every kind of SAE, trained for a while on activations that are sums of a few directions.

use std::ops::ControlFlow;
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use sae_core::train::*;

const D_IN: usize = 16;
const D_SAE: usize = 32;
const N_STEPS: usize = 400;
const BATCH: usize = 64;

fn normal(random: &mut impl Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| random.sample(StandardNormal)).collect()
}

/// Sums of three of 24 directions.
fn activations() -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(0);
    let directions: Vec<Vec<f32>> = (0..24).map(|_| normal(&mut random, D_IN)).collect();
    let mut values = Vec::new();
    for _ in 0..BATCH * 50 {
        let mut row = vec![0.5; D_IN];
        for _ in 0..3 {
            let size: f32 = random.random_range(0.5..1.5);
            let direction = &directions[random.random_range(0..24)];
            row.iter_mut().zip(direction).for_each(|(x, d)| *x += size * d);
        }
        values.extend(row);
    }
    values
}

fn kinds(d_sae: usize) -> Vec<(&'static str, Kind)> {
    let sparsity = Sparsity::new(0.3);
    let selecting = |selection| Selecting {
        aux_k: Some(AuxK::new()),
        threshold: Some(RunningThreshold::SaeLens { rate: 0.05 }),
        ..Selecting::new(selection)
    };
    let groups = vec![Group { width: 8, weight: 1.0 }, Group { width: d_sae, weight: 1.0 }];
    let aux_k_target = AuxKTarget::OwnResidual;
    let matryoshka = Selection::Matryoshka { k: 3.0, groups, aux_k_target };
    let undetached = GatedAuxiliary::UndetachedDecoder;
    let jump_relu = JumpRelu {
        bandwidth: 0.5,
        initial_threshold: 0.1,
        pre_activation: Some(0.01),
        ..JumpRelu::new(0.3)
    };
    let by_logarithm = JumpRelu { threshold: ThresholdParameter::Logarithm, ..jump_relu };
    vec![
        ("standard", Kind::Standard(Standard { sparsity })),
        ("gated", Kind::Gated(Gated { sparsity, auxiliary: undetached })),
        ("top_k", Kind::Selecting(selecting(Selection::TopK { k: 3 }))),
        ("multi_top_k", Kind::Selecting(selecting(Selection::MultiTopK { k: 3 }))),
        ("abs_top_k", Kind::Selecting(selecting(Selection::AbsTopK { k: 3 }))),
        ("group_max", Kind::Selecting(selecting(Selection::GroupMax { k: 4 }))),
        ("batch_top_k", Kind::Selecting(selecting(Selection::BatchTopK { k: 3.0 }))),
        ("matryoshka", Kind::Selecting(selecting(matryoshka))),
        ("jump_relu", Kind::JumpRelu(jump_relu)),
        ("jump_relu_log", Kind::JumpRelu(by_logarithm)),
    ]
}

fn config(kind: Kind) -> TrainConfig {
    let schedule = Schedule::new().with_learning_rate(3e-3);
    TrainConfig::new(D_SAE, Objective::new(kind))
        .with_batch(BATCH)
        .with_n_passes(8)
        .with_schedule(schedule)
        .with_clip_norm(Some(1.0))
        .with_dead_after(2000)
}

fn rows(values: &[f32]) -> Tensor<2> {
    let data = TensorData::new(values.to_vec(), [values.len() / D_IN, D_IN]);
    Tensor::from_data(data, &Device::flex())
}

#[test]
fn every_kind_learns_and_its_sae_does_what_was_trained() {
    let values = activations();
    let matrix = ActivationMatrix::new(&values, D_IN).expect("whole rows");
    for (name, kind) in kinds(D_SAE) {
        for decoder in [DecoderNorm::Free, DecoderNorm::Unit] {
            let config = config(kind.clone()).with_decoder(decoder).with_decoder_norm(1.0);
            let mut trainer = Trainer::new(config, &matrix, &Device::flex()).expect("valid");
            trainer.run(&matrix, |_| ControlFlow::Continue(())).expect("finite");
            assert_eq!(trainer.state().step, N_STEPS);
            let sae = trainer.sae();
            let x = rows(&values[..BATCH * D_IN]);
            let (latents, reconstruction) = sae.run(x.clone());
            let error = (reconstruction - x.clone()).square().sum().into_scalar::<f32>();
            let centred = x.clone() - x.clone().mean_dim(0);
            let fvu = error / centred.square().sum().into_scalar::<f32>();
            let l0 = latents.entries().count() as f64 / BATCH as f64;
            assert!(fvu < 0.5 && l0 < 12.0, "{name}, {decoder:?}: FVU {fvu}, L0 {l0}");
            if decoder == DecoderNorm::Unit {
                let norms = trainer.state().parameters.w_dec().square().sum_dim(1);
                let off = (norms - 1.0).abs().max().into_scalar::<f32>();
                assert!(off < 1e-5, "{name}: {off}");
            }
            // A selection over the batch ends as a threshold; the others are the same function.
            if trainer.config().objective.running_threshold().is_none()
                || name.ends_with("top_k") && name != "batch_top_k"
                || name == "group_max"
            {
                let state = trainer.state();
                let scaled = x.mul_scalar(state.input_scale);
                let objective = &trainer.config().objective;
                let found = objective.differentiate(&state.parameters, &scaled.into(), &[]);
                let trained = found.row_errors.sum().into_scalar::<f32>();
                let scale = state.input_scale * state.input_scale;
                let off = f64::from(trained) / (f64::from(error) * scale) - 1.0;
                assert!(off.abs() < 1e-3, "{name}, {decoder:?}: {off}");
            }
        }
    }
}

#[test]
fn a_transcoder_with_a_skip_learns_another_activation() {
    let x = activations();
    // Another direction in place of each axis, and a nonlinearity.
    let target: Vec<f32> =
        x.chunks(D_IN).flat_map(|row| [row[1] - row[0], row[2].max(0.0), row[3]]).collect();
    let n = x.len() / D_IN;
    let device = Device::flex();
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut matrix = |shape: [usize; 2], scale: f32| -> Tensor<2> {
        let values = normal(&mut random, shape[0] * shape[1]);
        Tensor::<2>::from_data(TensorData::new(values, shape), &device).mul_scalar(scale)
    };
    let parameters: Parameters = [
        (ParameterName::WEnc, matrix([D_SAE, D_IN], 0.3)),
        (ParameterName::BEnc, matrix([1, D_SAE], 0.0)),
        (ParameterName::WDec, matrix([D_SAE, 3], 0.1)),
        (ParameterName::BDec, matrix([1, 3], 0.0)),
        (ParameterName::WSkip, matrix([3, D_IN], 0.0)),
    ]
    .into_iter()
    .collect();
    let selecting = Selecting::new(Selection::TopK { k: 4 });
    let objective = Objective {
        error: ErrorMeasure::Fvu,
        apply_b_dec_to_input: false,
        ..Objective::new(Kind::Selecting(selecting))
    };
    let config = TrainConfig::new(D_SAE, objective)
        .with_transcoder(Some(Transcoder { d_out: 3, skip: true }))
        .with_schedule(Schedule::new().with_learning_rate(1e-2));
    config.validate(D_IN).expect("valid");
    let mut state = TrainState::new(parameters, 1.0, &config.optimizer);
    let targets = Tensor::from_data(TensorData::new(target, [n, 3]), &device);
    let batch = Batch { x: rows(&x), target: Some(targets.clone()) };
    let mut last = f64::INFINITY;
    for _ in 0..100 {
        let StepOutcome::Taken(report) = state.step(batch.clone(), &config, 100) else {
            panic!("skipped");
        };
        last = report.loss;
    }
    assert!(last < 0.05, "FVU {last}");
    let (_, reconstruction) = state.sae(&config).run(rows(&x));
    let error = (reconstruction - targets.clone()).square().sum().into_scalar::<f32>();
    let centred = targets.clone() - targets.mean_dim(0);
    let fvu = f64::from(error / centred.square().sum().into_scalar::<f32>());
    assert!((fvu / last - 1.0).abs() < 0.2, "{fvu} after {last}");
}

#[test]
fn a_step_without_a_finite_loss_is_skipped_and_counted() {
    let values = activations();
    let matrix = ActivationMatrix::new(&values, D_IN).expect("whole rows");
    let config = config(kinds(D_SAE).remove(2).1);
    let mut state =
        Trainer::new(config.clone(), &matrix, &Device::flex()).expect("valid").state().clone();
    let bits = |state: &TrainState| -> Vec<u32> {
        let moments = state.moments.first.named().chain(state.moments.second.named());
        let tensors = state.parameters.named().chain(moments).map(|(_, tensor)| tensor.to_data());
        tensors.flat_map(|data| data.iter::<f32>().map(f32::to_bits).collect::<Vec<_>>()).collect()
    };
    let good = rows(&values[..BATCH * D_IN]);
    let mut undisturbed = state.clone();
    let before = (bits(&state), state.ages.clone());
    for bad in [f32::NAN, f32::INFINITY, 1e30] {
        let mut values = values[..BATCH * D_IN].to_vec();
        values[17] = bad;
        let outcome = state.step(rows(&values), &config, N_STEPS);
        assert!(matches!(outcome, StepOutcome::Skipped { .. }), "{bad}: {outcome:?}");
        assert!((bits(&state), state.ages.clone()) == before, "{bad}");
    }
    assert_eq!((state.step, state.n_skipped), (3, 3));
    // The optimiser counts the steps that it took: the next is its first.
    undisturbed.step = 3;
    undisturbed.n_skipped = 3;
    state.step(good.clone(), &config, N_STEPS);
    undisturbed.step(good, &config, N_STEPS);
    assert!(bits(&state) == bits(&undisturbed));
}

#[test]
fn dead_latents_are_resampled_the_same_way_each_time() {
    let values = activations();
    let matrix = ActivationMatrix::new(&values, D_IN).expect("whole rows");
    let run = |seed| {
        let kind = Kind::Selecting(Selecting::new(Selection::TopK { k: 3 }));
        let config = config(kind)
            .with_resampling(Some(Resampling::new(20)))
            .with_dead_after(500)
            .with_seed(seed);
        let trainer = Trainer::new(config.clone(), &matrix, &Device::flex()).expect("valid");
        let mut state = trainer.state().clone();
        let mut n_resampled = 0;
        for step in 0..40 {
            let from = step % 50 * BATCH * D_IN;
            let x = rows(&values[from..from + BATCH * D_IN]).mul_scalar(state.input_scale);
            let StepOutcome::Taken(report) = state.step(x, &config, 40) else { panic!("skipped") };
            assert!(report.n_resampled == 0 || (step + 1) % 20 == 0);
            n_resampled += report.n_resampled;
        }
        (n_resampled, state.parameters.w_dec().into_data())
    };
    let (first, second, other) = (run(1), run(1), run(2));
    assert!(first.0 > 0);
    assert_eq!(first, second);
    assert_ne!(first.1, other.1);
}

/// All that a run remembers, as bits.
fn bits(state: &TrainState) -> Vec<u64> {
    let moments = state.moments.first.named().chain(state.moments.second.named());
    let tensors = state.parameters.named().chain(moments).map(|(_, tensor)| tensor.to_data());
    let mut bits: Vec<u64> = tensors
        .flat_map(|data| data.iter::<f32>().map(|x| x.to_bits().into()).collect::<Vec<_>>())
        .collect();
    bits.extend(state.ages.rows());
    bits.extend([state.step as u64, state.n_skipped as u64, state.input_scale.to_bits()]);
    bits.extend(state.threshold.map(f64::to_bits));
    bits
}

/// A run of every kind, with every optimiser and whatever else a step remembers or draws.
fn runs(width: usize) -> Vec<Run> {
    let d_sae = 2 * width;
    let plain = |kind| config(kind).with_n_passes(1).with_dead_after(64);
    let mut configs: Vec<(&str, TrainConfig)> =
        kinds(d_sae).into_iter().map(|(name, kind)| (name, plain(kind))).collect();
    let top_k = plain(kinds(d_sae).remove(2).1).with_resampling(Some(Resampling::new(4)));
    let jump_relu = plain(kinds(d_sae).remove(8).1).with_resampling(Some(Resampling::new(4)));
    let pursuit = Kind::MatchingPursuit(MatchingPursuit {
        residual_threshold: 0.5,
        max_iterations: Some(4),
        stop_on_duplicate_support: true,
    });
    configs.extend([
        ("pursuit", plain(pursuit).with_decoder(DecoderNorm::Unit).with_decoder_norm(1.0)),
        ("unit", top_k.clone().with_decoder(DecoderNorm::Unit).with_decoder_norm(1.0)),
        ("signum", top_k.clone().with_optimizer(Optimizer::Signum(Momentum::new()))),
        ("lazy", top_k.clone().with_optimizer(Optimizer::RowLazyAdam(Betas::new()))),
        ("rows", top_k.clone().with_input_scale(InputScale::LayerNorm)),
        ("revived", jump_relu),
    ]);
    let transcoder = Some(Transcoder { d_out: width, skip: true });
    let objective = Objective { apply_b_dec_to_input: false, ..top_k.objective.clone() };
    configs.push(("skip", TrainConfig { transcoder, objective, ..top_k }));
    let run = |(name, config): (&str, TrainConfig)| {
        let config = TrainConfig { d_sae, ..config };
        let run = Run::new(name, MatrixSource::COLUMN, config.clone());
        if config.transcoder.is_some() { run.transcoding(MatrixSource::COLUMN) } else { run }
    };
    configs.into_iter().map(run).collect()
}

/// Trains all of them together for ten steps, in a folder or without one, until so many are done.
fn trained(values: &[f32], width: usize, folder: Option<&Path>, until: usize) -> Vec<Vec<u64>> {
    let matrix = ActivationMatrix::new(values, width).expect("whole rows");
    let mut source = MatrixSource::new(matrix, 3, BATCH, 1).expect("a batch");
    let config = FitConfig::new().with_checkpoint_every(3).with_n_steps(Some(10));
    let (runs, device) = (runs(width), Device::flex());
    let mut fit = match folder {
        Some(folder) => {
            let checkpoints = Checkpoints::open(folder).expect("opens");
            Fit::resume(runs, &mut source, config, &device, checkpoints).expect("the same run")
        }
        None => Fit::new(runs, &mut source, config, &device).expect("valid"),
    };
    let stop = |event: &Event| match event {
        Event::Step(progress) if progress.step >= until => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    fit.run(stop).expect("finite");
    fit.into_trainers().iter().map(|trainer| bits(trainer.state())).collect()
}

fn assert_same(actual: &[Vec<u64>], expected: &[Vec<u64>], what: &str) {
    for ((run, actual), expected) in runs(D_IN).iter().zip(actual).zip(expected) {
        assert!(actual == expected, "{}: {what}", run.name);
    }
}

#[test]
fn every_kind_goes_on_with_the_same_bits() {
    let values = activations();
    let whole = trained(&values, D_IN, None, 10);
    for until in [2, 7] {
        let folder = tempfile::tempdir().expect("a folder");
        trained(&values, D_IN, Some(folder.path()), until);
        let resumed = trained(&values, D_IN, Some(folder.path()), 10);
        assert_same(&resumed, &whole, "broken off");
    }
}

/// On a width at which work is shared out.
#[test]
fn every_kind_has_the_same_bits_on_any_number_of_threads() {
    let width = 160;
    let values: Vec<f32> = (0..width * BATCH * 10).map(|i| (i as f32 * 0.7).sin()).collect();
    let on_threads = |n: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().expect("threads");
        pool.install(|| trained(&values, width, None, 10))
    };
    let one = on_threads(1);
    assert_same(&on_threads(2), &one, "two threads");
    assert_same(&on_threads(3), &one, "three threads");
}

/// What a selection over the batch becomes: a threshold on what latents write.
#[test]
fn a_running_threshold_is_the_threshold_of_what_latents_write() {
    let values = activations();
    let matrix = ActivationMatrix::new(&values, D_IN).expect("whole rows");
    for (name, kind) in
        kinds(D_SAE).into_iter().filter(|(name, _)| ["batch_top_k", "matryoshka"].contains(name))
    {
        let mut trainer = Trainer::new(config(kind), &matrix, &Device::flex()).expect("valid");
        trainer.run(&matrix, |_| ControlFlow::Continue(())).expect("finite");
        let state = trainer.state();
        let threshold = state.threshold.expect("a running threshold");
        let parameters = &state.parameters;
        let x = rows(&values[..BATCH * D_IN]);
        let row = |name| parameters.get(name).expect("trained").clone();
        let centred = x.clone().mul_scalar(state.input_scale) - row(ParameterName::BDec);
        let pre = centred.matmul(row(ParameterName::WEnc).transpose()) + row(ParameterName::BEnc);
        let norms = parameters.w_dec().square().sum_dim(1).sqrt().transpose();
        let written = pre.clone() * norms;
        let z = pre.mask_fill(written.lower_equal_elem(threshold), 0.0);
        let expected = z.clone().matmul(parameters.w_dec()) + row(ParameterName::BDec);
        let (latents, reconstruction) = trainer.sae().run(x);
        let n_active = z.greater_elem(0.0).int().sum().into_scalar::<i64>();
        assert_eq!(latents.entries().count() as i64, n_active, "{name}");
        let off = reconstruction.mul_scalar(state.input_scale) - expected;
        let off = off.abs().max().into_scalar::<f32>();
        assert!(off < 1e-4 && n_active > BATCH as i64, "{name}: {off}, {n_active} active");
    }
}
