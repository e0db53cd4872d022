//! What came of it: SAEs with their origin, and how good they are.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;

use anyhow::{Context, Result, ensure};
use sae_core::evaluate::{self, EvaluateError, Evaluation, MeasureProgress, Preference, Subject};
use sae_core::train::Trainer;
use sae_core::{Sae, SaeConfig};
use serde::{Deserialize, Serialize};

use super::options::{Plan, SaePlan};
use super::signals::Stop;
use super::text::Pieces;
use crate::assets::{HeadedModel, TextModel};
use crate::progress::bar;

/// What `evaluation.json` holds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Results {
    pub(super) model: String,
    /// SHA-256 of the model's files.
    pub(super) model_hash: String,
    pub(super) n_tokens: usize,
    pub(super) n_held_out_tokens: usize,
    /// Activations that were not trained on, for norms above `max_norm` times the median.
    pub(super) n_left_out: u64,
    pub(super) max_norm: Option<f64>,
    pub(super) n_steps: usize,
    pub(super) batch: usize,
    pub(super) seed: u64,
    /// What the figures are.
    pub(super) definitions: BTreeMap<&'static str, &'static str>,
    pub(super) saes: Vec<Measured>,
}

/// One of the SAEs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Measured {
    pub(super) name: String,
    pub(super) kind: String,
    pub(super) d_in: usize,
    pub(super) d_sae: usize,
    #[serde(flatten)]
    pub(super) evaluation: Evaluation,
}

/// What is measured on.
pub(super) struct Setting<'a> {
    pub(super) plan: &'a Plan,
    pub(super) loaded: &'a TextModel,
    pub(super) held_out: &'a Pieces,
    pub(super) preferences: Option<&'a [Preference]>,
    pub(super) n_tokens: usize,
    pub(super) n_left_out: u64,
    pub(super) n_steps: usize,
    pub(super) stop: &'a Stop,
}

/// What `evaluation.json` says of its figures.
const DEFINITIONS: [(&str, &str); 21] = [
    ("reconstruction.l0", "mean over activations of the latents other than zero"),
    (
        "reconstruction.mse",
        "mean over activations of |x - y|^2, summed over the width; y is the reconstruction of x",
    ),
    (
        "reconstruction.fvu.global_centred",
        "sum |x - y|^2 / sum |x - mean x|^2, both over all activations",
    ),
    (
        "reconstruction.fvu.per_dimension",
        "mean over dimensions that vary of sum (x - y)^2 / sum (x - mean x)^2",
    ),
    (
        "reconstruction.fvu.without_outliers",
        "global_centred, over activations with |x| < 16 * 2^e, where 2^e <= median |x| < 2^(e+1)",
    ),
    ("reconstruction.fvu.n_outliers", "activations that without_outliers leaves out"),
    ("reconstruction.cosine", "mean cosine of x and y"),
    ("reconstruction.l2_ratio", "mean of |y| / |x|, where x is not zero"),
    ("reconstruction.relative_bias", "sum |y|^2 / sum <y, x>: below 1 the reconstruction shrinks"),
    ("reconstruction.dead_share", "share of latents that are active on no activation"),
    (
        "reconstruction.densities.n_latents",
        "latents by log10 of the share of activations that they are active on, in bins 0.25 wide \
         from -7 to 0; what is below is in the first",
    ),
    ("reconstruction.densities.n_dead", "latents that are active on no activation, and in no bin"),
    (
        "next_tokens.ce_*",
        "mean cross-entropy of the next token in nats: of the model as it is, with the \
         reconstruction in place of the activation, with zeros, with the mean activation",
    ),
    ("next_tokens.ce_recovered", "(ce_zero_ablated - ce_spliced) / (ce_zero_ablated - ce_clean)"),
    (
        "next_tokens.ce_recovered_from_mean",
        "(ce_mean_ablated - ce_spliced) / (ce_mean_ablated - ce_clean)",
    ),
    ("next_tokens.kl", "mean KL(clean || spliced) of the predictions in nats"),
    (
        "next_tokens.by_position",
        "the same means, over tokens that are predicted from positions from <= p < to of their \
         piece",
    ),
    ("rewards.mean_absolute_error", "mean over conversations of |spliced - clean| reward"),
    ("rewards.correlation", "Pearson's, of spliced and clean rewards"),
    (
        "rewards.pair_accuracy_*",
        "share of pairs whose chosen conversation has the higher reward, a tie counting half",
    ),
    (
        "n_left_out",
        "activations of the stream that were not trained on: longer than max_norm times the \
         median of the first 16384",
    ),
];

/// The trained SAEs, with where they come from.
pub(super) fn saes(trainers: &[Trainer], plan: &Plan, loaded: &TextModel) -> Result<Vec<Sae>> {
    let finished = trainers.iter().zip(&plan.saes).map(|(trainer, sae_plan)| {
        let sae = trainer.sae();
        let point = sae_plan.point()?;
        let mut config: SaeConfig = sae.config().clone();
        config.joins_heads = point.axes().len() == 4;
        let metadata = &mut config.metadata;
        metadata.model_name = Some(loaded.name.clone());
        metadata.hook_name = Some(point.to_string());
        metadata.prepend_bos = Some(plan.text.bos);
        let first = plan.stream.skip_positions;
        metadata.seqpos_slice = (first > 0).then(|| vec![Some(first as i64), None]);
        Ok(Sae::new(config, sae.weights().clone())?)
    });
    finished.collect()
}

impl Setting<'_> {
    /// Measures them all; nothing if it was stopped meanwhile.
    pub(super) fn measure(&self, saes: &[Sae]) -> Result<Option<Results>> {
        let Self { plan, loaded, held_out, .. } = self;
        let subject = |(sae, plan): (_, &SaePlan)| -> Result<Subject> {
            let from_position = self.plan.stream.skip_positions;
            let target = plan.target()?;
            Ok(Subject { from_position, target, ..Subject::new(sae, plan.point()?) })
        };
        let subjects: Vec<Subject> =
            saes.iter().zip(&plan.saes).map(subject).collect::<Result<_>>()?;
        let batch_tokens = plan.stream.batch_tokens;
        let bar = bar("measuring", 0);
        let progress = |progress: &MeasureProgress| {
            bar.set_length(progress.n_tokens as u64);
            bar.set_position(progress.n_done as u64);
            match self.stop.is_asked() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        };
        let evaluations = match (&loaded.model, self.preferences) {
            (HeadedModel::Reward(model), Some(pairs)) => {
                evaluate::reward_model(model, &subjects, pairs, batch_tokens, progress)
            }
            (model, _) => {
                let texts = held_out.range(0..held_out.len());
                evaluate::language_model(model.body(), &subjects, &texts, batch_tokens, progress)
            }
        };
        bar.finish_and_clear();
        let evaluations = match evaluations {
            Err(EvaluateError::Stopped) => return Ok(None),
            evaluations => evaluations.context("while measuring")?,
        };
        let saes = evaluations.into_iter().zip(saes).zip(&plan.saes);
        Ok(Some(Results {
            model: loaded.name.clone(),
            model_hash: loaded.hash.clone(),
            n_tokens: self.n_tokens,
            n_held_out_tokens: held_out.n_tokens(),
            n_left_out: self.n_left_out,
            max_norm: plan.stream.max_norm,
            n_steps: self.n_steps,
            definitions: DEFINITIONS.into(),
            batch: plan.batch,
            seed: plan.seed,
            saes: saes
                .map(|((evaluation, sae), plan)| Measured {
                    name: plan.name.clone(),
                    kind: plan.objective.label(),
                    d_in: sae.config().d_in,
                    d_sae: sae.config().d_sae,
                    evaluation,
                })
                .collect(),
        }))
    }
}

/// The results, a line for each SAE.
pub(super) fn summary(results: &Results) -> Vec<String> {
    let line = |sae: &Measured| {
        let Evaluation { reconstruction, next_tokens, rewards, .. } = &sae.evaluation;
        let mut line = format!(
            "{}: L0 {:.1}, FVU {:.3}, dead {:.1} %",
            sae.name,
            reconstruction.l0,
            reconstruction.fvu.global_centred,
            100.0 * reconstruction.dead_share
        );
        if let Some(figures) = next_tokens {
            line += &format!(", CE recovered {:.3}, KL {:.3}", figures.ce_recovered, figures.kl);
        }
        if let Some(figures) = rewards {
            line += &format!(
                ", reward error {:.3}, pairs {:.0} % → {:.0} %",
                figures.mean_absolute_error,
                100.0 * figures.pair_accuracy_clean,
                100.0 * figures.pair_accuracy_spliced
            );
        }
        line
    };
    results.saes.iter().map(line).collect()
}

/// The pairs that the plan names, as tokens.
pub(super) fn read_preferences(plan: &Plan, loaded: &TextModel) -> Result<Option<Vec<Preference>>> {
    #[derive(Deserialize)]
    struct Pair {
        chosen: String,
        rejected: String,
    }
    let Some(path) = &plan.preferences else {
        return Ok(None);
    };
    let place = || format!("the preferences {}", path.display());
    let text = fs::read_to_string(path).with_context(place)?;
    let mut pairs = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let line_place = || format!("{}, line {}", place(), number + 1);
        let pair: Pair = serde_json::from_str(line).with_context(line_place)?;
        let ids = |text: &str| -> Result<Vec<u32>> {
            let ids = loaded.tokenizer.encode(text).with_context(line_place)?;
            let n_ctx = loaded.model.body().config().n_ctx;
            ensure!(!ids.is_empty(), "{}: a conversation without text", line_place());
            ensure!(
                ids.len() <= n_ctx,
                "{}: {} tokens, the model's context has {n_ctx}: shorten it",
                line_place(),
                ids.len()
            );
            Ok(ids)
        };
        pairs.push(Preference { chosen: ids(&pair.chosen)?, rejected: ids(&pair.rejected)? });
    }
    ensure!(!pairs.is_empty(), "{} hold no pair", place());
    Ok(Some(pairs))
}
