use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::Mutex;

use blobs::{Blob, Storage, StorageError};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::source::{Chunks, Column, Mixing, MixingBuffer, Position, SourceError};
use crate::train::{
    CheckpointError, MatrixSource, Objective, Schedule, TrainConfig, TrainError, TrainState,
};

const BATCH: usize = 16;
const N_ROWS: u64 = 200;

fn device() -> Device {
    Device::flex()
}

fn columns() -> Vec<Column> {
    vec![Column::new("early", 8), Column::new("late", 5), Column::new("id", 1)]
}

/// Chunks of 30 rows of noise that know their number.
fn chunks(poison: Rc<Cell<bool>>) -> impl ActivationSource {
    Chunks::new(columns(), "noise", move |chunk| {
        let ids: Vec<u64> = (chunk * 30..(chunk * 30 + 30).min(N_ROWS)).collect();
        let noise = |width: usize, salt: u64| -> Vec<f32> {
            let of = |&id: &u64| {
                let mut random = ChaCha8Rng::seed_from_u64(id * 2 + salt);
                (0..width).map(|_| random.random_range(-1.0..1.0)).collect::<Vec<f32>>()
            };
            ids.iter().flat_map(of).collect()
        };
        let mut early = noise(8, 0);
        if poison.get() && chunk == 2 {
            early[3] = f32::NAN;
        }
        let rows = vec![early, noise(5, 1), ids.iter().map(|&id| id as f32).collect()];
        let rows = Rows::new(&columns(), rows).expect("whole rows");
        Ok::<_, std::convert::Infallible>((!ids.is_empty()).then_some(rows))
    })
    .with_n_rows(N_ROWS)
}

/// The rows in a buffer, with a note of every one that is read, and an end to reading on request.
struct Watched<S> {
    source: S,
    ids: Rc<RefCell<Vec<u32>>>,
    n_reads_left: usize,
}

impl<S: ActivationSource> ActivationSource for Watched<S> {
    fn columns(&self) -> &[Column] {
        self.source.columns()
    }

    fn n_rows(&self) -> Option<u64> {
        self.source.n_rows()
    }

    fn fingerprint(&self) -> String {
        self.source.fingerprint()
    }

    fn read(&mut self, n: usize, rows: &mut Rows) -> Result<usize, SourceError> {
        if self.n_reads_left == 0 {
            return Err(SourceError::Chunk { chunk: 0, source: "the power went out".into() });
        }
        self.n_reads_left -= 1;
        let from = rows.n_rows();
        let n_read = self.source.read(n, rows)?;
        self.ids.borrow_mut().extend(rows.column(2)[from..].iter().map(|&id| id as u32));
        Ok(n_read)
    }

    fn position(&self) -> Position {
        self.source.position()
    }

    fn seek(&mut self, position: &Position) -> Result<(), SourceError> {
        self.source.seek(position)
    }
}

fn source(n_reads_left: usize) -> Watched<impl ActivationSource> {
    let mixing = Mixing { capacity: 50, share: 0.5, seed: 9 };
    let buffer = MixingBuffer::new(chunks(Rc::default()), mixing).expect("possible");
    Watched { source: buffer, ids: Rc::default(), n_reads_left }
}

fn runs() -> Vec<Run> {
    let config = TrainConfig::new(12, Objective::top_k(2)).with_batch(BATCH).with_dead_after(20);
    let config = config.with_schedule(Schedule::new().with_learning_rate(1e-2));
    vec![
        Run::new("a", "early", config.clone()),
        Run::new("b", "late", config.clone().with_seed(1)),
        Run::new("c", "early", TrainConfig { objective: Objective::top_k(3), d_sae: 20, ..config }),
    ]
}

fn options() -> FitConfig {
    FitConfig::new().with_checkpoint_every(3).with_model("none".to_owned())
}

fn on(_: &Event) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn bits(state: &TrainState) -> Vec<u64> {
    let (p, m) = (&state.parameters, &state.moments);
    let bits = |p: &crate::train::Parameters| {
        let all = p.named().map(|(_, tensor)| tensor.to_data());
        all.flat_map(|data| data.iter::<f32>().map(|x| x.to_bits().into()).collect::<Vec<u64>>())
            .collect::<Vec<u64>>()
    };
    let rest = [state.step as u64, state.input_scale.to_bits()];
    [bits(p), bits(&m.first), bits(&m.second), state.ages.rows().to_vec(), rest.to_vec()].concat()
}

fn all_bits(fit: Fit) -> Vec<Vec<u64>> {
    fit.into_trainers().iter().map(|trainer| bits(trainer.state())).collect()
}

fn uninterrupted() -> Vec<Vec<u64>> {
    let mut source = source(usize::MAX);
    let mut fit = Fit::new(runs(), &mut source, options(), &device()).expect("valid");
    assert_eq!(fit.run(on).expect("trains"), Ended::Finished);
    all_bits(fit)
}

fn resume<'a>(source: &'a mut dyn ActivationSource, folder: &Path) -> Result<Fit<'a>, FitError> {
    let checkpoints = Checkpoints::open(folder).expect("opens");
    Fit::resume(runs(), source, options(), &device(), checkpoints)
}

#[test]
fn a_run_that_is_broken_off_anywhere_ends_with_the_same_bits_and_uses_every_row_once() {
    let whole = uninterrupted();
    let n_steps = N_ROWS as usize / BATCH;
    for dies_in in 0..=n_steps {
        for politely in [true, false] {
            let folder = tempfile::tempdir().expect("a folder");
            // The sample takes one read, before the steps.
            let n_reads = if politely { usize::MAX } else { 1 + dies_in };
            let mut first = source(n_reads);
            let used = first.ids.clone();
            let mut fit = resume(&mut first, folder.path()).expect("starts");
            assert!(fit.resumed().is_none());
            let ended = fit.run(|event| match event {
                Event::Step(progress) if politely && progress.step == dies_in => {
                    ControlFlow::Break(())
                }
                _ => ControlFlow::Continue(()),
            });
            assert_eq!(ended.is_ok(), politely || dies_in == n_steps, "{dies_in}");
            drop(fit);
            let mut second = source(usize::MAX);
            let again = second.ids.clone();
            let mut fit = resume(&mut second, folder.path()).expect("goes on");
            let from = fit.resumed().map_or(0, |resumed| resumed.step);
            match politely {
                true => assert_eq!(from, if dies_in == 0 { n_steps } else { dies_in }),
                false if dies_in == n_steps => assert_eq!(from, n_steps),
                false => assert_eq!(from, dies_in / 3 * 3),
            }
            assert_eq!(fit.run(on).expect("trains"), Ended::Finished);
            assert_eq!(all_bits(fit), whole, "{dies_in} {politely}");
            // What was sampled and not yet used lies in the checkpoint.
            let n_used = if from == 0 { 0 } else { (from * BATCH).max(SAMPLE) };
            let mut ids = used.borrow()[..n_used].to_vec();
            ids.extend(&*again.borrow());
            ids.sort_unstable();
            let n_used = ids.len();
            ids.dedup();
            assert_eq!((n_used, ids.len()), (n_steps * BATCH, n_steps * BATCH), "{dies_in}");
        }
    }
}

#[test]
fn what_is_sampled_is_read_once_unless_the_run_is_shorter() {
    let fit = |n_steps: usize| {
        let mut source = source(usize::MAX);
        let ids = source.ids.clone();
        let config = options().with_n_steps(Some(n_steps));
        let mut fit = Fit::new(runs(), &mut source, config, &device()).expect("valid");
        assert_eq!(ids.borrow().len(), SAMPLE);
        assert_eq!(fit.ahead.n_rows(), if n_steps * BATCH < SAMPLE { 0 } else { SAMPLE });
        fit.run(on).expect("trains");
        let next = source.position();
        let n_read = ids.borrow().len();
        (n_read, next)
    };
    // 32 rows are read again, so that whoever goes on finds the 33rd; 48 are read once.
    let (short, at) = fit(2);
    assert_eq!(short, SAMPLE + 2 * BATCH);
    let (longer, further) = fit(3);
    assert_eq!(longer, 3 * BATCH);
    for (position, n) in [(at, 2), (further, 3)] {
        let mut plain = source(usize::MAX);
        plain.read(n * BATCH, &mut Rows::empty(&columns())).expect("reads");
        assert_eq!(plain.position(), position);
    }
}

#[test]
fn a_checkpoint_of_rows_of_other_widths_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut first = source(usize::MAX);
    let mut fit = resume(&mut first, folder.path()).expect("starts");
    fit.ahead = Rows::new(&[Column::new("early", 7)], vec![vec![0.0; 7]]).expect("a row");
    let mut progress = on;
    let _ = fit.save(&mut progress).expect("saved");
    drop(fit);
    let mut second = source(usize::MAX);
    let error = resume(&mut second, folder.path()).err().expect("refused").to_string();
    assert!(error.contains("ahead is of widths [7], expected rows of early [8], late"), "{error}");
}

/// Every seventh row is a hundred times as long, in one column of the two.
fn with_outliers() -> impl ActivationSource {
    Chunks::new(columns(), "noise with outliers", |chunk| {
        let mut source = chunks(Rc::default());
        source.seek(&Position::new(chunk, 0)).expect("a chunk");
        let mut rows = Rows::empty(&columns());
        source.read(30.min(N_ROWS.saturating_sub(chunk * 30) as usize), &mut rows).expect("reads");
        let values = (0..3).map(|column| {
            let ids = rows.column(2).iter().map(|&id| id as usize);
            let width = rows.width(column);
            let scaled = rows.column(column).chunks(width).zip(ids).map(|(row, id)| {
                let is_long = id % 7 == 3 && column == id / 7 % 2;
                row.iter().map(|x| x * if is_long { 100.0 } else { 1.0 }).collect::<Vec<f32>>()
            });
            scaled.flatten().collect()
        });
        let rows = Rows::new(&columns(), values.collect()).expect("whole rows");
        Ok::<_, std::convert::Infallible>((rows.n_rows() > 0).then_some(rows))
    })
    .with_n_rows(N_ROWS)
}

#[test]
fn outliers_are_left_out_counted_and_do_not_break_resuming() {
    let config = || options().with_max_norm(Some(10.0)).with_evaluate_every(10);
    let run = |folder: &Path, stop_at: usize| {
        let mut source = with_outliers();
        let mut held_out = with_outliers();
        let checkpoints = Checkpoints::open(folder).expect("opens");
        let fit = Fit::resume(runs(), &mut source, config(), &device(), checkpoints);
        let mut fit = fit.expect("valid").evaluate_on(&mut held_out).expect("the same columns");
        let mut events = Vec::new();
        let ended = fit.run(|event| {
            events.push(event.clone());
            match event {
                Event::Step(progress) if progress.step == stop_at => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        });
        let ended = ended.expect("trains");
        (ended, fit.n_steps(), fit.n_left_out(), events, all_bits(fit))
    };
    let whole = tempfile::tempdir().expect("a folder");
    let (ended, n_steps, n_left_out, events, bits) = run(whole.path(), usize::MAX);
    // 29 of 200 are long: 171 are left, for 10 steps and not 12.
    assert_eq!((ended, n_steps, n_left_out), (Ended::Finished, 10, 29));
    let steps = events.iter().filter_map(|event| match event {
        Event::Step(progress) if progress.run_idx == 0 => Some(progress.n_left_out),
        _ => None,
    });
    let steps: Vec<u64> = steps.collect();
    // The sample of 40 has six, rows 3, 10, 17, 24, 31 and 38.
    assert_eq!((steps.len(), steps[0], steps[1]), (10, 6, 6));
    let losses = events.iter().filter_map(|event| match event {
        Event::Step(progress) => Some(progress.loss),
        _ => None,
    });
    assert!(losses.fold(0.0, f64::max) < 20.0);
    let figures: Vec<_> = events
        .iter()
        .filter_map(|event| match event {
            Event::Evaluation(figures) => Some((figures.step, figures.n_rows, figures.n_left_out)),
            _ => None,
        })
        .collect();
    assert_eq!(figures, [(10, 171, 29); 3]);
    // Once it has ended it is at its end, and nothing is told again.
    let (ended, n_steps, _, events, again) = run(whole.path(), usize::MAX);
    assert_eq!((ended, n_steps, events.len(), again), (Ended::Finished, 10, 0, bits.clone()));
    for stop_at in [1, 2, 5, 10] {
        let folder = tempfile::tempdir().expect("a folder");
        run(folder.path(), stop_at);
        let (_, n_steps, n_left_out, _, resumed) = run(folder.path(), usize::MAX);
        assert_eq!((n_steps, n_left_out), (10, 29), "{stop_at}");
        assert_eq!(resumed, bits, "{stop_at}");
    }
    let mut source = with_outliers();
    let checkpoints = Checkpoints::open(whole.path()).expect("opens");
    let error = Fit::resume(runs(), &mut source, options(), &device(), checkpoints).err();
    let error = error.expect("refused").to_string();
    assert!(error.ends_with("max_norm is absent, expected 10.0"), "{error}");
}

#[test]
fn runs_do_not_disturb_each_other() {
    let together = uninterrupted();
    for (run, together) in runs().into_iter().zip(together) {
        let mut source = source(usize::MAX);
        let mut fit = Fit::new(vec![run], &mut source, options(), &device()).expect("valid");
        fit.run(on).expect("trains");
        assert_eq!(all_bits(fit), [together]);
    }
}

/// On a size at which work is shared out.
#[test]
fn one_thread_and_two_give_the_same_bits() {
    let values: Vec<f32> = (0..64 * 2048).map(|i| (i as f32 * 0.7).sin()).collect();
    let matrix = ActivationMatrix::new(&values, 64).expect("whole rows");
    let config =
        TrainConfig::new(1024, Objective::top_k(16)).with_batch(1024).with_clip_norm(Some(1.0));
    let on_threads = |n: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().expect("threads");
        pool.install(|| {
            let mut source = MatrixSource::new(matrix, 3, 1024, 3).expect("a batch");
            let runs = vec![Run::new("a", MatrixSource::COLUMN, config.clone())];
            let mut fit = Fit::new(runs, &mut source, options(), &device()).expect("valid");
            fit.run(on).expect("trains");
            all_bits(fit)
        })
    };
    let one = on_threads(1);
    assert_eq!(one, on_threads(2));
    assert_eq!(one, on_threads(3));
}

#[test]
fn another_run_is_refused_by_all_that_differs() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut first = source(usize::MAX);
    resume(&mut first, folder.path()).expect("starts").run(on).expect("trains");
    let refused = |runs: Vec<Run>, source: &mut dyn ActivationSource, options: FitConfig| {
        let checkpoints = Checkpoints::open(folder.path()).expect("opens");
        match Fit::resume(runs, source, options, &device(), checkpoints).err() {
            Some(FitError::Checkpoint(CheckpointError::OtherRun { differences, .. })) => {
                let told = |d: crate::train::Difference| {
                    format!("{}: {}, not {}", d.field, d.expected, d.actual)
                };
                differences.into_iter().map(told).collect::<Vec<_>>()
            }
            other => panic!("{other:?}"),
        }
    };
    let mut others = runs();
    others[0].config = others[0].config.clone().with_seed(7);
    others[2].config =
        TrainConfig { objective: Objective::top_k(4), d_sae: 24, ..others[2].config.clone() };
    let changed = refused(others, &mut source(9), options().with_model("gpt2".to_owned()));
    assert_eq!(
        changed,
        [
            "model: \"none\", not \"gpt2\"",
            "runs.a.config.seed: 0, not 7",
            "runs.c.config.d_sae: 20, not 24",
            "runs.c.config.objective.kind.selecting.selection.top_k.k: 3, not 4",
        ]
    );
    let mut plain = chunks(Rc::default());
    let changed = refused(runs(), &mut plain, options().with_n_steps(Some(5)));
    assert_eq!(changed.len(), 2, "{changed:?}");
    assert!(changed[0].starts_with("data: ") && changed[1] == "n_steps: 12, not 5");
    let mut fewer = runs();
    fewer.pop();
    let changed = refused(fewer, &mut source(9), options());
    assert!(changed.last().is_some_and(|d| d.starts_with("runs.c: {") && d.ends_with("absent")));
}

#[test]
fn steps_without_a_finite_loss_are_skipped_counted_and_in_the_end_too_many() {
    let poison = Rc::new(Cell::new(false));
    let run = |max_skipped: usize, folder: &Path| {
        poison.set(false);
        let mut source = chunks(poison.clone());
        let checkpoints = Checkpoints::open(folder).expect("opens");
        let config = options().with_max_skipped(max_skipped);
        let fit = Fit::resume(runs(), &mut source, config, &device(), checkpoints);
        let mut fit = fit.expect("valid");
        poison.set(true);
        let mut lost = Vec::new();
        let ended = fit.run(|event| {
            if let Event::Step(progress) = event
                && progress.n_skipped > 0
                && !progress.loss.is_finite()
            {
                lost.push((progress.run_idx, progress.step));
            }
            on(event)
        });
        let steps = fit.members.iter().map(|m| m.trainer.state().step).collect::<Vec<_>>();
        let finite = fit.members.iter().all(|m| m.trainer.state().parameters.norm().is_finite());
        assert!(finite);
        (ended, steps, lost)
    };
    let folder = tempfile::tempdir().expect("a folder");
    // Row 60 is in the fourth batch of the two runs on the early point.
    let (ended, steps, lost) = run(1, folder.path());
    assert_eq!(ended.expect("tolerated"), Ended::Finished);
    assert_eq!((steps, lost), (vec![12; 3], vec![(0, 4), (2, 4)]));
    let folder = tempfile::tempdir().expect("a folder");
    let (ended, ..) = run(0, folder.path());
    let error = ended.unwrap_err();
    assert_eq!(error.to_string(), "run \"c\" has skipped 1 steps, more than 0");
    let mut source = chunks(Rc::default());
    let fit = resume(&mut source, folder.path()).expect("the state was saved");
    assert_eq!((fit.steps_done(), fit.members[0].trainer.state().n_skipped), (4, 1));
}

#[test]
fn a_flag_saves_and_ends() {
    let folder = tempfile::tempdir().expect("a folder");
    let (stop, mut source) = (AtomicBool::new(false), source(usize::MAX));
    let mut fit = resume(&mut source, folder.path()).expect("starts").stop_on(&stop);
    let mut saved = None;
    let ended = fit.run(|event| {
        match event {
            Event::Step(progress) => stop.store(progress.step == 5, Ordering::Relaxed),
            Event::Checkpoint { step, .. } => saved = Some(*step),
            _ => {}
        }
        on(event)
    });
    assert_eq!((ended.expect("ends"), saved), (Ended::Stopped, Some(5)));
}

#[test]
fn evaluations_and_metrics_are_written_as_lines_of_json() {
    let (mut training, mut held_out) = (source(usize::MAX), chunks(Rc::default()));
    let mut lines = Vec::new();
    let config = options().with_evaluate_every(5).with_evaluate_rows(40);
    let mut fit = Fit::new(runs(), &mut training, config, &device())
        .expect("valid")
        .evaluate_on(&mut held_out)
        .expect("the same columns")
        .write_metrics_to(&mut lines);
    fit.run(on).expect("trains");
    let trainer = fit.trainer("b").expect("one of them");
    let (sae, scale) = (trainer.sae(), trainer.state().input_scale);
    drop(fit);
    let lines: Vec<Value> = String::from_utf8(lines)
        .expect("text")
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    let of = |event: &str| lines.iter().filter(|line| line["event"] == event).collect::<Vec<_>>();
    assert_eq!(of("step").len(), 36);
    let evaluations = of("evaluation");
    let steps: Vec<_> = evaluations.iter().map(|line| line["step"].as_u64()).collect();
    assert_eq!(steps, [5, 5, 5, 10, 10, 10, 12, 12, 12].map(Some));
    // The last one of run b, by hand.
    held_out.seek(&Position::default()).expect("its beginning");
    let mut rows = Rows::empty(held_out.columns());
    held_out.read(40, &mut rows).expect("reads");
    let data = burn::tensor::TensorData::new(rows.column(1).to_vec(), [40, 5]);
    let x = burn::tensor::Tensor::<2>::from_data(data, &device());
    let error = sae.decompose(x).error.square().sum().into_scalar::<f32>();
    let loss = f64::from(error) / 40.0 * scale * scale;
    let told = evaluations[7]["loss"].as_f64().expect("a number");
    assert!((told / loss - 1.0).abs() < 1e-4, "{told} for {loss}");
    assert_eq!(evaluations[7]["n_rows"], 40);
    for (from, to) in [("l0", 2.0), ("dead_share", 1.0)] {
        let value = evaluations[7][from].as_f64().expect("a number");
        assert!((0.0..=to).contains(&value), "{from} = {value}");
    }
}

#[test]
fn runs_that_cannot_be_made_are_refused() {
    let error = |runs: Vec<Run>, config: FitConfig| {
        Fit::new(runs, &mut chunks(Rc::default()), config, &device()).err().expect("refused")
    };
    let with = |change: fn(&mut Run)| {
        let mut runs = runs();
        change(&mut runs[1]);
        error(runs, options()).to_string()
    };
    assert!(matches!(error(Vec::new(), options()), FitError::NoRuns));
    assert_eq!(with(|run| run.name = "a".into()), "two runs are named \"a\"");
    assert_eq!(
        with(|run| run.config.batch = 8),
        "run \"b\" takes batches of 8, the first one of 16"
    );
    assert!(with(|run| run.config.n_passes = 2).starts_with("n_passes = 2 is not 1"));
    let expected = "no column \"none\" among early [8], late [5], id [1]";
    assert_eq!(with(|run| run.column = "none".into()), expected);
    let all = error(runs(), options().with_max_norm(Some(0.5))).to_string();
    assert_eq!(all, "max_norm = 0.5 is not a number above 1");
    let never = error(runs(), options().with_checkpoint_every(0)).to_string();
    assert_eq!(never, "checkpoint_every = 0 is not at least 1");
    let endless = error(runs(), options().with_n_steps(Some(0)));
    assert!(matches!(endless, FitError::Train(TrainError::TooFewRows { .. })));
    let (mut source, config) = (chunks(Rc::default()), options().with_n_steps(Some(13)));
    let mut fit = Fit::new(runs(), &mut source, config, &device()).expect("valid");
    let ended = fit.run(on).unwrap_err();
    assert_eq!(ended.to_string(), "the stream ends in step 12 of 13");
    assert!(matches!(fit.run(on), Err(FitError::Interrupted { step: 12 })));
}

#[test]
fn a_matrix_can_be_kept_too() {
    let values: Vec<f32> = (0..400).map(|i| (i as f32 * 0.7).sin()).collect();
    let matrix = ActivationMatrix::new(&values, 8).expect("whole rows");
    let config = TrainConfig::new(12, Objective::top_k(2)).with_batch(BATCH);
    let runs = || vec![Run::new("a", MatrixSource::COLUMN, config.clone())];
    let source = || MatrixSource::new(matrix, 3, BATCH, 4).expect("a batch");
    let mut whole = source();
    let mut fit = Fit::new(runs(), &mut whole, options(), &device()).expect("valid");
    fit.run(on).expect("trains");
    let whole = all_bits(fit);
    let folder = tempfile::tempdir().expect("a folder");
    for n in [5, 12] {
        let checkpoints = Checkpoints::open(folder.path()).expect("opens");
        let mut source = source();
        let fit = Fit::resume(runs(), &mut source, options(), &device(), checkpoints);
        let mut fit = fit.expect("valid");
        fit.run(|event| match event {
            Event::Step(progress) if progress.step == n => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        })
        .expect("trains");
        if n == 12 {
            assert_eq!(all_bits(fit), whole);
        }
    }
}

#[test]
fn numbers_that_a_reader_rounds_are_still_the_same_run() {
    let values = [0.5f32, 1.0, -1.0, 0.25].repeat(8);
    let matrix = ActivationMatrix::new(&values, 2).expect("whole rows");
    let mut random = ChaCha8Rng::seed_from_u64(0);
    for _ in 0..200 {
        let rate = 10f64.powf(random.random_range(-12.0..0.0));
        let schedule = Schedule::new().with_learning_rate(rate);
        let config = TrainConfig::new(3, Objective::top_k(1)).with_batch(4).with_schedule(schedule);
        let storage: &'static InMemory = Box::leak(Box::default());
        for _ in 0..3 {
            let checkpoints = Checkpoints::without_lock(Box::new(storage));
            let mut source = MatrixSource::new(matrix, 3, 4, 1).expect("a batch");
            let runs = vec![Run::new("a", MatrixSource::COLUMN, config.clone())];
            let fit = Fit::resume(runs, &mut source, options(), &device(), checkpoints);
            let mut fit = fit.unwrap_or_else(|error| panic!("{rate:e}: {error}"));
            let done = fit.steps_done();
            let stop = |event: &Event| match event {
                Event::Step(progress) if progress.step > done => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            };
            fit.run(stop).expect("trains");
        }
    }
}

#[test]
fn what_could_not_be_saved_at_the_end_is_saved_when_asked_again() {
    let storage: &'static InMemory = Box::leak(Box::default());
    let checkpoints = Checkpoints::without_lock(Box::new(storage));
    let mut source = chunks(Rc::default());
    let fit = Fit::resume(runs(), &mut source, options(), &device(), checkpoints);
    let mut fit = fit.expect("valid");
    let n_steps = fit.n_steps();
    let fill = |event: &Event| {
        if matches!(event, Event::Step(progress) if progress.step == n_steps) {
            storage.is_full.store(true, Ordering::Relaxed);
        }
        ControlFlow::Continue(())
    };
    assert!(matches!(fit.run(fill), Err(FitError::Checkpoint(CheckpointError::Save { .. }))));
    let newest = || storage.list().expect("in memory").into_iter().max();
    let before = newest();
    storage.is_full.store(false, Ordering::Relaxed);
    assert_eq!(fit.run(on).expect("saves"), Ended::Finished);
    assert!(newest() > before, "{before:?}");
    assert!(newest().is_some_and(|name| name.starts_with(&format!("step-{n_steps:012}"))));
}

/// Blobs in memory, as long as there is room.
#[derive(Default)]
struct InMemory {
    blobs: Mutex<BTreeMap<String, Vec<u8>>>,
    is_full: AtomicBool,
}

impl InMemory {
    fn missing(name: &str) -> StorageError {
        StorageError::Missing { place: "memory".to_owned(), name: name.to_owned() }
    }
}

impl Storage for &'static InMemory {
    fn list(&self) -> Result<Vec<String>, StorageError> {
        Ok(self.blobs.lock().expect("whole").keys().cloned().collect())
    }

    fn get(&self, name: &str) -> Result<Blob, StorageError> {
        let blobs = self.blobs.lock().expect("whole");
        blobs.get(name).cloned().map(Blob::Owned).ok_or_else(|| InMemory::missing(name))
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StorageError> {
        if self.is_full.load(Ordering::Relaxed) {
            let source = std::io::ErrorKind::StorageFull.into();
            let (place, name) = ("memory".to_owned(), name.to_owned());
            return Err(StorageError::Io { place, name, action: "written", source });
        }
        self.blobs.lock().expect("whole").insert(name.to_owned(), bytes.to_owned());
        Ok(())
    }

    fn delete(&self, name: &str) -> Result<(), StorageError> {
        let removed = self.blobs.lock().expect("whole").remove(name);
        removed.map(drop).ok_or_else(|| InMemory::missing(name))
    }
}
