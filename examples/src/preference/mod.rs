//! Opens up a preference model: what raises and lowers its rewards, proven by ablation.
//!
//! After Riggs and Brinkmann, "Interpreting Preference Models with Sparse Autoencoders" (2024). By
//! default the preference model is a planted one: it is trained on pairs whose preference follows
//! known rules ([`planted`]), so that what an attribution finds can be judged.

pub mod bradley_terry;
pub mod classifier;
mod effects;
mod explained;
mod human;
mod insertions;
mod model;
mod options;
mod page;
pub mod pairs;
pub mod planted;
mod ranked;
mod recovery;
mod repetition;
mod results;
mod saes;
mod sources;
mod stages;
mod table;
mod telling;
mod text;
pub mod tf_idf;
mod trained;
mod tuned;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use attribution::Check;
use steering::Rate;

pub use options::{Blocks, Options, Preset, SaeKind, Scale};
pub use page::render;
pub use results::{
    Estimate, Explained, Head, Human, Insertion, Interval, LatentRow, OnText, PairsUsed,
    Repetition, Results, SaeResults, TextBySae, TextResults, TopText, VerifiedText,
};
pub use text::{as_conversation, attribute_text};
pub use tuned::TuneConfig;

use self::bradley_terry::Agreement;
use self::effects::{Question, TextEffects, Thresholds, extremes, means};
use self::insertions::Insertions;
use self::model::texts;
use self::planted::{PlantedPair, Rule};
use self::ranked::Ranked;
use self::recovery::TOP;
use self::saes::TrainedSae;
use self::sources::{Encoding, Origin, Sources, sources};
use self::stages::Stages;
use self::telling::{tell_human, tell_sae};
use self::trained::{Run, Trained};
use crate::assets::{self, HeadedModel, TextModel, load_text_model, locate_model};
use crate::clock::Clock;
use crate::device::device;
use crate::progress::tell;
use crate::storage::cache_folder;

/// Latents named for a text of the user's.
const N_NAMED: usize = 8;

/// Runs it all. What an earlier run had done is in the cache, and is not done again.
///
/// # Errors
/// If the model cannot be had, or a step fails; the message says which.
pub fn run(options: &Options) -> Result<Results> {
    let mut clock = Clock::new();
    let (scale, device) = (options.scale(), device(&options.device)?);
    clock.step("Model");
    let path = locate_model(options.model.as_deref())?;
    let own_head = has_own_head(&path)?;
    if options.preset == Some(Preset::GptjPm) && !own_head {
        bail!("--preset gptj-pm opens up a reward model: pass a sequence classifier with --model");
    }
    let head = if own_head { assets::Head::Reward } else { assets::Head::Language };
    let mut loaded = load_text_model(path.clone(), head, &device)?;
    let config = loaded.model.body().config().clone();
    let layers = options.layers(&scale, config.n_layers)?;
    let (n_layers, d_model) = (config.n_layers, config.d_model);
    tell(&format!("{}, {n_layers} blocks of {d_model}", loaded.name));
    let end = config.special_tokens.eos.first().copied().filter(|_| !options.without_end);
    let max_tokens = scale.max_tokens.min(config.n_ctx);
    let n_ctx = config.n_ctx;
    let encoding = Encoding { tokenizer: &loaded.tokenizer, end, max_tokens, n_ctx };
    let stages = Stages::new(cache_folder()?.join("preference"), options.retrain);
    let sources = sources(options, &scale, encoding)?;

    clock.step("Preference model");
    let human = match &sources.origin {
        Origin::Planted { .. } => None,
        Origin::File(pairs) => {
            let found = human::cross_validate(&loaded, pairs, &stages)?;
            tell_human(&found);
            Some(found)
        }
    };
    let tune = options.tune.map(|n_blocks| TuneConfig::new(n_blocks, options.rank, options.seed));
    let mut changed = Vec::new();
    if let Some(config) = tune {
        ensure!(!own_head, "--tune: {} has its own head, and is taken as it is", loaded.name);
        let tuned = tuned::tune(&loaded, &sources, config, &stages)?;
        loaded.model = HeadedModel::Reward(Box::new(tuned.model));
        (loaded.hash, changed) = (tuned.hash, tuned.changed);
    }
    let run = Run { options, scale: &scale, loaded: &loaded, stages: &stages, device: &device };
    let Trained { model, key, rewards, saes } = run.train(&sources, &layers, &mut clock)?;
    if let Some(folder) = &options.save {
        ensure!(!own_head, "--save: {} has its own head already", loaded.name);
        let head: Vec<f32> = model.head().weight().into_data().iter().collect();
        classifier::save(&path, &head, &changed, folder)?;
        tell(&format!("saved to {}", folder.display()));
    }
    let differences: Vec<f64> = rewards.chunks_exact(2).map(|pair| pair[0] - pair[1]).collect();
    let agreement = Agreement::new(&differences);
    let by_rule = match &sources.origin {
        Origin::Planted { test } => by_rule(test, &differences),
        Origin::File(_) => Vec::new(),
    };
    for (rule, rate) in &by_rule {
        tell(&format!("{:<20} {rate}", rule.label()));
    }
    let chosen = run.chosen(&sources, &differences);
    let planted: Option<Vec<PlantedPair>> = match &sources.origin {
        Origin::Planted { test } => Some(chosen.iter().map(|&pair| test[pair].clone()).collect()),
        Origin::File(_) => None,
    };
    let pairs: Vec<_> = chosen.iter().map(|&pair| sources.test[pair].clone()).collect();
    let of_chosen: Vec<f64> =
        chosen.iter().flat_map(|&pair| [rewards[2 * pair], rewards[2 * pair + 1]]).collect();
    let question = Question {
        model: &model,
        unembeds: !own_head,
        tokenizer: &loaded.tokenizer,
        planted: planted.as_deref(),
        pairs: &pairs,
        rewards: &of_chosen,
        scale: &scale,
        thresholds: Thresholds::new(&differences),
        with_last: options.changes_last(),
        seed: options.seed,
        stages: &stages,
        key: &key,
    };
    let mut found = Vec::new();
    for trained in &saes {
        clock.step(&format!("Latents after block {}", trained.layer));
        found.push(explain(&question, trained, &sources, encoding, &mut clock)?);
    }
    let text = match &options.text {
        None => None,
        Some(text) => {
            clock.step("Text");
            Some(explain_text(text, &question, &saes, encoding)?)
        }
    };
    let (file, left_out) = match &sources.origin {
        Origin::Planted { .. } => (None, None),
        Origin::File(human) => {
            let name = options.pairs.as_deref().and_then(Path::file_name);
            (name.map(|name| name.to_string_lossy().into_owned()), Some(human.left_out))
        }
    };
    let used = PairsUsed {
        file,
        n_train: sources.train.len(),
        n_test: sources.test.len(),
        n_attributed: pairs.len(),
        n_verified: scale.n_verified_pairs.min(pairs.len()),
        left_out,
    };
    let thresholds = question.thresholds;
    let head = if own_head { Head::Own } else { Head::Learnt };
    let told = Told { head, tune, agreement, by_rule, pairs: used, human, text, thresholds };
    results(&loaded, options, told, found, clock)
}

/// What was found of one autoencoder.
struct Found {
    sae: SaeResults,
    explained: Vec<Explained>,
    insertions: Insertions,
    repetition: Option<Repetition>,
}

/// Attributes rewards to an autoencoder's latents, verifies the largest effects, and tries them.
fn explain(
    question: &Question<'_>,
    trained: &TrainedSae,
    sources: &Sources,
    encoding: Encoding<'_>,
    clock: &mut Clock,
) -> Result<Found> {
    let effects = question.attribute(trained)?;
    clock.lap("attributed");
    let n_verified = 2 * question.scale.n_verified_pairs.min(question.pairs.len());
    let of_verified = means(effects[..n_verified].iter().map(|text| &text.ig));
    let ranked = Ranked::new(&effects);
    let n_verified_latents = question.scale.n_verified_latents;
    let mut latents = extremes(&of_verified, n_verified_latents);
    latents.extend(ranked.first(n_verified_latents / 2).map(|of| of.latent));
    latents.sort_unstable();
    latents.dedup();
    let measured = question.measure(trained, &latents, &effects)?;
    clock.lap("verified");
    let shares = explained::shares(question, trained, &effects)?;
    clock.lap("explained");
    let by_rule = question
        .planted
        .map(|planted| recovery::by_rule(planted, &effects, question.tokenizer))
        .transpose()?;
    let recovered = by_rule.as_ref().map(|by_rule| recovery::recovered(by_rule, &ranked));
    let conversations = texts(question.pairs);
    let values = table::values(question.model.body(), trained, &conversations)?;
    let ranked_rules = (&ranked, by_rule.as_ref());
    let rows = table::rows(question, trained, &latents, &effects, &measured, ranked_rules, &values);
    clock.lap("table");
    let insertions =
        insertions::insert(question, trained, &effects, &ranked.raising, &sources.hosts, encoding)?;
    clock.lap("insertions");
    let repetition = match question.planted {
        Some(_) => Some(repetition::repetition(question, trained, encoding)?),
        None => None,
    };
    clock.lap("repetition");
    let of = |of: fn(&LatentRow) -> f64| -> Vec<f64> { rows.iter().map(of).collect() };
    let by_ablation = of(|row| row.measured);
    let check = |estimated: &[f64]| Check::new(estimated, &by_ablation, TOP);
    let by_text = |of: fn(&TextEffects) -> &std::collections::BTreeMap<usize, f64>| {
        let (mut estimated, mut by_ablation) = (Vec::new(), Vec::new());
        for (text, measured) in effects.iter().zip(&measured) {
            for (latent, effect) in measured {
                estimated.push(of(text).get(latent).copied().unwrap_or(0.0));
                by_ablation.push(*effect);
            }
        }
        Check::new(&estimated, &by_ablation, TOP)
    };
    let verified = conversations[..n_verified].iter().enumerate().map(|(text, ids)| {
        let tokens = table::tokens(question.tokenizer, ids);
        let from = question.pairs[text / 2].divergence;
        VerifiedText { tokens, reward: question.rewards[text], from }
    });
    // What both texts of a pair add up to stands with each.
    let pairs = || effects.iter().step_by(2);
    let sae = SaeResults {
        layer: trained.layer,
        kind: trained.kind,
        d_sae: trained.sae.config().d_sae,
        l0: trained.quality.l0,
        fvu: trained.quality.fvu,
        fvu_without_outliers: trained.quality.fvu_without_outliers,
        n_outliers: trained.quality.n_outliers,
        n_tokens: trained.quality.n_tokens,
        ig: check(&of(|row| row.ig)),
        together: check(&of(|row| row.together)),
        gxa: check(&of(|row| row.gxa)),
        ig_by_text: by_text(|text| &text.ig),
        gxa_by_text: by_text(|text| &text.gxa),
        completeness_residual: pairs().map(|text| text.residual).sum(),
        completeness_measured: pairs().map(|text| text.all).sum(),
        latents_share: shares.latents,
        error_share: shares.error,
        attributed_to_latents: shares.attributed_to_latents,
        attributed_to_error: shares.attributed_to_error,
        recovered: recovered.clone().map(|(places, _)| places).unwrap_or_default(),
        decoy_above: recovered.map(|(_, above)| above),
        texts: verified.collect(),
        latents: rows,
        effects: means(effects.iter().map(|text| &text.ig)).into_values().collect(),
    };
    tell_sae(&sae, &insertions, repetition.as_ref());
    Ok(Found { sae, explained: shares.curve, insertions, repetition })
}

/// Scores and attributes a text of the user's.
fn explain_text(
    text: &str,
    question: &Question<'_>,
    saes: &[TrainedSae],
    encoding: Encoding<'_>,
) -> Result<TextResults> {
    let ids = encoding.encode(&as_conversation(text))?;
    let tokens = table::tokens(question.tokenizer, &ids);
    let mut results = TextResults { tokens, reward: 0.0, saes: Vec::new() };
    for trained in saes {
        let (reward, by_sae) = attribute_text(question.model, &trained.sae, trained.layer, &ids)
            .context("while attributing --text")?;
        tell(&format!("reward {reward:.3}; after block {}:", trained.layer));
        for &(latent, position, adds) in by_sae.latents.iter().take(N_NAMED) {
            let at = &results.tokens[position];
            tell(&format!("  latent {latent:>6} at {at:?} adds {adds:+.3}"));
        }
        results.reward = reward;
        results.saes.push(by_sae);
    }
    Ok(results)
}

/// What was told apart from latents.
struct Told {
    head: Head,
    tune: Option<TuneConfig>,
    agreement: Agreement,
    by_rule: Vec<(Rule, Rate)>,
    pairs: PairsUsed,
    human: Option<Human>,
    text: Option<TextResults>,
    thresholds: Thresholds,
}

fn results(
    loaded: &TextModel,
    options: &Options,
    told: Told,
    found: Vec<Found>,
    clock: Clock,
) -> Result<Results> {
    ensure!(!found.is_empty(), "no block was given to read after");
    let Told { head, tune, agreement, by_rule, pairs, human, text, thresholds } = told;
    let estimate = |of: &dyn Fn(&SaeResults) -> f64| {
        Estimate::of(&found.iter().map(|found| of(&found.sae)).collect::<Vec<f64>>())
    };
    let places = || {
        let all = found.iter().flat_map(|found| &found.sae.recovered);
        all.filter(|(rule, _)| !rule.is_decoy())
    };
    let n_found = places().filter(|(_, place)| place.is_some()).count();
    let decoys: Vec<bool> = found.iter().filter_map(|found| found.sae.decoy_above).collect();
    let pooled = |of: fn(&Insertions) -> Rate| {
        let rates = || found.iter().map(|found| of(&found.insertions));
        let successes = rates().map(|rate| (rate.rate * rate.n as f64).round() as usize).sum();
        Rate::wilson(successes, rates().map(|rate| rate.n).sum())
    };
    let (steps, seconds) = clock.stop();
    Ok(Results {
        model: loaded.name.clone(),
        head,
        tuned: tune,
        pairs,
        pm_accuracy: agreement.accuracy,
        agreement,
        by_rule,
        planted_recall: (!decoys.is_empty()).then(|| Rate::wilson(n_found, places().count())),
        decoys_above: (!decoys.is_empty())
            .then(|| Rate::wilson(decoys.iter().filter(|&&above| above).count(), decoys.len())),
        ig_pearson: estimate(&|sae| sae.ig.pearson),
        ig_top20_recall: estimate(&|sae| sae.ig.top_k_recall),
        together_pearson: estimate(&|sae| sae.together.pearson),
        together_top20_recall: estimate(&|sae| sae.together.top_k_recall),
        gxa_pearson: estimate(&|sae| sae.gxa.pearson),
        gxa_top20_recall: estimate(&|sae| sae.gxa.top_k_recall),
        insertion_success: pooled(|inserted| inserted.success),
        control_success: pooled(|inserted| inserted.control),
        insertion_threshold: thresholds.rise,
        explained: found.iter().flat_map(|found| found.explained.clone()).collect(),
        explained_threshold: thresholds.explained,
        insertions: found.iter().flat_map(|found| found.insertions.insertions.clone()).collect(),
        repetition: found.iter().filter_map(|found| found.repetition.clone()).collect(),
        saes: found.into_iter().map(|found| found.sae).collect(),
        human,
        text,
        with_last: options.changes_last(),
        seed: options.seed,
        seconds,
        steps,
    })
}

/// Whether the checkpoint at a path is a sequence classifier.
fn has_own_head(path: &Path) -> Result<bool> {
    let config = path.join("config.json");
    if !config.is_file() {
        return Ok(false);
    }
    let text = fs::read_to_string(&config).with_context(|| config.display().to_string())?;
    let config: serde_json::Value =
        serde_json::from_str(&text).with_context(|| config.display().to_string())?;
    let architecture = config["architectures"][0].as_str().unwrap_or_default();
    Ok(architecture.ends_with("ForSequenceClassification"))
}

/// Accuracy on the pairs of each rule.
fn by_rule(planted: &[PlantedPair], differences: &[f64]) -> Vec<(Rule, Rate)> {
    let of_rule = |rule: Rule| {
        let of: Vec<f64> = (planted.iter().zip(differences))
            .filter(|(pair, _)| pair.rule == rule)
            .map(|(_, &difference)| difference)
            .collect();
        (rule, Rate::wilson(of.iter().filter(|&&d| d > 0.0).count(), of.len()))
    };
    Rule::ALL.into_iter().filter(|rule| !rule.is_decoy()).map(of_rule).collect()
}
