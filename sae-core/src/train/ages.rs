//! How long each latent has been silent.

use burn::tensor::Tensor;
use kernels::sparse_sum;

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

    /// As they were kept.
    pub fn from_rows(rows: Vec<u64>) -> Self {
        Self { rows }
    }

    /// Takes in a batch of so many rows, by the number of them that each latent is active on, and
    /// gives the number of active latents over all rows.
    pub(super) fn update(&mut self, n_active_on: Tensor<1>, n_rows: usize) -> usize {
        let mut n_active = 0.0;
        for (age, count) in self.rows.iter_mut().zip(n_active_on.into_data().iter::<f32>()) {
            n_active += f64::from(count);
            *age = if count > 0.0 { 0 } else { age.saturating_add(n_rows as u64) };
        }
        n_active as usize
    }

    /// The latents that are dead, in rising order.
    pub fn dead(&self, dead_after: u64) -> Vec<u32> {
        let latents = (0u32..).zip(&self.rows);
        latents.filter(|(_, age)| **age >= dead_after).map(|(latent, _)| latent).collect()
    }

    /// These latents as if active just now.
    pub(super) fn revive(&mut self, latents: &[u32]) {
        latents.iter().for_each(|&latent| self.rows[latent as usize] = 0);
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

/// On how many rows each latent is active, `[d_sae]`.
pub(super) fn n_active_on(latents: &SparseLatents) -> Tensor<1> {
    let is_active = latents.values.clone().not_equal_elem(0.0).float();
    sparse_sum(latents.indices.clone(), is_active, latents.d_sae)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn silence_grows_and_activity_ends_it() {
        let device = Device::flex();
        let batch = SparseLatents::new(
            Tensor::from_data([[0, 2], [1, 2]], &device),
            Tensor::from_data([[1.0, 0.0], [3.0, 0.0]], &device),
            4,
        );
        let mut ages = Ages::new(4);
        assert_eq!(ages.update(n_active_on(&batch), 2), 2);
        assert_eq!(ages.rows(), [0, 0, 2, 2]);
        ages.update(n_active_on(&batch), 2);
        assert_eq!((ages.n_dead(4), ages.n_dead(5)), (2, 0));
        assert_eq!(ages.dead(4), [2, 3]);
        ages.revive(&[2]);
        assert_eq!(ages.dead(4), [3]);
    }
}
