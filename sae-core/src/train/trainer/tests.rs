use burn::tensor::{Tensor, TensorData};
use rand::seq::SliceRandom;
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

use super::*;
use crate::metrics::Reconstruction;
use crate::train::{Kind, Objective, Search, Selecting, Selection, StepOutcome};

const D_IN: usize = 24;
const N_DIRECTIONS: usize = 32;
const N_ACTIVE: usize = 3;

/// Activations that are sums of a few of 32 unit directions, about a centre that is not zero.
struct Planted {
    directions: Vec<f32>,
    values: Vec<f32>,
}

impl Planted {
    fn new(n_rows: usize) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(0);
        let directions: Vec<f32> = (0..N_DIRECTIONS).flat_map(|_| unit(&mut random)).collect();
        let centre: Vec<f32> = unit(&mut random).iter().map(|x| 3.0 * x).collect();
        let mut values = Vec::with_capacity(n_rows * D_IN);
        for _ in 0..n_rows {
            let mut row = centre.clone();
            for _ in 0..N_ACTIVE {
                let which = random.random_range(0..N_DIRECTIONS);
                let size: f32 = random.random_range(0.5..1.5);
                let direction = &directions[which * D_IN..][..D_IN];
                row.iter_mut().zip(direction).for_each(|(x, d)| *x += size * d);
            }
            values.extend(row);
        }
        Self { directions, values }
    }

    fn matrix(&self) -> ActivationMatrix<'_> {
        ActivationMatrix::new(&self.values, D_IN).expect("whole rows")
    }

    fn rows(&self) -> Tensor<2> {
        let n = self.matrix().n_rows();
        Tensor::from_data(TensorData::new(self.values.clone(), [n, D_IN]), &device())
    }

    fn directions(&self) -> Tensor<2> {
        let data = TensorData::new(self.directions.clone(), [N_DIRECTIONS, D_IN]);
        Tensor::from_data(data, &device())
    }

    fn fvu(&self, sae: &Sae) -> f64 {
        let mut metrics = Reconstruction::new(sae.config().d_sae);
        let parts = sae.decompose(self.rows());
        metrics.update(self.rows(), parts.reconstruction, &parts.latents);
        metrics.fvu()
    }
}

fn unit(random: &mut impl Rng) -> Vec<f32> {
    let row: Vec<f32> = (0..D_IN).map(|_| random.sample(StandardNormal)).collect();
    let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
    row.iter().map(|x| x / norm).collect()
}

fn device() -> Device {
    Device::flex()
}

fn config() -> TrainConfig {
    let schedule = super::super::Schedule::new().with_learning_rate(3e-3);
    TrainConfig::new(64, Objective::top_k(N_ACTIVE))
        .with_batch(128)
        .with_n_passes(10)
        .with_schedule(schedule)
}

fn on(_: &Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn all_bits(state: &TrainState) -> Vec<u32> {
    let (p, m) = (&state.parameters, &state.moments);
    let bits = |p: &super::super::Parameters| {
        let tensors = p.named().map(|(_, tensor)| tensor.to_data());
        tensors.flat_map(|data| data.iter::<f32>().map(f32::to_bits).collect::<Vec<_>>()).collect()
    };
    let bits = |p| -> Vec<u32> { bits(p) };
    [bits(p), bits(&m.first), bits(&m.second)].concat()
}

#[test]
fn planted_directions_are_recovered() {
    let planted = Planted::new(1 << 14);
    let mut trainer = Trainer::new(config(), &planted.matrix(), &device()).expect("valid");
    let before = planted.fvu(&trainer.sae());
    let mut last = None;
    trainer
        .run(&planted.matrix(), |progress| {
            last = Some(*progress);
            on(progress)
        })
        .expect("trains");
    let last = last.expect("steps were made");
    assert_eq!((last.step, last.n_steps), (1280, 1280));
    let sae = trainer.sae();
    let after = planted.fvu(&sae);
    assert!(before > 0.5 && after < 0.08, "FVU {before} before, {after} after");
    let cosines = planted.directions().matmul(sae.weights().w_dec.clone().transpose());
    let best: Vec<f32> = cosines.max_dim(1).into_data().try_into_vec_as().expect("f32");
    let n_found = best.iter().filter(|&&cosine| cosine > 0.95).count();
    assert!(n_found >= 28, "{n_found} of 32 directions found: {best:?}");
}

#[test]
fn the_same_seed_gives_the_same_bits() {
    let planted = Planted::new(1000);
    let run = |seed| {
        let config = config().with_n_passes(2).with_seed(seed).with_clip_norm(Some(1.0));
        let mut trainer = Trainer::new(config, &planted.matrix(), &device()).expect("valid");
        trainer.run(&planted.matrix(), on).expect("trains");
        all_bits(trainer.state())
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

/// The order of the rows and the steps, written out.
#[test]
fn a_matrix_is_shuffled_anew_in_every_pass() {
    let planted = Planted::new(300);
    let config = config().with_n_passes(2).with_seed(4);
    let mut trainer = Trainer::new(config.clone(), &planted.matrix(), &device()).expect("valid");
    let mut state = trainer.state().clone();
    trainer.run(&planted.matrix(), on).expect("trains");
    for pass in 0..2 {
        let mut random = ChaCha8Rng::seed_from_u64(4);
        random.set_stream(pass + 1);
        let mut rows: Vec<i32> = (0..300).collect();
        rows.shuffle(&mut random);
        for rows in rows.chunks_exact(128) {
            let rows = Tensor::<1, burn::tensor::Int>::from_data(rows, &device());
            let x = planted.rows().select(0, rows).mul_scalar(state.input_scale as f32);
            let outcome = state.step(x, &config, 4);
            assert!(matches!(outcome, StepOutcome::Taken(_)));
        }
    }
    assert_eq!(all_bits(trainer.state()), all_bits(&state));
}

#[test]
fn a_run_that_is_broken_off_and_resumed_is_the_same_run() {
    let planted = Planted::new(1000);
    let config = config().with_n_passes(3);
    // Whether the device differentiates is no part of the run.
    let on_device = |device| Trainer::new(config.clone(), &planted.matrix(), &device);
    let trainer = || on_device(device()).expect("valid");
    let mut whole = on_device(device().autodiff()).expect("valid");
    whole.run(&planted.matrix(), on).expect("trains");
    let mut half = trainer();
    half.run(&planted.matrix(), |progress| match progress.step {
        10 => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    })
    .expect("trains");
    assert_eq!(half.state().step, 10);
    let mut resumed = Trainer::resume(config.clone(), half.state().clone()).expect("valid");
    resumed.run(&planted.matrix(), on).expect("trains");
    assert_eq!(resumed.state().step, 21);
    assert_eq!(all_bits(resumed.state()), all_bits(whole.state()));
    assert_eq!(resumed.state().ages, whole.state().ages);
}

#[test]
fn either_search_trains_the_same_bits() {
    let planted = Planted::new(1000);
    let trained = |search| {
        let selecting = Selecting { search, ..Selecting::new(Selection::TopK { k: 4 }) };
        let objective = Objective::new(Kind::Selecting(selecting));
        let config = TrainConfig::new(128, objective).with_batch(300).with_n_passes(3);
        let mut trainer = Trainer::new(config, &planted.matrix(), &device()).expect("valid");
        trainer.run(&planted.matrix(), on).expect("trains");
        all_bits(trainer.state())
    };
    assert_eq!(trained(Search::Proposed), trained(Search::Full));
}

#[test]
fn the_sae_does_on_raw_activations_what_training_did_on_scaled_ones() {
    let planted = Planted::new(500);
    let trainer = Trainer::new(config(), &planted.matrix(), &device()).expect("valid");
    let state = trainer.state();
    let x = planted.rows().mul_scalar(state.input_scale);
    let objective = &trainer.config().objective;
    let loss = objective.differentiate(&state.parameters, &x.into(), &[]).loss;
    let error = trainer.sae().decompose(planted.rows()).error;
    let raw = f64::from(error.square().sum().into_scalar::<f32>()) / 500.0;
    let scaled = raw * state.input_scale * state.input_scale;
    assert!((scaled / loss - 1.0).abs() < 1e-4, "{scaled} against {loss}");
    let norms: Vec<f32> = trainer.sae().decoder_norms().into_data().try_into_vec_as().expect("f32");
    assert!(norms.iter().all(|norm| (norm - 1.0).abs() < 1e-5));
}

#[test]
fn a_loss_that_is_no_number_stops_the_run_and_spoils_nothing() {
    let mut planted = Planted::new(512);
    let trainer = Trainer::new(config(), &planted.matrix(), &device()).expect("valid");
    let before = all_bits(trainer.state());
    planted.values.fill(f32::NAN);
    let mut resumed = Trainer::resume(config(), trainer.state().clone()).expect("valid");
    let error = resumed.run(&planted.matrix(), on).unwrap_err();
    let at_once =
        |error| matches!(error, FitError::Train(TrainError::NonFiniteLoss { step: 0, .. }));
    assert!(at_once(error));
    assert_eq!(all_bits(resumed.state()), before);
}

#[test]
fn activations_that_do_not_fit_are_refused() {
    let planted = Planted::new(100);
    let error = Trainer::new(config(), &planted.matrix(), &device()).unwrap_err();
    assert_eq!(error, TrainError::TooFewRows { n_rows: 100, batch: 128 });
    let config = config().with_batch(10);
    let mut trainer = Trainer::new(config, &planted.matrix(), &device()).expect("valid");
    let narrow = ActivationMatrix::new(&planted.values, D_IN / 2).expect("whole rows");
    let error = trainer.run(&narrow, on).unwrap_err();
    let width = TrainError::Width { expected: D_IN, actual: D_IN / 2 };
    assert!(matches!(error, FitError::Train(error) if error == width));
}

#[test]
fn clipping_bounds_the_gradient() {
    let planted = Planted::new(200);
    let trainer = Trainer::new(config(), &planted.matrix(), &device()).expect("valid");
    // The first moment after one step is a tenth of the gradient that was applied.
    let first_moment = |clip_norm| {
        let mut state = trainer.state().clone();
        let outcome = state.step(planted.rows(), &config().with_clip_norm(clip_norm), 100);
        assert!(matches!(outcome, StepOutcome::Taken(_)));
        state.moments.first.norm()
    };
    assert!(first_moment(None) > 0.1);
    assert!((first_moment(Some(0.5)) - 0.05).abs() < 1e-6);
    assert_eq!(first_moment(Some(1e9)), first_moment(None));
}
