//! A matrix in memory as a stream.

use super::activation_matrix::ActivationMatrix;
use super::error::TrainError;
use super::row_order::RowOrder;
use crate::source::{ActivationSource, Column, Position, Rows, SourceError};

/// The rows of a matrix, pass after pass, each pass shuffled whole. Rows that do not fill the last
/// batch of a pass are left out of it.
#[derive(Debug, Clone)]
pub struct MatrixSource<'a> {
    matrix: ActivationMatrix<'a>,
    order: RowOrder,
    /// What decides the order, in words.
    order_in_words: String,
    columns: [Column; 1],
    n_passes: u64,
    position: Position,
}

impl<'a> MatrixSource<'a> {
    /// What the only column is called.
    pub const COLUMN: &'static str = "activations";

    /// A stream of `n_passes` passes, for batches of `batch` rows.
    ///
    /// # Errors
    /// If the rows do not fill a batch, or a batch has none.
    pub fn new(
        matrix: ActivationMatrix<'a>,
        seed: u64,
        batch: usize,
        n_passes: usize,
    ) -> Result<Self, TrainError> {
        let n_rows = matrix.n_rows();
        if batch == 0 || n_rows < batch {
            return Err(TrainError::TooFewRows { n_rows, batch });
        }
        Ok(Self {
            matrix,
            order: RowOrder::new(seed, n_rows, batch),
            order_in_words: format!("{n_passes} passes in batches of {batch} with seed {seed}"),
            columns: [Column::new(Self::COLUMN, matrix.d_in())],
            n_passes: n_passes as u64,
            position: Position::default(),
        })
    }

    fn rows_per_pass(&self) -> u64 {
        self.order.rows_per_pass() as u64
    }
}

impl ActivationSource for MatrixSource<'_> {
    fn columns(&self) -> &[Column] {
        &self.columns
    }

    fn n_rows(&self) -> Option<u64> {
        self.n_passes.checked_mul(self.rows_per_pass())
    }

    fn fingerprint(&self) -> String {
        let (d_in, order) = (self.matrix.d_in(), &self.order_in_words);
        format!("matrix [{}, {d_in}] {}, {order}", self.matrix.n_rows(), self.matrix.sha256())
    }

    fn read(&mut self, n: usize, rows: &mut Rows) -> Result<usize, SourceError> {
        let mut n_read = 0;
        while n_read < n && self.position.part < self.n_passes {
            let pass = &self.order.pass(self.position.part)[self.position.row as usize..];
            let (matrix, taken) = (self.matrix, &pass[..pass.len().min(n - n_read)]);
            for &row in taken {
                rows.push_with(|_, values| values.extend(matrix.row(row as usize)));
            }
            n_read += taken.len();
            self.position.row += taken.len() as u64;
            if self.position.row == self.rows_per_pass() {
                self.position = Position::new(self.position.part + 1, 0);
            }
        }
        Ok(n_read)
    }

    fn position(&self) -> Position {
        self.position.clone()
    }

    fn seek(&mut self, position: &Position) -> Result<(), SourceError> {
        position.check_in_passes(self.n_passes, self.rows_per_pass())?;
        self.position = position.clone();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(source: &mut MatrixSource, n: usize) -> Vec<f32> {
        let mut rows = Rows::empty(source.columns());
        source.read(n, &mut rows).expect("reads");
        rows.column(0).to_vec()
    }

    #[test]
    fn passes_follow_each_other_and_every_place_can_be_gone_back_to() {
        let values: Vec<f32> = (0..11).map(|x| x as f32).collect();
        let matrix = ActivationMatrix::new(&values, 1).expect("whole rows");
        let source = || MatrixSource::new(matrix, 5, 3, 2).expect("a batch");
        let whole = read(&mut source(), 100);
        assert_eq!((whole.len() as u64, Some(18)), (18, source().n_rows()));
        let mut order = RowOrder::new(5, 11, 3);
        let expected: Vec<u32> = (0..2).flat_map(|pass| order.pass(pass).to_vec()).collect();
        assert!(whole.iter().map(|&x| x as u32).eq(expected));
        for n in 0..=18 {
            let mut source = source();
            assert_eq!(read(&mut source, n), whole[..n]);
            let position = source.position();
            read(&mut source, 4);
            source.seek(&position).expect("a place");
            assert_eq!(read(&mut source, 100), whole[n..]);
        }
        let beyond = source().seek(&Position::new(1, 9)).unwrap_err().to_string();
        assert!(beyond.ends_with("expected 2 passes of 9 rows"), "{beyond}");
    }

    #[test]
    fn a_fingerprint_tells_values_and_order() {
        let of = |values: &[f32], seed, batch, n_passes| {
            let matrix = ActivationMatrix::new(values, 1).expect("whole rows");
            MatrixSource::new(matrix, seed, batch, n_passes).expect("a batch").fingerprint()
        };
        let one = of(&[1.0, 2.0], 0, 1, 1);
        assert_eq!(one, of(&[1.0, 2.0], 0, 1, 1));
        let others = [of(&[1.0, 3.0], 0, 1, 1), of(&[1.0, 2.0], 1, 1, 1), of(&[1.0, 2.0], 0, 2, 1)];
        assert!(!others.contains(&one));
    }
}
