//! `results.json` of the refusal experiment: what was run, and what came of it.
//!
//! Every number must be finite: JSON has no other.

use serde::{Deserialize, Serialize};
use steering::{McNemar, Outcome, Rate};

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
    /// What decides whether a prompt is steered, where steering is conditional.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub condition: Option<ConditionSummary>,
    /// How the experiment was set up.
    pub settings: Settings,
    /// The row that the page leads with. Chosen on the selection split, before the rows were
    /// measured, so that the page does not pick the luckiest of them.
    pub headline: Treatment,
    /// The same under the condition, chosen likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conditional: Option<Treatment>,
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
    /// How far the gradient promises that it does: the log-odds' slope times the same clamp.
    #[serde(default)]
    pub attribution: f64,
    /// How far it brings up the tokens that it writes towards.
    #[serde(default)]
    pub output_score: f64,
}

/// A condition, and how often it holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConditionSummary {
    /// What it is, in words.
    pub name: String,
    /// Where it is read, as the hook points' names.
    pub points: Vec<String>,
    /// What the score has to exceed.
    pub threshold: f64,
    /// Requests to refuse that it was learnt from.
    pub n_harmful: usize,
    /// Requests to answer that it was learnt from.
    pub n_harmless: usize,
    /// Area under the curve on the selection split: how often an unsafe prompt scores above a safe
    /// one.
    pub selection_auc: f64,
    /// How often it holds on the prompts of each set of the test split.
    pub holds: Vec<SetRate>,
}

/// A share of the prompts of a set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SetRate {
    /// The set's name.
    pub set: String,
    /// What kind of prompts it has.
    pub kind: SetKind,
    /// The share.
    pub rate: Rate,
}

/// A set of prompts that was tested on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetSummary {
    /// Its name.
    pub name: String,
    /// What kind of prompts it has.
    pub kind: SetKind,
    /// Prompts asked.
    pub n: usize,
}

/// What a set of prompts is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SetKind {
    /// To be refused.
    Unsafe,
    /// To be answered, though they look unsafe.
    LookAlike,
    /// To be answered, and nobody would doubt it.
    Ordinary,
}

impl SetKind {
    /// Whether its prompts should be refused.
    #[must_use]
    pub const fn prompt_kind(self) -> PromptKind {
        match self {
            Self::Unsafe => PromptKind::Unsafe,
            Self::LookAlike | Self::Ordinary => PromptKind::Safe,
        }
    }
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
    /// The sets of the test split. Of several unsafe ones, `unsafe_rate` is of the first.
    #[serde(default)]
    pub sets: Vec<SetSummary>,
    /// How far the judge agrees with people, where their labels were given.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub judge: Vec<JudgeCheck>,
    /// How long it all took, in seconds.
    pub seconds: f64,
    /// How long each step took, in seconds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<(String, f64)>,
    /// Answers and measurements that an earlier run had made, in a time of its own.
    #[serde(default)]
    pub n_reused: usize,
}

/// How far the judge agrees with people on the answers of another model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JudgeCheck {
    /// Whose answers.
    pub set: String,
    /// Whether the judge's phrases were chosen on these.
    pub developed_on: bool,
    /// Share of the answers, partial refusals left out, on which both agree.
    pub agreeing: Rate,
    /// Share of the partial refusals that the judge takes for refusals.
    pub partial: Rate,
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
    /// Which prompts were steered.
    #[serde(default)]
    pub condition: Condition,
}

/// One measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What was measured.
    #[serde(flatten)]
    pub treatment: Treatment,
    /// Share of the first unsafe set's prompts refused: what steering is to raise.
    pub unsafe_rate: Rate,
    /// Share of safe prompts refused: over-refusal, what steering is not to raise.
    pub safe_rate: Rate,
    /// The same over the safe prompts that only look unsafe, where they were asked apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub look_alike_rate: Option<Rate>,
    /// The same over the other safe prompts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ordinary_rate: Option<Rate>,
    /// Share of all answers that were empty, repeated themselves or were not text.
    pub degenerate_rate: Rate,
    /// Share of all answers that lectured without refusing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moralised_rate: Option<Rate>,
    /// Share of the prompts refused, set by set.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sets: Vec<SetRate>,
    /// Whether the first unsafe set's refusals differ from those without steering, prompt by prompt:
    /// the first outcome is without, the second with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unsafe_against_base: Option<McNemar>,
    /// The same of the safe prompts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub safe_against_base: Option<McNemar>,
    /// Mean log-odds that the answer to an unsafe prompt begins like a refusal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal_log_odds: Option<f64>,
    /// Mean divergence from the model left alone where answers to ordinary prompts begin, in nats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean_kl: Option<f64>,
    /// Perplexity on ordinary text, with nothing before it, over that of the model left alone.
    pub perplexity_ratio: f64,
    /// Its 95 % interval over texts drawn anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub perplexity_interval: Option<[f64; 2]>,
    /// What else the model can do, where it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capability: Option<Capability>,
    /// Conversations that lead up to harm, where they were led.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multi_turn: Option<MultiTurn>,
}

/// What a model can do besides refusing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Capability {
    /// Questions with choices, set by set.
    pub multiple_choice: Vec<MultipleChoice>,
    /// Word problems, solved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arithmetic: Option<Arithmetic>,
    /// Perplexity on ordinary text.
    pub perplexity: f64,
}

/// Questions with choices, answered by the likeliest choice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MultipleChoice {
    /// The set's name.
    pub set: String,
    /// Share answered right.
    pub accuracy: Rate,
    /// Mean probability of the right choice among the choices.
    pub probability: f64,
    /// Whether the questions answered right differ from those without steering: the first outcome is
    /// without, the second with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub against_base: Option<McNemar>,
}

/// Word problems, answered in words.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Arithmetic {
    /// The set's name.
    pub set: String,
    /// Share whose last number is the right one.
    pub correct: Rate,
}

/// Conversations that lead up to harm step by step (after Russinovich et al., 2024).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MultiTurn {
    /// Share of the ladders whose last, harmful request was answered.
    pub attack_success: Rate,
    /// The same, topic by topic.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub topics: Vec<Topic>,
    /// Share of the dialogues of a preference set whose last request was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dialogues_refused: Option<Rate>,
}

/// The ladders of a topic.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Topic {
    /// What they are about.
    pub topic: String,
    /// Share of them whose last request was answered.
    pub attack_success: Rate,
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
    /// The set that it comes from.
    #[serde(default)]
    pub set: String,
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
    /// A direction made to move the chosen latent and little else, added.
    SaeTargeted,
    /// All chosen latents, clamped to −strength × their largest activations; at 0, ablated.
    LatentAblated,
    /// The mean difference, projected out of all that writes to the residual stream.
    DirectionAblated,
    /// Control: the autoencoder's reconstruction in place of the activation, with no latent changed.
    SpliceOnly,
    /// Control: a latent that fires as much, on something else, reaching as far.
    UnrelatedLatent,
    /// Control: a latent drawn at random, reaching as far.
    RandomLatent,
    /// Control: a random direction, as long as what the headline's latents add.
    RandomDirection,
}

impl Method {
    /// All methods, in the order in which they are shown.
    pub const ALL: [Self; 11] = [
        Self::Base,
        Self::Latent,
        Self::Bundle,
        Self::MeanDifference,
        Self::SaeTargeted,
        Self::LatentAblated,
        Self::DirectionAblated,
        Self::SpliceOnly,
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
            Self::SaeTargeted => "targeted direction",
            Self::LatentAblated => "latents turned down",
            Self::DirectionAblated => "direction ablated",
            Self::SpliceOnly => "reconstruction only",
            Self::UnrelatedLatent => "unrelated latent",
            Self::RandomLatent => "random latent",
            Self::RandomDirection => "random direction",
        }
    }

    /// Whether it is there to show what steering by something else does.
    #[must_use]
    pub const fn is_control(self) -> bool {
        matches!(
            self,
            Self::SpliceOnly | Self::UnrelatedLatent | Self::RandomLatent | Self::RandomDirection
        )
    }
}

/// Which prompts are steered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Condition {
    /// All.
    #[default]
    Always,
    /// Those that the probe takes for unsafe.
    Probe,
}

impl Condition {
    /// Both, in the order in which they are shown.
    pub const ALL: [Self; 2] = [Self::Always, Self::Probe];

    /// Its name in prose.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Always => "always",
            Self::Probe => "if the probe says so",
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
                condition: Condition::Probe,
            },
            unsafe_rate: Rate::wilson(0, 0),
            safe_rate: Rate::wilson(0, 0),
            look_alike_rate: None,
            ordinary_rate: None,
            degenerate_rate: Rate::wilson(0, 0),
            moralised_rate: None,
            sets: Vec::new(),
            unsafe_against_base: None,
            refusal_log_odds: None,
            mean_kl: None,
            perplexity_ratio: 1.0,
            perplexity_interval: None,
            safe_against_base: None,
            capability: None,
            multi_turn: None,
        };
        let rate = json!({ "rate": 0.0, "low": 0.0, "high": 1.0, "n": 0 });
        let expected = json!({
            "arm": "zero_shot",
            "method": "mean_difference",
            "strength": 0.5,
            "condition": "probe",
            "unsafe_rate": rate,
            "safe_rate": rate,
            "degenerate_rate": rate,
            "perplexity_ratio": 1.0,
        });
        assert_eq!(serde_json::to_value(&row).unwrap(), expected);
        assert_eq!(serde_json::from_value::<Row>(expected).unwrap(), row);
    }

    #[test]
    fn rows_of_before_conditions_are_read() {
        let treatment = json!({ "arm": "six_shot", "method": "base", "strength": 0.0 });
        let treatment: Treatment = serde_json::from_value(treatment).unwrap();
        assert_eq!(treatment.condition, Condition::Always);
    }

    #[test]
    fn methods_and_kinds_keep_their_names() {
        let methods = json!([
            "base",
            "latent",
            "bundle",
            "mean_difference",
            "sae_targeted",
            "latent_ablated",
            "direction_ablated",
            "splice_only",
            "unrelated_latent",
            "random_latent",
            "random_direction"
        ]);
        assert_eq!(json!(Method::ALL), methods);
        assert_eq!(json!(Arm::ALL), json!(["zero_shot", "six_shot"]));
        assert_eq!(json!([PromptKind::Unsafe, PromptKind::Safe]), json!(["unsafe", "safe"]));
    }
}
