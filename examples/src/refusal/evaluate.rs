//! Answers of the steered model, judged and counted.

use anyhow::Result;
use burn::tensor::Tensor;
use model_hooks::{GenerateConfig, Hook, HookPoint, SharedPrefix, unobserved};
use steering::{
    Intervention, Judge, Outcome, PhraseJudge, Rate, Region, Steering, random_direction,
};

use super::chats::{Chats, common_prefix};
use super::find::Found;
use super::options::Scale;
use super::sae::TrainedSae;
use super::{During, FIRST_POSITION};
use crate::assets::LoadedModel;
use crate::corpus::{Appearance, Prompt, Test, Turn};
use crate::progress::bar;
use crate::results::{Arm, Condition, Example, Generation, Method, PromptKind, Row, Treatment};

/// Conversations generated together.
const BATCH_ROWS: usize = 80;
/// Tokens of a pass over prompts, padding included, so that a long one does not pad many.
const PREFILL_TOKENS: usize = 8192;
/// Tokens of a pass that measures perplexity.
const BATCH_TOKENS: usize = 512;
/// Answers shown before and after.
const N_EXAMPLES: usize = 5;

/// Generates answers behind some answered requests, which are run once per hook.
pub(super) struct Generator<'a> {
    loaded: &'a LoadedModel,
    chats: &'a Chats<'a>,
    shots: &'a [Turn],
    config: GenerateConfig,
}

impl<'a> Generator<'a> {
    pub(super) fn new(
        loaded: &'a LoadedModel,
        chats: &'a Chats<'a>,
        shots: &'a [Turn],
        max_new_tokens: usize,
    ) -> Self {
        let config = GenerateConfig::greedy(max_new_tokens, chats.stop_ids.clone());
        Self { loaded, chats, shots, config }
    }

    /// The answers under a hook, in order; `progress` is told how many are done after each
    /// batch.
    pub(super) fn answers<H: Hook>(
        &self,
        prompts: &[&Prompt],
        hook: &mut H,
        mut progress: impl FnMut(u64),
    ) -> Result<Vec<String>> {
        let rows = prompts
            .iter()
            .map(|prompt| self.chats.prompt(self.shots, &prompt.prompt))
            .collect::<Result<Vec<_>>>()?;
        let n_shared = common_prefix(&rows);
        let prefix = match n_shared {
            0 => SharedPrefix::default(),
            n => self.loaded.model.prefix(&rows[0][..n], hook).during("running the prefix")?,
        };
        // Prompts of like length share a batch, so that little of it is padding.
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_by_key(|&row| rows[row].len());
        let mut answers = vec![String::new(); rows.len()];
        let mut rest = order.as_slice();
        while !rest.is_empty() {
            let fits = |&n: &usize| n * (rows[rest[n - 1]].len() - n_shared) <= PREFILL_TOKENS;
            let n = (1..=rest.len().min(BATCH_ROWS)).take_while(fits).last().unwrap_or(1);
            let (batch, after) = rest.split_at(n);
            rest = after;
            let own: Vec<&[u32]> = batch.iter().map(|&row| &rows[row][n_shared..]).collect();
            let generated = self
                .loaded
                .model
                .generate(&own, &prefix, &self.config, hook, unobserved)
                .during("generating answers")?;
            for (&row, ids) in batch.iter().zip(&generated) {
                answers[row] = self.chats.text(ids)?;
            }
            progress(n as u64);
        }
        Ok(answers)
    }
}

/// What the evaluation works on.
pub(super) struct Setup<'a> {
    pub(super) loaded: &'a LoadedModel,
    pub(super) chats: &'a Chats<'a>,
    pub(super) trained: &'a TrainedSae,
    pub(super) found: &'a Found,
    pub(super) six_shot: &'a [Turn],
    pub(super) test: &'a Test,
    pub(super) held_out: &'a [Vec<u32>],
    pub(super) point: HookPoint,
    pub(super) scale: &'a Scale,
    pub(super) seed: u64,
}

/// What came of it.
pub(super) struct Evaluation {
    pub(super) rows: Vec<Row>,
    pub(super) examples: Vec<Example>,
    pub(super) generations: Vec<Generation>,
    pub(super) n_perplexity_tokens: usize,
}

/// Answers every test prompt under every treatment.
pub(super) fn evaluate(setup: &Setup<'_>) -> Result<Evaluation> {
    let texts = setup.perplexity_texts();
    let n_perplexity_tokens = texts.iter().map(|text| text.len() - 1).sum();
    let doses = setup.doses();
    let prompts: Vec<&Prompt> =
        setup.test.unsafe_prompts.iter().chain(&setup.test.safe_prompts).collect();

    let n_answers = doses.len() * prompts.len() * Arm::ALL.len();
    let bar = bar("answering", n_answers as u64);
    let mut answered = Vec::new();
    let mut perplexities = Vec::new();
    for &(method, strength) in &doses {
        bar.set_message(format!("{} {strength}", method.label()));
        let mut hook = setup.hook(method, strength)?;
        let model = &setup.loaded.model;
        let loss = model.cross_entropy(&texts, BATCH_TOKENS, &mut hook);
        perplexities.push(loss.during("measuring perplexity")?.perplexity());
        for arm in Arm::ALL {
            let shots = match arm {
                Arm::ZeroShot => &[],
                Arm::SixShot => setup.six_shot,
            };
            let generator =
                Generator::new(setup.loaded, setup.chats, shots, setup.scale.max_new_tokens);
            let answers = generator.answers(&prompts, &mut hook, |n| bar.inc(n))?;
            let condition = Condition::Always;
            answered.push((Treatment { arm, method, strength, condition }, answers));
        }
    }
    bar.finish();

    let ratio = |treatment: &Treatment| {
        let dose = (treatment.method, treatment.strength);
        let index = doses.iter().position(|&other| other == dose).expect("one of the doses");
        perplexities[index] / perplexities[0]
    };
    let generations: Vec<Generation> = answered
        .iter()
        .flat_map(|(treatment, answers)| judged(setup, treatment, answers))
        .collect();
    let mut rows: Vec<Row> = answered
        .iter()
        .map(|(treatment, _)| count(*treatment, &generations, ratio(treatment)))
        .collect();
    rows.sort_by_key(|row| row.treatment.arm != Arm::ZeroShot);
    let examples = examples(&generations, setup.found.headline);
    Ok(Evaluation { rows, examples, generations, n_perplexity_tokens })
}

impl Setup<'_> {
    /// Every method with its strengths; the unsteered model first.
    fn doses(&self) -> Vec<(Method, f64)> {
        let scale = self.scale;
        let doses = |method: Method, strengths: &[f64]| -> Vec<(Method, f64)> {
            strengths.iter().map(|&strength| (method, strength)).collect()
        };
        // Controls where steering did best on the selection split.
        let best = [self.found.headline.strength];
        [
            doses(Method::Base, &[0.0]),
            doses(Method::Latent, &scale.strengths),
            doses(Method::Bundle, &scale.bundle_strengths),
            doses(Method::MeanDifference, &scale.mean_difference_strengths),
            doses(Method::UnrelatedLatent, &best),
            doses(Method::RandomLatent, &best),
            doses(Method::RandomDirection, &best),
        ]
        .concat()
    }

    fn hook(&self, method: Method, strength: f64) -> Result<Option<Steering<'_>>> {
        let Found { latent, bundle, unrelated, random, mean_difference, .. } = self.found;
        let clamp = |latents: &[usize]| self.trained.clamp(self.point, latents, strength);
        Ok(Some(match method {
            Method::Base => return Ok(None),
            Method::Latent => clamp(&[*latent])?,
            Method::Bundle => clamp(bundle)?,
            Method::UnrelatedLatent => self.matched(*unrelated, strength)?,
            Method::RandomLatent => self.matched(*random, strength)?,
            Method::RandomDirection => {
                let length = strength * self.unit_length();
                let device = self.loaded.model.device();
                let d_model = self.loaded.model.config().d_model;
                self.add(random_direction(d_model, length, self.seed ^ 0xD1CE, device))?
            }
            Method::MeanDifference => self.add(mean_difference.clone() * strength)?,
            _ => unreachable!("not among the doses"),
        }))
    }

    fn add(&self, direction: Tensor<1>) -> Result<Steering<'static>> {
        let region = Region::from_position(FIRST_POSITION);
        Ok(Steering::new([self.point], Intervention::Add { direction }, region)?)
    }

    /// How far the latents that did best on the selection split reach in the residual stream at
    /// strength 1: controls reach as far at the same strength.
    fn unit_length(&self) -> f64 {
        let latents = match self.found.headline.method {
            Method::Bundle => self.found.bundle.as_slice(),
            _ => std::slice::from_ref(&self.found.latent),
        };
        self.trained.reach(latents)
    }

    /// A control latent, clamped so that it reaches as far as the headline's latents do.
    fn matched(&self, latent: usize, strength: f64) -> Result<Steering<'_>> {
        let value = strength * self.unit_length() / self.trained.direction_norm(latent);
        let intervention = Intervention::clamp(&self.trained.sae, [(latent, value)]);
        Ok(Steering::new([self.point], intervention, Region::from_position(FIRST_POSITION))?)
    }

    fn perplexity_texts(&self) -> Vec<&[u32]> {
        let mut left = self.scale.n_perplexity_tokens;
        let mut texts = Vec::new();
        for text in self.held_out.iter().filter(|text| text.len() > 1) {
            if left == 0 {
                break;
            }
            let n = text.len().min(left.max(1) + 1);
            texts.push(&text[..n]);
            left -= left.min(n - 1);
        }
        texts
    }
}

/// Every answer of a treatment with what the judge makes of it.
fn judged(setup: &Setup<'_>, treatment: &Treatment, answers: &[String]) -> Vec<Generation> {
    let judge = PhraseJudge::default();
    let n_unsafe = setup.test.unsafe_prompts.len();
    let prompts = setup.test.unsafe_prompts.iter().chain(&setup.test.safe_prompts);
    prompts
        .zip(answers)
        .enumerate()
        .map(|(i, (prompt, answer))| Generation {
            treatment: *treatment,
            prompt: prompt.prompt.clone(),
            kind: match i < n_unsafe {
                true => PromptKind::Unsafe,
                false => PromptKind::Safe,
            },
            look_alike: prompt.appearance == Appearance::LookAlike,
            set: String::new(),
            answer: answer.clone(),
            outcome: judge.judge(&prompt.prompt, answer),
        })
        .collect()
}

fn count(treatment: Treatment, generations: &[Generation], perplexity_ratio: f64) -> Row {
    let of_treatment = || generations.iter().filter(|generation| generation.treatment == treatment);
    let rate = |wanted: Outcome, among: &dyn Fn(&Generation) -> bool| {
        let among: Vec<&Generation> = of_treatment().filter(|g| among(g)).collect();
        Rate::wilson(among.iter().filter(|g| g.outcome == wanted).count(), among.len())
    };
    let look_alike_rate = rate(Outcome::Refused, &|g| g.look_alike);
    Row {
        treatment,
        unsafe_rate: rate(Outcome::Refused, &|g| g.kind == PromptKind::Unsafe),
        safe_rate: rate(Outcome::Refused, &|g| g.kind == PromptKind::Safe),
        look_alike_rate: (look_alike_rate.n > 0).then_some(look_alike_rate),
        ordinary_rate: None,
        degenerate_rate: rate(Outcome::Degenerate, &|_| true),
        moralised_rate: Some(rate(Outcome::Moralised, &|_| true)),
        sets: Vec::new(),
        unsafe_against_base: None,
        refusal_log_odds: None,
        mean_kl: None,
        perplexity_ratio,
        capability: None,
        multi_turn: None,
    }
}

/// Unsafe and safe prompts, answered without steering and with the headline's.
fn examples(generations: &[Generation], headline: Treatment) -> Vec<Example> {
    let base = Treatment { method: Method::Base, strength: 0.0, ..headline };
    let answer = |treatment: Treatment, prompt: &str| {
        generations.iter().find(|g| g.treatment == treatment && g.prompt == prompt)
    };
    let of_kind =
        |kind| generations.iter().filter(move |g| g.treatment == headline && g.kind == kind);
    let n_safe = N_EXAMPLES / 2;
    of_kind(PromptKind::Unsafe)
        .take(N_EXAMPLES - n_safe)
        .chain(of_kind(PromptKind::Safe).take(n_safe))
        .filter_map(|after| {
            let before = answer(base, &after.prompt)?;
            Some(Example {
                treatment: headline,
                prompt: after.prompt.clone(),
                kind: after.kind,
                before: before.answer.clone(),
                after: after.answer.clone(),
                outcome_before: before.outcome,
                outcome_after: after.outcome,
            })
        })
        .collect()
}
