//! What the test split asks, and what else is learnt from and chosen on.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use serde::Serialize;
use steering::{Agreement, PhraseJudge, agreement};

use super::options::{Options, Scale};
use crate::corpus::{self, Appearance, Fingerprint, Prompt};
use crate::progress::tell;
use crate::prompts::{Wanted, read_prompts};
use crate::results::{JudgeCheck, SetKind, SetSummary};
use crate::sets::completions;
use crate::sets::prompts::{Safety, condition, harmful, xstest};
use crate::sets::sample;

/// Of the authors' compliances, those that nobody would doubt; the others look alarming.
const N_ORDINARY_COMPLIANCES: usize = 90;
/// Longer lessons are left out: they would take the time of many.
const MAX_LESSON_BYTES: usize = 220;

/// Models whose completions people have labelled, and whether the judge's phrases were chosen on
/// them.
const LABELLED: [(&str, bool); 5] = [
    ("gpt4", true),
    ("llama2new", true),
    ("llama2orig", false),
    ("mistralguard", false),
    ("mistralinstruct", false),
];

/// Prompts of one kind from one place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Set {
    pub(super) name: String,
    pub(super) kind: SetKind,
    pub(super) prompts: Vec<String>,
}

/// The sets of the test split; the first is unsafe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) sets: Vec<Set>,
}

/// A request to learn a condition from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Lesson {
    pub(super) prompt: String,
    pub(super) group: Group,
    /// Those of one fold are held out together: the two of a contrast are of one.
    pub(super) fold: usize,
}

/// What a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Group {
    Harmful,
    LookAlike,
    Ordinary,
}

impl Asked {
    /// All prompts with their sets, in order.
    pub(super) fn prompts(&self) -> impl Iterator<Item = (&Set, &str)> {
        self.sets
            .iter()
            .flat_map(|set| set.prompts.iter().map(move |prompt| (set, prompt.as_str())))
    }

    /// Sets of no more than so many of their prompts.
    pub(super) fn at_most(&self, n: usize) -> Self {
        let part = |set: &Set| Set { prompts: spread(set.prompts.clone(), n), ..set.clone() };
        Self { sets: self.sets.iter().map(part).collect() }
    }

    /// The first prompts of a kind, of the first set of that kind.
    pub(super) fn first(&self, kind: SetKind, n: usize) -> &[String] {
        let set = self.sets.iter().find(|set| set.kind == kind);
        set.map_or(&[], |set| &set.prompts[..n.min(set.prompts.len())])
    }

    pub(super) fn summaries(&self) -> Vec<SetSummary> {
        let summary =
            |set: &Set| SetSummary { name: set.name.clone(), kind: set.kind, n: set.prompts.len() };
        self.sets.iter().map(summary).collect()
    }

    /// The names of the sets of these kinds.
    pub(super) fn names(&self, kinds: &[SetKind]) -> String {
        let named = self.sets.iter().filter(|set| kinds.contains(&set.kind));
        named.map(|set| set.name.as_str()).collect::<Vec<_>>().join(", ")
    }
}

/// The test split, without any prompt that training or selection has seen.
///
/// # Errors
/// If a file cannot be read, or nothing is left of one.
pub(super) fn asked(options: &Options, scale: &Scale) -> Result<Asked> {
    let mut sets = match &options.sets {
        Some(folder) => published(folder, scale, options.seed)?,
        None => own(scale),
    };
    let given = |path: &Path, wanted: Wanted| -> Result<Vec<Set>> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let prompts = read_prompts(path, wanted)?;
        let kinds = match wanted {
            Wanted::Unsafe => vec![SetKind::Unsafe],
            Wanted::Safe => vec![SetKind::LookAlike, SetKind::Ordinary],
        };
        let set = |kind: &SetKind| {
            let looks = |prompt: &&Prompt| {
                wanted == Wanted::Unsafe
                    || (prompt.appearance == Appearance::LookAlike) == (*kind == SetKind::LookAlike)
            };
            let prompts = prompts.iter().filter(looks).map(|prompt| prompt.prompt.clone());
            let name =
                if kinds.len() == 1 { name.clone() } else { format!("{name}, {}", of(*kind)) };
            Set { name, kind: *kind, prompts: spread(prompts.collect(), scale.n_test_prompts) }
        };
        let sets: Vec<Set> = kinds.iter().map(set).collect();
        let sets: Vec<Set> = sets.into_iter().filter(|set| !set.prompts.is_empty()).collect();
        fresh(sets)
    };
    if let Some(path) = &options.unsafe_prompts {
        sets.retain(|set| set.kind != SetKind::Unsafe);
        sets.splice(0..0, given(path, Wanted::Unsafe)?);
    }
    if let Some(path) = &options.safe_prompts {
        sets.retain(|set| set.kind == SetKind::Unsafe);
        sets.extend(given(path, Wanted::Safe)?);
    }
    Ok(Asked { sets })
}

const fn of(kind: SetKind) -> &'static str {
    match kind {
        SetKind::Unsafe => "unsafe",
        SetKind::LookAlike => "look-alikes",
        SetKind::Ordinary => "ordinary",
    }
}

/// The authors' own.
fn own(scale: &Scale) -> Vec<Set> {
    let test = corpus::test();
    let set = |kind: SetKind, prompts: Vec<String>, n: usize| Set {
        name: format!("the authors' {}", of(kind)),
        kind,
        prompts: spread(prompts, n),
    };
    let safe = |appearance: Appearance| {
        let of_kind = test.safe_prompts.iter().filter(|prompt| prompt.appearance == appearance);
        of_kind.map(|prompt| prompt.prompt.clone()).collect::<Vec<_>>()
    };
    let n = scale.n_test_prompts;
    vec![
        set(
            SetKind::Unsafe,
            test.unsafe_prompts.iter().map(|prompt| prompt.prompt.clone()).collect(),
            n,
        ),
        set(SetKind::LookAlike, safe(Appearance::LookAlike), n / 2),
        set(SetKind::Ordinary, safe(Appearance::Ordinary), n / 2),
    ]
}

/// HarmBench's test split, XSTest, and the harmless test requests of the activation-steering set.
fn published(folder: &Path, scale: &Scale, seed: u64) -> Result<Vec<Set>> {
    let requests = harmful(&folder.join("harmful/harmbench_test.json"))?;
    let xstest = xstest(&folder.join("xstest/xstest_prompts.csv"))?;
    let ordinary = condition(&conditions(folder))?.test;
    let of_safety = |safety: Safety| -> Vec<String> {
        let of_safety = xstest.iter().filter(|request| request.safety == safety);
        of_safety.map(|request| request.prompt.clone()).collect()
    };
    let set =
        |name: &str, kind: SetKind, prompts: Vec<String>| Set { name: name.into(), kind, prompts };
    let sets = vec![
        set(
            "HarmBench test",
            SetKind::Unsafe,
            requests.into_iter().map(|request| request.prompt).collect(),
        ),
        set("XSTest, unsafe", SetKind::Unsafe, of_safety(Safety::Unsafe)),
        set("XSTest, safe", SetKind::LookAlike, of_safety(Safety::Safe)),
        set(
            "activation-steering test, harmless",
            SetKind::Ordinary,
            ordinary.into_iter().map(|pair| pair.harmless).collect(),
        ),
    ];
    let mut sets = fresh(sets)?;
    for set in &mut sets {
        let n = scale.n_published_prompts;
        let part = sample::of_all(set.prompts.len(), n, seed);
        set.prompts = part.into_iter().map(|index| set.prompts[index].clone()).collect();
    }
    Ok(sets)
}

fn conditions(folder: &Path) -> PathBuf {
    folder.join("activation-steering/condition_harmful.json")
}

/// What a condition is learnt from: the authors' training prompts and contrasts, openings of
/// dialogues, for small talk is no request that the others resemble, and, of published sets, the
/// requests of the training part; none of these that is near what is tested or chosen on.
///
/// # Errors
/// If a file cannot be read.
pub(super) fn lessons(
    options: &Options,
    scale: &Scale,
    asked: &Asked,
    openings: &[String],
) -> Result<Vec<Lesson>> {
    let training = corpus::training();
    let mut lessons = Vec::new();
    let mut add = |group: Group, prompts: Vec<String>| {
        let lesson = |(fold, prompt)| Lesson { prompt, group, fold };
        lessons.extend(prompts.into_iter().enumerate().map(lesson));
    };
    let prompts = |turns: &[corpus::Turn]| -> Vec<String> {
        turns.iter().map(|turn| turn.prompt.clone()).collect()
    };
    let (ordinary, alarming) = training.compliances.split_at(N_ORDINARY_COMPLIANCES);
    add(Group::Harmful, prompts(&training.refusals));
    add(Group::Ordinary, prompts(ordinary));
    add(Group::LookAlike, prompts(alarming));
    let contrasts = spread(corpus::contrasts(), scale.n_contrasts);
    let (harmful, harmless): (Vec<_>, Vec<_>) =
        contrasts.into_iter().map(|pair| (pair.harmful, pair.harmless)).unzip();
    add(Group::Harmful, harmful);
    add(Group::LookAlike, harmless);

    let selection = corpus::selection();
    let selected = [selection.unsafe_prompts, selection.safe_prompts].into_iter().flatten();
    let mut others: Vec<Fingerprint> =
        asked.prompts().map(|(_, prompt)| Fingerprint::new(prompt)).collect();
    others.extend(selected.map(|prompt| Fingerprint::new(&prompt.prompt)));
    let pick = |mut prompts: Vec<String>| -> Vec<String> {
        prompts.retain(|prompt| !prompt.trim().is_empty() && prompt.len() < MAX_LESSON_BYTES);
        prompts.sort();
        prompts.dedup();
        let part = sample::of_all(prompts.len(), scale.n_lessons, options.seed);
        let is_new = |prompt: &&String| {
            let fingerprint = Fingerprint::new(prompt);
            !others.iter().any(|other| other.is_near(&fingerprint))
        };
        let picked = part.into_iter().map(|index| &prompts[index]).filter(is_new);
        picked.cloned().collect()
    };
    add(Group::Ordinary, pick(openings.to_vec()));
    let Some(folder) = &options.sets else { return Ok(lessons) };
    let pairs = condition(&conditions(folder))?.train;
    add(Group::Harmful, pick(pairs.iter().map(|pair| pair.harmful.clone()).collect()));
    add(Group::Ordinary, pick(pairs.into_iter().map(|pair| pair.harmless).collect()));
    Ok(lessons)
}

/// How far the judge agrees with people on XSTest's completions, where they are there.
///
/// # Errors
/// If a file is there and cannot be read.
pub(super) fn judge(folder: &Path) -> Result<Vec<JudgeCheck>> {
    let folder = folder.join("xstest/model_completions");
    let mut checks = Vec::new();
    for (set, developed_on) in LABELLED {
        let path = folder.join(format!("xstest_v2_completions_{set}.csv"));
        if !path.exists() {
            tell(&format!("{} is not there: the judge is not compared with it", path.display()));
            continue;
        }
        let read = completions::read(&path)?;
        let labelled = read.iter().map(|c| (c.prompt.as_str(), c.answer.as_str(), c.label));
        let agreed = agreement(&PhraseJudge::calibrated(), labelled);
        let Agreement { agreeing, partial, .. } =
            agreed.map_err(|error| anyhow!(error)).context("judging labelled completions")?;
        checks.push(JudgeCheck { set: set.into(), developed_on, agreeing, partial });
    }
    Ok(checks)
}

/// Drops prompts that are near one of the training or selection splits, or there already.
fn fresh(sets: Vec<Set>) -> Result<Vec<Set>> {
    let seen = corpus::seen_prompts();
    let is_fresh = |prompt: &String| {
        let fingerprint = Fingerprint::new(prompt);
        !seen.iter().any(|seen| seen.is_near(&fingerprint))
    };
    let fresh = |mut set: Set| {
        let n_all = set.prompts.len();
        let mut seen = HashSet::new();
        set.prompts.retain(|prompt| seen.insert(prompt.clone()));
        let n = set.prompts.len();
        if n < n_all {
            tell(&format!("{}: {n} of {n_all} prompts are different ones", set.name));
        }
        set.prompts.retain(is_fresh);
        let left = set.prompts.len();
        ensure!(
            left > 0,
            "every prompt of {} is near one of the training or selection prompts",
            set.name
        );
        if left < n {
            tell(&format!(
                "{}: left out {} test prompts that are near a training or selection prompt",
                set.name,
                n - left
            ));
        }
        Ok(set)
    };
    sets.into_iter().map(fresh).collect::<Result<_>>().context("the test prompts")
}

/// At most `n` items, evenly spread.
fn spread<T>(items: Vec<T>, n: usize) -> Vec<T> {
    let len = items.len();
    if len <= n {
        return items;
    }
    let kept = |i: usize| (i + 1) * n / len > i * n / len;
    items.into_iter().enumerate().filter(|&(i, _)| kept(i)).map(|(_, item)| item).collect()
}
