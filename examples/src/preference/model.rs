//! A preference model: a language model with a head learnt from pairs.

use anyhow::{Context, Result};
use burn::tensor::{Tensor, TensorData};
use model_hooks::{
    ActivationCache, HookPoint, LanguageModel, RewardHead, RewardModel, TokenBatch,
    batches_in_order,
};

use super::bradley_terry::{FitConfig, fit};
use super::pairs::TokenPair;
use crate::progress::bar;

/// Tokens per forward pass.
pub(super) const BATCH_TOKENS: usize = 1024;

/// What a pass over texts leaves.
pub(super) struct Read {
    /// The normed residual stream at the last token of each text, in their order.
    pub(super) last: Vec<Vec<f32>>,
    /// Activations at each of the points, token by token: the first of each text left out.
    pub(super) activations: Vec<Vec<f32>>,
}

/// Runs texts once, for what a head reads and what autoencoders are trained on.
pub(super) fn read(
    body: &LanguageModel,
    texts: &[&[u32]],
    points: &[HookPoint],
    label: &'static str,
) -> Result<Read> {
    let (d_model, device) = (body.config().d_model, body.device());
    // A head that hands through what it reads.
    let states = RewardModel::new(body.clone(), RewardHead::new(Tensor::eye(d_model, device)));
    let mut order: Vec<usize> = (0..texts.len()).collect();
    order.sort_by_key(|&text| texts[text].len());
    let sorted: Vec<&[u32]> = order.iter().map(|&text| texts[text]).collect();
    let mut read =
        Read { last: vec![Vec::new(); texts.len()], activations: vec![Vec::new(); points.len()] };
    let bar = bar(label, texts.iter().map(|text| text.len() as u64).sum());
    for batch in batches_in_order(&sorted, BATCH_TOKENS) {
        let rows = &sorted[batch.clone()];
        let tokens = TokenBatch::new(rows, body.config(), device)?;
        let mut cache = ActivationCache::new(points.iter().copied());
        let last = states.scores(&tokens, &mut cache).context("while reading texts")?;
        let last: Vec<f32> = last.into_data().iter().collect();
        for (row, &text) in order[batch].iter().enumerate() {
            read.last[text] = last[row * d_model..(row + 1) * d_model].to_vec();
        }
        let n = tokens.dims()[1];
        for (point, kept) in points.iter().zip(&mut read.activations) {
            let x = cache.get::<3>(*point).context("a point of the residual stream")?;
            let x: Vec<f32> = x.into_data().iter().collect();
            for (row, ids) in rows.iter().enumerate() {
                // Position 0 is unlike all others.
                let first = row * n + n - ids.len() + 1;
                kept.extend_from_slice(&x[first * d_model..(row + 1) * n * d_model]);
            }
        }
        bar.inc(rows.iter().map(|row| row.len() as u64).sum());
    }
    bar.finish();
    Ok(read)
}

/// A head fitted to pairs, whose states come two by two, the preferred one first.
pub(super) fn head(states: &[Vec<f32>]) -> Vec<f32> {
    let difference = |pair: &[Vec<f32>]| -> Vec<f32> {
        pair[0].iter().zip(&pair[1]).map(|(chosen, rejected)| chosen - rejected).collect()
    };
    let differences: Vec<Vec<f32>> = states.chunks_exact(2).map(difference).collect();
    fit(&differences, FitConfig::default()).into_iter().map(|weight| weight as f32).collect()
}

/// The rewards that a head gives to states.
pub(super) fn rewards(states: &[Vec<f32>], head: &[f32]) -> Vec<f64> {
    let reward = |state: &Vec<f32>| {
        state.iter().zip(head).map(|(&x, &weight)| f64::from(x) * f64::from(weight)).sum()
    };
    states.iter().map(reward).collect()
}

/// The model with the head on it.
pub(super) fn with_head(body: &LanguageModel, head: &[f32]) -> RewardModel {
    let weight = TensorData::new(head.to_vec(), [1, head.len()]);
    RewardModel::new(body.clone(), RewardHead::new(Tensor::from_data(weight, body.device())))
}

/// Rewards of texts by the model itself.
pub(super) fn score(model: &RewardModel, texts: &[Vec<u32>]) -> Result<Vec<f64>> {
    let body = model.body();
    let mut rewards = Vec::with_capacity(texts.len());
    for batch in batches_in_order(texts, BATCH_TOKENS) {
        let tokens = TokenBatch::new(&texts[batch], body.config(), body.device())?;
        rewards.extend(model.scores(&tokens, &mut ())?.into_data().iter::<f64>());
    }
    Ok(rewards)
}

/// The texts of pairs, the preferred one of each first.
pub(super) fn texts(pairs: &[TokenPair]) -> Vec<&[u32]> {
    pairs.iter().flat_map(TokenPair::texts).collect()
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use model_hooks::load;

    use super::*;

    #[test]
    fn what_was_read_is_what_the_model_scores_and_captures() {
        let mut checkpoint = load::open(&goldens::own("models/llama_mha")).unwrap();
        let device = Device::flex();
        let body =
            LanguageModel::load(checkpoint.config, checkpoint.tensors.as_mut(), &device).unwrap();
        let rows: [&[u32]; 3] = [&[5, 9, 40, 77, 12], &[44, 3], &[7, 7, 19]];
        let point = HookPoint::resid_post(1);
        let read = read(&body, &rows, &[point], "reading").unwrap();
        let head: Vec<f32> = (0..48).map(|i| (i as f32 * 0.7).sin()).collect();
        let own: Vec<Vec<u32>> = rows.iter().map(|row| row.to_vec()).collect();
        let scored = score(&with_head(&body, &head), &own).unwrap();
        for (reward, scored) in rewards(&read.last, &head).iter().zip(&scored) {
            assert!((reward - scored).abs() < 1e-4, "{reward} {scored}");
        }
        // Shortest first, and no first tokens.
        let mut expected = Vec::new();
        for row in [rows[1], rows[2], rows[0]] {
            let tokens = TokenBatch::new(&[row], body.config(), &device).unwrap();
            let x = body.capture(&tokens, [point]).unwrap().get::<3>(point).unwrap();
            expected.extend(x.into_data().iter::<f32>().skip(48));
        }
        goldens::assert_close("activations", &read.activations[0], &expected, 1e-4);
    }

    #[test]
    fn a_head_prefers_what_it_learnt() {
        let state = |sign: f32, noise: f32| vec![sign + noise, 3.0 * noise, 1.0];
        let states: Vec<Vec<f32>> = (0..40)
            .flat_map(|i| {
                let noise = (i as f32 * 1.3).sin() * 0.2;
                [state(1.0, noise), state(-1.0, -noise)]
            })
            .collect();
        let rewards = rewards(&states, &head(&states));
        assert!(rewards.chunks_exact(2).all(|pair| pair[0] > pair[1] + 1.0), "{rewards:?}");
    }
}
