//! From answers to latents: which ones are behind refusing, and which are not.

use std::ops::ControlFlow;

use anyhow::{Context, Result, ensure};
use burn::tensor::{Tensor, TensorData};
use model_hooks::{HarvestConfig, Harvested, HookPoint, Place, SharedPrefix};
use rand::SeedableRng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use sae_core::Sae;
use steering::{
    Contrast, Judge, LatentStatistics, Outcome, contrast, difference_of_means, greedy_bundle,
    output_score,
};

use super::chats::{Chats, asked};
use super::first_words::FirstWords;
use super::generator::Generator;
use super::ladder::judged;
use super::options::Scale;
use super::plans::Planner;
use super::sae::TrainedSae;
use super::{During, FIRST_POSITION, targeted};
use crate::assets::LoadedModel;
use crate::corpus::{Prompt, Selection, Turn};
use crate::pool::side_by_side;
use crate::progress::bar;
use crate::results::{Arm, Candidate, Condition, Method, SteeringLatent, Treatment};

/// Tokens of refusing answers on which a candidate must be active.
const MIN_ACTIVE: usize = 2;
/// The fixed clamp at which candidates are compared: multiples of their largest activation.
const TRIAL_STRENGTH: f64 = 2.0;
/// The same for the latents of a bundle, which add up.
const BUNDLE_TRIAL_STRENGTH: f64 = 0.5;
/// A bundle grows by latents that add at least this much to the log-odds.
const LEAST_GAIN: f64 = 0.25;
/// Tokens per forward pass.
const BATCH_TOKENS: usize = 1024;

/// The latents to steer with, and those to compare with.
pub(super) struct Found {
    /// The latent that steers alone.
    pub(super) latent: usize,
    /// Latents that steer together; the first is not always `latent`.
    pub(super) bundle: Vec<usize>,
    /// Fires about as often as the chosen latent, but never on refusing answers.
    pub(super) unrelated: usize,
    /// Drawn from all that fire at all.
    pub(super) random: usize,
    /// Mean activation on the tokens of refusing answers − on those of complying ones.
    pub(super) mean_difference: Tensor<1>,
    /// Where and along what to push to move the chosen latent and little else, of norm 1.
    pub(super) targeted: (HookPoint, Tensor<1>),
    /// The strength at which the latent alone did best on the selection split.
    pub(super) latent_strength: f64,
    /// The same of the bundle.
    pub(super) bundle_strength: f64,
    /// First tokens of refusals.
    pub(super) refusal_tokens: Vec<u32>,
    /// All candidates, by their effect on the log-odds.
    pub(super) candidates: Vec<Candidate>,
    /// What did best on the selection split.
    pub(super) headline: Treatment,
    /// Prompts that the choices were made on.
    pub(super) n_selection_prompts: usize,
    refused_share: f64,
}

impl Found {
    pub(super) fn summary(&self, trained: &TrainedSae) -> String {
        format!(
            "latent {} (largest activation {:.1}); bundle {:?}; on the selection split {} at {} \
             made {:.0} % of the unsafe prompts refused; controls: unrelated latent {}, random \
             latent {}",
            self.latent,
            trained.max_activation(self.latent),
            self.bundle,
            self.headline.method.label(),
            self.headline.strength,
            100.0 * self.refused_share,
            self.unrelated,
            self.random,
        )
    }

    pub(super) fn steering_latents(
        &self,
        trained: &TrainedSae,
        chats: &Chats<'_>,
    ) -> Vec<SteeringLatent> {
        let others = self.bundle.iter().copied().filter(|&latent| latent != self.latent);
        std::iter::once(self.latent)
            .chain(others)
            .map(|latent| SteeringLatent {
                latent,
                max_activation: trained.max_activation(latent),
                top_tokens: trained.top_tokens(latent).iter().map(|&id| chats.token(id)).collect(),
            })
            .collect()
    }
}

/// Finds the latents behind refusing on the selection split.
pub(super) fn find(
    generator: &Generator<'_>,
    planner: &Planner<'_>,
    judge: &dyn Judge,
    selection: &Selection,
    scale: &Scale,
    seed: u64,
) -> Result<Found> {
    let (loaded, chats) = (generator.loaded, generator.chats);
    let Planner { trained, point, .. } = *planner;
    let search = Search { loaded, chats, generator, planner, judge, trained, point, scale };
    let refusing = search.answers(&selection.refusals)?;
    let complying = search.answers(&selection.compliances)?;
    let contrasts = contrast(&refusing.answers, &complying.answers, MIN_ACTIVE);
    ensure!(
        !contrasts.is_empty(),
        "no latent is active on {MIN_ACTIVE} tokens of the refusing answers: the autoencoder has \
         seen too little; train it on more"
    );
    let unsafe_prompts = first(&selection.unsafe_prompts, scale.n_selection_prompts);
    let refusal_tokens = search.refusal_tokens(selection)?;
    let rows = unsafe_prompts
        .iter()
        .map(|prompt| chats.prompt(&[], &prompt.prompt))
        .collect::<Result<Vec<_>>>()?;
    let at = (&trained.sae, point);
    let first_words = FirstWords::new(&loaded.model, at, &rows, &refusal_tokens)?;
    let slopes = first_words.slopes()?;
    let candidates = search.candidates(&contrasts, &first_words, &slopes)?;
    let chosen = search.choose(&candidates, &first_words, unsafe_prompts)?;

    let (unrelated, random) = search.controls(&refusing.conversations, &chosen, seed)?;
    let alive: Vec<usize> =
        (0..trained.sae.config().d_sae).filter(|&latent| trained.density(latent) > 0.0).collect();
    let targeted = targeted::direction(
        loaded,
        &trained.sae,
        point,
        &rows,
        &targeted::Wanted {
            latent: chosen.latent,
            others: &alive,
            n_vectors: scale.n_trial_vectors,
            length: chosen.headline.strength * trained.reach(&[chosen.latent]),
            seed,
        },
    )?;
    Ok(Found {
        latent: chosen.latent,
        bundle: chosen.bundle,
        unrelated,
        random,
        mean_difference: difference_of_means(refusing.activations, complying.activations),
        targeted,
        latent_strength: chosen.latent_strength,
        bundle_strength: chosen.bundle_strength,
        refusal_tokens,
        candidates,
        headline: chosen.headline,
        n_selection_prompts: unsafe_prompts.len(),
        refused_share: chosen.refused_share,
    })
}

fn first(prompts: &[Prompt], n: usize) -> &[Prompt] {
    &prompts[..n.min(prompts.len())]
}

struct Search<'a> {
    loaded: &'a LoadedModel,
    chats: &'a Chats<'a>,
    generator: &'a Generator<'a>,
    planner: &'a Planner<'a>,
    judge: &'a dyn Judge,
    trained: &'a TrainedSae,
    point: HookPoint,
    scale: &'a Scale,
}

/// What the latents do on a set of conversations.
struct Answers {
    /// On the tokens of the answers.
    answers: LatentStatistics,
    /// On all tokens but the first of each conversation.
    conversations: LatentStatistics,
    /// Activations of the answers' tokens, `[n_tokens, d_model]`.
    activations: Tensor<2>,
}

/// Latents clamped at a strength, and what came of it on the selection prompts.
struct Attempt {
    latents: Vec<usize>,
    strength: f64,
    /// Share of the prompts refused.
    refused: f64,
    /// The same less the share of degenerate answers.
    score: f64,
}

struct Chosen {
    latent: usize,
    bundle: Vec<usize>,
    latent_strength: f64,
    bundle_strength: f64,
    headline: Treatment,
    refused_share: f64,
}

impl Search<'_> {
    fn sae(&self) -> &Sae {
        &self.trained.sae
    }

    fn answers(&self, turns: &[Turn]) -> Result<Answers> {
        let answered =
            turns.iter().map(|turn| self.chats.answered(turn)).collect::<Result<Vec<_>>>()?;
        let ids: Vec<&[u32]> = answered.iter().map(|answered| answered.ids.as_slice()).collect();
        let mut config = HarvestConfig::new(self.point, BATCH_TOKENS);
        config.skip_positions = FIRST_POSITION;
        let (mut answers, mut conversations) = <(LatentStatistics, LatentStatistics)>::default();
        let mut kept = Vec::new();
        let sink = |harvested: Harvested| {
            let Harvested { activations, places } = harvested;
            let [activations]: [Tensor<2>; 1] =
                activations.try_into().expect("one point was asked for");
            let in_answer = |place: &Place| place.position >= answered[place.text].answer_start;
            let rows = (0..).zip(&places).filter(|(_, place)| in_answer(place));
            let rows: Vec<i64> = rows.map(|(row, _)| row).collect();
            let rows = TensorData::new(rows.clone(), [rows.len()]);
            let rows = Tensor::from_data(rows, &activations.device());
            conversations.add(&self.sae().encode(activations.clone()));
            let activations = activations.select(0, rows);
            answers.add(&self.sae().encode(activations.clone()));
            kept.push(activations);
            ControlFlow::Continue(())
        };
        self.loaded
            .model
            .harvest(&ids, &SharedPrefix::default(), &config, sink)
            .during("reading the selection answers")?;
        Ok(Answers { answers, conversations, activations: Tensor::cat(kept, 0) })
    }

    /// First tokens that are commoner in refusing than in complying answers.
    fn refusal_tokens(&self, selection: &Selection) -> Result<Vec<u32>> {
        let first_tokens = |turns: &[Turn]| {
            let first = |turn: &Turn| {
                let answered = self.chats.answered(turn)?;
                Ok(answered.ids[answered.answer_start])
            };
            turns.iter().map(first).collect::<Result<Vec<u32>>>()
        };
        let refusing = first_tokens(&selection.refusals)?;
        let complying = first_tokens(&selection.compliances)?;
        let count = |ids: &[u32], id| ids.iter().filter(|&&other| other == id).count();
        let mut tokens: Vec<u32> = refusing
            .iter()
            .copied()
            .filter(|&id| count(&refusing, id) > count(&complying, id))
            .collect();
        tokens.sort_unstable();
        tokens.dedup();
        ensure!(!tokens.is_empty(), "refusing answers begin like complying ones");
        Ok(tokens)
    }

    /// Ranks latents by contrast and by slope, then measures what clamping the best does to the
    /// log-odds that an answer begins like a refusal.
    fn candidates(
        &self,
        contrasts: &[Contrast],
        first_words: &FirstWords<'_>,
        slopes: &[f32],
    ) -> Result<Vec<Candidate>> {
        // Half by contrast, half by what the gradient promises of a clamp to the same multiple.
        let promise =
            |c: &Contrast| f64::from(slopes[c.latent]) * self.trained.max_activation(c.latent);
        let mut by_promise: Vec<&Contrast> =
            contrasts.iter().filter(|c| c.difference > 0.0).collect();
        by_promise.sort_by(|a, b| promise(b).total_cmp(&promise(a)));
        let half = self.scale.n_candidates / 2;
        let mut picked: Vec<&Contrast> = contrasts.iter().take(half).collect();
        for contrast in by_promise {
            if picked.len() >= self.scale.n_candidates {
                break;
            }
            if !picked.iter().any(|other| other.latent == contrast.latent) {
                picked.push(contrast);
            }
        }

        let bar = bar("clamping candidates", picked.len() as u64);
        let plain = first_words.rows(&[])?;
        let base = first_words.mean_log_odds(&plain);
        let mut candidates = side_by_side(&picked, |contrast| {
            let value = TRIAL_STRENGTH * self.trained.max_activation(contrast.latent);
            let clamped = first_words.rows(&[(contrast.latent, value)])?;
            let written = first_words.written(contrast.latent)?;
            let scores = plain.iter().zip(&clamped);
            let scores = scores.map(|(before, after)| output_score(before, after, &written));
            bar.inc(1);
            anyhow::Ok(Candidate {
                latent: contrast.latent,
                contrast: contrast.difference,
                log_odds_shift: first_words.mean_log_odds(&clamped) - base,
                attribution: value * f64::from(slopes[contrast.latent]),
                output_score: scores.sum::<f64>() / plain.len() as f64,
            })
        })?;
        bar.finish();
        candidates.sort_by(|a, b| b.log_odds_shift.total_cmp(&a.log_odds_shift));
        Ok(candidates)
    }

    /// Tries the finalists by the answers that they make, then a bundle that grows from them as long
    /// as it gains in log-odds.
    fn choose(
        &self,
        candidates: &[Candidate],
        first_words: &FirstWords<'_>,
        prompts: &[Prompt],
    ) -> Result<Chosen> {
        let Scale { n_finalists, strengths, bundle_strengths, .. } = self.scale;
        let finalists = &candidates[..candidates.len().min(*n_finalists)];
        let n_trials = finalists.len() * strengths.len() + bundle_strengths.len();
        let bar = bar("trying finalists", n_trials as u64);
        let attempt = |latents: &[usize], strengths: &[f64]| -> Result<Attempt> {
            let tried = self.attempts(latents, strengths, prompts)?;
            bar.inc(strengths.len() as u64);
            // Of equals, the gentler.
            let better = |best: Attempt, tried: Attempt| match tried.score > best.score {
                true => tried,
                false => best,
            };
            let best = tried.into_iter().reduce(better);
            best.context("no strength was tried: pass at least one with --strengths")
        };
        let mut alone = finalists
            .iter()
            .map(|candidate| attempt(&[candidate.latent], strengths))
            .collect::<Result<Vec<_>>>()?;
        // Stable: of equals, the better candidate stays first.
        alone.sort_by(|a, b| b.score.total_cmp(&a.score));
        // The best by their answers, all of them or those that gain from each other: the log-odds
        // alone would take what begins like a refusal and does not end like one.
        let among: Vec<usize> =
            alone.iter().take(self.scale.bundle).flat_map(|tried| tried.latents.clone()).collect();
        let (grown, _) =
            greedy_bundle(&among, self.scale.bundle, LEAST_GAIN, |latents: &[usize]| {
                let value = |&latent: &usize| {
                    (latent, BUNDLE_TRIAL_STRENGTH * self.trained.max_activation(latent))
                };
                let clamps: Vec<(usize, f64)> = latents.iter().map(value).collect();
                Ok::<f64, anyhow::Error>(first_words.mean_log_odds(&first_words.rows(&clamps)?))
            })?;
        let mut bundle = among;
        let mut together = attempt(&bundle, bundle_strengths)?;
        if grown.len() > 1 && grown.len() < bundle.len() {
            let fewer = attempt(&grown, bundle_strengths)?;
            if fewer.score > together.score {
                (bundle, together) = (grown, fewer);
            }
        }
        bar.finish();

        let single = &alone[0];
        let (method, best) = match together.score > single.score {
            true => (Method::Bundle, &together),
            false => (Method::Latent, single),
        };
        Ok(Chosen {
            latent: single.latents[0],
            latent_strength: single.strength,
            bundle_strength: together.strength,
            headline: Treatment {
                arm: Arm::ZeroShot,
                method,
                strength: best.strength,
                condition: Condition::Always,
            },
            refused_share: best.refused,
            bundle,
        })
    }

    /// Answers to the selection prompts with some latents clamped, at each strength.
    fn attempts(
        &self,
        latents: &[usize],
        strengths: &[f64],
        prompts: &[Prompt],
    ) -> Result<Vec<Attempt>> {
        let conversations: Vec<_> =
            prompts.iter().map(|prompt| asked(&[], &prompt.prompt)).collect();
        let answers = side_by_side(strengths, |&strength| {
            let steered = self.generator.steered(Some(self.planner.clamp(latents, strength)))?;
            self.generator.answers(&conversations, &steered, self.scale.max_new_tokens, |_| ())
        })?;
        let judged = |(&strength, answers): (&f64, Vec<String>)| {
            let outcomes = prompts.iter().zip(&answers);
            let outcomes =
                outcomes.map(|(prompt, answer)| judged(self.judge, &prompt.prompt, answer));
            let outcomes = outcomes.collect::<Result<Vec<Outcome>>>()?;
            let share = |wanted: Outcome| {
                let n = outcomes.iter().filter(|&&outcome| outcome == wanted).count();
                n as f64 / prompts.len() as f64
            };
            let refused = share(Outcome::Refused);
            let score = refused - share(Outcome::Degenerate);
            Ok(Attempt { latents: latents.to_vec(), strength, refused, score })
        };
        strengths.iter().zip(answers).map(judged).collect()
    }

    /// A latent that never fires in refused conversations, and elsewhere as often as the chosen one
    /// or as near to that as there is; and one drawn from all that fire. Neither is chosen by what
    /// clamping it does.
    fn controls(
        &self,
        refusing: &LatentStatistics,
        chosen: &Chosen,
        seed: u64,
    ) -> Result<(usize, usize)> {
        let density = |latent: usize| self.trained.density(latent);
        let alive: Vec<usize> = (0..self.sae().config().d_sae)
            .filter(|latent| !chosen.bundle.contains(latent) && *latent != chosen.latent)
            .filter(|&latent| density(latent) > 0.0)
            .collect();
        let unlike = |&other: &usize| (density(other) / density(chosen.latent)).ln().abs();
        // Of a small autoencoder, all may fire there now and then: the least then.
        let least = alive.iter().map(|&latent| refusing.n_active(latent)).min().unwrap_or(0);
        let silent = alive.iter().copied().filter(|&latent| refusing.n_active(latent) == least);
        let unrelated = silent.min_by(|a, b| unlike(a).total_cmp(&unlike(b)));
        let random = alive.choose(&mut ChaCha8Rng::seed_from_u64(seed ^ 0x00C0_FFEE)).copied();
        unrelated
            .zip(random)
            .context("no latent is left for a control: the autoencoder is too small")
    }
}
