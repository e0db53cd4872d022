//! What must hold of effects: exact where the metric is linear, complete, measured as estimated.

mod circuits;
mod estimates;
mod interventions;
mod positions;

use attribution::{
    Baseline, Cut, Effect, End, Metric, NextToken, SaeMeans, SaeSite, SiteEffects, Study, Target,
};
use burn::tensor::{Device, Tensor, TensorData};
use model_hooks::{ForwardError, Hook, LanguageModel, RewardModel, load};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sae_core::{Activation, Sae, SaeConfig, SaeWeights};

const ROWS: [&[u32]; 3] = [&[5, 9, 40, 77, 12, 8, 101], &[44, 3, 90], &[7, 7, 19, 23, 60]];
const OTHER: [&[u32]; 3] = [&[5, 9, 41, 70, 12, 9, 100], &[44, 4, 90], &[7, 8, 19, 23, 61]];
const D_MODEL: usize = 48;
const D_SAE: usize = 96;

fn language_model() -> LanguageModel {
    let mut checkpoint = load::open(&goldens::own("models/llama_gqa_theta_tied")).unwrap();
    LanguageModel::load(checkpoint.config, checkpoint.tensors.as_mut(), &Device::flex()).unwrap()
}

fn reward_model(name: &str) -> RewardModel {
    let mut checkpoint = load::open(&goldens::own("models").join(name)).unwrap();
    RewardModel::load(checkpoint.config, checkpoint.tensors.as_mut(), &Device::flex()).unwrap()
}

fn sae(seed: u64) -> Sae {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..D_SAE * D_MODEL).map(|_| rng.random_range(-0.3..0.3)).collect();
    let device = Device::flex();
    let w_dec = Tensor::<2>::from_data(TensorData::new(values, [D_SAE, D_MODEL]), &device);
    let weights = SaeWeights::new(
        w_dec.clone().transpose(),
        Tensor::zeros([D_SAE], &device),
        w_dec,
        // Not zero: a norm jumps where its input vanishes, and no integral sees that.
        random(&mut rng, D_MODEL),
    );
    let activation = Activation::TopK { k: 6, rescale_by_decoder_norm: true };
    Sae::new(SaeConfig::new(D_MODEL, D_SAE, activation), weights).unwrap()
}

fn random(rng: &mut ChaCha8Rng, n: usize) -> Tensor<1> {
    let values: Vec<f32> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_data(TensorData::new(values, [n]), &Device::flex())
}

fn owned(rows: &[&[u32]]) -> Vec<Vec<u32>> {
    rows.iter().map(|row| row.to_vec()).collect()
}

fn difference(model: &LanguageModel) -> NextToken<'_> {
    NextToken::new(model, vec![Target::Difference { wanted: 7, other: 30 }; 3])
}

/// `⟨direction, residual⟩` behind the last block, summed over the tokens: linear there.
struct Linear<'a> {
    model: &'a LanguageModel,
    direction: Tensor<1>,
}

impl Metric for Linear<'_> {
    fn body(&self) -> &LanguageModel {
        self.model
    }

    fn measure<H: Hook>(&self, end: End<'_>, _: &mut H) -> Result<Tensor<1>, ForwardError> {
        let mask = end.positions.mask_from(0, &end.residual.device());
        let product = end.residual * self.direction.clone().unsqueeze() * mask;
        Ok(product.sum_dim(2).sum_dim(1).flatten::<2>(1, 2).squeeze_dim(1))
    }
}

fn close(what: &str, actual: f64, expected: f64, tolerance: f64) {
    let error = (actual - expected).abs();
    assert!(error <= tolerance, "{what}: {actual} is not {expected} (error {error:e})");
}

/// Every latent that is changed anywhere, measured alone.
fn measured<M: Metric>(
    study: &Study<'_, M>,
    site: &SaeSite<'_>,
    baseline: Baseline<'_, SaeMeans>,
    effects: &SiteEffects,
) -> Vec<(Effect, Effect)> {
    let estimates: Vec<(Cut, Effect)> = effects
        .by_conversation()
        .into_iter()
        .enumerate()
        .flat_map(|(c, effects)| effects.into_iter().map(move |(l, e)| (Cut::latent(c, l), e)))
        .collect();
    let (cuts, estimates): (Vec<Cut>, Vec<Effect>) = estimates.into_iter().unzip();
    let measured = study.measure_cuts(site, baseline, &cuts).unwrap();
    estimates.into_iter().zip(measured).collect()
}
