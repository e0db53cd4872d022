//! What fires raising latents, put into texts that have nothing to do with it.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Context, Result};
use attribution::{Baseline, Cut, Effect, Reward, SaeSite, Study};
use steering::Rate;

use super::effects::{Question, TextEffects};
use super::model::{BATCH_TOKENS, texts};
use super::pairs::divergence;
use super::ranked::OnWords;
use super::results::Insertion;
use super::saes::TrainedSae;
use super::sources::{Encoding, conversation};
use super::table;
use crate::corpus::Turn;

/// Raising latents, which are ablated again.
const N_LATENTS: usize = 5;
/// Sentences that fire them, which are inserted.
const N_PHRASES: usize = 5;
/// Tokens of a sentence before and behind one at which a latent is active, at most.
const AROUND: usize = 12;
/// What a sentence ends with, or begins behind.
const ENDS: [char; 5] = ['.', '!', '?', ':', '\n'];
/// Answers that a control is chosen among.
const N_OTHERS: usize = 3;

/// Insertions, and how many of them raise the reward by more than the threshold.
pub(super) struct Insertions {
    pub(super) insertions: Vec<Insertion>,
    pub(super) success: Rate,
    pub(super) control: Rate,
}

/// Puts what fires the latents that raise the reward most behind answers to other questions, and
/// answers that fire them least as a control.
pub(super) fn insert(
    question: &Question<'_>,
    trained: &TrainedSae,
    effects: &[TextEffects],
    raising: &[OnWords],
    hosts: &[Turn],
    encoding: Encoding<'_>,
) -> Result<Insertions> {
    let raising = &raising[..N_LATENTS.min(raising.len())];
    let latents: Vec<usize> = raising.iter().map(|raising| raising.latent).collect();
    let phrases = phrases(question, effects, &latents)?;
    let (hosts, others) = hosts.split_at(question.scale.n_insertions.min(hosts.len() / 2));
    let others = &others[..(N_OTHERS * hosts.len()).min(others.len())];
    let controls = controls(question, trained, &latents, others, hosts.len(), encoding)?;
    let plain: Vec<String> =
        hosts.iter().map(|turn| conversation(&turn.prompt, &turn.answer)).collect();
    let plain_ids = plain.iter().map(|text| encoding.encode(text)).collect::<Result<Vec<_>>>()?;
    let metric = Reward::new(question.model);
    let before = Study::new(&metric, &plain_ids)?.with_batch_tokens(BATCH_TOKENS).clean()?;
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
        let study = question.study(&metric, &ids, firsts)?.start_at(site.point)?;
        let after = study.clean()?;
        let cuts: Vec<Cut> =
            (0..ids.len()).map(|text| Cut::latents(text, latents.clone())).collect();
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
        let rises =
            |insertion: &&&Insertion| insertion.after - insertion.before > question.thresholds.rise;
        Rate::wilson(of.iter().filter(rises).count(), of.len())
    };
    let (success, control) = (rate(false), rate(true));
    Ok(Insertions { insertions, success, control })
}

/// The tokens of the sentence around one of them, between two positions.
fn sentence(question: &Question<'_>, text: usize, at: usize, within: Range<usize>) -> Range<usize> {
    let ids = texts(question.pairs)[text];
    let ends = |&place: &usize| {
        question.tokenizer.decode(&[ids[place]]).is_ok_and(|token| token.ends_with(ENDS))
    };
    let least = at.saturating_sub(AROUND).max(within.start);
    let most = (at + AROUND + 1).min(within.end);
    let begin = (least..at).rev().find(ends).map_or(least, |end| end + 1);
    let end = (at..most).find(ends).map_or(most, |end| end + 1);
    begin..end
}

/// Tokens of a text as words.
fn words(question: &Question<'_>, text: usize, tokens: Range<usize>) -> Result<String> {
    let tokenizer = question.tokenizer;
    let special = tokenizer.special_ids();
    let is_word = |id: &u32| !special.contains(id) && tokenizer.decode(&[*id]).is_ok();
    let ids = &texts(question.pairs)[text][tokens];
    let ids: Vec<u32> = ids.iter().copied().filter(is_word).collect();
    Ok(tokenizer.decode(&ids)?.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// The sentences, behind where texts part, on which some latents together add most to the difference
/// of rewards: over all texts that say them, so that what either text says alike adds nothing.
fn phrases(
    question: &Question<'_>,
    effects: &[TextEffects],
    latents: &[usize],
) -> Result<Vec<String>> {
    let mut added = BTreeMap::<String, f64>::new();
    for (text, of_text) in effects.iter().enumerate() {
        let sign = if text % 2 == 0 { 1.0 } else { -1.0 };
        let within = question.pairs[text / 2].divergence..texts(question.pairs)[text].len();
        for &(_, at, effect) in of_text.on_words.iter().filter(|(of, ..)| latents.contains(of)) {
            let said = words(question, text, sentence(question, text, at, within.clone()))?;
            // What a latent adds is its effect with the sign turned.
            *added.entry(said).or_default() -= sign * effect;
        }
    }
    added.retain(|said, added| !said.is_empty() && *added > 0.0);
    let mut phrases: Vec<(String, f64)> = added.into_iter().collect();
    phrases.sort_by(|a, b| b.1.total_cmp(&a.1));
    Ok(phrases.into_iter().take(N_PHRASES).map(|(said, _)| said).collect())
}

/// Answers to other questions, those on which the latents are least active.
fn controls(
    question: &Question<'_>,
    trained: &TrainedSae,
    latents: &[usize],
    others: &[Turn],
    n: usize,
    encoding: Encoding<'_>,
) -> Result<Vec<String>> {
    let encode = |answer: &str, turn: &Turn| encoding.encode(&conversation(&turn.prompt, answer));
    let whole = others.iter().map(|turn| encode(&turn.answer, turn)).collect::<Result<Vec<_>>>()?;
    let asked = others.iter().map(|turn| encode("", turn)).collect::<Result<Vec<_>>>()?;
    let ids: Vec<&[u32]> = whole.iter().map(Vec::as_slice).collect();
    let values = table::values(question.model.body(), trained, &ids)?;
    let activity = |text: usize| -> f32 {
        let words = divergence(&asked[text], &whole[text])..whole[text].len() - 1;
        let of_latents = latents.iter().filter_map(|latent| values[text].get(latent));
        let on_words = of_latents.flatten().filter(|(place, _)| words.contains(place));
        on_words.map(|&(_, value)| value).sum()
    };
    let activities: Vec<f32> = (0..others.len()).map(activity).collect();
    let mut order: Vec<usize> = (0..others.len()).collect();
    order.sort_by(|&a, &b| activities[a].total_cmp(&activities[b]));
    Ok(order.into_iter().take(n).map(|text| others[text].answer.clone()).collect())
}
