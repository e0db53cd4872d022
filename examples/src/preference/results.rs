//! What the program found, as `results.json` has it.

use attribution::Check;
use serde::Serialize;
use steering::{McNemar, Rate};

use super::bradley_terry::Agreement;
use super::options::SaeKind;
use super::pairs::LeftOut;
use super::planted::Rule;
use super::tuned::TuneConfig;

/// Everything that was found.
#[derive(Debug, Clone, Serialize)]
pub struct Results {
    /// The model that was opened up.
    pub model: String,
    /// Where its head comes from.
    pub head: Head,
    /// How its top blocks learnt with the head, if they did.
    pub tuned: Option<TuneConfig>,
    /// Which pairs it was learnt from, measured on and explained by.
    pub pairs: PairsUsed,
    /// Pairs to measure on, on which the preference model agrees.
    pub pm_accuracy: Rate,
    /// The same with its calibration.
    pub agreement: Agreement,
    /// The same for the pairs of each planted rule.
    pub by_rule: Vec<(Rule, Rate)>,
    /// Planted rules for which a latent of their own is among the twenty that matter most, over all
    /// autoencoders' rules.
    pub planted_recall: Option<Rate>,
    /// Autoencoders of which a decoy's latent comes before the best one of a rule that matters.
    pub decoys_above: Option<Rate>,
    /// Correlation of integrated gradients, over the ways of a tenth of the latents at a time, with
    /// ablation: of each autoencoder's verified latents.
    pub ig_pearson: Estimate,
    /// Of the twenty with the largest measured effects, the share among the twenty of the largest
    /// integrated gradients.
    pub ig_top20_recall: Estimate,
    /// As `ig_pearson`, where all latents go the way together.
    pub together_pearson: Estimate,
    /// As `ig_top20_recall`, where all latents go the way together.
    pub together_top20_recall: Estimate,
    /// As `ig_pearson`, of gradient × activation.
    pub gxa_pearson: Estimate,
    /// As `ig_top20_recall`, of gradient × activation.
    pub gxa_top20_recall: Estimate,
    /// Insertions of what fires raising latents that raise the reward of unrelated completions by
    /// more than `insertion_threshold`.
    pub insertion_success: Rate,
    /// The same of answers to other questions, those that fire them least.
    pub control_success: Rate,
    /// Half of what the rewards of a pair's texts differ by, the mean of the pairs measured on.
    pub insertion_threshold: f64,
    /// How much of the difference of rewards goes when latents are ablated in both texts.
    pub explained: Vec<Explained>,
    /// Pairs count whose difference of rewards is larger than this, in either direction.
    pub explained_threshold: f64,
    /// The autoencoders.
    pub saes: Vec<SaeResults>,
    /// What was inserted, and what came of it.
    pub insertions: Vec<Insertion>,
    /// A question said again against the same in other words, for each autoencoder.
    pub repetition: Vec<Repetition>,
    /// Heads on pairs of people, cross-validated.
    pub human: Option<Human>,
    /// The text that was asked about.
    pub text: Option<TextResults>,
    /// Whether latents were ablated on the last token too.
    pub with_last: bool,
    /// The seed of every draw.
    pub seed: u64,
    /// How long it all took; less where an earlier run had done a part.
    pub seconds: f64,
    /// How long each step took.
    pub steps: Vec<(String, f64)>,
}

/// Where the head of a preference model comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Head {
    /// Learnt here, from pairs.
    Learnt,
    /// The checkpoint's own.
    Own,
}

/// Which pairs were used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PairsUsed {
    /// The file, or none where they were made by rules.
    pub file: Option<String>,
    /// Pairs to learn from.
    pub n_train: usize,
    /// Pairs to measure on.
    pub n_test: usize,
    /// Of those, pairs that were attributed.
    pub n_attributed: usize,
    /// Of those, pairs on which latents were ablated one by one.
    pub n_verified: usize,
    /// Pairs of the file that were left out.
    pub left_out: Option<LeftOut>,
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

/// A number with 95 % of what it is when what it was measured on is drawn anew.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Interval {
    /// The number.
    pub value: f64,
    /// The 2.5th percentile.
    pub low: f64,
    /// The 97.5th.
    pub high: f64,
}

/// The share of the difference of rewards that some latents carry.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Explained {
    /// The block after which the autoencoder reads.
    pub layer: usize,
    /// How many latents were ablated, those with the largest effects on other pairs first.
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
    pub kind: SaeKind,
    /// Its latents.
    pub d_sae: usize,
    /// Latents active on a token.
    pub l0: f64,
    /// Fraction of variance unexplained.
    pub fvu: f64,
    /// The same without tokens of outlying norm.
    pub fvu_without_outliers: f64,
    /// Those tokens.
    pub n_outliers: usize,
    /// Tokens that it was measured on.
    pub n_tokens: usize,
    /// Integrated gradients against ablation, latent by latent.
    pub ig: Check,
    /// The same where all latents go the way together, as in the source work.
    pub together: Check,
    /// Gradient × activation against ablation.
    pub gxa: Check,
    /// Integrated gradients against ablation for each latent on each text.
    pub ig_by_text: Check,
    /// Gradient × activation, the same.
    pub gxa_by_text: Check,
    /// What integrated gradients miss of what ablating each group of latents does.
    pub completeness_residual: f64,
    /// What that does, added up.
    pub completeness_measured: f64,
    /// The share of the difference of rewards that goes with all latents.
    pub latents_share: Interval,
    /// The share that goes with the error.
    pub error_share: Interval,
    /// The share that integrated gradients give to all latents.
    pub attributed_to_latents: f64,
    /// The share that they give to the error.
    pub attributed_to_error: f64,
    /// The best place of a latent of each planted rule, from 0, if it is among the first twenty.
    pub recovered: Vec<(Rule, Option<usize>)>,
    /// Whether a decoy's latent comes before the best latent of a rule that matters.
    pub decoy_above: Option<bool>,
    /// The texts of the verified pairs, the preferred one of each first.
    pub texts: Vec<VerifiedText>,
    /// Latents by what they add to the difference of rewards, then by their effect on the reward.
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
    /// The same where all latents go the way together.
    pub together: f64,
    /// The same by gradient × activation.
    pub gxa: f64,
    /// The share of tokens that it is active on.
    pub density: f64,
    /// What it adds to the difference of rewards on all tokens but the last, if it is among the first
    /// twenty of those that raise rewards, or that lower them.
    pub adds: Option<f64>,
    /// The planted rule that it adds that for.
    pub rule: Option<Rule>,
    /// What it does on the verified texts that it is active on.
    pub on_texts: Vec<OnText>,
    /// Where it is most active.
    pub top: Vec<TopText>,
    /// Tokens whose logits one unit of it raises most; none where the model has no unembedding.
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
    /// Tokens around the one that it is most active on.
    pub tokens: Vec<String>,
    /// Values of the latent.
    pub values: Vec<f32>,
}

/// A phrase put behind an unrelated completion.
#[derive(Debug, Clone, Serialize)]
pub struct Insertion {
    /// The block of the autoencoder.
    pub layer: usize,
    /// What was inserted.
    pub phrase: String,
    /// Whether it is an answer to another question, that fires the raising latents least.
    pub is_control: bool,
    /// The reward without it.
    pub before: f64,
    /// The reward with it.
    pub after: f64,
    /// The reward with it, those latents ablated.
    pub ablated: f64,
}

/// What it costs to say the question again, word by word and in other words.
#[derive(Debug, Clone, Serialize)]
pub struct Repetition {
    /// The block of the autoencoder.
    pub layer: usize,
    /// The two latents that lower the reward of repetitions most, found on other texts than these.
    pub latents: Vec<usize>,
    /// Texts.
    pub n: usize,
    /// Mean reward of the plain answers.
    pub plain: f64,
    /// Change of the reward where the question is said again.
    pub repeated: Interval,
    /// Change of the reward where it is said in other words.
    pub paraphrased: Interval,
    /// The share of the gap between the two that comes back when the latents are ablated in the
    /// repetition.
    pub recovered: Interval,
    /// What the same ablation does to the paraphrases.
    pub control: Interval,
}

/// How well people's preferences are told, over all pairs, each by a head that learnt from others.
#[derive(Debug, Clone, Serialize)]
pub struct Human {
    /// Pairs.
    pub n: usize,
    /// Parts that the pairs were divided into.
    pub n_folds: usize,
    /// The head on the last token's state and the answer's mean.
    pub head: Agreement,
    /// After which block the head of each part reads: chosen on the pairs that it learnt from.
    pub layers: Vec<usize>,
    /// A head on each block's states alone: its accuracy.
    pub by_layer: Vec<(usize, Rate)>,
    /// Logistic regression on words and pairs of words.
    pub tf_idf: Rate,
    /// The shorter text.
    pub shorter: Rate,
    /// The head against the words, pair by pair.
    pub against_tf_idf: McNemar,
    /// The head against the length, pair by pair.
    pub against_shorter: McNemar,
}

/// What latents do to the reward of a text.
#[derive(Debug, Clone, Serialize)]
pub struct TextResults {
    /// Tokens.
    pub tokens: Vec<String>,
    /// Its reward.
    pub reward: f64,
    /// By each autoencoder.
    pub saes: Vec<TextBySae>,
}

/// What the latents of one autoencoder do to the reward of a text.
#[derive(Debug, Clone, Serialize)]
pub struct TextBySae {
    /// The block after which it reads.
    pub layer: usize,
    /// What all latents add at each token.
    pub by_token: Vec<f64>,
    /// What its error adds.
    pub error: f64,
    /// The largest: latent, position, and what it adds.
    pub latents: Vec<(usize, usize, f64)>,
}
