//! Activations to train on.

use super::error::TrainError;

/// Activations in memory, one row after another.
#[derive(Debug, Clone, Copy)]
pub struct ActivationMatrix<'a> {
    values: &'a [f32],
    d_in: usize,
}

impl<'a> ActivationMatrix<'a> {
    /// From rows of `d_in` values.
    ///
    /// # Errors
    /// If the values make no whole number of rows.
    pub fn new(values: &'a [f32], d_in: usize) -> Result<Self, TrainError> {
        match d_in != 0 && values.len().is_multiple_of(d_in) {
            true => Ok(Self { values, d_in }),
            false => Err(TrainError::Ragged { n_values: values.len(), d_in }),
        }
    }

    /// The SHA-256 of the values, in hex.
    pub(super) fn sha256(&self) -> String {
        let bytes = |row: &[f32]| row.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        blobs::sha256(self.values.chunks(self.d_in).map(bytes))
    }

    /// Number of activations.
    pub fn n_rows(&self) -> usize {
        self.values.len() / self.d_in
    }

    /// Width of an activation.
    pub fn d_in(&self) -> usize {
        self.d_in
    }

    /// One activation.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, row: usize) -> &'a [f32] {
        &self.values[row * self.d_in..][..self.d_in]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_found() {
        let values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let matrix = ActivationMatrix::new(&values, 2).expect("whole rows");
        assert_eq!((matrix.n_rows(), matrix.row(1)), (3, &[3.0, 4.0][..]));
    }

    #[test]
    fn ragged_rows_are_refused() {
        for d_in in [0, 4] {
            let error = ActivationMatrix::new(&[0.0; 6], d_in).unwrap_err();
            assert_eq!(error, TrainError::Ragged { n_values: 6, d_in });
        }
    }
}
