//! What the latents of one autoencoder do to rewards: estimated for all, measured for some.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use attribution::{
    AttributionConfig, Baseline, Cut, Integration, Reward, Rule, SaeSite, SiteEffects, Study,
    TokenEffect,
};
use model_hooks::text::Tokenizer;
use model_hooks::{HookPoint, RewardModel};
use rayon::prelude::*;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::model::{BATCH_TOKENS, texts};
use super::options::Scale;
use super::pairs::TokenPair;
use super::planted::PlantedPair;
use super::saes::TrainedSae;
use super::stages::{Fingerprint, Stages};

/// Gradients are taken half of the way that a tenth of the latents go at a time: ten passes as in the
/// source work, where all latents go together, and nearer to what ablating one does.
const N_GROUPS: usize = 10;
const N_STEPS: usize = 1;
/// Steps for all latents together.
const N_STEPS_TOGETHER: usize = 10;
/// Pairs that are kept together.
const PAIRS_OF_A_STAGE: usize = 5;

/// What is to be explained.
pub(super) struct Question<'a> {
    pub(super) model: &'a RewardModel,
    /// Whether its body can be asked for logits.
    pub(super) unembeds: bool,
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) pairs: &'a [TokenPair],
    /// The rules that they follow, if those are known.
    pub(super) planted: Option<&'a [PlantedPair]>,
    /// Rewards of the texts, the preferred one of each pair first.
    pub(super) rewards: &'a [f64],
    pub(super) scale: &'a Scale,
    pub(super) thresholds: Thresholds,
    /// Whether the last token, which the reward is read at, is changed as the words are.
    pub(super) with_last: bool,
    pub(super) seed: u64,
    pub(super) stages: &'a Stages,
    /// Of the preference model.
    pub(super) key: &'a Fingerprint,
}

/// From where on differences of rewards count.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Thresholds {
    /// In either direction, of a pair's texts, for the share that latents explain: a quarter of the
    /// standard deviation.
    pub(super) explained: f64,
    /// After a sentence was inserted: half of what a pair's texts differ by on average.
    pub(super) rise: f64,
}

impl Thresholds {
    /// By the differences of the pairs measured on.
    pub(super) fn new(differences: &[f64]) -> Self {
        let n = differences.len().max(1) as f64;
        let mean = differences.iter().sum::<f64>() / n;
        let square = differences.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
        let size = differences.iter().map(|x| x.abs()).sum::<f64>() / n;
        Self { explained: 0.25 * square.sqrt(), rise: 0.5 * size }
    }
}

/// Estimated effects on the rewards of one text.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct TextEffects {
    /// Of its latents, by integrated gradients.
    pub(super) ig: BTreeMap<usize, f64>,
    /// By gradient × activation.
    pub(super) gxa: BTreeMap<usize, f64>,
    /// By integrated gradients of all latents together, as in the source work; of verified texts.
    pub(super) together: BTreeMap<usize, f64>,
    /// By integrated gradients, of each latent at each token but the last: latent, position, effect.
    pub(super) on_words: Vec<(usize, usize, f64)>,
    /// Of the error of the autoencoder, by integrated gradients.
    pub(super) error: f64,
    /// What the effects by integrated gradients miss of what ablating each group of latents does,
    /// for both texts of a pair together.
    pub(super) residual: f64,
    /// What that does, added up.
    pub(super) all: f64,
}

impl Question<'_> {
    /// Texts, each changed from its own first position on, to its last word.
    pub(super) fn study<'m>(
        &self,
        metric: &'m Reward<'m>,
        texts: &[impl AsRef<[u32]>],
        firsts: impl IntoIterator<Item = usize>,
    ) -> Result<Study<'m, Reward<'m>>> {
        let left_alone = usize::from(!self.with_last);
        let ends = texts.iter().map(|ids| ids.as_ref().len() - left_alone);
        let study = Study::new(metric, texts)?
            .from_positions(firsts.into_iter().collect())
            .to_positions(ends.collect());
        Ok(study.with_batch_tokens(BATCH_TOKENS))
    }

    /// One pair, changed from where its texts part.
    pub(super) fn study_pair<'m>(
        &self,
        metric: &'m Reward<'m>,
        pair: &TokenPair,
        point: HookPoint,
    ) -> Result<Study<'m, Reward<'m>>> {
        let study = self.study(metric, &pair.texts(), [pair.divergence; 2])?;
        Ok(study.with_batch_tokens(2 * BATCH_TOKENS).share_prefix()?.start_at(point)?)
    }

    /// What `of_pair` gives for each pair, or gave before.
    pub(super) fn by_pair<T: Serialize + DeserializeOwned + Send>(
        &self,
        name: &str,
        trained: &TrainedSae,
        pairs: &[TokenPair],
        settings: serde_json::Value,
        of_pair: impl Fn(usize, &TokenPair) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        let bar = crate::progress::bar("pairs", pairs.len() as u64);
        let mut all = Vec::with_capacity(pairs.len());
        for (nth, stage) in pairs.chunks(PAIRS_OF_A_STAGE).enumerate() {
            let first = nth * PAIRS_OF_A_STAGE;
            let key = Fingerprint::new(&json!({
                "model": self.key, "sae": trained.key, "texts": Fingerprint::of_texts(&texts(stage)),
                "first": first, "with_last": self.with_last, "settings": settings,
            }));
            let name = format!("block{}-{name}", trained.layer);
            let found: Vec<T> = self.stages.value(&name, &key, || {
                // A pair keeps one core busy: its texts are short.
                let pairs = stage.par_iter().enumerate();
                pairs
                    .map(|(at, pair)| {
                        let found = of_pair(first + at, pair)?;
                        bar.inc(1);
                        Ok(found)
                    })
                    .collect()
            })?;
            bar.set_position((first + stage.len()) as u64);
            all.extend(found);
        }
        bar.finish();
        Ok(all)
    }

    /// Estimates for all texts, the preferred one of each pair first.
    pub(super) fn attribute(&self, trained: &TrainedSae) -> Result<Vec<TextEffects>> {
        let metric = Reward::new(self.model);
        let site = SaeSite::new(&trained.sae, trained.point());
        let n_verified = self.scale.n_verified_pairs;
        let settings = json!({
            "steps": [N_GROUPS, N_STEPS, N_STEPS_TOGETHER], "n_verified": n_verified,
        });
        let of_pair = |nth: usize, pair: &TokenPair| -> Result<[TextEffects; 2]> {
            let study = self.study_pair(&metric, pair, site.point)?;
            attributed(&study, &site, nth < n_verified).context("while attributing rewards")
        };
        let pairs = self.by_pair("attributed", trained, self.pairs, settings, of_pair)?;
        Ok(pairs.into_iter().flatten().collect())
    }

    /// Ablates latents on the texts of the first pairs, each on those texts that it is active on.
    /// Gives the effect of each, by text.
    pub(super) fn measure(
        &self,
        trained: &TrainedSae,
        latents: &[usize],
        effects: &[TextEffects],
    ) -> Result<Vec<BTreeMap<usize, f64>>> {
        let metric = Reward::new(self.model);
        let site = SaeSite::new(&trained.sae, trained.point());
        let n_pairs = self.scale.n_verified_pairs.min(self.pairs.len());
        let settings = json!({"latents": latents});
        let of_pair = |nth: usize, pair: &TokenPair| -> Result<[BTreeMap<usize, f64>; 2]> {
            let study = self.study_pair(&metric, pair, site.point)?;
            let active = |text: usize| {
                let ig = &effects[2 * nth + text].ig;
                latents.iter().filter(|latent| ig.contains_key(latent)).map(move |&l| (text, l))
            };
            let cells: Vec<(usize, usize)> = (0..2).flat_map(active).collect();
            let cuts: Vec<Cut> = cells.iter().map(|&(text, l)| Cut::latent(text, l)).collect();
            let measured = study.measure_cuts(&site, Baseline::Zero, &cuts);
            let measured = measured.context("while ablating latents")?;
            let mut by_text = [BTreeMap::new(), BTreeMap::new()];
            for ((text, latent), effect) in cells.into_iter().zip(measured) {
                by_text[text].insert(latent, effect.change());
            }
            Ok(by_text)
        };
        let pairs = &self.pairs[..n_pairs];
        let found = self.by_pair("verified", trained, pairs, settings, of_pair)?;
        Ok(found.into_iter().flatten().collect())
    }
}

/// How gradients are integrated.
pub(super) fn integrated() -> AttributionConfig {
    let integration = Integration::new(Rule::Midpoint, N_STEPS);
    AttributionConfig { n_groups: N_GROUPS, ..AttributionConfig::integrated(integration) }
}

/// Estimates for the two texts of a pair, verified or not.
fn attributed(
    study: &Study<'_, Reward<'_>>,
    site: &SaeSite<'_>,
    is_verified: bool,
) -> Result<[TextEffects; 2]> {
    let of = |config| -> Result<SiteEffects> {
        let mut effects = study.attribute(&[*site], Baseline::Zero, config)?;
        Ok(effects.swap_remove(0))
    };
    let changes = |effects: &SiteEffects| {
        effects.by_conversation().into_iter().map(|of_text| -> BTreeMap<usize, f64> {
            of_text.into_iter().map(|(latent, effect)| (latent, effect.change())).collect()
        })
    };
    let integrated = of(integrated())?;
    let plain = of(AttributionConfig::GRADIENT_TIMES_ACTIVATION)?;
    let mut together = [BTreeMap::new(), BTreeMap::new()];
    if is_verified {
        let integration = Integration::new(Rule::Left, N_STEPS_TOGETHER);
        let found = of(AttributionConfig::integrated(integration))?;
        together.iter_mut().zip(changes(&found)).for_each(|(of_text, found)| *of_text = found);
    }
    let complete = integrated.completeness.context("gradients were integrated")?;
    let errors = integrated.error_by_conversation();
    let mut on_words = [Vec::new(), Vec::new()];
    for token in integrated.tokens() {
        if token.position + 1 < study.conversations()[token.conversation].len() {
            let TokenEffect { latent_idx, position, effect, .. } = token;
            on_words[token.conversation].push((latent_idx, position, effect.change()));
        }
    }
    let mut texts = changes(&integrated)
        .zip(changes(&plain))
        .zip(together.into_iter().zip(on_words))
        .zip(errors)
        .map(|(((ig, gxa), (together, on_words)), error)| TextEffects {
            ig,
            gxa,
            together,
            on_words,
            error: error.change(),
            residual: complete.residual(),
            all: complete.measured.change(),
        });
    Ok([(); 2].map(|()| texts.next().expect("two texts")))
}

/// The mean effect of every latent over some texts: zero where it is not active.
pub(super) fn means<'a>(
    by_text: impl ExactSizeIterator<Item = &'a BTreeMap<usize, f64>>,
) -> BTreeMap<usize, f64> {
    let n = by_text.len().max(1) as f64;
    let mut sums = BTreeMap::<usize, f64>::new();
    for (&latent, effect) in by_text.flatten() {
        *sums.entry(latent).or_default() += effect;
    }
    sums.values_mut().for_each(|sum| *sum /= n);
    sums
}

/// The latents with the largest effects: so many that raise the reward most, then so many that
/// lower it most, the strongest ones first and last.
pub(super) fn extremes(means: &BTreeMap<usize, f64>, n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = means.keys().copied().collect();
    order.sort_by(|a, b| means[a].total_cmp(&means[b]));
    match order.len() {
        len if len <= 2 * n => order,
        len => [&order[..n], &order[len - n..]].concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_by_hand() {
        let expected = Thresholds { explained: 0.5, rise: 1.0 };
        assert_eq!(Thresholds::new(&[3.0, -1.0, 3.0, -1.0]), expected);
    }

    #[test]
    fn means_count_texts_that_a_latent_is_not_active_on() {
        let texts = [BTreeMap::from([(3, -2.0), (5, 1.0)]), BTreeMap::from([(3, -1.0)])];
        assert_eq!(means(texts.iter()), BTreeMap::from([(3, -1.5), (5, 0.5)]));
    }

    #[test]
    fn extremes_are_of_both_signs() {
        let means = BTreeMap::from([(1, 0.5), (2, -3.0), (4, 2.0), (6, -1.0), (9, 0.0)]);
        assert_eq!(extremes(&means, 2), [2, 6, 1, 4]);
        assert_eq!(extremes(&means, 3), [2, 6, 9, 1, 4]);
    }
}
