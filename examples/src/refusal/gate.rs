//! When to steer: a probe of what the model makes of a request, before it answers.
//!
//! The request is run once as it is, behind what was said before; if the probe takes it for harmful,
//! it is answered with steering, else without. So the probe may read blocks behind those that are
//! steered, and what is not steered is answered by the very model that was there before.
//! Conversations do not see each other: what a gated model does is what the steered one does where
//! the probe fires, and what the plain one does elsewhere.

use anyhow::{Context, Result, ensure};
use burn::tensor::{Tensor, TensorData};
use model_hooks::HookPoint;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;
use steering::plan::PlanModel;
use steering::{
    At, LogisticOptions, LogisticProbe, Rate, Request, RequestFeature, RequestProbe, RequestReading,
};

use super::During;
use super::asked::{Asked, Group, Lesson};
use super::chats::{Chats, asked};
use super::journal::{Journal, key};
use crate::assets::LoadedModel;
use crate::corpus::{Prompt, Selection};
use crate::pool::side_by_side;
use crate::progress::bar;
use crate::results::{ConditionSummary, SetRate};

/// Tokens of a forward pass.
const BATCH_TOKENS: usize = 1024;
/// Requests that a core reads at a time.
const SOME_REQUESTS: usize = 100;
/// What is read, by shares of the model's depth: of all that was tried on lessons held out, the mean
/// over the user's words tells most, in the middle of the model, and several blocks more than one.
const FEATURES: [(f64, At); 4] =
    [(0.47, At::Mean), (0.54, At::Mean), (0.61, At::Mean), (0.87, At::FromEnd(0))];
/// Parts of the lessons that are held out in turn, to find the threshold.
const N_FOLDS: usize = 5;
/// Of the harmless lessons that look harmful, how many may be taken for it.
const LOOK_ALIKES_ALLOWED: f64 = 0.05;
/// The same of the ordinary ones.
const ORDINARY_ALLOWED: f64 = 0.01;
/// The probe's penalty for each lesson, on features brought to deviation 1.
const PENALTY: f64 = 0.01;

/// A probe of requests, and how it was learnt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Gate {
    pub(super) probe: RequestProbe,
    n_harmful: usize,
    n_harmless: usize,
    selection_auc: f64,
}

impl Gate {
    /// Learnt from lessons, its threshold found on parts of them held out in turn; how well it does
    /// is told by the selection split, which it has not seen.
    pub(super) fn learn(
        loaded: &LoadedModel,
        chats: &Chats<'_>,
        lessons: &[Lesson],
        selection: &Selection,
        journal: &Journal,
    ) -> Result<Self> {
        let n_layers = loaded.model.config().n_layers;
        let layer = |depth: f64| (depth * n_layers as f64) as usize;
        let mut features: Vec<RequestFeature> = Vec::new();
        for feature in FEATURES.map(|(depth, at)| RequestFeature { layer: layer(depth), at }) {
            if !features.contains(&feature) {
                features.push(feature);
            }
        }
        let described: Vec<_> =
            lessons.iter().map(|lesson| (&lesson.prompt, lesson.group)).collect();
        let of = json!({
            "gate": 3, "lessons": described, "features": features, "folds": N_FOLDS,
            "allowed": [LOOK_ALIKES_ALLOWED, ORDINARY_ALLOWED], "penalty": PENALTY,
        });
        journal.once(&key(&of), || fit(loaded, chats, lessons, selection, features))
    }

    /// Whether each of some requests is taken for harmful.
    pub(super) fn fires(&self, loaded: &LoadedModel, requests: &[Request]) -> Result<Vec<bool>> {
        self.probe.fires(&loaded.model, requests).during("deciding when to steer")
    }

    /// What is to be told of it, with how often it fires on each set of the test split.
    pub(super) fn summary(&self, asked: &Asked, fires: &[bool]) -> ConditionSummary {
        let mut rest = fires;
        let holds = asked.sets.iter().map(|set| {
            let (own, after) = rest.split_at(set.prompts.len());
            rest = after;
            let n_fires = own.iter().filter(|&&fires| fires).count();
            SetRate {
                set: set.name.clone(),
                kind: set.kind,
                rate: Rate::wilson(n_fires, own.len()),
            }
        });
        let holds = holds.collect();
        let mut points: Vec<String> = Vec::new();
        for feature in &self.probe.reading.features {
            let point = HookPoint::resid_post(feature.layer).to_string();
            if !points.contains(&point) {
                points.push(point);
            }
        }
        ConditionSummary {
            name: "a logistic probe of the request, run once as it is".into(),
            points,
            threshold: self.probe.threshold,
            n_harmful: self.n_harmful,
            n_harmless: self.n_harmless,
            selection_auc: self.selection_auc,
            holds,
        }
    }
}

fn fit(
    loaded: &LoadedModel,
    chats: &Chats<'_>,
    lessons: &[Lesson],
    selection: &Selection,
    features: Vec<RequestFeature>,
) -> Result<Gate> {
    let requests = requests(chats, lessons.iter().map(|lesson| &lesson.prompt))?;
    let reading = RequestReading { features, n_behind: n_behind(&requests) };
    let read = |requests: &[Request], label: &'static str| -> Result<Vec<Vec<f32>>> {
        let bar = bar(label, requests.len() as u64);
        let some: Vec<&[Request]> = requests.chunks(SOME_REQUESTS).collect();
        let read = side_by_side(&some, |some| {
            let read = reading.read(&loaded.model, some, BATCH_TOKENS, |n| bar.inc(n as u64));
            read.during("reading requests")
        })?;
        bar.finish();
        Ok(read.concat())
    };
    let of_lessons = read(&requests, "learning when")?;
    let width = of_lessons.first().map_or(0, Vec::len);
    let fit = |held_out: usize| -> Result<LogisticProbe> {
        let of_class = |harmful: bool| {
            let rows = lessons.iter().zip(&of_lessons).filter(|(lesson, _)| {
                lesson.fold % N_FOLDS != held_out && (lesson.group == Group::Harmful) == harmful
            });
            let rows: Vec<&[f32]> = rows.map(|(_, x)| x.as_slice()).collect();
            ensure!(!rows.is_empty(), "too few lessons to learn a condition from");
            let data = TensorData::new(rows.concat(), [rows.len(), width]);
            Ok(Tensor::<2>::from_data(data, loaded.model.device()))
        };
        let (harmful, harmless) = (of_class(true)?, of_class(false)?);
        let n_lessons = harmful.dims()[0] + harmless.dims()[0];
        let options = LogisticOptions { l2: PENALTY * n_lessons as f64, standardize: true };
        Ok(LogisticProbe::fit(&harmful, &harmless, options))
    };

    // The last one holds out none.
    let probes = (0..=N_FOLDS).into_par_iter().map(fit).collect::<Result<Vec<_>>>()?;
    let (probe, of_folds) = probes.split_last().expect("one at least");
    let of_fold = |lesson: &Lesson| &of_folds[lesson.fold % N_FOLDS];
    let unseen = lessons.iter().zip(&of_lessons).map(|(lesson, x)| of_fold(lesson).logit(x));
    let unseen: Vec<f64> = unseen.collect();
    let least = |group: Group, allowed: f64| {
        let scores = lessons.iter().zip(&unseen).filter(|(lesson, _)| lesson.group == group);
        exceeded_by(scores.map(|(_, &score)| score).collect(), allowed)
    };
    let threshold = least(Group::LookAlike, LOOK_ALIKES_ALLOWED)
        .into_iter()
        .chain(least(Group::Ordinary, ORDINARY_ALLOWED))
        .reduce(f64::max)
        .context("no harmless lesson to learn a condition from")?;

    let scores = |prompts: &[Prompt]| -> Result<Vec<f64>> {
        let requests = self::requests(chats, prompts.iter().map(|prompt| &prompt.prompt))?;
        let read = read(&requests, "checking when")?;
        Ok(read.iter().map(|x| probe.logit(x)).collect())
    };
    let harmful = scores(&selection.unsafe_prompts)?;
    let harmless = scores(&selection.safe_prompts)?;
    let n_harmful = lessons.iter().filter(|lesson| lesson.group == Group::Harmful).count();
    let LoadedModel { model, name, hash, .. } = loaded;
    let (name, sha256) = (Some(name.clone()), Some(hash.clone()));
    Ok(Gate {
        probe: RequestProbe {
            request_probe: RequestProbe::VERSION,
            model: PlanModel { name, sha256, ..PlanModel::of(model) },
            probe: probe.clone(),
            threshold,
            reading,
        },
        n_harmful,
        n_harmless: lessons.len() - n_harmful,
        selection_auc: area_under_curve(&harmful, &harmless),
    })
}

fn requests<'p>(
    chats: &Chats<'_>,
    prompts: impl Iterator<Item = &'p String>,
) -> Result<Vec<Request>> {
    prompts.map(|prompt| chats.request(&asked(&[], prompt))).collect()
}

/// How many tokens all of them end with, of those behind their words.
fn n_behind(requests: &[Request]) -> usize {
    let Some(first) = requests.first() else { return 0 };
    let agreeing = |other: &Request| {
        first.ids.iter().rev().zip(other.ids.iter().rev()).take_while(|(a, b)| a == b).count()
    };
    requests.iter().map(|it| agreeing(it).min(it.ids.len() - it.start)).min().unwrap_or(0)
}

/// The least of the scores that no more than this share of them exceeds, to the nearest score.
fn exceeded_by(mut scores: Vec<f64>, share: f64) -> Option<f64> {
    scores.sort_by(f64::total_cmp);
    let n_allowed = (share * scores.len() as f64).round() as usize;
    scores.iter().rev().nth(n_allowed).copied()
}

/// How often one of the first scores above one of the second, ties by half.
fn area_under_curve(above: &[f64], below: &[f64]) -> f64 {
    let wins = above.iter().flat_map(|a| {
        below.iter().map(move |b| match a.total_cmp(b) {
            std::cmp::Ordering::Greater => 1.0,
            std::cmp::Ordering::Equal => 0.5,
            std::cmp::Ordering::Less => 0.0,
        })
    });
    wins.sum::<f64>() / (above.len() * below.len()).max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_and_areas_by_hand() {
        let scores = vec![3.0, 1.0, 2.0, 4.0];
        assert_eq!(exceeded_by(scores.clone(), 0.0), Some(4.0));
        assert_eq!(exceeded_by(scores.clone(), 0.25), Some(3.0));
        assert_eq!(exceeded_by(scores.clone(), 0.37), Some(3.0));
        assert_eq!(exceeded_by(scores, 0.38), Some(2.0));
        assert_eq!(exceeded_by(Vec::new(), 0.5), None);
        // Of (2, 1), (2, 3), (3, 1), (3, 3): three and a half.
        assert_eq!(area_under_curve(&[2.0, 3.0], &[1.0, 3.0]), 2.5 / 4.0);
    }
}
