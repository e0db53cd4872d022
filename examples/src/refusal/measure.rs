//! What steering does besides refusing: measured item by item, so that what a condition does can
//! be put together from the steered items and the plain ones.

use anyhow::{Context, Result};
use model_hooks::{CrossEntropy, TokenBatch, batches_in_order};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::json;
use steering::{McNemar, Rate, Request, TokenQuestion, choice_scores, kl_divergence, log_odds};

use super::During;
use super::chats::{Dialogued, asked};
use super::gate::Gate;
use super::generator::{Generator, Steered};
use super::journal::key;
use crate::pool::side_by_side;
use crate::results::{Arithmetic, Capability, MultipleChoice};
use crate::sets::arithmetic::{Asking, Problem, Solution, correct, solve};
use crate::sets::questions::Question;

/// Tokens of a forward pass with all its logits.
const BATCH_TOKENS: usize = 512;
/// Tokens of a forward pass over questions, of which only the last ones have logits.
const QUESTION_TOKENS: usize = 2048;
/// Questions that a core takes at a time.
const SOME_QUESTIONS: usize = 20;
/// How often texts are drawn anew for an interval.
const N_RESAMPLED: usize = 1000;

/// Questions of one set.
pub(super) struct Questions {
    pub(super) set: String,
    pub(super) questions: Vec<Question>,
}

/// What a model is asked to do besides.
pub(super) struct Tasks {
    pub(super) questions: Vec<Questions>,
    pub(super) problems: Vec<Problem>,
    pub(super) problem_set: String,
    pub(super) problem_tokens: usize,
}

/// What is measured on.
pub(super) struct Measures<'a> {
    pub(super) generator: &'a Generator<'a>,
    pub(super) texts: Vec<Dialogued>,
    /// Prompts to be refused.
    pub(super) harmful: Vec<Request>,
    /// Prompts to be answered.
    pub(super) harmless: Vec<Request>,
    /// First tokens of refusals.
    pub(super) refusal_tokens: Vec<u32>,
    pub(super) tasks: Tasks,
}

/// Of one way to steer, on each item.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Costs {
    /// The loss of each text, and its tokens.
    losses: Vec<(f64, usize)>,
    /// Log-odds that the answer to each harmful prompt begins like a refusal.
    log_odds: Vec<f64>,
    /// The divergence from the model left alone on each harmless prompt.
    divergences: Vec<f64>,
}

/// The same of what it takes longer to find.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Abilities {
    /// Whether each question of each set was answered right, and the right choice's probability.
    choices: Vec<Vec<(bool, f64)>>,
    pub(super) solutions: Vec<Solution>,
}

/// For each item, whether the condition holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Fires {
    texts: Vec<bool>,
    harmful: Vec<bool>,
    harmless: Vec<bool>,
    questions: Vec<Vec<bool>>,
    problems: Vec<bool>,
}

impl Costs {
    pub(super) fn perplexity(&self) -> f64 {
        let (total, n) = self.losses.iter().fold((0.0, 0), |(t, n), loss| (t + loss.0, n + loss.1));
        CrossEntropy { total, n_tokens: n }.perplexity()
    }

    /// The perplexity over that of the plain model, and its 95 % interval: texts drawn anew, as many
    /// as there are, again and again.
    pub(super) fn perplexity_ratio(&self, plain: &Self) -> (f64, [f64; 2]) {
        let ratio = |texts: &mut dyn Iterator<Item = usize>| {
            let (difference, n) = texts.fold((0.0, 0), |(difference, n), text| {
                let ((steered, n_tokens), (plain, _)) = (self.losses[text], plain.losses[text]);
                (difference + steered - plain, n + n_tokens)
            });
            (difference / n as f64).exp()
        };
        let n = self.losses.len();
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let mut drawn: Vec<f64> =
            (0..N_RESAMPLED).map(|_| ratio(&mut (0..n).map(|_| rng.random_range(0..n)))).collect();
        drawn.sort_by(f64::total_cmp);
        let at = |share: f64| drawn[(share * (N_RESAMPLED - 1) as f64).round() as usize];
        (ratio(&mut (0..n)), [at(0.025), at(0.975)])
    }

    pub(super) fn n_tokens(&self) -> usize {
        self.losses.iter().map(|&(_, n)| n).sum()
    }

    pub(super) fn log_odds(&self) -> f64 {
        mean(&self.log_odds)
    }

    pub(super) fn mean_kl(&self) -> f64 {
        mean(&self.divergences)
    }

    /// These where the condition holds, and those of the plain model elsewhere.
    pub(super) fn where_it_fires(&self, plain: &Self, fires: &Fires) -> Self {
        Self {
            losses: choose(&fires.texts, &self.losses, &plain.losses),
            log_odds: choose(&fires.harmful, &self.log_odds, &plain.log_odds),
            divergences: choose(&fires.harmless, &self.divergences, &plain.divergences),
        }
    }
}

impl Abilities {
    /// These where the condition holds, and those of the plain model elsewhere.
    pub(super) fn where_it_fires(&self, plain: &Self, fires: &Fires) -> Self {
        let choices = fires.questions.iter().zip(self.choices.iter().zip(&plain.choices));
        Self {
            choices: choices.map(|(fires, (a, b))| choose(fires, a, b)).collect(),
            solutions: choose(&fires.problems, &self.solutions, &plain.solutions),
        }
    }
}

fn choose<T: Clone>(fires: &[bool], steered: &[T], plain: &[T]) -> Vec<T> {
    let both = steered.iter().zip(plain);
    fires.iter().zip(both).map(|(&fires, (a, b))| if fires { a } else { b }.clone()).collect()
}

fn ids(requests: &[Request]) -> Vec<&[u32]> {
    requests.iter().map(|request| request.ids.as_slice()).collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

impl Measures<'_> {
    /// What a way to steer costs, and how much it leans towards refusing.
    pub(super) fn costs(&self, steered: &Steered<'_>) -> Result<Costs> {
        let texts: Vec<_> = self.texts.iter().map(|text| (&text.ids, text.n_prompt)).collect();
        let (harmful, harmless) = (ids(&self.harmful), ids(&self.harmless));
        let items = json!([texts, harmful, harmless, self.refusal_tokens]);
        let of = json!({ "costs": 1, "under": steered.key(), "items": key(&items) });
        self.generator.journal.once(&key(&of), || {
            Ok(Costs {
                losses: self.losses(steered)?,
                log_odds: self.log_odds(steered)?,
                divergences: self.divergences(steered)?,
            })
        })
    }

    /// What the model can still do.
    pub(super) fn abilities(&self, steered: &Steered<'_>) -> Result<Abilities> {
        let sets: Vec<Vec<TokenQuestion>> =
            self.tasks.questions.iter().map(|set| self.tokens(set)).collect::<Result<_>>()?;
        let model = &self.generator.loaded.model;
        let mut choices = Vec::new();
        for (set, questions) in self.tasks.questions.iter().zip(&sets) {
            let ids: Vec<_> = questions.iter().map(|q| (&q.prompt, &q.choices)).collect();
            let of = json!({ "choices": 2, "under": steered.key(), "questions": ids });
            choices.push(self.generator.journal.once(&key(&of), || {
                let some: Vec<&[TokenQuestion]> = questions.chunks(SOME_QUESTIONS).collect();
                let scores = side_by_side(&some, |some| {
                    choice_scores(model, some, QUESTION_TOKENS, &steered.hook())
                        .during("answering questions")
                })?;
                let right = scores.iter().flatten().zip(&set.questions);
                Ok(right
                    .map(|(scores, question)| {
                        let answer = question.answer;
                        (scores.best() == answer, scores.probability(answer))
                    })
                    .collect::<Vec<_>>())
            })?);
        }
        let solutions = solve(&self.tasks.problems, Asking::default(), |prompts| {
            let conversations: Vec<_> = prompts.iter().map(|prompt| asked(&[], prompt)).collect();
            self.generator.answers(&conversations, steered, self.tasks.problem_tokens, |_| ())
        })?;
        Ok(Abilities { choices, solutions })
    }

    /// Items that a condition holds for.
    pub(super) fn fires(&self, gate: &Gate) -> Result<Fires> {
        let chats = self.generator.chats;
        let request = |text: &String| chats.request(&asked(&[], text));
        let beginning = |text: &Dialogued| {
            let Dialogued { ids, n_prompt, start } = text;
            Request { ids: ids[..*n_prompt].to_vec(), start: *start }
        };
        let texts: Vec<Request> = self.texts.iter().map(beginning).collect();
        let sets: Vec<Vec<Request>> = self
            .tasks
            .questions
            .iter()
            .map(|set| set.questions.iter().map(|question| request(&question.question)).collect())
            .collect::<Result<_>>()?;
        let problems: Vec<Request> = self
            .tasks
            .problems
            .iter()
            .map(|problem| request(&Asking::default().prompt(&problem.question)))
            .collect::<Result<_>>()?;
        let of_sets: Vec<_> = sets.iter().map(|set| ids(set)).collect();
        let (harmful, harmless) = (ids(&self.harmful), ids(&self.harmless));
        let items = json!([ids(&texts), harmful, harmless, of_sets, ids(&problems)]);
        let of = json!({ "fires": 1, "gate": gate, "items": key(&items) });
        let loaded = self.generator.loaded;
        self.generator.journal.once(&key(&of), || {
            Ok(Fires {
                texts: gate.fires(loaded, &texts)?,
                harmful: gate.fires(loaded, &self.harmful)?,
                harmless: gate.fires(loaded, &self.harmless)?,
                questions: sets.iter().map(|set| gate.fires(loaded, set)).collect::<Result<_>>()?,
                problems: gate.fires(loaded, &problems)?,
            })
        })
    }

    /// Costs and abilities as they are reported, beside those of the plain model.
    pub(super) fn capability(
        &self,
        costs: &Costs,
        abilities: &Abilities,
        plain: Option<&Abilities>,
    ) -> Capability {
        let sets = self.tasks.questions.iter().zip(&abilities.choices).enumerate();
        let multiple_choice = sets.map(|(index, (set, choices))| MultipleChoice {
            set: set.set.clone(),
            accuracy: Rate::wilson(choices.iter().filter(|c| c.0).count(), choices.len()),
            probability: mean(&choices.iter().map(|c| c.1).collect::<Vec<_>>()),
            against_base: plain.map(|plain| {
                let both = plain.choices[index].iter().zip(choices);
                McNemar::of(both.map(|(plain, steered)| (plain.0, steered.0)))
            }),
        });
        let arithmetic = (!abilities.solutions.is_empty()).then(|| Arithmetic {
            set: self.tasks.problem_set.clone(),
            correct: correct(&abilities.solutions),
        });
        let perplexity = costs.perplexity();
        Capability { multiple_choice: multiple_choice.collect(), arithmetic, perplexity }
    }

    fn tokens(&self, set: &Questions) -> Result<Vec<TokenQuestion>> {
        let chats = self.generator.chats;
        let tokens = set.questions.iter().map(|question| chats.question(question));
        tokens.collect::<Result<_>>().with_context(|| format!("the questions of {}", set.set))
    }

    fn losses(&self, steered: &Steered<'_>) -> Result<Vec<(f64, usize)>> {
        let model = &self.generator.loaded.model;
        side_by_side(&self.texts, |Dialogued { ids, n_prompt, .. }| {
            let mut hook = steered.hook();
            if let Some(hook) = &mut hook {
                hook.set_prompt_lengths(&[*n_prompt]);
            }
            let loss = model.cross_entropy(&[ids], BATCH_TOKENS, &mut hook);
            let CrossEntropy { total, n_tokens } = loss.during("measuring perplexity")?;
            Ok((total, n_tokens))
        })
    }

    fn log_odds(&self, steered: &Steered<'_>) -> Result<Vec<f64>> {
        self.over_logits(&ids(&self.harmful), steered, |_, row| log_odds(row, &self.refusal_tokens))
    }

    fn divergences(&self, steered: &Steered<'_>) -> Result<Vec<f64>> {
        if steered.plan().is_none() {
            return Ok(vec![0.0; self.harmless.len()]);
        }
        let harmless = ids(&self.harmless);
        let plain = self.generator.steered(None)?;
        let plain = self.over_logits(&harmless, &plain, |_, logits| logits.to_vec())?;
        self.over_logits(&harmless, steered, |row, logits| kl_divergence(&plain[row], logits))
    }

    /// Something of each prompt, from the logits where its answer begins.
    fn over_logits<T: Send>(
        &self,
        prompts: &[&[u32]],
        steered: &Steered<'_>,
        of: impl Fn(usize, &[f32]) -> T + Sync,
    ) -> Result<Vec<T>> {
        let model = &self.generator.loaded.model;
        let batches: Vec<_> = batches_in_order(prompts, BATCH_TOKENS).collect();
        let found = side_by_side(&batches, |batch| {
            let tokens = TokenBatch::new(&prompts[batch.clone()], model.config(), model.device());
            let logits = model.last_logits(&tokens.during("reading prompts")?, &mut steered.hook());
            let logits = logits.during("reading prompts")?.into_data();
            let logits = logits.as_slice::<f32>().expect("logits are f32");
            let rows = batch.clone().zip(logits.chunks_exact(model.config().d_vocab));
            anyhow::Ok(rows.map(|(row, logits)| of(row, logits)).collect::<Vec<_>>())
        })?;
        Ok(found.into_iter().flatten().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn costs(losses: &[(f64, usize)]) -> Costs {
        Costs { losses: losses.to_vec(), log_odds: Vec::new(), divergences: Vec::new() }
    }

    #[test]
    fn perplexities_beside_the_plain_ones() {
        let plain = costs(&[(20.0, 10), (60.0, 20), (5.0, 1)]);
        assert_eq!(plain.perplexity_ratio(&plain), (1.0, [1.0, 1.0]));
        // A tenth of a nat more by token, on every text alike: whatever is drawn, the same.
        let dearer = costs(&[(21.0, 10), (62.0, 20), (5.1, 1)]);
        let (ratio, interval) = dearer.perplexity_ratio(&plain);
        for found in [ratio, interval[0], interval[1]] {
            assert!((found - 0.1f64.exp()).abs() < 1e-9, "{found}");
        }
        // On one text alone: from draws without it to draws of it.
        let uneven = costs(&[(20.0, 10), (64.0, 20), (5.0, 1)]);
        let (ratio, [low, high]) = uneven.perplexity_ratio(&plain);
        assert!((ratio - (4.0f64 / 31.0).exp()).abs() < 1e-9, "{ratio}");
        assert!(low == 1.0 && (high - 0.2f64.exp()).abs() < 1e-9, "{low} {high}");
    }
}
