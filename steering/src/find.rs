//! Finding the latents behind a behaviour by contrast.

use std::collections::BTreeMap;

use sae_core::SparseLatents;

/// How each latent behaves on the tokens of a set of answers.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LatentStatistics {
    n_tokens: usize,
    latents: BTreeMap<usize, Activity>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Activity {
    n_active: usize,
    sum: f64,
    max: f64,
}

impl LatentStatistics {
    /// Counts the tokens of some latents; call it for every batch of answers.
    pub fn add(&mut self, latents: &SparseLatents) {
        self.n_tokens += latents.n_rows();
        for entry in latents.entries() {
            let activity = self.latents.entry(entry.latent_idx).or_default();
            let value = f64::from(entry.value);
            activity.n_active += 1;
            activity.sum += value;
            activity.max = activity.max.max(value);
        }
    }

    /// Tokens counted.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Tokens on which a latent is active.
    pub fn n_active(&self, latent: usize) -> usize {
        self.latents.get(&latent).map_or(0, |activity| activity.n_active)
    }

    /// The mean value of a latent over all tokens counted, zero where it is inactive.
    pub fn mean(&self, latent: usize) -> f64 {
        let sum = self.latents.get(&latent).map_or(0.0, |activity| activity.sum);
        sum / self.n_tokens.max(1) as f64
    }

    /// The largest value of a latent.
    pub fn max(&self, latent: usize) -> f64 {
        self.latents.get(&latent).map_or(0.0, |activity| activity.max)
    }

    /// The latents active on at least so many tokens, in order: of hand-written answers that show a
    /// behaviour, two or more (O'Brien et al., 2024).
    pub fn active_on(&self, min_active: usize) -> Vec<usize> {
        self.active().filter(|&latent| self.n_active(latent) >= min_active).collect()
    }

    /// The latents that are active anywhere, in order.
    pub fn active(&self) -> impl Iterator<Item = usize> {
        self.latents.keys().copied()
    }
}

/// A latent that tells two sets of answers apart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Contrast {
    /// The latent.
    pub latent: usize,
    /// Mean value on the first set − mean value on the second.
    pub difference: f64,
    /// Tokens of the first set on which it is active.
    pub n_active: usize,
}

/// The latents active on at least `min_active` tokens of `shown`, those first whose mean exceeds
/// their mean on `other` most; ties go to the lower latent.
pub fn contrast(
    shown: &LatentStatistics,
    other: &LatentStatistics,
    min_active: usize,
) -> Vec<Contrast> {
    let mut ranked: Vec<Contrast> = shown
        .active()
        .map(|latent| Contrast {
            latent,
            difference: shown.mean(latent) - other.mean(latent),
            n_active: shown.n_active(latent),
        })
        .filter(|contrast| contrast.n_active >= min_active)
        .collect();
    ranked.sort_by(|a, b| b.difference.total_cmp(&a.difference).then(a.latent.cmp(&b.latent)));
    ranked
}
