//! The order in which activations are seen.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Random numbers of a run: stream 0 initialises, stream `pass + 1` shuffles that pass. Each is
/// found from the seed alone, so nothing about them has to be remembered.
pub(super) fn random_stream(seed: u64, stream: u64) -> ChaCha8Rng {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(stream);
    random
}

/// Which rows each step of a run sees: another permutation of all rows in every pass.
#[derive(Debug, Clone)]
pub(super) struct RowOrder {
    seed: u64,
    batch: usize,
    rows: Vec<u32>,
    /// The pass that `rows` is shuffled for.
    pass: Option<usize>,
}

impl RowOrder {
    /// # Panics
    /// If the rows do not fill a batch, or are more than 2³².
    pub(super) fn new(seed: u64, n_rows: usize, batch: usize) -> Self {
        assert!(0 < batch && batch <= n_rows, "{n_rows} rows, batch of {batch}");
        let n_rows = u32::try_from(n_rows).expect("rows are counted in 32 bits");
        Self { seed, batch, rows: (0..n_rows).collect(), pass: None }
    }

    /// Steps in a pass; rows that fill no batch are left out of it.
    pub(super) fn steps_per_pass(&self) -> usize {
        self.rows.len() / self.batch
    }

    /// The rows of a step.
    pub(super) fn batch(&mut self, step: usize) -> &[u32] {
        let pass = step / self.steps_per_pass();
        if self.pass != Some(pass) {
            self.rows.sort_unstable();
            self.rows.shuffle(&mut random_stream(self.seed, pass as u64 + 1));
            self.pass = Some(pass);
        }
        &self.rows[step % self.steps_per_pass() * self.batch..][..self.batch]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(order: &mut RowOrder, pass: usize) -> Vec<u32> {
        let n = order.steps_per_pass();
        (pass * n..(pass + 1) * n).flat_map(|step| order.batch(step).to_vec()).collect()
    }

    #[test]
    fn every_pass_sees_every_row_once_in_its_own_order() {
        let mut order = RowOrder::new(7, 12, 3);
        let (first, second) = (pass(&mut order, 0), pass(&mut order, 1));
        assert_ne!(first, second);
        for mut rows in [first, second] {
            rows.sort_unstable();
            assert!(rows.into_iter().eq(0..12));
        }
    }

    #[test]
    fn a_step_sees_the_same_rows_however_it_is_reached() {
        let mut walked = RowOrder::new(7, 13, 3);
        let steps: Vec<_> = (0..12).map(|step| walked.batch(step).to_vec()).collect();
        for step in [11, 2, 5] {
            assert_eq!(RowOrder::new(7, 13, 3).batch(step), steps[step]);
            assert_eq!(walked.batch(step), steps[step]);
        }
        assert_ne!(RowOrder::new(8, 13, 3).batch(0), steps[0]);
    }
}
