//! Kills a training run over and over, and looks whether it ends as if nothing had happened.
//!
//! A child process trains two SAEs on a store of random activations through a mixing buffer, and
//! saves after every step. It is killed with SIGKILL at random moments, every other time within a
//! save, and started again. In the end its last checkpoint has to have the name, and so the hash
//! of all weights, moments and counters, of an uninterrupted run's, and every row has to have been
//! used exactly once.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use burn::tensor::Device;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sae_core::source::{
    ActivationSource, Column, Mixing, MixingBuffer, Position, Rows, SourceError,
};
use sae_core::store::{LocalFolder, ReadOrder, StoreSource, StoreWriter};
use sae_core::train::{Checkpoints, Event, Fit, FitConfig, Objective, Run, TrainConfig};
use serde::Serialize;

const D_IN: usize = 32;
const BATCH: usize = 64;
/// A child is killed after this many steps, at most.
const STEPS_PER_KILL: usize = 20;
/// Steps of the whole run for each kill: more than can be done before the last one.
const STEPS: usize = 25;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// How often the run is killed.
    #[arg(long, default_value_t = 200)]
    kills: usize,
    /// Decides when.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Be the run itself, on what lies in this folder.
    #[arg(long, hide = true)]
    child: Option<PathBuf>,
    /// Steps between two saves of the run.
    #[arg(long, hide = true, default_value_t = 1)]
    save_every: usize,
}

/// The line that is printed.
#[derive(Serialize)]
struct Report {
    kills: usize,
    /// Kills that left a half-written file behind.
    kills_in_a_save: usize,
    /// Ends that were asked for by SIGTERM, and were clean.
    terminations: usize,
    steps: usize,
    steps_repeated: usize,
    rows: usize,
    seconds: f64,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    match &options.child {
        Some(folder) => train(folder, options.save_every),
        None => soak(options),
    }
}

fn soak(options: &Options) -> Result<()> {
    let start = Instant::now();
    ensure!(options.kills > 0, "nothing to do without a kill");
    let folder = tempfile::tempdir()?;
    let (straight, killed) = (folder.path().join("straight"), folder.path().join("killed"));
    let n_steps = options.kills * STEPS;
    fill_store(&folder.path().join("activations"), n_steps)?;
    let expected = {
        let mut child = spawn(&straight, n_steps)?;
        read_to_end(&mut child)?;
        last_checkpoint(&straight)?
    };
    let mut random = ChaCha8Rng::seed_from_u64(options.seed);
    let mut kills_in_a_save = 0;
    for kill in 0..options.kills {
        let mut child = spawn(&killed, 1)?;
        wait_for_steps(&mut child, random.random_range(1..=STEPS_PER_KILL))?;
        if kill % 2 == 0 {
            wait_for_save(&killed)?;
        }
        sleep(Duration::from_micros(random.random_range(0..3000)));
        // This is SIGKILL.
        child.kill()?;
        let status = child.wait()?;
        ensure!(!status.success(), "the run ended before kill {kill}: {status}");
        kills_in_a_save += usize::from(saves(&killed)? > 0);
    }
    let terminations = 1;
    let mut child = spawn(&killed, 1)?;
    wait_for_steps(&mut child, 2)?;
    let asked = Command::new("sh").args(["-c", &format!("kill -TERM {}", child.id())]).status()?;
    ensure!(asked.success(), "no SIGTERM could be sent: {asked}");
    read_to_end(&mut child)?;
    read_to_end(&mut spawn(&killed, n_steps)?)?;
    let actual = last_checkpoint(&killed)?;
    ensure!(
        actual == expected,
        "the killed run ends with {actual}, the straight one with {expected}"
    );
    let n_lines = check_rows(&killed, n_steps)?;
    let report = Report {
        kills: options.kills,
        kills_in_a_save,
        terminations,
        steps: n_steps,
        steps_repeated: n_lines - n_steps,
        rows: n_steps * BATCH,
        seconds: start.elapsed().as_secs_f64(),
    };
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

/// Random rows that know their number, by two writers.
fn fill_store(folder: &Path, n_steps: usize) -> Result<()> {
    let storage = LocalFolder::new(folder)?;
    let n_rows = n_steps * BATCH;
    let mut random = ChaCha8Rng::seed_from_u64(0);
    for (writer, ids) in [("a", 0..n_rows / 3), ("b", n_rows / 3..n_rows)] {
        let mut writer = StoreWriter::open(&storage, writer, columns(), 1000)?;
        for id in ids {
            let x = (0..D_IN).map(|_| random.random_range(-1.0..1.0)).collect();
            writer.write(&Rows::new(&columns(), vec![x, vec![id as f32]])?)?;
        }
        writer.finish()?;
    }
    Ok(())
}

fn columns() -> Vec<Column> {
    vec![Column::new("x", D_IN), Column::new("id", 1)]
}

fn spawn(folder: &Path, save_every: usize) -> Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("soak").arg("--child").arg(folder);
    command.args(["--save-every", &save_every.to_string()]);
    command.stdout(Stdio::piped()).spawn().context("the run cannot be started")
}

/// Waits until the child has made some steps. It writes a line after each.
fn wait_for_steps(child: &mut Child, n_steps: usize) -> Result<()> {
    let mut lines = BufReader::new(child.stdout.as_mut().context("no output")?);
    let mut line = String::new();
    for _ in 0..n_steps {
        ensure!(lines.read_line(&mut line)? > 0, "the run ended by itself");
    }
    Ok(())
}

fn read_to_end(child: &mut Child) -> Result<ExitStatus> {
    std::io::copy(child.stdout.as_mut().context("no output")?, &mut std::io::sink())?;
    let status = child.wait()?;
    ensure!(status.success(), "the run failed: {status}");
    Ok(status)
}

/// Waits until a file is being written.
fn wait_for_save(folder: &Path) -> Result<()> {
    let start = Instant::now();
    while saves(folder)? == 0 {
        ensure!(start.elapsed() < Duration::from_secs(60), "no save within a minute");
    }
    Ok(())
}

/// Files that are half written.
fn saves(folder: &Path) -> Result<usize> {
    let names = names(&folder.join("checkpoints"))?;
    Ok(names.iter().filter(|name| name.starts_with('.')).count())
}

fn last_checkpoint(folder: &Path) -> Result<String> {
    let names = names(&folder.join("checkpoints"))?;
    let checkpoints = names.into_iter().filter(|name| name.starts_with("step-"));
    checkpoints.max().ok_or_else(|| anyhow!("{}: no checkpoints", folder.display()))
}

fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        // A child that has just been started has not made it yet.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// Checks that the steps as they were last made used every row exactly once, and gives the number
/// of steps that were made in all.
fn check_rows(folder: &Path, n_steps: usize) -> Result<usize> {
    let mut steps: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    let mut n_lines = 0;
    for line in fs::read_to_string(folder.join("rows"))?.lines() {
        let numbers = line.split(' ').map(str::parse).collect::<Result<Vec<usize>, _>>();
        let numbers = numbers.with_context(|| format!("a torn line: {line:?}"))?;
        let (step, ids) = numbers.split_first().context("an empty line")?;
        steps.insert(*step, ids.to_vec());
        n_lines += 1;
    }
    ensure!(steps.keys().copied().eq(1..=n_steps), "steps are missing");
    let mut ids: Vec<usize> = steps.into_values().flatten().collect();
    ids.sort_unstable();
    ensure!(ids.into_iter().eq(0..n_steps * BATCH), "rows were used twice or never");
    Ok(n_lines)
}

/// The run.
fn train(folder: &Path, save_every: usize) -> Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGTERM, stop.clone())?;
    let activations = folder.parent().context("no parent")?.join("activations");
    let order = ReadOrder { seed: 1, window: 3000, n_passes: 1 };
    let stored = StoreSource::open(Arc::new(LocalFolder::new(activations)?), order)?;
    let mixed = MixingBuffer::new(stored, Mixing { capacity: 1000, share: 0.5, seed: 2 })?;
    let ids = RefCell::new(Vec::new());
    let mut source = Watched { source: mixed, ids: &ids };
    let config = TrainConfig::new(256, Objective::top_k(4)).with_batch(BATCH).with_dead_after(2000);
    let runs = vec![
        Run::new("k4", "x", config.clone()),
        Run::new("k8", "x", TrainConfig { objective: Objective::top_k(8), ..config }.with_seed(1)),
    ];
    let fit_config = FitConfig::new().with_checkpoint_every(save_every);
    let checkpoints = Checkpoints::open(&folder.join("checkpoints"))?;
    let fit = Fit::resume(runs, &mut source, fit_config, &Device::flex(), checkpoints)?;
    let mut fit = fit.stop_on(&stop);
    let mut out = std::io::stdout();
    let mut rows = File::options().create(true).append(true).open(folder.join("rows"))?;
    let mut told = Ok(());
    fit.run(|event| {
        if let Event::Step(progress) = event
            && progress.run_idx == 0
        {
            let ids = ids.borrow().iter().map(|id| format!(" {id}")).collect::<String>();
            // In one piece: a process that is killed leaves it whole or does not write it.
            let line = format!("{}{ids}\n", progress.step);
            told = rows.write_all(line.as_bytes()).and_then(|()| writeln!(out, "step"));
        }
        match told.is_ok() {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(()),
        }
    })?;
    Ok(told?)
}

/// A source with a note of the rows that were read last.
struct Watched<'a, S> {
    source: S,
    ids: &'a RefCell<Vec<usize>>,
}

impl<S: ActivationSource> ActivationSource for Watched<'_, S> {
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
        let n_read = self.source.read(n, rows)?;
        *self.ids.borrow_mut() = rows.column(1).iter().map(|&id| id as usize).collect();
        Ok(n_read)
    }

    fn position(&self) -> Position {
        self.source.position()
    }

    fn seek(&mut self, position: &Position) -> Result<(), SourceError> {
        self.source.seek(position)
    }
}
