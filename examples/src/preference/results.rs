//! What the program found, as `results.json` has it.

use attribution::Check;
use serde::Serialize;
use steering::Rate;

use super::bradley_terry::Agreement;
use super::planted::Rule;

/// Everything that was found.
#[derive(Debug, Clone, Serialize)]
pub struct Results {
    /// The model that the head stands on.
    pub model: String,
    /// Held-out pairs on which the preference model agrees with the rules.
    pub pm_accuracy: Rate,
    /// The same with its calibration.
    pub agreement: Agreement,
    /// The same for the pairs of each rule.
    pub by_rule: Vec<(Rule, Rate)>,
    /// Rules for which a latent of their own is among the twenty that matter most, over all
    /// autoencoders' rules.
    pub planted_recall: Rate,
    /// Correlation of integrated gradients with ablation, over all autoencoders' verified latents.
    pub ig_pearson: Estimate,
    /// Of the twenty with the largest measured effects, the share among the twenty of the largest
    /// integrated gradients.
    pub ig_top20_recall: Estimate,
    /// As `ig_pearson`, of gradient × activation.
    pub gxa_pearson: Estimate,
    /// As `ig_top20_recall`, of gradient × activation.
    pub gxa_top20_recall: Estimate,
    /// Insertions of what fires raising latents that raise the reward of unrelated completions by
    /// more than `insertion_threshold`.
    pub insertion_success: Rate,
    /// The same of what fires none of them.
    pub control_success: Rate,
    /// Half of the standard deviation of the rewards of those completions.
    pub insertion_threshold: f64,
    /// How much of the difference of rewards goes when latents are ablated in both texts.
    pub explained: Vec<Explained>,
    /// Pairs count whose difference of rewards is larger than this, in either direction.
    pub explained_threshold: f64,
    /// The autoencoders.
    pub saes: Vec<SaeResults>,
    /// What was inserted, and what came of it.
    pub insertions: Vec<Insertion>,
    /// The seed of every draw.
    pub seed: u64,
    /// Minutes are sixty of these.
    pub seconds: f64,
}

/// A mean over autoencoders, with the least and the largest.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Estimate {
    /// The mean.
    pub mean: f64,
    /// The least.
    pub low: f64,
    /// The largest.
    pub high: f64,
}

impl Estimate {
    /// Of some numbers.
    pub fn of(values: &[f64]) -> Self {
        let fold = |start: f64, f: fn(f64, f64) -> f64| values.iter().copied().fold(start, f);
        Self {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            low: fold(f64::INFINITY, f64::min),
            high: fold(f64::NEG_INFINITY, f64::max),
        }
    }
}

/// The share of the difference of rewards that some latents carry.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Explained {
    /// The block after which the autoencoder reads.
    pub layer: usize,
    /// How many latents were ablated, those with the largest effects first.
    pub n_latents: usize,
    /// `1 − Σ Δ(ablated) / Σ Δ(clean)`.
    pub share: f64,
    /// The 2.5th percentile, pairs drawn anew.
    pub low: f64,
    /// The 97.5th.
    pub high: f64,
}

/// An autoencoder and what its latents do.
#[derive(Debug, Clone, Serialize)]
pub struct SaeResults {
    /// The block after which it reads.
    pub layer: usize,
    /// Its kind.
    pub kind: String,
    /// Its latents.
    pub d_sae: usize,
    /// Latents active on a token.
    pub l0: f64,
    /// Fraction of variance unexplained.
    pub fvu: f64,
    /// The same without outliers.
    pub fvu_without_outliers: f64,
    /// Integrated gradients against ablation.
    pub ig: Check,
    /// Gradient × activation against ablation.
    pub gxa: Check,
    /// What integrated gradients of all latents miss of what ablating all of them does.
    pub completeness_residual: f64,
    /// What ablating all of them does.
    pub completeness_measured: f64,
    /// The share of the difference of rewards that the error carries.
    pub error_share: f64,
    /// The best place of a latent of each rule, from 0, if it is among the first twenty.
    pub recovered: Vec<(Rule, Option<usize>)>,
    /// Whether a decoy's latent comes before the best latent of a rule that matters.
    pub decoy_above: bool,
    /// The texts of the verified pairs, the preferred one of each first.
    pub texts: Vec<VerifiedText>,
    /// Latents by effect on the reward: those that raise it most, then those that lower it most.
    pub latents: Vec<LatentRow>,
    /// Effects of all active latents, for a histogram.
    pub effects: Vec<f64>,
}

/// A latent of the table.
#[derive(Debug, Clone, Serialize)]
pub struct LatentRow {
    /// Which.
    pub latent: usize,
    /// Mean effect of ablating it over the verified texts: negative where it raises the reward.
    pub measured: f64,
    /// The same by integrated gradients.
    pub ig: f64,
    /// The same by gradient × activation.
    pub gxa: f64,
    /// The share of tokens that it is active on.
    pub density: f64,
    /// The rule that its effect follows most.
    pub rule: Rule,
    /// What it does on the verified texts that it is active on.
    pub on_texts: Vec<OnText>,
    /// Where it is most active.
    pub top: Vec<TopText>,
    /// Tokens whose logits one unit of it raises most.
    pub promoted: Vec<String>,
}

/// What a latent does on a verified text.
#[derive(Debug, Clone, Serialize)]
pub struct OnText {
    /// Index of the text.
    pub text: usize,
    /// What ablating the latent does to its reward.
    pub effect: f64,
    /// Positions and values.
    pub values: Vec<(usize, f32)>,
}

/// A text on which latents were ablated.
#[derive(Debug, Clone, Serialize)]
pub struct VerifiedText {
    /// Tokens.
    pub tokens: Vec<String>,
    /// Its reward.
    pub reward: f64,
    /// The first position that was changed.
    pub from: usize,
}

/// A text with what a latent does on its tokens.
#[derive(Debug, Clone, Serialize)]
pub struct TopText {
    /// Tokens.
    pub tokens: Vec<String>,
    /// Values of the latent.
    pub values: Vec<f32>,
}

/// A phrase put behind an unrelated completion.
#[derive(Debug, Clone, Serialize)]
pub struct Insertion {
    /// What was inserted.
    pub phrase: String,
    /// Whether it fires none of the raising latents.
    pub is_control: bool,
    /// The reward without it.
    pub before: f64,
    /// The reward with it.
    pub after: f64,
    /// The reward with it, those latents ablated.
    pub ablated: f64,
}
