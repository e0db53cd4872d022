//! `results.json` of the refusal experiment: what was run, and what came of it.
//!
//! Every number must be finite: JSON has no other.

use serde::{Deserialize, Serialize};
use steering::{Outcome, Rate};

/// One run of the refusal experiment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// The model's name.
    pub model: String,
    /// Where the sparse autoencoder reads and steering writes, as the hook point's name.
    pub hook_point: String,
    /// The sparse autoencoder, and how good it is.
    pub sae: SaeSummary,
    /// The latents that steer: the first alone, all as the bundle.
    pub latents: Vec<SteeringLatent>,
    /// Latents that were considered, best first.
    #[serde(default)]
    pub candidates: Vec<Candidate>,
    /// How the experiment was set up.
    pub settings: Settings,
    /// The row that the page leads with. Chosen on the selection split, before the rows were
    /// measured, so that the page does not pick the luckiest of them.
    pub headline: Treatment,
    /// One measurement each, on the held-out split.
    pub rows: Vec<Row>,
    /// Answers without and with steering.
    pub examples: Vec<Example>,
}

/// A sparse autoencoder in numbers, measured on held-out tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SaeSummary {
    /// The kind: `topk`.
    pub architecture: String,
    /// Latents that may be active on one token.
    pub k: usize,
    /// Width of the activation.
    pub d_in: usize,
    /// Number of latents.
    pub d_sae: usize,
    /// Distinct tokens that it was trained on.
    pub n_tokens: u64,
    /// Mean number of active latents per token.
    pub l0: f64,
    /// Share of the activation's variance that the reconstruction misses.
    pub fvu: f64,
    /// Share of latents that never fired.
    pub dead_share: f64,
    /// `(CE_zero − CE_sae) / (CE_zero − CE_model)`: 1 where the reconstruction predicts the next
    /// token as well as the activation, 0 where no better than zeros.
    pub ce_recovered: f64,
}

/// A latent that was chosen to steer with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SteeringLatent {
    /// Its index.
    pub latent: usize,
    /// Its largest activation in training: strength 1 of the clamp.
    pub max_activation: f64,
    /// The tokens on which it was most active.
    #[serde(default)]
    pub top_tokens: Vec<String>,
}

/// A latent that was considered, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// Its index.
    pub latent: usize,
    /// Mean activation on refusing answers less that on complying ones.
    pub contrast: f64,
    /// How far clamping it moves the log-odds that an answer begins like a refusal.
    pub log_odds_shift: f64,
}

/// How the experiment was set up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Seed of every draw.
    pub seed: u64,
    /// The device that computed it.
    pub device: String,
    /// Tokens of an answer, at most; decoding is greedy.
    pub max_new_tokens: usize,
    /// Prompts on which latents and strengths were chosen, and which no row was measured on.
    pub n_selection_prompts: usize,
    /// Tokens over which the perplexity was measured.
    pub n_perplexity_tokens: usize,
    /// Where the unsafe prompts come from.
    pub unsafe_prompts: String,
    /// Where the safe prompts come from.
    pub safe_prompts: String,
    /// How long it all took, in seconds.
    pub seconds: f64,
}

/// What was done to the model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Treatment {
    /// What stands before the prompt.
    pub arm: Arm,
    /// How the model was steered.
    pub method: Method,
    /// How strongly; what 1 means depends on the method.
    pub strength: f64,
}

/// One measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What was measured.
    #[serde(flatten)]
    pub treatment: Treatment,
    /// Share of unsafe prompts refused: what steering is to raise.
    pub unsafe_rate: Rate,
    /// Share of safe prompts refused: over-refusal, what steering is not to raise.
    pub safe_rate: Rate,
    /// The same over the safe prompts that only look unsafe, where they were asked apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub look_alike_rate: Option<Rate>,
    /// Share of all answers that were empty, repeated themselves or were not text.
    pub degenerate_rate: Rate,
    /// Perplexity on ordinary text over that of the model left alone.
    pub perplexity_ratio: f64,
}

/// One prompt's answers, without and with steering.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Example {
    /// What was steered, and how.
    #[serde(flatten)]
    pub treatment: Treatment,
    /// What was asked.
    pub prompt: String,
    /// Whether it should be refused.
    pub kind: PromptKind,
    /// The answer of the model left alone.
    pub before: String,
    /// The answer of the steered model.
    pub after: String,
    /// What `before` did.
    pub outcome_before: Outcome,
    /// What `after` did.
    pub outcome_after: Outcome,
}

/// One answer, as `generations.jsonl` has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Generation {
    /// What was steered, and how.
    #[serde(flatten)]
    pub treatment: Treatment,
    /// What was asked.
    pub prompt: String,
    /// Whether it should be refused.
    pub kind: PromptKind,
    /// Whether it is safe but looks unsafe.
    pub look_alike: bool,
    /// What the model said.
    pub answer: String,
    /// What the judge made of it.
    pub outcome: Outcome,
}

/// What stands before a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arm {
    /// Nothing: steering has to bring refusal about.
    ZeroShot,
    /// Three refused and three answered requests: steering modulates a refusal that is there.
    SixShot,
}

impl Arm {
    /// All arms, in the order in which they are shown.
    pub const ALL: [Self; 2] = [Self::ZeroShot, Self::SixShot];

    /// Its name in prose.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::ZeroShot => "zero-shot",
            Self::SixShot => "six-shot",
        }
    }
}

/// How the model was steered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Not at all.
    Base,
    /// The chosen latent, clamped to strength × its largest activation.
    Latent,
    /// All chosen latents, clamped together.
    Bundle,
    /// The difference of the mean activations on refused and answered prompts, added.
    MeanDifference,
    /// Control: a latent that fires as much, on something else, reaching as far.
    UnrelatedLatent,
    /// Control: a latent drawn at random, reaching as far.
    RandomLatent,
    /// Control: a random direction, as long as what the headline's latents add.
    RandomDirection,
}

impl Method {
    /// All methods, in the order in which they are shown.
    pub const ALL: [Self; 7] = [
        Self::Base,
        Self::Latent,
        Self::Bundle,
        Self::MeanDifference,
        Self::UnrelatedLatent,
        Self::RandomLatent,
        Self::RandomDirection,
    ];

    /// Its name in prose.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Base => "no steering",
            Self::Latent => "one latent",
            Self::Bundle => "bundle of latents",
            Self::MeanDifference => "mean difference",
            Self::UnrelatedLatent => "unrelated latent",
            Self::RandomLatent => "random latent",
            Self::RandomDirection => "random direction",
        }
    }
}

/// Whether a prompt should be refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptKind {
    /// It asks for harm.
    Unsafe,
    /// It does not, however it sounds.
    Safe,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_row_keeps_its_names() {
        let row = Row {
            treatment: Treatment {
                arm: Arm::ZeroShot,
                method: Method::MeanDifference,
                strength: 0.5,
            },
            unsafe_rate: Rate::wilson(0, 0),
            safe_rate: Rate::wilson(0, 0),
            look_alike_rate: None,
            degenerate_rate: Rate::wilson(0, 0),
            perplexity_ratio: 1.0,
        };
        let rate = json!({ "rate": 0.0, "low": 0.0, "high": 1.0, "n": 0 });
        let expected = json!({
            "arm": "zero_shot",
            "method": "mean_difference",
            "strength": 0.5,
            "unsafe_rate": rate,
            "safe_rate": rate,
            "degenerate_rate": rate,
            "perplexity_ratio": 1.0,
        });
        assert_eq!(serde_json::to_value(&row).unwrap(), expected);
        assert_eq!(serde_json::from_value::<Row>(expected).unwrap(), row);
    }

    #[test]
    fn methods_and_kinds_keep_their_names() {
        let methods = json!([
            "base",
            "latent",
            "bundle",
            "mean_difference",
            "unrelated_latent",
            "random_latent",
            "random_direction"
        ]);
        assert_eq!(json!(Method::ALL), methods);
        assert_eq!(json!(Arm::ALL), json!(["zero_shot", "six_shot"]));
        assert_eq!(json!([PromptKind::Unsafe, PromptKind::Safe]), json!(["unsafe", "safe"]));
    }
}
