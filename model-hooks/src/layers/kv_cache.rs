//! Keys and values of the tokens that were run before.

use burn::tensor::{Device, Int, Tensor, TensorData};
use kernels::KeyValues;

use crate::positions::Positions;

/// The keys and values of a batch of conversations, block by block.
///
/// A cache may begin with a [`SharedPrefix`]: tokens that all rows have in common, run once and
/// kept once. Each row's own columns follow, padded on the left.
#[derive(Debug, Clone)]
pub struct KvCache {
    prefix: SharedPrefix,
    own: Vec<Option<(Tensor<4>, Tensor<4>)>>,
    n_own: usize,
    padding: Vec<usize>,
}

/// Keys and values of tokens that any number of conversations begin with. Cloning is cheap.
#[derive(Debug, Clone, Default)]
pub struct SharedPrefix {
    layers: Vec<(Tensor<4>, Tensor<4>)>,
    n: usize,
}

impl SharedPrefix {
    /// Tokens of the prefix.
    pub fn n_tokens(&self) -> usize {
        self.n
    }
}

impl KvCache {
    /// An empty cache for `n_layers` blocks behind a prefix (`SharedPrefix::default()` for none),
    /// whose rows will begin with so many padding columns each.
    ///
    /// # Panics
    /// If the prefix comes from a model with another number of blocks.
    pub fn new(n_layers: usize, prefix: SharedPrefix, padding: Vec<usize>) -> Self {
        assert!(
            prefix.n == 0 || prefix.layers.len() == n_layers,
            "the prefix has {} blocks, the model {n_layers}",
            prefix.layers.len()
        );
        Self { prefix, own: vec![None; n_layers], n_own: 0, padding }
    }

    /// Positions of the next `n` columns.
    pub fn next_positions(&self, n: usize) -> Positions {
        Positions::new(self.prefix.n, self.n_own, n, self.padding.clone())
    }

    /// Columns kept for every row, the prefix and the padding included.
    pub fn n_columns(&self) -> usize {
        self.prefix.n + self.n_own
    }

    /// Turns the cache of a single unpadded conversation into a prefix for others.
    ///
    /// # Panics
    /// If it holds several rows, padding, a prefix of its own, or a block was not run.
    pub fn into_prefix(self) -> SharedPrefix {
        assert_eq!(self.padding, [0], "a shared prefix is one unpadded row");
        assert_eq!(self.prefix.n, 0, "a shared prefix has no prefix of its own");
        let layers = self.own.into_iter().map(|layer| layer.expect("every block was run"));
        SharedPrefix { layers: layers.collect(), n: self.n_own }
    }

    /// Keeps these rows, in this order, and drops padding that all of them share.
    ///
    /// # Panics
    /// If a row is out of range or none is given.
    pub fn select_rows(&mut self, rows: &[usize]) {
        assert!(!rows.is_empty(), "a cache keeps at least one row");
        self.padding = rows.iter().map(|&row| self.padding[row]).collect();
        let drop = self.padding.iter().copied().min().unwrap_or(0);
        for padding in &mut self.padding {
            *padding -= drop;
        }
        let n_own = self.n_own;
        for (keys, values) in self.own.iter_mut().flatten() {
            let picked = rows.iter().map(|&row| row as i64).collect::<Vec<_>>();
            let picked =
                Tensor::<1, Int>::from_data(TensorData::new(picked, [rows.len()]), &keys.device());
            for tensor in [keys, values] {
                *tensor = tensor.clone().select(0, picked.clone()).narrow(1, drop, n_own - drop);
            }
        }
        self.n_own -= drop;
    }

    /// Adds a block's keys and values of this pass and gives all that its queries may see.
    pub(crate) fn append(&mut self, layer: usize, keys: Tensor<4>, values: Tensor<4>) -> KeyValues {
        let slot = &mut self.own[layer];
        let own = match slot.take() {
            Some((k, v)) => (Tensor::cat(vec![k, keys], 1), Tensor::cat(vec![v, values], 1)),
            None => (keys, values),
        };
        *slot = Some(own.clone());
        KeyValues { prefix: self.prefix.layers.get(layer).cloned(), own }
    }

    /// Counts the columns of a pass once all its blocks have run.
    pub(crate) fn advance(&mut self, n: usize) {
        self.n_own += n;
    }

    pub(crate) fn first_columns(&self, device: &Device) -> Tensor<1, Int> {
        self.next_positions(0).first_columns(device)
    }
}
