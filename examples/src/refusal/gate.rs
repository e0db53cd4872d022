//! When to steer: a probe of what the model makes of a request, before it answers.
//!
//! The request is run once as it is, behind what was said before; if the probe takes it for harmful,
//! it is answered with steering, else without. So the probe may read blocks behind those that are
//! steered, and what is not steered is answered by the very model that was there before.
//! Conversations do not see each other: what a gated model does is what the steered one does where
//! the probe fires, and what the plain one does elsewhere.

use std::ops::ControlFlow;

use anyhow::{Context, Result, ensure};
use burn::tensor::{Tensor, TensorData};
use model_hooks::{HarvestConfig, Harvested, HookPoint, SharedPrefix};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;
use steering::{LogisticOptions, LogisticProbe, Rate};

use super::During;
use super::asked::{Asked, Group, Lesson};
use super::chats::{Chats, common_prefix};
use super::journal::{Journal, key};
use crate::assets::LoadedModel;
use crate::corpus::Selection;
use crate::progress::bar;
use crate::results::{ConditionSummary, SetRate};

/// Tokens of a forward pass.
const BATCH_TOKENS: usize = 1024;
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

/// A linear probe of what the model makes of a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Gate {
    reading: Reading,
    probe: LogisticProbe,
    /// What the logit has to exceed.
    threshold: f64,
    n_harmful: usize,
    n_harmless: usize,
    selection_auc: f64,
}

/// What is read of a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Reading {
    features: Vec<Feature>,
    /// Tokens before the user's first words, and behind their last.
    n_before: usize,
    n_behind: usize,
}

/// An activation of the residual stream, one of the probe's inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Feature {
    /// The block behind which it is read.
    layer: usize,
    at: At,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum At {
    /// So many tokens before the last one.
    FromEnd(usize),
    /// The mean over the user's words.
    Mean,
}

/// Reads requests.
struct Reader<'a> {
    loaded: &'a LoadedModel,
    reading: &'a Reading,
}

impl Reader<'_> {
    fn width(&self) -> usize {
        self.reading.features.len() * self.loaded.model.config().d_model
    }

    /// The features of each prompt, one behind another; of conversations, with where the last
    /// request of each begins.
    fn read(
        &self,
        prompts: &[Vec<u32>],
        starts: Option<&[usize]>,
        label: &'static str,
    ) -> Result<Vec<Vec<f32>>> {
        let start = |prompt: usize| starts.map_or(self.reading.n_before, |starts| starts[prompt]);
        let model = &self.loaded.model;
        let d_model = model.config().d_model;
        let mut layers: Vec<usize> = self.reading.features.iter().map(|f| f.layer).collect();
        layers.sort_unstable();
        layers.dedup();
        let n_shared = match prompts.len() {
            0 | 1 => 0,
            // What is read may lie behind it alone.
            n => (0..n).map(start).fold(common_prefix(prompts), usize::min),
        };
        let prefix = match n_shared {
            0 => SharedPrefix::default(),
            n => model.prefix(&prompts[0][..n], &mut ()).during("running the shared prefix")?,
        };
        let mut config = HarvestConfig::new(HookPoint::resid_post(layers[0]), BATCH_TOKENS);
        config.points = layers.iter().map(|&layer| HookPoint::resid_post(layer)).collect();
        let own: Vec<&[u32]> = prompts.iter().map(|ids| &ids[n_shared..]).collect();
        let mut read = vec![vec![0f32; self.width()]; prompts.len()];
        let bar = bar(label, prompts.len() as u64);
        let sink = |harvested: Harvested| {
            let Harvested { activations, places } = harvested;
            let activations: Vec<TensorData> =
                activations.into_iter().map(Tensor::into_data).collect();
            for (index, feature) in self.reading.features.iter().enumerate() {
                let point = layers.binary_search(&feature.layer).expect("one of the layers");
                let rows = activations[point].as_slice::<f32>().expect("f32 activations");
                for (row, place) in rows.chunks_exact(d_model).zip(&places) {
                    let words = (start(place.text), prompts[place.text].len());
                    let weight = self.weight(*feature, place.position, words);
                    if weight > 0.0 {
                        let out = &mut read[place.text][index * d_model..][..d_model];
                        out.iter_mut().zip(row).for_each(|(out, x)| *out += weight * x);
                    }
                }
            }
            bar.inc(
                places.iter().filter(|p| p.position + 1 == prompts[p.text].len()).count() as u64
            );
            ControlFlow::Continue(())
        };
        model.harvest(&own, &prefix, &config, sink).during("reading requests")?;
        bar.finish();
        Ok(read)
    }

    /// What a token counts for in a feature of a prompt of some length, whose last request begins
    /// somewhere.
    fn weight(&self, feature: Feature, position: usize, (start, length): (usize, usize)) -> f32 {
        match feature.at {
            At::FromEnd(n) => f32::from(u8::from(position + 1 + n == length)),
            At::Mean => {
                let end = length.saturating_sub(self.reading.n_behind);
                let words = start.min(end)..end;
                if words.contains(&position) { 1.0 / words.len() as f32 } else { 0.0 }
            }
        }
    }
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
        let mut features: Vec<Feature> = Vec::new();
        for feature in FEATURES.map(|(depth, at)| Feature { layer: layer(depth), at }) {
            if !features.contains(&feature) {
                features.push(feature);
            }
        }
        let described: Vec<_> =
            lessons.iter().map(|lesson| (&lesson.prompt, lesson.group)).collect();
        let of = json!({
            "gate": 2, "lessons": described, "features": features, "folds": N_FOLDS,
            "allowed": [LOOK_ALIKES_ALLOWED, ORDINARY_ALLOWED], "penalty": PENALTY,
        });
        journal.once(&key(&of), || fit(loaded, chats, lessons, selection, features))
    }

    /// Whether each of some requests, in tokens, is taken for harmful.
    pub(super) fn fires(&self, loaded: &LoadedModel, prompts: &[Vec<u32>]) -> Result<Vec<bool>> {
        self.decide(loaded, prompts, None)
    }

    /// The same of the last requests of conversations, which begin at these positions.
    pub(super) fn fires_last(
        &self,
        loaded: &LoadedModel,
        conversations: &[Vec<u32>],
        starts: &[usize],
    ) -> Result<Vec<bool>> {
        self.decide(loaded, conversations, Some(starts))
    }

    fn decide(
        &self,
        loaded: &LoadedModel,
        prompts: &[Vec<u32>],
        starts: Option<&[usize]>,
    ) -> Result<Vec<bool>> {
        if prompts.is_empty() {
            return Ok(Vec::new());
        }
        let read = Reader { loaded, reading: &self.reading }.read(prompts, starts, "deciding")?;
        Ok(read.iter().map(|x| self.probe.logit(x) > self.threshold).collect())
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
        for feature in &self.reading.features {
            let point = HookPoint::resid_post(feature.layer).to_string();
            if !points.contains(&point) {
                points.push(point);
            }
        }
        ConditionSummary {
            name: "a logistic probe of the request, run once as it is".into(),
            points,
            threshold: self.threshold,
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
    features: Vec<Feature>,
) -> Result<Gate> {
    let prompts = tokens(chats, lessons.iter().map(|lesson| &lesson.prompt))?;
    let reversed: Vec<Vec<u32>> =
        prompts.iter().map(|ids| ids.iter().rev().copied().collect()).collect();
    let reading =
        Reading { features, n_before: common_prefix(&prompts), n_behind: common_prefix(&reversed) };
    let reader = Reader { loaded, reading: &reading };
    let read = reader.read(&prompts, None, "learning when")?;
    let fit = |held_out: usize| -> Result<LogisticProbe> {
        let of_class = |harmful: bool| {
            let rows = lessons.iter().zip(&read).filter(|(lesson, _)| {
                lesson.fold % N_FOLDS != held_out && (lesson.group == Group::Harmful) == harmful
            });
            let rows: Vec<&[f32]> = rows.map(|(_, x)| x.as_slice()).collect();
            ensure!(!rows.is_empty(), "too few lessons to learn a condition from");
            let data = TensorData::new(rows.concat(), [rows.len(), reader.width()]);
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
    let unseen = lessons.iter().zip(&read).map(|(lesson, x)| of_fold(lesson).logit(x));
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

    let scores = |prompts: Vec<Vec<u32>>| -> Result<Vec<f64>> {
        let read = reader.read(&prompts, None, "checking when")?;
        Ok(read.iter().map(|x| probe.logit(x)).collect())
    };
    let harmful =
        scores(tokens(chats, selection.unsafe_prompts.iter().map(|prompt| &prompt.prompt))?)?;
    let harmless =
        scores(tokens(chats, selection.safe_prompts.iter().map(|prompt| &prompt.prompt))?)?;
    let n_harmful = lessons.iter().filter(|lesson| lesson.group == Group::Harmful).count();
    Ok(Gate {
        threshold,
        n_harmful,
        n_harmless: lessons.len() - n_harmful,
        selection_auc: area_under_curve(&harmful, &harmless),
        probe: probe.clone(),
        reading,
    })
}

fn tokens<'p>(
    chats: &Chats<'_>,
    prompts: impl Iterator<Item = &'p String>,
) -> Result<Vec<Vec<u32>>> {
    prompts.map(|prompt| chats.prompt(&[], prompt)).collect()
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
