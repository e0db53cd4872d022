//! Where the tokens of a pass stand in their conversations.

use burn::tensor::{Device, Int, Tensor, TensorData};

/// The absolute positions of the tokens of one pass, row by row.
///
/// Rows of a batch are padded on the left. A position counts the row's real tokens from the start
/// of its conversation (a shared prefix included), so it does not depend on the padding, on the
/// batch, or on how the conversation is cut into prefill and cached steps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Positions {
    /// Tokens that every row has before its own first column.
    n_prefix: usize,
    /// Own columns that were run in earlier passes.
    n_past: usize,
    /// Columns of this pass.
    n: usize,
    /// Padding columns at the start of every row.
    padding: Vec<usize>,
}

impl Positions {
    /// Of `n` columns after `n_past` own columns and a shared prefix of `n_prefix` tokens.
    pub fn new(n_prefix: usize, n_past: usize, n: usize, padding: Vec<usize>) -> Self {
        Self { n_prefix, n_past, n, padding }
    }

    /// Rows of the batch.
    pub fn n_rows(&self) -> usize {
        self.padding.len()
    }

    /// Columns of this pass.
    pub fn n_columns(&self) -> usize {
        self.n
    }

    /// Tokens of the shared prefix.
    pub fn n_prefix(&self) -> usize {
        self.n_prefix
    }

    /// Padding columns at the start of every row's own columns.
    pub fn padding(&self) -> &[usize] {
        &self.padding
    }

    /// The absolute position of a column of this pass, or `None` where it is padding.
    pub fn get(&self, row: usize, column: usize) -> Option<usize> {
        let own = (self.n_past + column).checked_sub(self.padding[row])?;
        Some(self.n_prefix + own)
    }

    /// The least position of a real token of this pass: hooks that leave early positions alone
    /// can skip their mask when it is past them.
    pub fn first(&self) -> usize {
        let rows = 0..self.n_rows();
        let first = |row| (0..self.n).find_map(|column| self.get(row, column));
        rows.filter_map(first).min().unwrap_or(self.n_prefix)
    }

    /// 1 where a column is a real token at `from` or later, else 0.
    ///
    /// # Shapes
    /// `[batch, pos, 1]`.
    pub fn mask_from(&self, from: usize, device: &Device) -> Tensor<3> {
        let cells = (0..self.n_rows()).flat_map(|row| (0..self.n).map(move |column| (row, column)));
        let mask: Vec<f32> = cells
            .map(|(row, column)| self.get(row, column).is_some_and(|p| p >= from))
            .map(f32::from)
            .collect();
        Tensor::from_data(TensorData::new(mask, [self.n_rows(), self.n, 1]), device)
    }

    /// Padding per row, as the attention kernel takes it.
    pub(crate) fn first_columns(&self, device: &Device) -> Tensor<1, Int> {
        let padding: Vec<i32> = self.padding.iter().map(|&n| n as i32).collect();
        Tensor::from_data(TensorData::new(padding, [self.n_rows()]), device)
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
    }
}
