//! Where the tokens of a pass stand in their conversations.

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};

/// The absolute positions of the tokens of one pass, row by row.
///
/// A row holds one conversation, padded on the left, or several texts one after the other that do
/// not see each other. A position counts the real tokens from the start of its own conversation (a
/// shared prefix included), so it does not depend on the padding, on the batch, or on how the
/// conversation is cut into prefill and cached steps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Positions {
    /// Tokens that every conversation has before its own first column.
    n_prefix: usize,
    /// Own columns that were run in earlier passes.
    n_past: usize,
    /// Columns of this pass.
    n: usize,
    /// Own columns at which the conversations of each row begin, in order. What stands before the
    /// first is padding.
    starts: Vec<Vec<usize>>,
    /// Which of the rows that the conversations began with each row is.
    rows: Vec<usize>,
    /// Own columns of the prompts; what stands behind them was generated.
    n_prompt: usize,
    /// Whether the tokens are those of a prefix, to be shared by rows that are not known yet.
    is_prefix: bool,
}

impl Positions {
    /// Of `n` columns after `n_past` own columns and a shared prefix of `n_prefix` tokens, in rows
    /// that begin with so many padding columns each.
    pub fn new(n_prefix: usize, n_past: usize, n: usize, padding: Vec<usize>) -> Self {
        let starts = padding.into_iter().map(|padding| vec![padding]).collect();
        Self::packed(n_prefix, n_past, n, starts)
    }

    /// As [`new`](Self::new), with the own columns at which the conversations of each row begin.
    ///
    /// # Panics
    /// If a row has no conversation, or they are not in order.
    pub fn packed(n_prefix: usize, n_past: usize, n: usize, starts: Vec<Vec<usize>>) -> Self {
        let in_order = |row: &Vec<usize>| !row.is_empty() && row.is_sorted();
        assert!(starts.iter().all(in_order), "conversations begin at {starts:?}");
        let rows = (0..starts.len()).collect();
        Self { n_prefix, n_past, n, starts, rows, n_prompt: n_past + n, is_prefix: false }
    }

    /// The same places, in a pass over these rows of an earlier one, with so many own columns of
    /// prompts.
    pub(crate) fn of_rows(mut self, rows: Vec<usize>, n_prompt: usize) -> Self {
        assert_eq!(rows.len(), self.starts.len(), "a number for each row");
        (self.rows, self.n_prompt) = (rows, n_prompt);
        self
    }

    /// The same places, as those of a prefix that rows will share.
    pub(crate) fn of_prefix(mut self) -> Self {
        self.is_prefix = true;
        self
    }

    /// Rows of the batch.
    pub fn n_rows(&self) -> usize {
        self.starts.len()
    }

    /// Columns of this pass.
    pub fn n_columns(&self) -> usize {
        self.n
    }

    /// Tokens of the shared prefix.
    pub fn n_prefix(&self) -> usize {
        self.n_prefix
    }

    /// Own columns that were run in earlier passes: 0 in the first.
    pub fn n_past(&self) -> usize {
        self.n_past
    }

    /// Which of the prompts given a row is. Rows that have ended leave a generation, so this is not
    /// the row's place in the batch.
    pub fn prompt(&self, row: usize) -> usize {
        self.rows[row]
    }

    /// Whether a column of this pass was generated. The prompts are the columns of the first pass;
    /// where conversations are run anew from their first tokens, they stay what they were.
    pub fn is_generated(&self, column: usize) -> bool {
        self.n_past + column >= self.n_prompt
    }

    /// Whether this is the pass over a [`SharedPrefix`](crate::SharedPrefix): the conversations
    /// that begin with it are not known yet.
    pub fn is_prefix(&self) -> bool {
        self.is_prefix
    }

    /// Padding columns at the start of a row's own columns.
    pub fn padding(&self, row: usize) -> usize {
        self.starts[row][0]
    }

    /// The absolute position of a column of this pass, or `None` where it is padding.
    pub fn get(&self, row: usize, column: usize) -> Option<usize> {
        let own = self.n_past + column;
        Some(self.n_prefix + own - self.start(row, own)?)
    }

    /// Which of the row's conversations a column of this pass belongs to, from 0, or `None` where
    /// it is padding.
    pub fn conversation(&self, row: usize, column: usize) -> Option<usize> {
        let own = self.n_past + column;
        self.starts[row].iter().rposition(|&start| start <= own)
    }

    /// Tokens of the conversation of a column at the end of this pass, the prefix counted; 0 for
    /// padding.
    pub fn length(&self, row: usize, column: usize) -> usize {
        let Some(conversation) = self.conversation(row, column) else { return 0 };
        let starts = &self.starts[row];
        let end = starts.get(conversation + 1).copied().unwrap_or(self.n_past + self.n);
        self.n_prefix + end - starts[conversation]
    }

    /// The least position of a real token of this pass: hooks that leave early positions alone
    /// can skip their mask when it is past them.
    pub fn first(&self) -> usize {
        let rows = 0..self.n_rows();
        let least = |row| (0..self.n).filter_map(|column| self.get(row, column)).min();
        rows.filter_map(least).min().unwrap_or(self.n_prefix)
    }

    /// 1 where a column is a real token at `from` or later, else 0.
    ///
    /// # Shapes
    /// `[batch, pos, 1]`.
    pub fn mask_from(&self, from: usize, device: &Device) -> Tensor<3> {
        let is_kept = |row, column| self.get(row, column).is_some_and(|p| p >= from);
        let mask = self.cells(|row, column| f32::from(is_kept(row, column)));
        Tensor::from_data(TensorData::new(mask, [self.n_rows(), self.n, 1]), device)
    }

    /// The first own column that each query may see, as the attention kernel takes it.
    pub(crate) fn first_columns(&self, device: &Device) -> Tensor<2, Int> {
        let first = |row: usize, column| {
            let own = self.n_past + column;
            self.start(row, own).unwrap_or(self.starts[row][0]) as i32
        };
        let first = self.cells(first);
        Tensor::from_data(TensorData::new(first, [self.n_rows(), self.n]), device)
    }

    /// Where a query does not see a key, prefix first: padding, another conversation, the future,
    /// or out of a window.
    ///
    /// # Shapes
    /// `[batch, 1, query, key]`.
    pub(crate) fn hidden(&self, window: Option<usize>, device: &Device) -> Tensor<4, Bool> {
        let n_own = self.n_past + self.n;
        let mut hidden = Vec::with_capacity(self.n_rows() * self.n * (self.n_prefix + n_own));
        for row in 0..self.n_rows() {
            for own in self.n_past..n_own {
                let start = self.start(row, own);
                let position = start.map(|start| self.n_prefix + own - start);
                let far = |key: usize| {
                    position.zip(window).is_some_and(|(query, window)| query - key >= window)
                };
                hidden.extend((0..self.n_prefix).map(far));
                hidden.extend((0..n_own).map(|key| match start {
                    Some(start) if start <= key && key <= own => far(self.n_prefix + key - start),
                    _ => true,
                }));
            }
        }
        let shape = [self.n_rows(), 1, self.n, self.n_prefix + n_own];
        Tensor::from_data(TensorData::new(hidden, shape), device)
    }

    /// One value for every row and column of this pass.
    pub(crate) fn cells<T>(&self, value: impl Fn(usize, usize) -> T) -> Vec<T> {
        let cells = (0..self.n_rows()).flat_map(|row| (0..self.n).map(move |column| (row, column)));
        cells.map(|(row, column)| value(row, column)).collect()
    }

    /// Where the conversation of an own column begins.
    fn start(&self, row: usize, own: usize) -> Option<usize> {
        self.starts[row].iter().rev().copied().find(|&start| start <= own)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_do_not_depend_on_padding_or_steps() {
        let prefill = Positions::new(10, 0, 4, vec![0, 3]);
        assert_eq!(prefill.get(0, 0), Some(10));
        assert_eq!(prefill.get(1, 2), None);
        assert_eq!(prefill.get(1, 3), Some(10));
        let step = Positions::new(10, 4, 1, vec![0, 3]);
        assert_eq!(step.get(0, 0), Some(14));
        assert_eq!(step.get(1, 0), Some(11));
        assert_eq!((prefill.first(), step.first()), (10, 11));
        assert_eq!((step.length(0, 0), step.length(1, 0), prefill.length(1, 0)), (15, 12, 0));
    }

    #[test]
    fn prompts_keep_their_numbers_and_ends() {
        let pass = Positions::new(0, 0, 4, vec![0, 3]);
        assert_eq!((pass.prompt(1), pass.is_generated(3), pass.is_prefix()), (1, false, false));
        // The first row has ended; one column of the next two was generated.
        let step = Positions::new(0, 3, 2, vec![0]).of_rows(vec![1], 4);
        assert_eq!((step.prompt(0), step.is_generated(0), step.is_generated(1)), (1, false, true));
    }

    #[test]
    fn texts_in_one_row_count_for_themselves() {
        let packed = Positions::packed(2, 0, 5, vec![vec![0, 3], vec![1]]);
        let row = |row| packed.cells(|_, column| packed.get(row, column))[..5].to_vec();
        assert_eq!(row(0), [2, 3, 4, 2, 3].map(Some));
        assert_eq!(row(1), [None, Some(2), Some(3), Some(4), Some(5)]);
        assert_eq!((packed.length(0, 2), packed.length(0, 3)), (5, 4));
        assert_eq!((packed.conversation(0, 2), packed.conversation(0, 3)), (Some(0), Some(1)));
        assert_eq!(packed.first(), 2);
    }

    #[test]
    fn a_query_sees_its_own_conversation_back_to_its_window() {
        let positions = Positions::packed(1, 0, 4, vec![vec![1, 3]]);
        let hidden = |window| {
            let hidden = positions.hidden(window, &Device::flex()).into_data();
            let seen = |row: &[bool]| row.iter().map(|&h| if h { '.' } else { 'x' }).collect();
            let hidden: Vec<bool> = hidden.iter::<bool>().collect();
            hidden.chunks(5).map(seen).collect::<Vec<String>>()
        };
        // Keys: one of the prefix, padding, two of one text, one of the next.
        assert_eq!(hidden(None), ["x....", "x.x..", "x.xx.", "x...x"]);
        assert_eq!(hidden(Some(2)), ["x....", "x.x..", "..xx.", "x...x"]);
    }
}
