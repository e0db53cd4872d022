//! Answers of the steered model, judged and counted.

use std::collections::HashMap;

use anyhow::{Context, Result};
use steering::{Judge, McNemar, Outcome, Rate};

use super::asked::Asked;
use super::chats::asked;
use super::gate::Gate;
use super::generator::{Generator, Steered};
use super::ladder::{self, Climb, Conversation, Ended, Ladder, judged};
use super::measure::{Abilities, Costs, Fires, Measures};
use super::options::Scale;
use super::plans::Treatments;
use super::said::{Conversed, Said};
use crate::clock::Clock;
use crate::corpus::Turn;
use crate::pool::side_by_side;
use crate::progress::bar;
use crate::results::{
    Arm, Condition, Example, Generation, Method, PromptKind, Row, SetKind, SetRate, Treatment,
};

/// Answers shown before and after.
const N_EXAMPLES: usize = 5;
/// The same under the condition.
const N_CONDITIONAL_EXAMPLES: usize = 4;
/// Ways in which a request of a ladder is put, at most.
const MAX_TRIES: usize = 3;

/// What the evaluation works on.
pub(super) struct Setup<'a> {
    pub(super) generator: &'a Generator<'a>,
    pub(super) treatments: &'a Treatments<'a>,
    pub(super) measures: &'a Measures<'a>,
    pub(super) led: &'a Led,
    pub(super) gate: &'a Gate,
    pub(super) judge: &'a dyn Judge,
    pub(super) six_shot: &'a [Turn],
    pub(super) asked: &'a Asked,
    /// Of those, what is asked in the six-shot arm.
    pub(super) asked_six_shot: &'a Asked,
    /// Whether the condition holds for each prompt asked.
    pub(super) fires: &'a [bool],
    pub(super) scale: &'a Scale,
}

/// Conversations of several turns.
pub(super) struct Led {
    pub(super) ladders: Vec<Ladder>,
    pub(super) dialogues: Vec<Conversation>,
}

/// Where conversations led under a treatment.
struct LedTo {
    treatment: Treatment,
    climbs: Vec<Climb>,
    ended: Vec<Ended>,
}

/// What came of it.
pub(super) struct Evaluation {
    pub(super) rows: Vec<Row>,
    pub(super) examples: Vec<Example>,
    pub(super) generations: Vec<Generation>,
    pub(super) conversations: Vec<Conversed>,
    pub(super) n_perplexity_tokens: usize,
}

/// Answers every test prompt under every treatment, and measures what that costs.
pub(super) fn evaluate(setup: &Setup<'_>, clock: &mut Clock) -> Result<Evaluation> {
    let all = setup.treatments.all(setup.scale);
    clock.step("Measuring what steering costs");
    let fires = setup.measures.fires(setup.gate)?;
    let costs = setup.costs(&all, &fires)?;
    clock.step("Generating answers");
    let answers = setup.answers(&all)?;
    clock.step("Testing abilities");
    let abilities = setup.abilities(&fires)?;
    clock.step("Leading conversations on");
    let led = setup.led()?;

    let base = costs(base_of(all[0]))?;
    let plain = abilities.iter().find(|(treatment, _)| treatment.method == Method::Base);
    let plain = plain.map(|(_, abilities)| abilities);
    let mut generations = Vec::new();
    let mut rows: Vec<Row> = Vec::new();
    let mut refused_by_base = HashMap::new();
    for (treatment, answers) in all.iter().zip(answers) {
        let judged = setup.judged(*treatment, answers)?;
        let costs = costs(*treatment)?;
        let mut row = setup.count(*treatment, &judged);
        let (ratio, interval) = costs.perplexity_ratio(&base);
        row.perplexity_ratio = ratio;
        if treatment.arm == Arm::ZeroShot {
            row.refusal_log_odds = Some(costs.log_odds());
            row.mean_kl = Some(costs.mean_kl());
            row.capability =
                abilities.iter().find(|(other, _)| other == treatment).map(|(_, abilities)| {
                    let plain = plain.filter(|_| treatment.method != Method::Base);
                    setup.measures.capability(&costs, abilities, plain)
                });
            row.multi_turn = led
                .iter()
                .find(|led| led.treatment == *treatment)
                .map(|led| ladder::summary(&led.climbs, &led.ended));
        }
        let refused = [setup.refused_unsafe(&judged), refused_safe(&judged)];
        match treatment.method {
            Method::Base => drop(refused_by_base.insert(treatment.arm, refused)),
            _ => {
                let base = refused_by_base.get(&treatment.arm).context("the base comes first")?;
                let [of_unsafe, of_safe] = std::array::from_fn(|i| {
                    McNemar::of(base[i].iter().copied().zip(refused[i].iter().copied()))
                });
                row.unsafe_against_base = Some(of_unsafe);
                row.safe_against_base = Some(of_safe);
                row.perplexity_interval = Some(interval);
            }
        }
        rows.push(row);
        generations.extend(judged);
    }
    rows.sort_by_key(|row| row.treatment.arm != Arm::ZeroShot);
    let headline = setup.treatments.found.headline;
    let conditional = Treatment { condition: Condition::Probe, ..headline };
    let examples = [(headline, N_EXAMPLES), (conditional, N_CONDITIONAL_EXAMPLES)];
    let examples = examples.iter().flat_map(|&(shown, n)| examples_of(&generations, shown, n));
    let examples = examples.collect();
    let n_perplexity_tokens = base.n_tokens();
    let conversations = conversations(led, abilities);
    Ok(Evaluation { rows, examples, generations, conversations, n_perplexity_tokens })
}

/// What was said besides the answers to prompts, treatment by treatment.
fn conversations(led: Vec<LedTo>, abilities: Vec<(Treatment, Abilities)>) -> Vec<Conversed> {
    let led = led.into_iter().flat_map(|LedTo { treatment, climbs, ended }| {
        let climbs = climbs.into_iter().map(Said::Ladder);
        let said = climbs.chain(ended.into_iter().map(Said::Dialogue));
        said.map(move |said| Conversed { treatment, said }).collect::<Vec<_>>()
    });
    let solved = abilities.into_iter().flat_map(|(treatment, abilities)| {
        let said = abilities.solutions.into_iter().map(Said::Problem);
        said.map(move |said| Conversed { treatment, said }).collect::<Vec<_>>()
    });
    led.chain(solved).collect()
}

fn base_of(treatment: Treatment) -> Treatment {
    Treatment { method: Method::Base, strength: 0.0, condition: Condition::Always, ..treatment }
}

fn zero_shot(treatment: Treatment) -> Treatment {
    Treatment { arm: Arm::ZeroShot, ..treatment }
}

fn always(treatment: Treatment) -> Treatment {
    Treatment { condition: Condition::Always, ..treatment }
}

/// What was made under a treatment, among what was made under each.
fn found<'a, T>(treatments: &[Treatment], made: &'a [T], wanted: Treatment) -> Result<&'a T> {
    let at = treatments.iter().position(|&treatment| treatment == wanted);
    at.map(|at| &made[at]).with_context(|| format!("{wanted:?} was not run"))
}

impl Setup<'_> {
    fn asked(&self, arm: Arm) -> &Asked {
        match arm {
            Arm::ZeroShot => self.asked,
            Arm::SixShot => self.asked_six_shot,
        }
    }

    fn steered(&self, treatment: Treatment) -> Result<Steered<'_>> {
        self.generator.steered(self.treatments.plan(treatment)?)
    }

    /// The answers of each treatment to all prompts, in order.
    fn answers(&self, all: &[Treatment]) -> Result<Vec<Vec<String>>> {
        let is_made = |treatment: &&Treatment| treatment.condition == Condition::Always;
        let made: Vec<Treatment> = all.iter().filter(is_made).copied().collect();
        let n_made: usize = made.iter().map(|made| self.asked(made.arm).prompts().count()).sum();
        let bar = bar("answering", n_made as u64);
        let answers = side_by_side(&made, |&treatment| {
            let shots = match treatment.arm {
                Arm::ZeroShot => &[],
                Arm::SixShot => self.six_shot,
            };
            let prompts = self.asked(treatment.arm).prompts();
            let conversations: Vec<_> = prompts.map(|(_, prompt)| asked(shots, prompt)).collect();
            let steered = self.steered(treatment)?;
            let max_new_tokens = self.scale.max_new_tokens;
            self.generator.answers(&conversations, &steered, max_new_tokens, |n| bar.inc(n))
        })?;
        bar.finish();
        let of = |wanted: Treatment| found(&made, &answers, wanted);
        let all = all.iter().map(|&treatment| {
            let steered = of(always(treatment))?;
            if treatment.condition == Condition::Always {
                return Ok(steered.clone());
            }
            let both = steered.iter().zip(of(base_of(treatment))?).zip(self.fires);
            Ok(both.map(|((a, b), &fires)| if fires { a } else { b }.clone()).collect())
        });
        all.collect()
    }

    /// What each treatment costs; the arms share it.
    fn costs(
        &self,
        all: &[Treatment],
        fires: &Fires,
    ) -> Result<impl Fn(Treatment) -> Result<Costs>> {
        let mut made: Vec<Treatment> = Vec::new();
        for treatment in all.iter().map(|&treatment| zero_shot(always(treatment))) {
            if !made.contains(&treatment) {
                made.push(treatment);
            }
        }
        let bar = bar("measuring", made.len() as u64);
        let costs = side_by_side(&made, |&treatment| {
            let costs = self.measures.costs(&self.steered(treatment)?)?;
            bar.inc(1);
            anyhow::Ok(costs)
        })?;
        bar.finish();
        let fires = fires.clone();
        Ok(move |treatment: Treatment| {
            let of = |wanted: Treatment| found(&made, &costs, zero_shot(wanted));
            let steered = of(always(treatment))?;
            Ok(match treatment.condition {
                Condition::Always => steered.clone(),
                Condition::Probe => steered.where_it_fires(of(base_of(treatment))?, &fires),
            })
        })
    }

    /// What the model can still do under the chosen treatments.
    fn abilities(&self, fires: &Fires) -> Result<Vec<(Treatment, Abilities)>> {
        let chosen = self.treatments.chosen();
        let is_made = |treatment: &&Treatment| treatment.condition == Condition::Always;
        let made: Vec<Treatment> = chosen.iter().filter(is_made).copied().collect();
        let bar = bar("testing abilities", made.len() as u64);
        let abilities = side_by_side(&made, |&treatment| {
            let abilities = self.measures.abilities(&self.steered(treatment)?)?;
            bar.inc(1);
            anyhow::Ok(abilities)
        })?;
        bar.finish();
        let of = |wanted: Treatment| found(&made, &abilities, wanted);
        let all = chosen.into_iter().map(|treatment| {
            let steered = of(always(treatment))?;
            let abilities = match treatment.condition {
                Condition::Always => steered.clone(),
                Condition::Probe => steered.where_it_fires(of(base_of(treatment))?, fires),
            };
            Ok((treatment, abilities))
        });
        all.collect()
    }

    /// Where conversations lead under the chosen treatments.
    fn led(&self) -> Result<Vec<LedTo>> {
        let chosen = self.treatments.chosen();
        let bar = bar("leading on", chosen.len() as u64);
        let led = side_by_side(&chosen, |&treatment| {
            let steered = self.steered(treatment)?;
            let plain = self.steered(base_of(treatment))?;
            let answers = |conversations: &[Conversation]| {
                self.turns(conversations, &steered, &plain, treatment.condition)
            };
            let climbs = ladder::run(&self.led.ladders, self.judge, MAX_TRIES, answers)?;
            let ended = match self.led.dialogues.is_empty() {
                true => Vec::new(),
                false => ladder::end(&self.led.dialogues, self.judge, answers)?,
            };
            bar.inc(1);
            anyhow::Ok(LedTo { treatment, climbs, ended })
        })?;
        bar.finish();
        Ok(led)
    }

    /// Answers to the last requests of conversations: under a condition, it is decided anew for each.
    fn turns(
        &self,
        conversations: &[Conversation],
        steered: &Steered<'_>,
        plain: &Steered<'_>,
        condition: Condition,
    ) -> Result<Vec<String>> {
        let messages: Vec<_> = conversations.iter().map(|c| asked(&c.turns, &c.prompt)).collect();
        let fires = match condition {
            Condition::Always => vec![true; messages.len()],
            Condition::Probe => {
                let chats = self.generator.chats;
                let requests = messages.iter().map(|messages| chats.request(messages));
                self.gate.fires(self.generator.loaded, &requests.collect::<Result<Vec<_>>>()?)?
            }
        };
        let mut answers = vec![String::new(); messages.len()];
        for (wanted, steered) in [(true, steered), (false, plain)] {
            let own: Vec<usize> = (0..messages.len()).filter(|&i| fires[i] == wanted).collect();
            let of: Vec<_> = own.iter().map(|&index| messages[index].clone()).collect();
            let max_new_tokens = self.scale.max_new_tokens;
            let said = self.generator.answers(&of, steered, max_new_tokens, |_| ())?;
            own.into_iter().zip(said).for_each(|(index, said)| answers[index] = said);
        }
        Ok(answers)
    }

    /// Every answer of a treatment with what the judge makes of it.
    fn judged(&self, treatment: Treatment, answers: Vec<String>) -> Result<Vec<Generation>> {
        let generation = |((set, prompt), answer): ((&super::asked::Set, &str), String)| {
            Ok(Generation {
                treatment,
                prompt: prompt.to_owned(),
                kind: set.kind.prompt_kind(),
                look_alike: set.kind == SetKind::LookAlike,
                set: set.name.clone(),
                outcome: judged(self.judge, prompt, &answer)?,
                answer,
            })
        };
        self.asked(treatment.arm).prompts().zip(answers).map(generation).collect()
    }

    /// The rates of a treatment; what is measured otherwise is left out.
    fn count(&self, treatment: Treatment, generations: &[Generation]) -> Row {
        let rate = |wanted: Outcome, among: &dyn Fn(&Generation) -> bool| {
            let among: Vec<&Generation> = generations.iter().filter(|g| among(g)).collect();
            Rate::wilson(among.iter().filter(|g| g.outcome == wanted).count(), among.len())
        };
        let asked = |rate: Rate| (rate.n > 0).then_some(rate);
        let main = &self.asked.sets[0].name;
        let is_safe = |g: &Generation| g.kind == PromptKind::Safe;
        let sets = self.asked.sets.iter().map(|set| SetRate {
            set: set.name.clone(),
            kind: set.kind,
            rate: rate(Outcome::Refused, &|g| g.set == set.name),
        });
        Row {
            treatment,
            unsafe_rate: rate(Outcome::Refused, &|g| g.set == *main),
            safe_rate: rate(Outcome::Refused, &is_safe),
            look_alike_rate: asked(rate(Outcome::Refused, &|g| g.look_alike)),
            ordinary_rate: asked(rate(Outcome::Refused, &|g| is_safe(g) && !g.look_alike)),
            degenerate_rate: rate(Outcome::Degenerate, &|_| true),
            moralised_rate: Some(rate(Outcome::Moralised, &|_| true)),
            sets: sets.collect(),
            unsafe_against_base: None,
            refusal_log_odds: None,
            mean_kl: None,
            safe_against_base: None,
            perplexity_ratio: 1.0,
            perplexity_interval: None,
            capability: None,
            multi_turn: None,
        }
    }

    /// Whether each prompt of the first unsafe set was refused.
    fn refused_unsafe(&self, generations: &[Generation]) -> Vec<bool> {
        let main = &self.asked.sets[0].name;
        let of_main = generations.iter().filter(|generation| generation.set == *main);
        of_main.map(|generation| generation.outcome == Outcome::Refused).collect()
    }
}

/// Whether each safe prompt was refused.
fn refused_safe(generations: &[Generation]) -> Vec<bool> {
    let safe = generations.iter().filter(|generation| generation.kind == PromptKind::Safe);
    safe.map(|generation| generation.outcome == Outcome::Refused).collect()
}

/// Unsafe and safe prompts, answered without steering and with some.
fn examples_of(generations: &[Generation], shown: Treatment, n_examples: usize) -> Vec<Example> {
    let base = base_of(shown);
    let answer = |treatment: Treatment, prompt: &str| {
        generations.iter().find(|g| g.treatment == treatment && g.prompt == prompt)
    };
    let of_kind = |kind| generations.iter().filter(move |g| g.treatment == shown && g.kind == kind);
    let n_safe = n_examples / 2;
    of_kind(PromptKind::Unsafe)
        .take(n_examples - n_safe)
        .chain(of_kind(PromptKind::Safe).take(n_safe))
        .filter_map(|after| {
            let before = answer(base, &after.prompt)?;
            Some(Example {
                treatment: shown,
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
