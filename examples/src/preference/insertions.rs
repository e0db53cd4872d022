//! What fires raising latents, put into texts that have nothing to do with it.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use attribution::{Baseline, Cut, Effect, Reward, SaeSite, Study};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use steering::Rate;

use super::effects::{Question, TextEffects};
use super::model::{BATCH_TOKENS, texts};
use super::pairs::divergence;
use super::results::Insertion;
use super::saes::TrainedSae;
use super::sources::{Encoding, conversation};
use super::table::Values;
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

/// The latents that raise rewards, those first that raise the preferred texts' most above the
/// others'.
pub(super) fn raising(effects: &[TextEffects]) -> Vec<usize> {
    let (mut sums, mut differences) = (BTreeMap::<usize, f64>::new(), BTreeMap::<_, f64>::new());
    for (nth, text) in effects.iter().enumerate() {
        let sign = if nth % 2 == 0 { 1.0 } else { -1.0 };
        for (&latent, effect) in &text.ig {
            *sums.entry(latent).or_default() += effect;
            *differences.entry(latent).or_default() += sign * effect;
        }
    }
    let mut order: Vec<(usize, f64)> = differences
        .into_iter()
        .filter(|(latent, difference)| sums[latent] < 0.0 && *difference < 0.0)
        .collect();
    order.sort_by(|a, b| a.1.total_cmp(&b.1));
    order.into_iter().map(|(latent, _)| latent).collect()
}

/// Puts what fires the latents that raise the reward most behind answers to other questions, and
/// what fires none of them as a control.
pub(super) fn insert(
    question: &Question<'_>,
    trained: &TrainedSae,
    raising: &[usize],
    values: &[Values],
    hosts: &[Turn],
    encoding: Encoding<'_>,
) -> Result<Insertions> {
    let latents = &raising[..N_LATENTS.min(raising.len())];
    let phrases = phrases(question, latents, values)?;
    let controls = controls(question, latents, values, phrases.len())?;
    let hosts = &hosts[..question.scale.n_insertions.min(hosts.len())];
    let plain: Vec<String> =
        hosts.iter().map(|turn| conversation(&turn.prompt, &turn.answer)).collect();
    let plain_ids = plain.iter().map(|text| encoding.encode(text)).collect::<Result<Vec<_>>>()?;
    let metric = Reward::new(question.model);
    let before = study(&metric, &plain_ids)?.clean()?;
    let threshold = 0.5 * deviation(&before);
    let mut insertions = Vec::new();
    for (phrases, is_control) in [(phrases, false), (controls, true)] {
        if phrases.is_empty() {
            continue;
        }
        let phrase = |nth: usize| &phrases[nth % phrases.len()];
        let ids = plain
            .iter()
            .enumerate()
            .map(|(nth, text)| encoding.encode(&format!("{text} {}", phrase(nth))));
        let ids = ids.collect::<Result<Vec<_>>>()?;
        let firsts = ids.iter().zip(&plain_ids).map(|(ids, plain)| divergence(ids, plain));
        let site = SaeSite::new(&trained.sae, trained.point());
        let study = study(&metric, &ids)?.from_positions(firsts.collect()).start_at(site.point)?;
        let after = study.clean()?;
        let cuts: Vec<Cut> =
            (0..ids.len()).map(|text| Cut::latents(text, latents.to_vec())).collect();
        let effects = study.measure_cuts(&site, Baseline::Zero, &cuts);
        let effects: Vec<Effect> = effects.context("while ablating what was inserted")?;
        for (nth, effect) in effects.into_iter().enumerate() {
            insertions.push(Insertion {
                layer: trained.layer,
                phrase: phrase(nth).clone(),
                is_control,
                before: before[nth],
                after: after[nth],
                ablated: after[nth] + effect.change(),
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

fn study<'a>(metric: &'a Reward<'a>, ids: &[Vec<u32>]) -> Result<Study<'a, Reward<'a>>> {
    Ok(Study::new(metric, ids)?.with_batch_tokens(BATCH_TOKENS))
}

/// The words around a token, behind a first position.
fn window(question: &Question<'_>, text: usize, at: usize, first: usize) -> Result<String> {
    let ids = texts(question.pairs)[text];
    let begin = at.saturating_sub(AROUND).max(first.min(at));
    let special = question.tokenizer.special_ids();
    let ids: Vec<u32> = ids[begin..(at + AROUND + 1).min(ids.len())]
        .iter()
        .copied()
        .filter(|id| !special.contains(id) && question.tokenizer.decode(&[*id]).is_ok())
        .collect();
    Ok(question.tokenizer.decode(&ids)?.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// The words around the token, behind where texts part, that each latent is most active on.
fn phrases(question: &Question<'_>, latents: &[usize], values: &[Values]) -> Result<Vec<String>> {
    let mut phrases = Vec::new();
    for latent in latents {
        let of_text = |text: usize| {
            let of_latent = values[text].get(latent).into_iter().flatten();
            of_latent.map(move |&(at, value)| (value, text, at))
        };
        let first = |text: usize| question.pairs[text / 2].divergence;
        let most = (0..values.len())
            .flat_map(of_text)
            .filter(|&(_, text, at)| at >= first(text))
            .max_by(|a, b| a.0.total_cmp(&b.0));
        if let Some((_, text, at)) = most {
            phrases.push(window(question, text, at, first(text))?);
        }
    }
    phrases.retain(|phrase| !phrase.is_empty());
    Ok(phrases)
}

/// As many windows of what the texts of pairs share, on which none of the latents is active.
fn controls(
    question: &Question<'_>,
    latents: &[usize],
    values: &[Values],
    n: usize,
) -> Result<Vec<String>> {
    let mut rng = ChaCha8Rng::seed_from_u64(question.seed ^ 0x1415);
    let mut controls = Vec::new();
    for _ in 0..1000 {
        if controls.len() == n {
            break;
        }
        let text = rng.random_range(0..values.len());
        let end = question.pairs[text / 2].divergence;
        if end <= AROUND + 1 {
            continue;
        }
        let at = rng.random_range(1..end - AROUND);
        let near = |position: usize| position.abs_diff(at) <= AROUND;
        let fires = |latent: &usize| {
            values[text].get(latent).is_some_and(|fires| fires.iter().any(|&(p, _)| near(p)))
        };
        let phrase = window(question, text, at, 0)?;
        if !latents.iter().any(fires) && !phrase.is_empty() {
            controls.push(phrase);
        }
    }
    Ok(controls)
}

/// The standard deviation.
pub(super) fn deviation(values: &[f64]) -> f64 {
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / n).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raising_latents_raise_the_preferred_text() {
        let text = |ig: &[(usize, f64)]| TextEffects {
            ig: ig.iter().copied().collect(),
            ..TextEffects::default()
        };
        // 1 raises the preferred text, 2 more so; 3 raises both alike; 4 lowers the other one.
        let effects = [text(&[(1, -1.0), (2, -2.0), (3, -5.0)]), text(&[(3, -5.0), (4, 2.0)])];
        assert_eq!(raising(&effects), [2, 1]);
    }
}
