//! The table of latents: where they fire, and what they do there.

use std::collections::BTreeMap;

use anyhow::Result;
use burn::tensor::{Tensor, TensorData};
use model_hooks::text::Tokenizer;
use model_hooks::{LanguageModel, Positions};

use super::effects::{Question, TextEffects, means};
use super::model::{Wanted, read, texts};
use super::ranked::Ranked;
use super::recovery::{ByRule, TOP, rule_of};
use super::results::{LatentRow, OnText, TopText};
use super::saes::TrainedSae;

/// Texts shown for a latent.
const N_TOP_TEXTS: usize = 4;
/// Tokens shown before and behind the one that a latent is most active on.
const AROUND: [usize; 2] = [24, 8];
/// Tokens shown for a latent.
const N_PROMOTED: usize = 6;
/// Latents whose logits are found together.
const UNEMBED_ROWS: usize = 64;

/// Where each latent is active on a text: positions and values.
pub(super) type Values = BTreeMap<usize, Vec<(usize, f32)>>;

/// Where each latent is active on each text.
pub(super) fn values(
    body: &LanguageModel,
    trained: &TrainedSae,
    conversations: &[&[u32]],
) -> Result<Vec<Values>> {
    let wanted = Wanted { points: &[trained.point()], last: false };
    let read = read(body, conversations, wanted, "reading")?;
    let (d_in, device) = (trained.sae.config().d_in, body.device());
    let x = &read.activations[0];
    let x = TensorData::new(x.clone(), [x.len() / d_in, d_in]);
    let latents = trained.sae.encode(Tensor::from_data(x, device));
    let mut values = vec![Values::new(); conversations.len()];
    for entry in latents.entries() {
        let place = read.places[entry.row];
        for &text in read.texts_at(place) {
            values[text].entry(entry.latent_idx).or_default().push((place.position, entry.value));
        }
    }
    // What texts have in common was not read in their order.
    for of_latent in values.iter_mut().flat_map(BTreeMap::values_mut) {
        of_latent.sort_by_key(|&(position, _)| position);
    }
    Ok(values)
}

/// The table, for latents that were measured: first those that make the model prefer one text to
/// another by what it says, then by their effects on all that was verified.
pub(super) fn rows(
    question: &Question<'_>,
    trained: &TrainedSae,
    latents: &[usize],
    effects: &[TextEffects],
    measured: &[BTreeMap<usize, f64>],
    (ranked, by_rule): (&Ranked, Option<&ByRule>),
    values: &[Values],
) -> Vec<LatentRow> {
    let conversations = texts(question.pairs);
    let of_verified = &effects[..measured.len()];
    let by_ablation = means(measured.iter());
    let ig = means(of_verified.iter().map(|text| &text.ig));
    let together = means(of_verified.iter().map(|text| &text.together));
    let gxa = means(of_verified.iter().map(|text| &text.gxa));
    let promoted = promoted(question, trained, latents);
    let of = |means: &BTreeMap<usize, f64>, latent| means.get(&latent).copied().unwrap_or(0.0);
    let first: BTreeMap<usize, f64> =
        ranked.first(TOP).map(|of| (of.latent, of.difference)).collect();
    let rows = latents.iter().zip(promoted).map(|(&latent, promoted)| {
        let on_text = |(text, effects): (usize, &BTreeMap<usize, f64>)| {
            let effect = *effects.get(&latent)?;
            let values = values[text].get(&latent).cloned().unwrap_or_default();
            Some(OnText { text, effect, values })
        };
        LatentRow {
            latent,
            measured: of(&by_ablation, latent),
            ig: of(&ig, latent),
            together: of(&together, latent),
            gxa: of(&gxa, latent),
            density: trained.quality.densities.get(latent).copied().unwrap_or(0.0),
            adds: first.get(&latent).copied(),
            rule: by_rule
                .filter(|_| first.contains_key(&latent))
                .and_then(|all| all.get(&latent))
                .and_then(rule_of),
            on_texts: measured.iter().enumerate().filter_map(on_text).collect(),
            top: top_texts(question.tokenizer, values, latent, &conversations),
            promoted,
        }
    });
    let mut rows: Vec<LatentRow> = rows.collect();
    let adds = |row: &LatentRow| row.adds.unwrap_or(0.0);
    rows.sort_by(|a, b| adds(b).total_cmp(&adds(a)).then(a.ig.total_cmp(&b.ig)));
    rows
}

/// The texts on which a latent is most active, around the token that it is most active on.
fn top_texts(
    tokenizer: &Tokenizer,
    values: &[Values],
    latent: usize,
    conversations: &[&[u32]],
) -> Vec<TopText> {
    let most = |(text, values): (usize, &Values)| {
        let most = values.get(&latent)?.iter().max_by(|a, b| a.1.total_cmp(&b.1))?;
        Some((most.1, text, most.0))
    };
    let mut best: Vec<(f32, usize, usize)> = values.iter().enumerate().filter_map(most).collect();
    best.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    // Texts of a pair begin alike: what they share is shown once.
    let mut shown: Vec<(&[u32], usize)> = Vec::new();
    best.retain(|&(_, text, at)| {
        let begin = (&conversations[text][..=at], at);
        let is_new = !shown.contains(&begin) && shown.len() < N_TOP_TEXTS;
        if is_new {
            shown.push(begin);
        }
        is_new
    });
    let text = |(_, text, at): (f32, usize, usize)| {
        let ids = conversations[text];
        let window = at.saturating_sub(AROUND[0])..(at + AROUND[1] + 1).min(ids.len());
        let mut of_tokens = vec![0.0; ids.len()];
        values[text][&latent].iter().for_each(|&(at, value)| of_tokens[at] = value);
        let tokens = tokens(tokenizer, &ids[window.clone()]);
        TopText { tokens, values: of_tokens[window].to_vec() }
    };
    best.into_iter().map(text).collect()
}

/// Tokens as text. Models have ids that their tokenizer has no token for; those show their number.
pub(super) fn tokens(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let token = |&id: &u32| tokenizer.decode(&[id]).unwrap_or_else(|_| format!("⟨{id}⟩"));
    ids.iter().map(token).collect()
}

/// Tokens whose logits one unit of each latent raises most.
fn promoted(question: &Question<'_>, trained: &TrainedSae, latents: &[usize]) -> Vec<Vec<String>> {
    if !question.unembeds {
        return vec![Vec::new(); latents.len()];
    }
    let body = question.model.body();
    let (d_in, directions) = (trained.sae.config().d_in, trained.sae.directions());
    let mut promoted = Vec::with_capacity(latents.len());
    for latents in latents.chunks(UNEMBED_ROWS) {
        let n = latents.len();
        let rows = latents.iter().map(|&latent| directions.clone().narrow(0, latent, 1));
        let rows = Tensor::cat(rows.collect(), 0).reshape([n, 1, d_in]);
        let positions = Positions::new(0, 0, 1, vec![0; n]);
        let logits: Vec<f32> = body.unembed(rows, &positions, &mut ()).into_data().iter().collect();
        for logits in logits.chunks_exact(body.config().d_vocab) {
            let mut order: Vec<u32> = (0..logits.len() as u32).collect();
            order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
            order.truncate(N_PROMOTED);
            promoted.push(tokens(question.tokenizer, &order));
        }
    }
    promoted
}
