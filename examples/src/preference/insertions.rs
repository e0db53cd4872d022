//! What fires raising latents, put into texts that have nothing to do with it.

use anyhow::{Context, Result};
use attribution::{Baseline, Cut, Reward, SaeSite, Study};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use steering::Rate;

use super::effects::{Question, values};
use super::model::{score, texts};
use super::pairs::{ASSISTANT, HUMAN};
use super::results::Insertion;
use super::saes::TrainedSae;
use crate::corpus::Turn;

/// Raising latents whose firing is inserted, and which are ablated again.
const N_LATENTS: usize = 5;
/// Tokens before and behind the one that a latent is most active on.
const AROUND: usize = 3;

/// Insertions, and how many of them raise the reward by more than the threshold.
pub(super) struct Insertions {
    pub(super) insertions: Vec<Insertion>,
    pub(super) success: Rate,
    pub(super) control: Rate,
    pub(super) threshold: f64,
}

/// Puts what fires the latents that raise the reward most behind answers to other questions, and
/// what fires none of them as a control.
pub(super) fn insert(
    question: &Question<'_>,
    trained: &TrainedSae,
    raising: &[usize],
    turns: &[Turn],
    end: Option<u32>,
) -> Result<Insertions> {
    let mut rng = ChaCha8Rng::seed_from_u64(question.seed ^ 0x1415);
    let latents = &raising[..N_LATENTS.min(raising.len())];
    let conversations = texts(question.pairs);
    let values = values(question.model.body(), trained, &conversations)?;
    let decode = |ids: &[u32]| -> Result<String> {
        let special = question.tokenizer.special_ids();
        let ids: Vec<u32> = ids.iter().copied().filter(|id| !special.contains(id)).collect();
        Ok(question.tokenizer.decode(&ids)?.split_whitespace().collect::<Vec<_>>().join(" "))
    };
    let window = |text: usize, at: usize| {
        let ids = conversations[text];
        let first = question.pairs[text / 2].divergence.min(ids.len() - 1);
        decode(&ids[at.saturating_sub(AROUND).max(first.min(at))..(at + AROUND + 1).min(ids.len())])
    };
    // Where each latent is most active.
    let mut phrases = Vec::new();
    for latent in latents {
        let of_text = |text: usize| {
            let of_latent = values[text].get(latent).into_iter().flatten();
            of_latent.map(move |&(at, value)| (value, text, at))
        };
        let most = (0..values.len())
            .flat_map(of_text)
            .filter(|&(_, text, at)| at >= question.pairs[text / 2].divergence)
            .max_by(|a, b| a.0.total_cmp(&b.0));
        if let Some((_, text, at)) = most {
            phrases.push(window(text, at)?);
        }
    }
    phrases.retain(|phrase| !phrase.is_empty());
    // Windows of answers on which none of them is active.
    let mut controls = Vec::new();
    for _ in 0..1000 {
        if controls.len() == phrases.len() {
            break;
        }
        let text = rng.random_range(0..conversations.len());
        let at = rng.random_range(1..conversations[text].len());
        let near = |position: usize| position.abs_diff(at) <= AROUND;
        let fires = |latent: &usize| {
            values[text].get(latent).is_some_and(|fires| fires.iter().any(|&(p, _)| near(p)))
        };
        let phrase = window(text, at)?;
        if !latents.iter().any(fires) && !phrase.is_empty() {
            controls.push(phrase);
        }
    }
    let mut turns: Vec<&Turn> = turns.iter().collect();
    turns.shuffle(&mut rng);
    turns.truncate(question.scale.n_insertions);
    let encode = |text: &str| -> Result<Vec<u32>> {
        let mut ids = question.tokenizer.encode(text)?;
        ids.extend(end);
        Ok(ids)
    };
    let plain: Vec<String> = turns
        .iter()
        .map(|turn| format!("{HUMAN}{}{ASSISTANT}{}", turn.prompt, turn.answer))
        .collect();
    let plain_ids = plain.iter().map(|text| encode(text)).collect::<Result<Vec<_>>>()?;
    let before = score(question.model, &plain_ids)?;
    let threshold = 0.5 * deviation(&before);
    let mut insertions = Vec::new();
    for (phrases, is_control) in [(&phrases, false), (&controls, true)] {
        for (nth, text) in plain.iter().enumerate() {
            let Some(phrase) = phrases.get(nth % phrases.len().max(1)) else { break };
            let ids = encode(&format!("{text} {phrase}"))?;
            let first = super::pairs::divergence(&ids, &plain_ids[nth]);
            let metric = Reward::new(question.model);
            let site = SaeSite::new(&trained.sae, trained.point());
            let study = Study::new(&metric, &[ids])?.from_positions(vec![first]);
            let study = study.start_at(site.point)?;
            let after = study.clean()?[0];
            let cut = [Cut::latents(0, latents.to_vec())];
            let effect = study.measure_cuts(&site, Baseline::Zero, &cut);
            let effect = effect.context("while ablating what was inserted")?[0];
            insertions.push(Insertion {
                phrase: phrase.clone(),
                is_control,
                before: before[nth],
                after,
                ablated: after + effect.change(),
            });
        }
    }
    let rate = |is_control: bool| {
        let of: Vec<&Insertion> =
            insertions.iter().filter(|insertion| insertion.is_control == is_control).collect();
        let rises = |insertion: &&&Insertion| insertion.after - insertion.before > threshold;
        Rate::wilson(of.iter().filter(rises).count(), of.len())
    };
    let (success, control) = (rate(false), rate(true));
    Ok(Insertions { insertions, success, control, threshold })
}

/// The standard deviation.
pub(super) fn deviation(values: &[f64]) -> f64 {
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / n).sqrt()
}
