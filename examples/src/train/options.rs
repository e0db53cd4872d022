//! What the user can say: a few options, and a file with the rest.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use model_hooks::HookPoint;
use sae_core::train::{Schedule, TrainConfig, Transcoder};
use serde::Deserialize;

use super::objective::Objective;
use super::recipe::{
    AnnealPlan, CentrePlan, DecayPlan, DecoderPlan, InputScalePlan, OptimizerPlan, ResamplingPlan,
};
use crate::assets::locate_model;

/// Trains sparse autoencoders on what a language or reward model computes, and shows how good they
/// are. A run that was stopped goes on when it is started again with the same --out.
///
/// Exit codes: 0 done, 2 something is wrong, 3 stopped by SIGINT or SIGTERM with everything saved.
#[derive(Debug, Clone, Parser)]
#[command(name = "train", version, after_long_help = KEYS)]
pub struct Options {
    /// What to train, on what: see below, and examples/configs
    #[arg(value_name = "CONFIG.json")]
    pub config: PathBuf,
    /// Where the SAEs, the page and the checkpoints go
    #[arg(long, default_value = "target/train", value_name = "DIR")]
    pub out: PathBuf,
    /// The backend that computes
    #[arg(long, env = "BURN_DEVICE", default_value = "flex", value_name = "NAME")]
    pub device: String,
}

/// All keys of a config: what the long help ends with.
pub const KEYS: &str = include_str!("keys.txt");

/// What is trained, on what. Paths count from the file that says so.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// The SAEs, all of them trained on one stream.
    pub saes: Vec<SaePlan>,
    /// A GGUF file, a Hugging Face folder, or a hub id; SmolLM2-135M-Instruct if not given.
    #[serde(default)]
    pub model: Option<String>,
    /// A JSONL file of pairs with `chosen` and `rejected`: then the model is a reward model, and the
    /// SAEs are evaluated by its rewards.
    #[serde(default)]
    pub preferences: Option<PathBuf>,
    /// What the model reads.
    #[serde(default)]
    pub text: TextPlan,
    /// How activations come to the SAEs.
    #[serde(default)]
    pub stream: StreamPlan,
    /// Activations per step.
    #[serde(default = "default_batch")]
    pub batch: usize,
    /// Steps of the run; all that the stream has batches for if not given.
    #[serde(default)]
    pub n_steps: Option<usize>,
    /// Steps between checkpoints.
    #[serde(default = "default_checkpoint_every")]
    pub checkpoint_every: usize,
    /// Steps between evaluations on the held-out text.
    #[serde(default = "default_evaluate_every")]
    pub evaluate_every: usize,
    /// Steps that each SAE may skip because its loss or gradient was not finite.
    #[serde(default = "default_max_skipped")]
    pub max_skipped: usize,
    /// Decides every draw.
    #[serde(default)]
    pub seed: u64,
}

/// One SAE.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SaePlan {
    /// What it is called, and its folder.
    pub name: String,
    /// The activation that it reads.
    pub hook_point: String,
    /// The activation that a transcoder reconstructs in place of the one that it reads.
    #[serde(default)]
    pub target: Option<String>,
    /// Whether a transcoder has a matrix past its latents.
    #[serde(default)]
    pub skip: bool,
    /// The kind of SAE, and what it minimises.
    pub objective: Objective,
    /// Number of latents; `expansion` times the width if not given.
    #[serde(default)]
    pub d_sae: Option<usize>,
    /// Latents per dimension; 8 if neither is given.
    #[serde(default)]
    pub expansion: Option<usize>,
    /// The peak of the learning rate.
    #[serde(default = "default_learning_rate")]
    pub learning_rate: f64,
    /// The share of the steps over which the rate rises.
    #[serde(default = "default_warmup")]
    pub warmup: f64,
    /// The share of the steps over which it falls.
    #[serde(default = "default_decay")]
    pub decay: f64,
    /// How it falls.
    #[serde(default)]
    pub decay_shape: DecayPlan,
    /// The share of the steps over which the weight of sparsity rises.
    #[serde(default)]
    pub sparsity_warmup: f64,
    /// Where `k` or `p` starts, if it moves to where the objective has it.
    #[serde(default)]
    pub anneal: Option<AnnealPlan>,
    /// How the weights follow their gradients.
    #[serde(default)]
    pub optimizer: OptimizerPlan,
    /// Gradients of a larger norm are scaled down to this one.
    #[serde(default = "default_clip_norm")]
    pub clip_norm: Option<f64>,
    /// What holds the norms of decoder rows.
    #[serde(default)]
    pub decoder: DecoderPlan,
    /// Their norm at the start; 1 if they are held, or else 0.1, if not given.
    #[serde(default)]
    pub decoder_norm: Option<f64>,
    /// How activations are scaled before the SAE reads them.
    #[serde(default)]
    pub input_scale: InputScalePlan,
    /// Where `b_dec` starts.
    #[serde(default)]
    pub centre: CentrePlan,
    /// A latent is dead when it was not active on so many activations in a row.
    #[serde(default = "default_dead_after")]
    pub dead_after: u64,
    /// Whether dead latents get new weights from time to time.
    #[serde(default)]
    pub resampling: Option<ResamplingPlan>,
}

/// What the model reads.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TextPlan {
    /// Files or folders of .txt, .md and .jsonl; human dialogues from a Python package if none.
    pub paths: Vec<PathBuf>,
    /// The field of a line of .jsonl that has the text.
    pub field: String,
    /// Tokens to train on, at most.
    pub n_tokens: Option<usize>,
    /// Tokens to evaluate on, none of which is trained on.
    pub held_out_tokens: usize,
    /// Longer texts are cut into pieces of so many tokens, and shorter ones share a row.
    pub row_tokens: usize,
    /// Whether every piece begins with the model's token for the beginning of a text.
    pub bos: bool,
    /// Times that the text is read.
    pub n_passes: u64,
}

impl Default for TextPlan {
    fn default() -> Self {
        Self {
            paths: Vec::new(),
            field: "text".to_owned(),
            n_tokens: None,
            held_out_tokens: 8192,
            row_tokens: 128,
            bos: false,
            n_passes: 1,
        }
    }
}

/// How activations come to the SAEs.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StreamPlan {
    /// A folder to keep the activations in; without one, the model runs while the SAEs train.
    pub store: Option<PathBuf>,
    /// Positions at the start of every piece that are left out.
    pub skip_positions: usize,
    /// Activations are left out whose norm is above so many times the median, if any are.
    pub max_norm: Option<f64>,
    /// Tokens of a forward pass.
    pub batch_tokens: usize,
    /// Activations that are shuffled among each other.
    pub mixed_rows: usize,
    /// The share of them that stays when more are taken in.
    pub mixed_share: f64,
}

impl Default for StreamPlan {
    fn default() -> Self {
        Self {
            store: None,
            skip_positions: 1,
            max_norm: Some(10.0),
            batch_tokens: 1024,
            mixed_rows: 16_384,
            mixed_share: 0.5,
        }
    }
}

fn default_batch() -> usize {
    1024
}

fn default_checkpoint_every() -> usize {
    200
}

fn default_evaluate_every() -> usize {
    100
}

fn default_max_skipped() -> usize {
    10
}

fn default_learning_rate() -> f64 {
    4e-4
}

fn default_warmup() -> f64 {
    0.05
}

fn default_decay() -> f64 {
    0.2
}

fn default_clip_norm() -> Option<f64> {
    Some(1.0)
}

fn default_dead_after() -> u64 {
    1_000_000
}

impl Plan {
    /// Reads a plan, and resolves its paths.
    ///
    /// # Errors
    /// If the file is no plan, or something that it names is not there.
    pub fn read(path: &Path) -> Result<Self> {
        let place = || format!("the config {}", path.display());
        let text = fs::read_to_string(path)
            .with_context(|| format!("{}: pass one of examples/configs", place()))?;
        let mut plan: Self = serde_json::from_str(&text).with_context(place)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let mut paths: Vec<&mut PathBuf> = plan.text.paths.iter_mut().collect();
        paths.extend(&mut plan.preferences);
        for path in paths {
            *path = folder.join(&path);
            ensure!(
                path.exists(),
                "{}: there is no {}: paths count from the config's folder",
                place(),
                path.display()
            );
        }
        if let Some(store) = &mut plan.stream.store {
            *store = folder.join(&store);
        }
        if let Some(model) = &mut plan.model
            && folder.join(&model).exists()
        {
            *model = folder.join(&model).to_string_lossy().into_owned();
        }
        plan.check().with_context(place)?;
        Ok(plan)
    }

    /// Where the model is, once it has been fetched if need be.
    ///
    /// # Errors
    /// If it cannot be had.
    pub fn locate_model(&self) -> Result<PathBuf> {
        ensure!(
            self.model.is_some() || self.preferences.is_none(),
            "preferences need a reward model: name one in \"model\""
        );
        locate_model(self.model.as_deref())
    }

    fn check(&self) -> Result<()> {
        ensure!(!self.saes.is_empty(), "\"saes\" is empty: describe at least one SAE");
        let TextPlan { row_tokens, held_out_tokens, n_passes, .. } = self.text;
        for (key, actual, least) in [
            ("text.row_tokens", row_tokens, 2 + self.stream.skip_positions),
            ("text.held_out_tokens", held_out_tokens, row_tokens),
            ("text.n_passes", n_passes as usize, 1),
            ("stream.batch_tokens", self.stream.batch_tokens, 1),
        ] {
            ensure!(actual >= least, "{key} is {actual}, and has to be at least {least}");
        }
        for (idx, sae) in self.saes.iter().enumerate() {
            let name = &sae.name;
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
            ensure!(
                !name.is_empty() && name.chars().all(plain) && name != "checkpoints",
                "the name {name:?} of an SAE becomes a folder: use letters, digits, - and _, and \
                 not \"checkpoints\""
            );
            if self.saes[..idx].iter().any(|other| other.name == *name) {
                bail!("two SAEs are named {name:?}: give each a name of its own");
            }
            ensure!(
                sae.d_sae.is_none() || sae.expansion.is_none(),
                "{name}: d_sae and expansion say the same thing: leave one out"
            );
            sae.points()?;
            ensure!(
                sae.target.is_some() || !sae.skip,
                "{name}: skip is for transcoders: name what it is to reconstruct in target"
            );
        }
        Ok(())
    }
}

impl SaePlan {
    /// The activation that it reads.
    ///
    /// # Errors
    /// If there is no such hook point.
    pub fn point(&self) -> Result<HookPoint> {
        let point = self.hook_point.parse();
        point.with_context(|| format!("{}: hook_point {:?}", self.name, self.hook_point))
    }

    /// The activation that a transcoder reconstructs.
    ///
    /// # Errors
    /// If there is no such hook point.
    pub fn target(&self) -> Result<Option<HookPoint>> {
        let parse =
            |name: &String| name.parse().with_context(|| format!("{}: target {name:?}", self.name));
        self.target.as_ref().map(parse).transpose()
    }

    /// All activations that it is trained on.
    ///
    /// # Errors
    /// If there is no such hook point.
    pub fn points(&self) -> Result<Vec<HookPoint>> {
        Ok([Some(self.point()?), self.target()?].into_iter().flatten().collect())
    }

    /// How it is trained, on activations of this width, towards a target of another one.
    pub fn train_config(&self, d_in: usize, d_out: Option<usize>) -> TrainConfig {
        let d_sae = self.d_sae(d_in);
        let mut objective = self.objective.of(d_sae);
        // What b_dec is added to is no input of a transcoder's.
        objective.apply_b_dec_to_input &= d_out.is_none();
        let schedule = Schedule::new()
            .with_learning_rate(self.learning_rate)
            .with_warmup(self.warmup)
            .with_decay(self.decay)
            .with_decay_shape(self.decay_shape.into())
            .with_sparsity_warmup(self.sparsity_warmup)
            .with_anneal(self.anneal.map(Into::into));
        let decoder_norm = match self.decoder {
            DecoderPlan::Free => 0.1,
            DecoderPlan::Unit => 1.0,
        };
        TrainConfig::new(d_sae, objective)
            .with_transcoder(d_out.map(|d_out| Transcoder { d_out, skip: self.skip }))
            .with_schedule(schedule)
            .with_optimizer(self.optimizer.into())
            .with_clip_norm(self.clip_norm)
            .with_decoder(self.decoder.into())
            .with_decoder_norm(self.decoder_norm.unwrap_or(decoder_norm))
            .with_input_scale(self.input_scale.into())
            .with_centre(self.centre.into())
            .with_dead_after(self.dead_after)
            .with_resampling(self.resampling.map(Into::into))
    }

    /// Number of latents, on activations of this width.
    pub fn d_sae(&self, width: usize) -> usize {
        self.d_sae.unwrap_or_else(|| self.expansion.unwrap_or(8) * width)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::recipe::BetasPlan;
    use serde::de::DeserializeOwned;

    /// The keys that a type knows, from what it says about one that it does not.
    fn keys_of<T: DeserializeOwned>() -> Vec<String> {
        let error = serde_json::from_str::<T>(r#"{"?": 0}"#).err().expect("refused").to_string();
        let expected = error.split("expected ").nth(1).unwrap_or_else(|| panic!("{error}"));
        expected.split('`').skip(1).step_by(2).map(str::to_owned).collect()
    }

    #[test]
    fn the_table_of_keys_is_whole() {
        let mut known: Vec<String> = keys_of::<Plan>();
        known.retain(|key| key != "text" && key != "stream");
        known.extend(keys_of::<TextPlan>().iter().map(|key| format!("text.{key}")));
        known.extend(keys_of::<StreamPlan>().iter().map(|key| format!("stream.{key}")));
        known.extend(keys_of::<SaePlan>());
        known.extend(keys_of::<Objective>());
        let told = KEYS.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   "));
        let told: Vec<&str> = told
            .flat_map(|line| line.trim().split("  ").next().expect("a key").split(", "))
            .collect();
        for key in &known {
            assert!(told.contains(&key.as_str()), "{key} is not in keys.txt");
        }
        for key in told {
            assert!(known.iter().any(|known| known == key), "{key} is in keys.txt, and unknown");
        }
        let within = [keys_of::<AnnealPlan>(), keys_of::<ResamplingPlan>(), keys_of::<BetasPlan>()];
        for key in within.into_iter().flatten().chain(keys_of::<OptimizerPlan>()) {
            assert!(KEYS.contains(&format!("\"{key}\"")), "{key} is not in keys.txt");
        }
        for kind in keys_of::<Objective>().iter().filter(|kind| *kind != "custom") {
            let error = serde_json::from_str::<Objective>(&format!("{{{kind:?}: {{\"?\": 0}}}}"));
            let error = error.expect_err("refused").to_string();
            let at = KEYS.find(&format!("\n  {kind} ")).expect("it was found before");
            for field in error.split('`').skip(3).step_by(2) {
                assert!(KEYS[at..].contains(field), "{kind}: {field} is not in keys.txt");
            }
        }
    }

    #[test]
    fn what_is_said_is_what_is_trained() {
        let plan: SaePlan = serde_json::from_str(
            r#"{"name": "a", "hook_point": "blocks.0.hook_resid_post", "d_sae": 64,
                "objective": {"standard": {"l1_coefficient": 2, "p": 0.5, "to_the_p": true,
                    "weighted_by_decoder_norms": false}},
                "decay_shape": "cosine", "anneal": {"from": 1, "end": 0.5}, "decoder": "unit",
                "optimizer": {"row_lazy_adam": {"beta_1": 0.5}}, "centre": "geometric_median",
                "input_scale": "layer_norm", "resampling": {"every": 50, "rule": "dictionary_learning"}, "clip_norm": null}"#,
        )
        .expect("a plan");
        use sae_core::train::*;
        let sparsity = Sparsity {
            coefficient: 2.0,
            norm: SparsityNorm::LpToTheP { p: 0.5 },
            weighted_by_decoder_norms: false,
        };
        let kind = Kind::Standard(Standard { sparsity });
        let objective = Objective::new(kind);
        let anneal = Anneal { from: 1.0, begin: 0.0, end: 0.5 };
        let expected = TrainConfig::new(64, objective)
            .with_schedule(
                Schedule::new().with_decay_shape(DecayShape::Cosine).with_anneal(Some(anneal)),
            )
            .with_decoder(DecoderNorm::Unit)
            .with_decoder_norm(1.0)
            .with_optimizer(Optimizer::RowLazyAdam(Betas::new().with_beta_1(0.5)))
            .with_input_scale(InputScale::LayerNorm)
            .with_centre(Centre::GeometricMedian)
            .with_resampling(Some(
                Resampling::new(50).with_rule(ResamplingRule::DictionaryLearning),
            ));
        assert_eq!(plan.train_config(32, None), expected);
        assert_eq!(expected.validate(32), Ok(()));
    }
}
