//! The order in which activations are seen.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Random numbers of a run: stream 0 initialises, stream `pass + 1` shuffles that pass. Each is
/// found from the seed alone, so nothing about them has to be remembered.
pub(crate) fn random_stream(seed: u64, stream: u64) -> ChaCha8Rng {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(stream);
    random
}

/// Which rows each pass of a run sees: another permutation of all rows in every pass.
#[derive(Debug, Clone)]
pub(super) struct RowOrder {
    seed: u64,
    batch: usize,
    rows: Vec<u32>,
    /// The pass that `rows` is shuffled for.
    pass: Option<u64>,
}

impl RowOrder {
    /// # Panics
    /// If the rows do not fill a batch, or are more than 2³².
    pub(super) fn new(seed: u64, n_rows: usize, batch: usize) -> Self {
        assert!(0 < batch && batch <= n_rows, "{n_rows} rows, batch of {batch}");
        let n_rows = u32::try_from(n_rows).expect("rows are counted in 32 bits");
        Self { seed, batch, rows: (0..n_rows).collect(), pass: None }
    }

    /// Rows in a pass; those that fill no batch are left out of it.
    pub(super) fn rows_per_pass(&self) -> usize {
        self.rows.len() / self.batch * self.batch
    }

    /// The rows that a pass sees, in its order.
    pub(super) fn pass(&mut self, pass: u64) -> &[u32] {
        if self.pass != Some(pass) {
            self.rows.sort_unstable();
            self.rows.shuffle(&mut random_stream(self.seed, pass + 1));
            self.pass = Some(pass);
        }
        &self.rows[..self.rows_per_pass()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pass_sees_every_row_once_in_its_own_order() {
        let mut order = RowOrder::new(7, 12, 3);
        let (first, second) = (order.pass(0).to_vec(), order.pass(1).to_vec());
        assert_ne!(first, second);
        for mut rows in [first, second] {
            rows.sort_unstable();
            assert!(rows.into_iter().eq(0..12));
        }
    }

    #[test]
    fn a_pass_is_the_same_however_it_is_reached() {
        let mut walked = RowOrder::new(7, 13, 3);
        let passes: Vec<_> = (0..4).map(|pass| walked.pass(pass).to_vec()).collect();
        assert!(passes.iter().all(|rows| rows.len() == 12));
        for pass in [3, 0, 2] {
            assert_eq!(RowOrder::new(7, 13, 3).pass(pass), passes[pass as usize]);
            assert_eq!(walked.pass(pass), passes[pass as usize]);
        }
        assert_ne!(RowOrder::new(8, 13, 3).pass(0), passes[0]);
    }
}
