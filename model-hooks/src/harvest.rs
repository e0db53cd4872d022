//! Streams the activations of a set of texts, stopping the pass at the last layer needed.

use std::ops::ControlFlow;

use burn::tensor::{Int, Tensor, TensorData};

use crate::activation::Activation;
use crate::cache::ActivationCache;
use crate::hook_point::{Axis, HookPoint};
use crate::layers::SharedPrefix;
use crate::model::{ForwardError, LanguageModel};
use crate::positions::Positions;
use crate::tokens::TokenBatch;

/// What to harvest, and how.
#[derive(Debug, Clone)]
pub struct HarvestConfig {
    /// Points with a row for every position. Heads are joined: of `[batch, pos, head, d_head]`
    /// come rows `head · d_head` wide.
    pub points: Vec<HookPoint>,
    /// Tokens per forward pass, padding included, at most (a longer text runs alone).
    pub batch_tokens: usize,
    /// How texts become the rows of a batch.
    pub layout: Layout,
    /// Positions at the start of every text that are left out. SmolLM2's position 0 carries an
    /// activation two orders of magnitude larger than the others.
    pub skip_positions: usize,
    /// Tokens that are left out wherever they stand, as those that begin and end texts.
    pub skip_ids: Vec<u32>,
}

/// How texts become the rows of a batch. No text sees another, and positions count from the start
/// of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// A row for each; texts of like length run together, so batches do not follow their order.
    OneByOne,
    /// Several in a row of so many tokens (a longer text has a row to itself), nearly in order.
    Packed {
        /// Tokens of a row.
        row_tokens: usize,
    },
}

/// Activations of some tokens, in the order of the places.
#[derive(Debug, Clone)]
pub struct Harvested {
    /// `[n, width]` for each of the points.
    pub activations: Vec<Tensor<2>>,
    /// Where each row comes from.
    pub places: Vec<Place>,
}

/// A token of a harvested text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Index of the text.
    pub text: usize,
    /// Absolute position, the prefix counted.
    pub position: usize,
}

/// What became of the tokens of a harvest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HarvestReport {
    /// Tokens whose activations were handed over, one row each.
    pub n_taken: usize,
    /// Tokens left out for their position.
    pub n_skipped_positions: usize,
    /// Tokens left out for their id.
    pub n_skipped_ids: usize,
    /// Padding that was run for nothing.
    pub n_padding: usize,
}

impl HarvestConfig {
    /// Everything at one point, a row for each text.
    pub fn new(point: HookPoint, batch_tokens: usize) -> Self {
        Self {
            points: vec![point],
            batch_tokens,
            layout: Layout::OneByOne,
            skip_positions: 0,
            skip_ids: Vec::new(),
        }
    }
}

impl LanguageModel {
    /// Hands the activations of every text to `sink`, batch by batch: one row for each token that
    /// is not left out, and none for padding. The texts go on where `prefix` ends; its own tokens
    /// are not harvested.
    ///
    /// What is harvested for a text does not depend on the others. `sink` can stop the harvest.
    ///
    /// # Errors
    /// If a text is empty, too long or holds an unknown id, or the model does not have a point.
    ///
    /// # Panics
    /// If a point has no row for every position, as attention patterns have not.
    pub fn harvest(
        &self,
        texts: &[impl AsRef<[u32]>],
        prefix: &SharedPrefix,
        config: &HarvestConfig,
        mut sink: impl FnMut(Harvested) -> ControlFlow<()>,
    ) -> Result<HarvestReport, ForwardError> {
        for &point in &config.points {
            self.check_point(point)?;
            let by_position = matches!(point.axes(), [Axis::Batch, Axis::Pos, ..]);
            assert!(by_position, "{point} has no row for every position");
        }
        let mut report = HarvestReport::default();
        let lengths: Vec<usize> = texts.iter().map(|text| text.as_ref().len()).collect();
        for batch in batches(&lengths, config) {
            let ids = |text: &usize| texts[*text].as_ref();
            let rows: Vec<Vec<&[u32]>> =
                batch.iter().map(|row| row.iter().map(ids).collect()).collect();
            let before = prefix.n_tokens();
            let tokens = TokenBatch::packed(&rows, before, self.config(), self.device())?;
            let positions = tokens.positions(before);
            let mut cache = ActivationCache::new(config.points.iter().copied());
            self.run_for(&tokens, &mut self.cache(prefix.clone(), &tokens), &mut cache)?;

            let (places, cells) = report.take(&positions, &batch, texts, config);
            let activations = config.points.iter().map(|&point| {
                let kept = cache.take(point).expect("the pass came by the point");
                select(rows_of(kept), &cells)
            });
            let harvested = Harvested { activations: activations.collect(), places };
            if !harvested.places.is_empty() && sink(harvested).is_break() {
                break;
            }
        }
        Ok(report)
    }
}

impl HarvestReport {
    /// The tokens of a batch that are not left out: their places, and their cells.
    fn take(
        &mut self,
        positions: &Positions,
        batch: &[Vec<usize>],
        texts: &[impl AsRef<[u32]>],
        config: &HarvestConfig,
    ) -> (Vec<Place>, Vec<i64>) {
        let (mut places, mut cells) = (Vec::new(), Vec::new());
        for (row, in_row) in batch.iter().enumerate() {
            for column in 0..positions.n_columns() {
                let at = positions.get(row, column).zip(positions.conversation(row, column));
                let Some((position, nth)) = at else {
                    self.n_padding += 1;
                    continue;
                };
                let text = in_row[nth];
                let id = texts[text].as_ref()[position - positions.n_prefix()];
                if position < config.skip_positions {
                    self.n_skipped_positions += 1;
                } else if config.skip_ids.contains(&id) {
                    self.n_skipped_ids += 1;
                } else {
                    places.push(Place { text, position });
                    cells.push((row * positions.n_columns() + column) as i64);
                }
            }
        }
        self.n_taken += places.len();
        (places, cells)
    }
}

/// The texts of each row of each batch.
fn batches(lengths: &[usize], config: &HarvestConfig) -> Vec<Vec<Vec<usize>>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    match config.layout {
        Layout::OneByOne => {
            order.sort_by_key(|&text| lengths[text]);
            let mut batches: Vec<Vec<Vec<usize>>> = Vec::new();
            for text in order {
                // They come in order of length: the last is the longest.
                match batches.last_mut() {
                    Some(batch) if (batch.len() + 1) * lengths[text] <= config.batch_tokens => {
                        batch.push(vec![text]);
                    }
                    _ => batches.push(vec![vec![text]]),
                }
            }
            batches
        }
        Layout::Packed { row_tokens } => {
            let n_rows = (config.batch_tokens / row_tokens.max(1)).max(1);
            let mut batches = Vec::new();
            // Rows of the batch that is being filled, with the tokens that each has room for.
            let mut open: Vec<(Vec<usize>, usize)> = Vec::new();
            for text in order {
                let length = lengths[text];
                if length > row_tokens {
                    batches.push(vec![vec![text]]);
                } else if let Some((row, room)) = open.iter_mut().find(|(_, room)| *room >= length)
                {
                    row.push(text);
                    *room -= length;
                } else {
                    if open.len() == n_rows {
                        batches.push(open.drain(..).map(|(row, _)| row).collect());
                    }
                    open.push((vec![text], row_tokens - length));
                }
            }
            if !open.is_empty() {
                batches.push(open.into_iter().map(|(row, _)| row).collect());
            }
            batches
        }
    }
}

/// One row for every position, heads joined.
fn rows_of(activation: Activation) -> Tensor<2> {
    match activation {
        Activation::Rank3(x) => {
            let [batch, pos, width] = x.dims();
            x.reshape([batch * pos, width])
        }
        Activation::Rank4(x) => {
            let [batch, pos, n_heads, d_head] = x.dims();
            x.reshape([batch * pos, n_heads * d_head])
        }
    }
}

fn select(rows: Tensor<2>, cells: &[i64]) -> Tensor<2> {
    // Nothing to drop is the common case of equal lengths; selecting no rows is not allowed.
    if cells.is_empty() || cells.len() == rows.dims()[0] {
        return rows;
    }
    let cells = TensorData::new(cells.to_vec(), [cells.len()]);
    let cells = Tensor::<1, Int>::from_data(cells, &rows.device());
    rows.select(0, cells)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_rows_are_filled_in_order() {
        let layout = Layout::Packed { row_tokens: 10 };
        let config = HarvestConfig { layout, ..HarvestConfig::new(HookPoint::Embed, 20) };
        let batches = batches(&[6, 5, 4, 5, 12, 3, 9], &config);
        // Six and four fill a row, five and five the other; twelve has a batch of its own.
        let expected = [vec![vec![4]], vec![vec![0, 2], vec![1, 3]], vec![vec![5], vec![6]]];
        assert_eq!(batches, expected);
    }
}
