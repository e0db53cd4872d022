//! Activations of the text: made while the SAEs train, or kept in a store.

use std::fs::{File, TryLockError};
use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use burn::tensor::Tensor;
use model_hooks::{
    ForwardError, HarvestConfig, HookPoint, LanguageModel, Layout, SharedPrefix, TokenBatch,
};
use sae_core::source::{ActivationSource, Chunks, Column, Mixing, MixingBuffer, Position, Rows};
use sae_core::store::{LocalFolder, ReadOrder, Storage, StoreError, StoreSource, StoreWriter};

use super::options::Plan;
use super::text::Pieces;
use crate::progress::bar;
use crate::storage::write_whole;

/// Tokens of a chunk of the stream: a run that goes on makes the chunk that it stood in again.
const CHUNK_TOKENS: usize = 4096;
/// Rows of a shard of a store.
const SHARD_ROWS: usize = 1 << 14;
/// The only writer of a store.
const WRITER: &str = "harvest";
/// What a store was filled with.
const CONTENT: &str = "content.txt";

/// Activations of a model at some points.
pub(super) struct Harvest<'a> {
    model: &'a LanguageModel,
    config: HarvestConfig,
    columns: Vec<Column>,
}

impl<'a> Harvest<'a> {
    pub(super) fn new(model: &'a LanguageModel, plan: &Plan) -> Result<Self> {
        let mut points: Vec<HookPoint> = Vec::new();
        for sae in &plan.saes {
            for point in sae.points()? {
                model.check_point(point).with_context(|| sae.name.clone())?;
                if !points.contains(&point) {
                    points.push(point);
                }
            }
        }
        // Widths follow from one token: a point's name does not tell them.
        let tokens = TokenBatch::new(&[[0]], model.config(), model.device())?;
        let seen = model.capture(&tokens, points.iter().copied())?;
        let columns = points.iter().map(|&point| {
            let (_, x) = seen.iter().find(|(seen, _)| *seen == point).expect("it was asked for");
            let by_position =
                matches!(point.axes(), [model_hooks::Axis::Batch, model_hooks::Axis::Pos, ..]);
            ensure!(by_position, "{point} has no activation for every position: choose another");
            Ok(Column::new(point.to_string(), x.shape()[2..].iter().product()))
        });
        let columns = columns.collect::<Result<_>>()?;
        let config = HarvestConfig {
            layout: Layout::Packed { row_tokens: plan.text.row_tokens },
            skip_positions: plan.stream.skip_positions,
            points: points.clone(),
            ..HarvestConfig::new(points[0], plan.stream.batch_tokens)
        };
        Ok(Self { model, config, columns })
    }

    /// The width of a point.
    pub(super) fn width(&self, point: HookPoint) -> usize {
        let name = point.to_string();
        let column = self.columns.iter().find(|column| column.name == name);
        column.expect("every point of the plan has a column").width
    }

    /// All that the rows depend on, but for the model and the text.
    fn fingerprint(&self) -> String {
        let names: Vec<&str> = self.columns.iter().map(|column| column.name.as_str()).collect();
        let HarvestConfig { batch_tokens, layout, skip_positions, .. } = &self.config;
        format!("{names:?} from position {skip_positions}, {layout:?} in {batch_tokens} tokens")
    }

    fn rows(&self, texts: &[&[u32]]) -> Result<Rows, ForwardError> {
        let mut rows = Rows::empty(&self.columns);
        self.model.harvest(texts, &SharedPrefix::default(), &self.config, |harvested| {
            let values =
                |x: Tensor<2>| x.into_data().try_into_vec_as().expect("numbers convert to numbers");
            let values = harvested.activations.into_iter().map(values).collect();
            let harvested = Rows::new(&self.columns, values).expect("as wide as was seen");
            rows.extend(&harvested, 0..harvested.n_rows());
            ControlFlow::Continue(())
        })?;
        Ok(rows)
    }

    /// The rows of all pieces in memory, as a stream.
    pub(super) fn in_memory(&self, pieces: &Pieces) -> Result<impl ActivationSource + use<>> {
        let rows = self.rows(&pieces.range(0..pieces.len()))?;
        let n_rows = rows.n_rows() as u64;
        let make =
            move |chunk| Ok::<_, std::convert::Infallible>((chunk == 0).then(|| rows.clone()));
        Ok(Chunks::new(self.columns.clone(), "held out", make).with_n_rows(n_rows))
    }
}

/// The chunks of a text: a place in the stream is a place in the text.
pub(super) struct Chunking {
    /// Pieces of each chunk.
    pieces: Vec<Range<usize>>,
    /// Rows of each chunk.
    n_rows: Vec<u64>,
}

impl Chunking {
    pub(super) fn new(pieces: &Pieces, skip_positions: usize) -> Self {
        let mut chunks = Self { pieces: Vec::new(), n_rows: Vec::new() };
        let (mut start, mut n_tokens, mut n_rows) = (0, 0, 0);
        for piece in 0..pieces.len() {
            let length = pieces.get(piece).len();
            n_tokens += length;
            n_rows += length.saturating_sub(skip_positions) as u64;
            if n_tokens >= CHUNK_TOKENS || piece + 1 == pieces.len() {
                chunks.pieces.push(start..piece + 1);
                chunks.n_rows.push(n_rows);
                (start, n_tokens, n_rows) = (piece + 1, 0, 0);
            }
        }
        chunks
    }

    fn rows_per_pass(&self) -> u64 {
        self.n_rows.iter().sum()
    }

    /// The place behind so many rows.
    fn position(&self, mut n_rows: u64) -> Position {
        for (chunk, &rows) in self.n_rows.iter().enumerate() {
            if n_rows < rows {
                return Position::new(chunk as u64, n_rows);
            }
            n_rows -= rows;
        }
        Position::new(self.n_rows.len() as u64, 0)
    }
}

/// The activations of the text, made when they are asked for. `before_each` is called before every
/// chunk.
pub(super) fn live<'a>(
    harvest: &'a Harvest,
    pieces: &'a Pieces,
    chunking: &'a Chunking,
    n_passes: u64,
    mut before_each: impl FnMut() + 'a,
) -> impl ActivationSource + 'a {
    let fingerprint = format!("{} of {}, {n_passes} times", harvest.fingerprint(), pieces.hash());
    let n_chunks = chunking.pieces.len() as u64;
    let make = move |chunk: u64| {
        if chunk >= n_chunks * n_passes {
            return Ok(None);
        }
        before_each();
        let texts = pieces.range(chunking.pieces[(chunk % n_chunks) as usize].clone());
        harvest.rows(&texts).map(Some)
    };
    Chunks::new(harvest.columns.clone(), fingerprint, make)
        .with_n_rows(chunking.rows_per_pass() * n_passes)
}

/// The same, over a longer distance shuffled.
pub(super) fn mixed<'a>(
    live: impl ActivationSource + 'a,
    plan: &Plan,
) -> Result<Box<dyn ActivationSource + 'a>> {
    let mixing = Mixing {
        capacity: plan.stream.mixed_rows,
        share: plan.stream.mixed_share,
        seed: plan.seed,
    };
    let mixed = MixingBuffer::new(live, mixing).context("stream.mixed_rows and mixed_share")?;
    Ok(Box::new(mixed))
}

/// The activations of the text in a store, which is filled first if it is not full; nothing if it
/// was stopped meanwhile.
pub(super) fn stored(
    harvest: &Harvest,
    pieces: &Pieces,
    chunking: &Chunking,
    model_hash: &str,
    plan: &Plan,
    stop: &AtomicBool,
) -> Result<Option<Box<dyn ActivationSource>>> {
    let folder = plan.stream.store.as_ref().expect("the plan has a store");
    let content = format!("{} of {} by {model_hash}\n", harvest.fingerprint(), pieces.hash());
    let place = folder.join(CONTENT);
    match std::fs::read_to_string(&place) {
        Ok(found) => ensure!(
            found == content,
            "the store {} holds activations of another model, text or hook point: name another \
             folder in stream.store, or remove this one",
            folder.display()
        ),
        Err(_) => {
            LocalFolder::new(folder)?;
            let is_empty = std::fs::read_dir(folder)?.next().is_none();
            ensure!(
                is_empty,
                "the folder {} is no store of this program: name another one in stream.store",
                folder.display()
            );
            write_whole(&place, content.as_bytes())?;
        }
    }
    let lock = locked(&place).with_context(|| {
        format!("the store {} is being filled: wait for the other program", folder.display())
    })?;
    let storage: Arc<dyn Storage> = Arc::new(LocalFolder::new(folder)?);
    match StoreWriter::open(&*storage, WRITER, harvest.columns.clone(), SHARD_ROWS) {
        Err(StoreError::Finished { .. }) => {}
        writer => {
            if !fill(writer?, harvest, pieces, chunking, stop)? {
                return Ok(None);
            }
        }
    }
    drop(lock);
    let window = plan.stream.mixed_rows as u64;
    let order = ReadOrder { seed: plan.seed, window, n_passes: plan.text.n_passes };
    Ok(Some(Box::new(StoreSource::open(storage, order)?)))
}

/// A file of which no other program has the lock. Whoever finds a full store holds it for a moment
/// only.
fn locked(path: &Path) -> Result<File> {
    let file = File::open(path)?;
    for _ in 0..20 {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(50)),
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
    }
    bail!("{} is locked", path.display())
}

/// Writes what is missing, and says whether it came to the end.
fn fill(
    mut writer: StoreWriter,
    harvest: &Harvest,
    pieces: &Pieces,
    chunking: &Chunking,
    stop: &AtomicBool,
) -> Result<bool> {
    let mut live = live(harvest, pieces, chunking, 1, || ());
    let n_rows = chunking.rows_per_pass();
    live.seek(&chunking.position(writer.n_rows()))?;
    let bar = bar("filling the store", n_rows);
    bar.set_position(writer.n_rows());
    bar.reset_eta();
    let mut rows = Rows::empty(live.columns());
    loop {
        if stop.load(Ordering::Relaxed) {
            bar.abandon();
            return Ok(false);
        }
        rows.clear();
        if live.read(CHUNK_TOKENS, &mut rows)? == 0 {
            break;
        }
        writer.write(&rows)?;
        bar.inc(rows.n_rows() as u64);
    }
    writer.finish()?;
    bar.finish();
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_found_by_the_rows_before_it() {
        let chunking = Chunking { pieces: vec![0..2, 2..3, 3..5], n_rows: vec![4, 0, 3] };
        let at = |n_rows| {
            let position = chunking.position(n_rows);
            (position.part, position.row)
        };
        assert_eq!([0, 3, 4, 6, 7].map(at), [(0, 0), (0, 3), (2, 0), (2, 2), (3, 0)]);
    }
}
