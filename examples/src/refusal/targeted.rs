//! A direction that moves one latent and little else (Chalnev et al., 2024).

use anyhow::Result;
use burn::tensor::{Tensor, TensorData};
use model_hooks::{ActivationCache, Hook, HookPoint, LanguageModel, SharedPrefix, TokenBatch};
use rand::SeedableRng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use sae_core::Sae;
use steering::{Intervention, LinearEffects, Region, Steering, norm, random_direction};

use super::{During, FIRST_POSITION};
use crate::assets::LoadedModel;
use crate::pool::side_by_side;
use crate::progress::bar;

/// Blocks between where vectors are added and where latents are read: what is added at once is
/// what the encoder sees, and nothing is learnt of the model.
const N_BLOCKS_BEFORE: usize = 2;
/// Prompts on which vectors are tried.
const N_PROMPTS: usize = 6;
/// Latents beside the wanted one whose effects say what any vector moves.
const N_OTHERS: usize = 64;
/// The penalty of the regression, for vectors of norm 1.
const RIDGE: f64 = 1e-2;
/// How far the direction is turned away from what any vector moves.
const LAMBDA: f64 = 0.5;

/// What is to be moved.
pub(super) struct Wanted<'a> {
    pub(super) latent: usize,
    /// Latents that fire at all.
    pub(super) others: &'a [usize],
    /// Vectors that are tried.
    pub(super) n_vectors: usize,
    /// How long they are.
    pub(super) length: f64,
    pub(super) seed: u64,
}

/// Where to push, and along what, as a vector of norm 1.
pub(super) fn direction(
    loaded: &LoadedModel,
    sae: &Sae,
    point: HookPoint,
    rows: &[Vec<u32>],
    wanted: &Wanted<'_>,
) -> Result<(HookPoint, Tensor<1>)> {
    let model = &loaded.model;
    let (device, d_model) = (model.device(), model.config().d_model);
    let read = point.layer().unwrap_or(0);
    let before = read.saturating_sub(N_BLOCKS_BEFORE);
    let pushed = HookPoint::resid_post(before);
    let rows = &rows[..rows.len().min(N_PROMPTS)];
    let tokens = TokenBatch::new(rows, model.config(), device).during("reading prompts")?;
    let residual = model.run_until(&tokens, before + 1, &mut ()).during("reading prompts")?;

    let mut rng = ChaCha8Rng::seed_from_u64(wanted.seed ^ 0x7A26_E7ED);
    let others: Vec<usize> =
        wanted.others.iter().copied().filter(|&latent| latent != wanted.latent).collect();
    let others: Vec<usize> = others.sample(&mut rng, N_OTHERS).copied().collect();
    let seen: Vec<usize> = std::iter::once(wanted.latent).chain(others).collect();
    // What latents write is where the model is to be found; the rest is what else there is.
    let written = sae.directions();
    let vector = |index: usize| {
        if index % 4 == 3 {
            return random_direction(d_model, 1.0, wanted.seed.wrapping_add(index as u64), device);
        }
        let latent = match index {
            0 => wanted.latent,
            _ => *wanted.others.choose(&mut rng).unwrap_or(&wanted.latent),
        };
        let row = written.clone().narrow(0, latent, 1).reshape([d_model]);
        let length = norm(&row).max(f64::MIN_POSITIVE);
        row / length
    };
    let vectors: Vec<Tensor<1>> = (0..wanted.n_vectors).map(vector).collect();
    let trial = Trial { model, sae, tokens: &tokens, residual, pushed, read, seen: &seen };
    let plain = trial.means(None)?;
    let bar = bar("trying vectors", vectors.len() as u64);
    let effects = side_by_side(&vectors, |vector| {
        let moved = trial.means(Some(vector.clone() * wanted.length))?;
        bar.inc(1);
        let effects = moved.iter().zip(&plain).map(|(moved, plain)| moved - plain);
        anyhow::Ok(effects.collect::<Vec<f32>>())
    })?;
    bar.finish();
    let effects = TensorData::new(effects.concat(), [vectors.len(), seen.len()]);
    let effects = Tensor::<2>::from_data(effects, device);
    let found = LinearEffects::fit(&Tensor::stack(vectors, 0), &effects, RIDGE);
    let direction = found.direction(0, LAMBDA, device);
    let length = norm(&direction).max(f64::MIN_POSITIVE);
    Ok((pushed, direction / length))
}

/// Prompts run up to where vectors are added.
struct Trial<'a> {
    model: &'a LanguageModel,
    sae: &'a Sae,
    tokens: &'a TokenBatch,
    residual: Tensor<3>,
    pushed: HookPoint,
    read: usize,
    seen: &'a [usize],
}

impl Trial<'_> {
    /// The mean values of the latents over all tokens but the first.
    fn means(&self, added: Option<Tensor<1>>) -> Result<Vec<f32>> {
        let positions = self.tokens.positions(0);
        let mut residual = self.residual.clone();
        if let Some(direction) = added {
            let region = Region::from_position(FIRST_POSITION);
            let mut hook = Steering::new([self.pushed], Intervention::Add { direction }, region)?;
            residual = hook.at(self.pushed, residual, &positions);
        }
        let point = HookPoint::resid_post(self.read);
        let mut kept = ActivationCache::new([point]);
        let between = self.pushed.layer().map_or(0, |layer| layer + 1)..self.read + 1;
        let x = if between.is_empty() {
            residual
        } else {
            let mut cache = self.model.cache(SharedPrefix::default(), self.tokens);
            self.model.blocks(residual, between, &mut cache, &mut kept).during("trying a vector")?
        };
        let [batch, n, d_model] = x.dims();
        let counts = |cell: usize| {
            positions.get(cell / n, cell % n).is_some_and(|position| position >= FIRST_POSITION)
        };
        let latents = self.sae.encode(x.reshape([batch * n, d_model]));
        let mut sums = vec![0f32; self.seen.len()];
        for entry in latents.entries() {
            let place = self.seen.iter().position(|&latent| latent == entry.latent_idx);
            if let Some(place) = place.filter(|_| counts(entry.row)) {
                sums[place] += entry.value;
            }
        }
        let n_counted = (0..batch * n).filter(|&cell| counts(cell)).count().max(1);
        Ok(sums.into_iter().map(|sum| sum / n_counted as f32).collect())
    }
}
