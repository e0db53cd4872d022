//! What the latents of one autoencoder do to rewards.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use attribution::{
    AttributionConfig, Baseline, Check, Cut, CutOf, Effect, Integration, Reward, Rule as Riemann,
    SaeSite, SiteEffects, Study,
};
use burn::tensor::Tensor;
use burn::tensor::TensorData;
use model_hooks::text::Tokenizer;
use model_hooks::{LanguageModel, Positions, RewardModel};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::model::{BATCH_TOKENS, texts};
use super::options::Scale;
use super::pairs::TokenPair;
use super::planted::{PlantedPair, Rule};
use super::results::{Explained, LatentRow, OnText, SaeResults, TopText, VerifiedText};
use super::saes::TrainedSae;

/// Steps of integrated gradients.
const N_STEPS: usize = 10;
/// Latents that a rule is looked for among.
pub(super) const TOP: usize = 20;
/// Texts shown for a latent.
const N_TOP_TEXTS: usize = 4;
/// Tokens shown for a latent.
const N_PROMOTED: usize = 6;
/// Times that pairs are drawn anew for an interval.
const N_RESAMPLES: usize = 500;

/// Where each latent is active on a text: positions and values.
pub(super) type Values = BTreeMap<usize, Vec<(usize, f32)>>;

/// What is to be explained.
pub(super) struct Question<'a> {
    pub(super) model: &'a RewardModel,
    pub(super) tokenizer: &'a Tokenizer,
    /// Pairs with the rules that they follow.
    pub(super) planted: &'a [PlantedPair],
    /// The same as tokens.
    pub(super) pairs: &'a [TokenPair],
    pub(super) scale: &'a Scale,
    pub(super) explained_threshold: f64,
    pub(super) seed: u64,
}

/// What was found of one autoencoder.
pub(super) struct Found {
    pub(super) results: SaeResults,
    pub(super) explained: Vec<Explained>,
    /// Latents that raise the reward most, by integrated gradients.
    pub(super) raising: Vec<usize>,
}

/// Estimates, and what was measured of some.
struct Measured {
    latents: Vec<usize>,
    /// Mean effects over the verified texts.
    measured: Vec<f64>,
    ig: Vec<f64>,
    gxa: Vec<f64>,
    /// By place among the latents: texts and effects.
    on_texts: Vec<Vec<(usize, f64)>>,
}

/// Attributes rewards to an autoencoder's latents, and verifies the largest effects.
pub(super) fn explain(question: &Question<'_>, trained: &TrainedSae) -> Result<Found> {
    let Question { model, pairs, scale, .. } = *question;
    let metric = Reward::new(model);
    let site = SaeSite::new(&trained.sae, trained.point());
    let conversations = texts(pairs);
    let firsts = |pairs: &[TokenPair]| pairs.iter().flat_map(|pair| [pair.divergence; 2]).collect();
    let study = |pairs: &[TokenPair]| {
        Study::new(&metric, &texts(pairs))?
            .from_positions(firsts(pairs))
            .with_batch_tokens(2 * BATCH_TOKENS)
            .start_at(site.point)
    };
    // In parts, so that a pass of many texts with its gradients stays small.
    let (mut ig, mut gxa) = (Vec::new(), Vec::new());
    let mut completeness = [0.0; 2];
    for pairs in pairs.chunks(8) {
        let study = study(pairs).context("while attributing rewards")?;
        let of = |config| -> Result<SiteEffects> {
            let mut effects = study.attribute(&[site], Baseline::Zero, config)?;
            Ok(effects.swap_remove(0))
        };
        let integrated = AttributionConfig::integrated(Integration::new(Riemann::Left, N_STEPS));
        let integrated = of(integrated)?;
        let complete = integrated.completeness.context("gradients were integrated")?;
        completeness[0] += complete.residual();
        completeness[1] += complete.measured.change();
        ig.extend(integrated.by_conversation());
        gxa.extend(of(AttributionConfig::GRADIENT_TIMES_ACTIVATION)?.by_conversation());
    }
    let means = means(&ig);
    let mut by_effect: Vec<(usize, f64)> = means.iter().map(|(&l, &mean)| (l, mean)).collect();
    by_effect.sort_by(|a, b| a.1.total_cmp(&b.1));
    let raising: Vec<usize> =
        by_effect.iter().take_while(|(_, mean)| *mean < 0.0).map(|l| l.0).collect();

    let n = scale.n_verified_pairs.min(pairs.len());
    let verified = study(&pairs[..n]).context("while ablating latents")?;
    let measured = verify(&verified, &site, [&ig[..2 * n], &gxa[..2 * n]], scale)?;
    let check = |estimated: &[f64]| Check::new(estimated, &measured.measured, TOP);

    let everything = study(pairs).context("while ablating sets of latents")?;
    let (explained, error_share) = explained(question, &everything, &site, &ig, trained.layer)?;
    let contrasts = contrasts(question.planted, &ig);
    let (recovered, decoy_above) = recovered(&contrasts);
    let latents = rows(question, trained, &measured, &contrasts, &conversations)?;
    let shown = verified.clean()?.into_iter().zip(&conversations).zip(verified.firsts());
    let shown = shown.map(|((reward, ids), &from)| {
        Ok(VerifiedText { tokens: tokens(question.tokenizer, ids)?, reward, from })
    });
    let reconstruction = &trained.reconstruction;
    let results = SaeResults {
        layer: trained.layer,
        kind: trained.kind.clone(),
        d_sae: trained.sae.config().d_sae,
        l0: reconstruction.l0(),
        fvu: reconstruction.fvu(),
        fvu_without_outliers: reconstruction.fvu_without_outliers(),
        ig: check(&measured.ig),
        gxa: check(&measured.gxa),
        completeness_residual: completeness[0],
        completeness_measured: completeness[1],
        error_share,
        recovered,
        decoy_above,
        texts: shown.collect::<Result<_>>()?,
        latents,
        effects: by_effect.into_iter().map(|(_, mean)| mean).collect(),
    };
    Ok(Found { results, explained, raising })
}

/// The mean effect of every latent over some texts: zero where it is not active.
fn means(by_text: &[BTreeMap<usize, Effect>]) -> BTreeMap<usize, f64> {
    let mut sums = BTreeMap::<usize, f64>::new();
    for (&latent, effect) in by_text.iter().flatten() {
        *sums.entry(latent).or_default() += effect.change();
    }
    sums.values_mut().for_each(|sum| *sum /= by_text.len() as f64);
    sums
}

/// Ablates the latents with the largest effects in every text that they are active on.
fn verify(
    study: &Study<'_, Reward<'_>>,
    site: &SaeSite<'_>,
    [ig, gxa]: [&[BTreeMap<usize, Effect>]; 2],
    scale: &Scale,
) -> Result<Measured> {
    let (by_ig, by_gxa) = (means(ig), means(gxa));
    let mut order: Vec<usize> = by_ig.keys().copied().collect();
    order.sort_by(|a, b| by_ig[a].total_cmp(&by_ig[b]));
    let n = scale.n_verified_latents;
    let latents: Vec<usize> = match order.len() {
        len if len <= 2 * n => order,
        len => [&order[..n], &order[len - n..]].concat(),
    };
    let is_active = |latent: usize, text: usize| ig[text].contains_key(&latent);
    let cells: Vec<(usize, usize)> = latents
        .iter()
        .enumerate()
        .flat_map(|(nth, &latent)| {
            (0..ig.len()).filter(move |&text| is_active(latent, text)).map(move |text| (nth, text))
        })
        .collect();
    let cuts: Vec<Cut> = cells.iter().map(|&(nth, text)| Cut::latent(text, latents[nth])).collect();
    let effects = study.measure_cuts(site, Baseline::Zero, &cuts)?;
    let mut measured = vec![0.0; latents.len()];
    let mut on_texts = vec![Vec::new(); latents.len()];
    for (&(nth, text), effect) in cells.iter().zip(effects) {
        measured[nth] += effect.change() / ig.len() as f64;
        on_texts[nth].push((text, effect.change()));
    }
    let of = |means: &BTreeMap<usize, f64>| -> Vec<f64> {
        latents.iter().map(|latent| means.get(latent).copied().unwrap_or(0.0)).collect()
    };
    Ok(Measured { measured, ig: of(&by_ig), gxa: of(&by_gxa), latents, on_texts })
}

/// How the difference of rewards shrinks as latents are ablated in both texts, those with the
/// largest effects on it first; and the share that the error carries.
fn explained(
    question: &Question<'_>,
    study: &Study<'_, Reward<'_>>,
    site: &SaeSite<'_>,
    ig: &[BTreeMap<usize, Effect>],
    layer: usize,
) -> Result<(Vec<Explained>, f64)> {
    let mut on_difference = BTreeMap::<usize, f64>::new();
    for (text, effects) in ig.iter().enumerate() {
        let sign = if text % 2 == 0 { 1.0 } else { -1.0 };
        for (&latent, effect) in effects {
            *on_difference.entry(latent).or_default() += sign * effect.change();
        }
    }
    let mut order: Vec<usize> = on_difference.keys().copied().collect();
    order.sort_by(|a, b| on_difference[b].abs().total_cmp(&on_difference[a].abs()));
    let clean = study.clean()?;
    let differences = |rewards: &[f64]| -> Vec<f64> {
        rewards.chunks_exact(2).map(|pair| pair[0] - pair[1]).collect()
    };
    let before = differences(&clean);
    let counted: Vec<usize> = (0..before.len())
        .filter(|&pair| before[pair].abs() > question.explained_threshold)
        .collect();
    let ablated = |what: &CutOf| -> Result<Vec<f64>> {
        let cut = |conversation| Cut { conversation, what: what.clone() };
        let cuts: Vec<Cut> = (0..clean.len()).map(cut).collect();
        let effects = study.measure_cuts(site, Baseline::Zero, &cuts)?;
        let rewards = clean.iter().zip(effects).map(|(clean, effect)| clean + effect.change());
        Ok(differences(&rewards.collect::<Vec<f64>>()))
    };
    let share = |after: &[f64], pairs: &mut dyn Iterator<Item = usize>| {
        let (after, before) = pairs.fold((0.0, 0.0), |(a, b), pair| {
            // By the sign of the model's own preference.
            let sign = before[pair].signum();
            (a + sign * after[pair], b + before[pair].abs())
        });
        1.0 - after / before
    };
    let mut sizes: Vec<usize> =
        [1, 2, 5, 10, 20, 50, 100, 200].into_iter().filter(|&n| n < order.len()).collect();
    sizes.push(order.len());
    let mut rng = ChaCha8Rng::seed_from_u64(question.seed);
    let mut curve = Vec::new();
    for n_latents in sizes {
        let after = ablated(&CutOf::Latents(order[..n_latents].to_vec()))?;
        let mut resampled: Vec<f64> = (0..N_RESAMPLES)
            .map(|_| {
                let n = counted.len();
                share(&after, &mut (0..n).map(|_| counted[rng.random_range(0..n)]))
            })
            .collect();
        resampled.sort_by(f64::total_cmp);
        curve.push(Explained {
            layer,
            n_latents,
            share: share(&after, &mut counted.iter().copied()),
            low: resampled[N_RESAMPLES / 40],
            high: resampled[N_RESAMPLES - 1 - N_RESAMPLES / 40],
        });
    }
    let error = ablated(&CutOf::Error)?;
    Ok((curve, share(&error, &mut counted.iter().copied())))
}

/// For each latent and rule, how much more the latent adds to the reward of texts that follow the
/// rule than to that of others.
fn contrasts(
    planted: &[PlantedPair],
    ig: &[BTreeMap<usize, Effect>],
) -> BTreeMap<usize, BTreeMap<Rule, f64>> {
    let follows: Vec<BTreeSet<Rule>> = planted
        .iter()
        .flat_map(|pair| [&pair.chosen, &pair.rejected])
        .map(|text| text.insertions.iter().map(|insertion| insertion.rule).collect())
        .collect();
    let latents: BTreeSet<usize> = ig.iter().flat_map(|effects| effects.keys().copied()).collect();
    let mean = |latent: usize, rule: Rule, with: bool| {
        let of: Vec<f64> = (follows.iter().zip(ig))
            .filter(|(follows, _)| follows.contains(&rule) == with)
            .map(|(_, effects)| effects.get(&latent).map_or(0.0, |effect| effect.contribution()))
            .collect();
        of.iter().sum::<f64>() / of.len().max(1) as f64
    };
    let of_latent = |latent: usize| {
        let contrast = |rule| (rule, mean(latent, rule, true) - mean(latent, rule, false));
        (latent, Rule::ALL.into_iter().map(contrast).collect())
    };
    latents.into_iter().map(of_latent).collect()
}

/// The rule that a latent follows most.
fn rule_of(contrasts: &BTreeMap<Rule, f64>) -> (Rule, f64) {
    let most = contrasts.iter().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()));
    most.map(|(&rule, &contrast)| (rule, contrast)).expect("there are rules")
}

/// The best place of each rule's latents among the first, and whether a decoy's comes before one.
fn recovered(
    contrasts: &BTreeMap<usize, BTreeMap<Rule, f64>>,
) -> (Vec<(Rule, Option<usize>)>, bool) {
    let mut order: Vec<(Rule, f64)> = contrasts.values().map(rule_of).collect();
    order.sort_by(|a, b| b.1.abs().total_cmp(&a.1.abs()));
    let best = |rule: Rule| {
        order.iter().position(|&(of, contrast)| of == rule && contrast * rule.sign() >= 0.0)
    };
    let places: Vec<(Rule, Option<usize>)> =
        Rule::ALL.map(|rule| (rule, best(rule).filter(|&place| place < TOP))).to_vec();
    let place = |rule: Rule| best(rule).unwrap_or(usize::MAX);
    let (decoys, planted): (Vec<Rule>, Vec<Rule>) =
        Rule::ALL.into_iter().partition(|rule| rule.is_decoy());
    let last = planted.into_iter().map(place).max().unwrap_or(0);
    let decoy_above = decoys.into_iter().any(|decoy| place(decoy) < last);
    (places, decoy_above)
}

/// The table of latents.
fn rows(
    question: &Question<'_>,
    trained: &TrainedSae,
    measured: &Measured,
    contrasts: &BTreeMap<usize, BTreeMap<Rule, f64>>,
    conversations: &[&[u32]],
) -> Result<Vec<LatentRow>> {
    let values = values(question.model.body(), trained, conversations)?;
    let top = top_texts(question, &values, &measured.latents, conversations)?;
    let densities = trained.reconstruction.densities();
    let mut rows = Vec::new();
    for (nth, (&latent, top)) in measured.latents.iter().zip(top).enumerate() {
        let on_texts = measured.on_texts[nth].iter().map(|&(text, effect)| {
            let values = values[text].get(&latent).cloned().unwrap_or_default();
            OnText { text, effect, values }
        });
        rows.push(LatentRow {
            latent,
            measured: measured.measured[nth],
            ig: measured.ig[nth],
            gxa: measured.gxa[nth],
            density: densities[latent],
            rule: rule_of(&contrasts[&latent]).0,
            on_texts: on_texts.collect(),
            top,
            promoted: promoted(question, trained, latent)?,
        });
    }
    Ok(rows)
}

/// The texts on which latents are most active.
fn top_texts(
    question: &Question<'_>,
    values: &[Values],
    latents: &[usize],
    conversations: &[&[u32]],
) -> Result<Vec<Vec<TopText>>> {
    let of_latent = |&latent: &usize| {
        let mut best: Vec<(f32, usize)> = values
            .iter()
            .enumerate()
            .filter_map(|(text, values)| {
                let values = values.get(&latent)?;
                Some((values.iter().map(|&(_, value)| value).fold(0.0, f32::max), text))
            })
            .collect();
        best.sort_by(|a, b| b.0.total_cmp(&a.0));
        best.truncate(N_TOP_TEXTS);
        let text = |(_, text): (f32, usize)| {
            let ids = conversations[text];
            let mut of_tokens = vec![0.0; ids.len()];
            values[text][&latent].iter().for_each(|&(at, value)| of_tokens[at] = value);
            Ok(TopText { tokens: tokens(question.tokenizer, ids)?, values: of_tokens })
        };
        best.into_iter().map(text).collect::<Result<Vec<TopText>>>()
    };
    latents.iter().map(of_latent).collect()
}

/// Where each latent is active on each text.
pub(super) fn values(
    body: &LanguageModel,
    trained: &TrainedSae,
    conversations: &[&[u32]],
) -> Result<Vec<Values>> {
    let read = super::model::read(body, conversations, &[trained.point()], "reading")?;
    let (d_in, device) = (trained.sae.config().d_in, body.device());
    let x = &read.activations[0];
    let x = TensorData::new(x.clone(), [x.len() / d_in, d_in]);
    let latents = trained.sae.encode(Tensor::from_data(x, device));
    // Texts were read in order of length, each without its first token.
    let mut order: Vec<usize> = (0..conversations.len()).collect();
    order.sort_by_key(|&text| conversations[text].len());
    let places: Vec<(usize, usize)> = order
        .iter()
        .flat_map(|&text| (1..conversations[text].len()).map(move |position| (text, position)))
        .collect();
    let mut values = vec![Values::new(); conversations.len()];
    for entry in latents.entries() {
        let (text, position) = places[entry.row];
        values[text].entry(entry.latent_idx).or_default().push((position, entry.value));
    }
    Ok(values)
}

/// Tokens as text.
pub(super) fn tokens(tokenizer: &Tokenizer, ids: &[u32]) -> Result<Vec<String>> {
    ids.iter().map(|&id| Ok(tokenizer.decode(&[id])?)).collect()
}

/// Tokens whose logits one unit of a latent raises most.
fn promoted(question: &Question<'_>, trained: &TrainedSae, latent: usize) -> Result<Vec<String>> {
    let body = question.model.body();
    let d_in = trained.sae.config().d_in;
    let direction = trained.sae.directions().narrow(0, latent, 1).reshape([1, 1, d_in]);
    let positions = Positions::new(0, 0, 1, vec![0]);
    let logits: Vec<f32> =
        body.unembed(direction, &positions, &mut ()).into_data().iter().collect();
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
    tokens(question.tokenizer, &order[..N_PROMOTED.min(order.len())])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_found_by_contrast() {
        let contrast = |rule: Rule, contrast: f64| {
            Rule::ALL.into_iter().map(|r| (r, if r == rule { contrast } else { 0.1 })).collect()
        };
        let contrasts = BTreeMap::from([
            (1, contrast(Rule::Thanks, 2.0)),
            (2, contrast(Rule::Curse, -3.0)),
            // The wrong way round.
            (3, contrast(Rule::Url, 1.5)),
            (4, contrast(Rule::Weather, 1.0)),
            (5, contrast(Rule::Apology, 0.5)),
        ]);
        let (places, decoy_above) = recovered(&contrasts);
        let place = |rule| places.iter().find(|(r, _)| *r == rule).unwrap().1;
        assert_eq!((place(Rule::Curse), place(Rule::Thanks)), (Some(0), Some(1)));
        assert_eq!((place(Rule::Url), place(Rule::Apology)), (None, Some(4)));
        assert!(decoy_above);
    }
}
