//! Streams the activations of a set of texts, stopping the pass at the last layer needed.

use burn::tensor::{Int, Tensor, TensorData};

use crate::cache::ActivationCache;
use crate::hook_point::{Axis, HookPoint};
use crate::layers::SharedPrefix;
use crate::model::{ForwardError, LanguageModel};
use crate::positions::Positions;
use crate::tokens::TokenBatch;

/// What to harvest, and how.
#[derive(Debug, Clone)]
pub struct HarvestConfig {
    /// A point with axes `[batch, pos, width]`.
    pub point: HookPoint,
    /// Tokens per forward pass, padding included, at most (a longer text runs alone).
    pub batch_tokens: usize,
    /// Positions at the start of every text that are left out. SmolLM2's position 0 carries an
    /// activation two orders of magnitude larger than the others.
    pub skip_positions: usize,
}

/// Activations of some tokens, in the order of the places.
#[derive(Debug, Clone)]
pub struct Harvested {
    /// `[n, width]`.
    pub activations: Tensor<2>,
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

impl LanguageModel {
    /// Hands the activations of every text to `sink`, batch by batch: one row for each token at
    /// position `skip_positions` or later, and none for padding. The texts go on where `prefix`
    /// ends; its own tokens are not harvested.
    ///
    /// Texts of like length run together, so batches do not follow the order of the texts; the
    /// places tell. What is harvested for a text does not depend on the others. `sink` can stop the
    /// harvest by returning `false`.
    ///
    /// # Errors
    /// If a text is empty, too long or holds an unknown id, or the model does not have the point.
    ///
    /// # Panics
    /// If the point's axes are not `[batch, pos, width]`.
    pub fn harvest(
        &self,
        texts: &[impl AsRef<[u32]>],
        prefix: &SharedPrefix,
        config: &HarvestConfig,
        mut sink: impl FnMut(Harvested) -> bool,
    ) -> Result<(), ForwardError> {
        let point = config.point;
        self.check_point(point)?;
        assert!(
            matches!(point.axes(), [Axis::Batch, Axis::Pos, _]),
            "harvest takes activations [batch, pos, width], {point} has other axes"
        );
        let mut order: Vec<usize> = (0..texts.len()).collect();
        order.sort_by_key(|&text| texts[text].as_ref().len());
        let mut rest = order.as_slice();
        while !rest.is_empty() {
            let (batch, after) = rest.split_at(batch_size(rest, texts, config.batch_tokens));
            rest = after;
            let rows: Vec<&[u32]> = batch.iter().map(|&text| texts[text].as_ref()).collect();
            let before = prefix.n_tokens();
            let tokens = TokenBatch::after(&rows, before, self.config(), self.device())?;
            let mut kv = self.cache(prefix.clone(), &tokens);
            let positions = tokens.positions(before);
            let mut cache = ActivationCache::new([point]);
            self.run_for(&tokens, &mut kv, &mut cache)?;
            let activations = cache.get::<3>(point).expect("the pass came by the point");
            let harvested = real_rows(activations, batch, &positions, config.skip_positions);
            if !harvested.places.is_empty() && !sink(harvested) {
                break;
            }
        }
        Ok(())
    }
}

/// How many of the next texts fit a batch; they come in order of length.
fn batch_size(order: &[usize], texts: &[impl AsRef<[u32]>], batch_tokens: usize) -> usize {
    let fits = |&n: &usize| n * texts[order[n - 1]].as_ref().len() <= batch_tokens;
    (1..=order.len()).take_while(fits).last().unwrap_or(1)
}

/// Drops padding and skipped positions.
fn real_rows(
    activations: Tensor<3>,
    batch: &[usize],
    positions: &Positions,
    skip: usize,
) -> Harvested {
    let [n_rows, n_columns, width] = activations.dims();
    let (mut places, mut kept) = (Vec::new(), Vec::new());
    for (row, &text) in batch.iter().enumerate() {
        for column in 0..n_columns {
            if let Some(position) = positions.get(row, column).filter(|&p| p >= skip) {
                places.push(Place { text, position });
                kept.push((row * n_columns + column) as i64);
            }
        }
    }
    let activations = activations.reshape([n_rows * n_columns, width]);
    // Nothing to drop is the common case of equal lengths; selecting no rows is not allowed.
    let activations = if kept.len() == n_rows * n_columns || kept.is_empty() {
        activations
    } else {
        let kept = TensorData::new(kept, [places.len()]);
        let kept = Tensor::<1, Int>::from_data(kept, &activations.device());
        activations.select(0, kept)
    };
    Harvested { activations, places }
}
