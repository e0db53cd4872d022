//! What clamps do to where answers begin, without answering.

use anyhow::Result;
use attribution::clamp_slopes;
use burn::tensor::activation::log_softmax;
use burn::tensor::{Tensor, TensorData};
use model_hooks::{
    ActivationCache, Hook, HookPoint, LanguageModel, Positions, Probe, SharedPrefix, TokenBatch,
};
use sae_core::Sae;
use steering::{Intervention, Region, Steering, latent_direction, log_odds};

use super::{During, FIRST_POSITION};

/// Tokens that a latent writes towards.
const N_WRITTEN_TOKENS: usize = 20;

/// Prompts run up to the autoencoder once, so that each clamp costs only the blocks above.
pub(super) struct FirstWords<'a> {
    model: &'a LanguageModel,
    sae: &'a Sae,
    point: HookPoint,
    tokens: TokenBatch,
    residual: Tensor<3>,
    refusal_tokens: &'a [u32],
    layer: usize,
}

impl<'a> FirstWords<'a> {
    pub(super) fn new(
        model: &'a LanguageModel,
        (sae, point): (&'a Sae, HookPoint),
        rows: &[Vec<u32>],
        refusal_tokens: &'a [u32],
    ) -> Result<Self> {
        let layer = point.layer().unwrap_or(0);
        let tokens =
            TokenBatch::new(rows, model.config(), model.device()).during("reading prompts")?;
        let mut cache = ActivationCache::new([point]);
        let residual = model.run_until(&tokens, layer + 1, &mut cache).during("reading prompts")?;
        Ok(Self { model, sae, point, tokens, residual, refusal_tokens, layer })
    }

    fn positions(&self) -> Positions {
        self.tokens.positions(0)
    }

    /// Logits where the answers begin, from a residual after the autoencoder's block.
    fn logits(&self, residual: Tensor<3>) -> Result<Tensor<2>> {
        let model = self.model;
        let mut cache = model.cache(SharedPrefix::default(), &self.tokens);
        let layers = self.layer + 1..model.config().n_layers;
        let end = model.blocks(residual, layers, &mut cache, &mut ()).during("trying a clamp")?;
        Ok(model.unembed_last(end, &self.positions(), &mut ()))
    }

    /// The logits where each answer begins, with some latents clamped.
    pub(super) fn rows(&self, clamps: &[(usize, f64)]) -> Result<Vec<Vec<f32>>> {
        let mut residual = self.residual.clone();
        if !clamps.is_empty() {
            let region = Region::from_position(FIRST_POSITION);
            let intervention = Intervention::clamp(self.sae, clamps.iter().copied());
            let mut steering = Steering::new([self.point], intervention, region)?;
            residual = steering.at(self.point, residual, &self.positions());
        }
        let logits = self.logits(residual)?;
        let [_, d_vocab] = logits.dims();
        let logits = logits.into_data();
        let logits = logits.as_slice::<f32>().expect("logits are f32");
        Ok(logits.chunks(d_vocab).map(<[f32]>::to_vec).collect())
    }

    pub(super) fn mean_log_odds(&self, rows: &[Vec<f32>]) -> f64 {
        let odds = rows.iter().map(|row| log_odds(row, self.refusal_tokens));
        odds.sum::<f64>() / rows.len() as f64
    }

    /// The tokens that a latent raises most by itself.
    pub(super) fn written(&self, latent: usize) -> Result<Vec<u32>> {
        let model = self.model;
        let (d_model, d_vocab) = (model.config().d_model, model.config().d_vocab);
        let direction = latent_direction(self.sae, latent)?.reshape([1, 1, d_model]);
        let ids: Vec<u32> = (0..d_vocab as u32).collect();
        // The scale of the final norm is one for all tokens, and changes no order.
        let raised = model.direct_logits(direction.clone(), direction, &ids);
        let raised = raised.during("reading what a latent writes")?.into_data();
        let raised = raised.as_slice::<f32>().expect("logits are f32");
        let mut order: Vec<u32> = ids;
        order.sort_by(|&a, &b| raised[b as usize].total_cmp(&raised[a as usize]));
        order.truncate(N_WRITTEN_TOKENS);
        Ok(order)
    }

    /// How fast the mean log-odds rise with each latent, by one backward pass.
    pub(super) fn slopes(&self) -> Result<Vec<f32>> {
        let point = self.point;
        let mut probe = Probe::new([point]);
        let residual = probe.at(point, self.residual.clone(), &self.positions());
        let [batch, n, d_model] = residual.dims();
        let log_probs = log_softmax(self.logits(residual)?, 1);
        let ids: Vec<i64> = self.refusal_tokens.iter().map(|&id| i64::from(id)).collect();
        let ids = TensorData::new(ids, [self.refusal_tokens.len()]);
        let ids = Tensor::from_data(ids, &self.residual.device());
        let within = log_probs.select(1, ids).exp().sum_dim(1);
        let odds = within.clone().log() - (-within + 1.0).log();
        let grads = odds.mean().backward();
        let gradient = probe.gradient::<3>(point, &grads).expect("the probe was passed");
        // Position 0 is left alone by every clamp.
        let gradient =
            gradient * self.positions().mask_from(FIRST_POSITION, &self.residual.device());
        let slopes = clamp_slopes(self.sae, gradient.reshape([batch * n, d_model]));
        slopes.into_data().try_to_vec().map_err(|error| anyhow::anyhow!("{error:?}"))
    }
}
