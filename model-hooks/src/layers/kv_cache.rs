//! Keys and values of the tokens that were run before.

use burn::tensor::{Int, Tensor, TensorData, s};
use kernels::KeyValues;

use super::RopeLength;
use crate::positions::Positions;

/// The keys and values of a batch of conversations, block by block.
///
/// A cache may begin with a [`SharedPrefix`]: tokens that all rows have in common, run once and
/// kept once. Each row's own columns follow, padded on the left.
#[derive(Debug, Clone)]
pub struct KvCache {
    prefix: SharedPrefix,
    own: Vec<Option<Columns>>,
    n_own: usize,
    /// Own columns at which the conversations of each row begin.
    starts: Vec<Vec<usize>>,
    /// Which of the rows that it was made for each row is.
    rows: Vec<usize>,
    /// Own columns of the prompts, once they have been run.
    n_prompt: Option<usize>,
    /// Whether this is to become a prefix.
    is_prefix: bool,
}

/// Columns that a block's buffer gets room for at a time.
const ROOM: usize = 64;

/// Keys and values of a block's own columns: the first `n` of two buffers
/// `[batch, columns, kv_head, d_head]`, whose others are room for the steps that follow.
///
/// The first pass is kept as it came, so that what is run once costs no copy.
#[derive(Debug, Clone)]
struct Columns {
    keys: Tensor<4>,
    values: Tensor<4>,
    n: usize,
}

impl Columns {
    fn new(keys: Tensor<4>, values: Tensor<4>) -> Self {
        let n = keys.dims()[1];
        Self { keys, values, n }
    }

    /// The columns that are filled.
    fn filled(&self) -> (Tensor<4>, Tensor<4>) {
        let filled = |buffer: &Tensor<4>| buffer.clone().narrow(1, 0, self.n);
        (filled(&self.keys), filled(&self.values))
    }

    fn append(self, keys: Tensor<4>, values: Tensor<4>) -> Self {
        let n = self.n + keys.dims()[1];
        let keys = with_columns(self.keys, self.n, keys);
        Self { keys, values: with_columns(self.values, self.n, values), n }
    }

    /// These rows, without the first `drop` columns.
    fn select_rows(self, rows: &Tensor<1, Int>, drop: usize) -> Self {
        let select = |buffer: Tensor<4>| {
            let [_, columns, _, _] = buffer.dims();
            buffer.select(0, rows.clone()).narrow(1, drop, columns - drop)
        };
        Self { keys: select(self.keys), values: select(self.values), n: self.n - drop }
    }
}

/// A buffer with these columns behind its first `n`: written into it, if it has room.
fn with_columns(buffer: Tensor<4>, n: usize, new: Tensor<4>) -> Tensor<4> {
    let ([_, columns, _, _], [batch, n_new, n_heads, d_head]) = (buffer.dims(), new.dims());
    if n + n_new <= columns {
        return buffer.slice_assign(s![.., n..n + n_new, .., ..], new);
    }
    let room = Tensor::zeros([batch, ROOM, n_heads, d_head], &buffer.device());
    Tensor::cat(vec![buffer.narrow(1, 0, n), new, room], 1)
}

/// Keys and values of tokens that any number of conversations begin with. Cloning is cheap.
#[derive(Debug, Clone, Default)]
pub struct SharedPrefix {
    layers: Vec<(Tensor<4>, Tensor<4>)>,
    ids: Vec<u32>,
}

impl SharedPrefix {
    /// Tokens of the prefix.
    pub fn n_tokens(&self) -> usize {
        self.ids.len()
    }

    pub(crate) fn ids(&self) -> &[u32] {
        &self.ids
    }
}

impl KvCache {
    /// An empty cache for `n_layers` blocks behind a prefix, whose rows' conversations will begin
    /// at these columns.
    ///
    /// # Panics
    /// If the prefix comes from a model with another number of blocks.
    pub(crate) fn new(n_layers: usize, prefix: SharedPrefix, starts: Vec<Vec<usize>>) -> Self {
        assert!(
            prefix.ids.is_empty() || prefix.layers.len() == n_layers,
            "the prefix has {} blocks, the model {n_layers}",
            prefix.layers.len()
        );
        let rows = (0..starts.len()).collect();
        let own = vec![None; n_layers];
        Self { prefix, own, n_own: 0, starts, rows, n_prompt: None, is_prefix: false }
    }

    /// The same cache, whose tokens others will share.
    pub(crate) fn for_prefix(mut self) -> Self {
        self.is_prefix = true;
        self
    }

    /// The same empty cache, to run these rows of an earlier one anew, with so many columns of
    /// prompts.
    pub(crate) fn anew(mut self, rows: Vec<usize>, n_prompt: usize) -> Self {
        assert_eq!(rows.len(), self.starts.len(), "a number for each row");
        (self.rows, self.n_prompt) = (rows, Some(n_prompt));
        self
    }

    /// Positions of the next `n` columns.
    pub fn next_positions(&self, n: usize) -> Positions {
        let n_prompt = self.n_prompt.unwrap_or(self.n_own + n);
        let positions =
            Positions::packed(self.prefix.n_tokens(), self.n_own, n, self.starts.clone())
                .of_rows(self.rows.clone(), n_prompt);
        if self.is_prefix { positions.of_prefix() } else { positions }
    }

    /// Whether the next `n` columns bring a conversation, of which something is cached, from at
    /// most `length` tokens to more.
    pub(crate) fn grows_past(&self, length: usize, n: usize, rope_length: RopeLength) -> bool {
        let crosses = |(before, after)| (1..=length).contains(&before) && after > length;
        let growth = self.starts.iter().flat_map(|row| {
            let ends = row.iter().skip(1).copied().chain([usize::MAX]);
            row.iter().zip(ends).map(|(&start, end)| {
                let tokens = |columns: usize| end.min(columns).saturating_sub(start);
                let before = self.prefix.n_tokens() + tokens(self.n_own);
                (before, self.prefix.n_tokens() + tokens(self.n_own + n))
            })
        });
        match rope_length {
            RopeLength::Conversation => growth.into_iter().any(crosses),
            RopeLength::LongestOfBatch => {
                let longest = |a: (usize, usize), b: (usize, usize)| (a.0.max(b.0), a.1.max(b.1));
                crosses(growth.fold((0, 0), longest))
            }
        }
    }

    /// Turns the cache of a single unpadded conversation, of these tokens, into a prefix for others.
    ///
    /// # Panics
    /// If it holds several rows, padding, a prefix of its own, or a block was not run.
    pub(crate) fn into_prefix(self, ids: &[u32]) -> SharedPrefix {
        assert_eq!(self.starts, [[0]], "a shared prefix is one unpadded row");
        assert_eq!(self.prefix.n_tokens(), 0, "a shared prefix has no prefix of its own");
        let layers = self.own.iter().map(|own| own.as_ref().expect("every block was run").filled());
        SharedPrefix { layers: layers.collect(), ids: ids.to_vec() }
    }

    /// Keeps these rows, in this order, and drops padding that all of them share.
    ///
    /// # Panics
    /// If a row is out of range or none is given.
    pub fn select_rows(&mut self, rows: &[usize]) {
        assert!(!rows.is_empty(), "a cache keeps at least one row");
        self.starts = rows.iter().map(|&row| self.starts[row].clone()).collect();
        self.rows = rows.iter().map(|&row| self.rows[row]).collect();
        let drop = self.starts.iter().map(|row| row[0]).min().unwrap_or(0);
        for start in self.starts.iter_mut().flatten() {
            *start -= drop;
        }
        if let Some(device) = self.own.iter().flatten().next().map(|own| own.keys.device()) {
            let picked = rows.iter().map(|&row| row as i64).collect::<Vec<_>>();
            let picked = Tensor::from_data(TensorData::new(picked, [rows.len()]), &device);
            for slot in &mut self.own {
                *slot = slot.take().map(|own| own.select_rows(&picked, drop));
            }
        }
        self.n_own -= drop;
        self.n_prompt = self.n_prompt.map(|n_prompt| n_prompt - drop);
    }

    /// Adds a block's keys and values of this pass and gives all that its queries may see.
    pub(crate) fn append(&mut self, layer: usize, keys: Tensor<4>, values: Tensor<4>) -> KeyValues {
        let slot = &mut self.own[layer];
        let columns = match slot.take() {
            Some(columns) => columns.append(keys, values),
            None => Columns::new(keys, values),
        };
        let own = slot.insert(columns).filled();
        KeyValues { prefix: self.prefix.layers.get(layer).cloned(), own }
    }

    /// Counts the columns of a pass once all its blocks have run.
    pub(crate) fn advance(&mut self, n: usize) {
        self.n_own += n;
        self.n_prompt.get_or_insert(self.n_own);
    }
}
