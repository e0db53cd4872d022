//! How long each latent has been silent.

use crate::latents::SparseLatents;

/// Activations seen since each latent was last active.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ages {
    rows: Vec<u64>,
}

impl Ages {
    /// All latents as if active just now.
    pub fn new(d_sae: usize) -> Self {
        Self { rows: vec![0; d_sae] }
    }

    /// What [`rows`](Self::rows) gave.
    pub(super) fn from_rows(rows: Vec<u64>) -> Self {
        Self { rows }
    }

    /// Takes in a batch, and gives the number of active latents in it, over all rows.
    pub(super) fn update(&mut self, latents: &SparseLatents) -> usize {
        let n = latents.n_rows() as u64;
        self.rows.iter_mut().for_each(|age| *age += n);
        let active = latents.entries().map(|entry| self.rows[entry.latent_idx] = 0);
        active.count()
    }

    /// Latents that have not been active on the last `dead_after` activations.
    pub fn n_dead(&self, dead_after: u64) -> usize {
        self.rows.iter().filter(|&&age| age >= dead_after).count()
    }

    /// Activations seen since each latent was active, a whole batch counting as one moment.
    pub fn rows(&self) -> &[u64] {
        &self.rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, Tensor};

    #[test]
    fn silence_grows_and_activity_ends_it() {
        let device = Device::flex();
        let batch = SparseLatents::new(
            Tensor::from_data([[0, 2], [1, 2]], &device),
            Tensor::from_data([[1.0, 0.0], [3.0, 0.0]], &device),
            4,
        );
        let mut ages = Ages::new(4);
        assert_eq!(ages.update(&batch), 2);
        assert_eq!(ages.rows(), [0, 0, 2, 2]);
        ages.update(&batch);
        assert_eq!((ages.n_dead(4), ages.n_dead(5)), (2, 0));
    }
}
