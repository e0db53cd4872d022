//! Opens up a preference model: what raises and lowers its rewards, proven by ablation.
//!
//! After Riggs and Brinkmann, "Interpreting Preference Models with Sparse Autoencoders" (2024). By
//! default the preference model is a planted one: it is trained on pairs whose preference follows
//! known rules ([`planted`]), so that what an attribution finds can be judged.

pub mod bradley_terry;
pub mod classifier;
mod effects;
mod insertions;
mod model;
mod options;
mod page;
pub mod pairs;
pub mod planted;
mod results;
mod saes;

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use attribution::{AttributionConfig, Baseline, Integration, Reward, SaeSite, Study};
use model_hooks::text::Tokenizer;
use model_hooks::{HookPoint, RewardModel};
use steering::Rate;

pub use options::{Options, Scale};
pub use page::render;
pub use results::{
    Estimate, Explained, Insertion, LatentRow, OnText, Results, SaeResults, TopText, VerifiedText,
};

use self::bradley_terry::Agreement;
use self::effects::{Question, TOP};
use self::pairs::{ASSISTANT, HUMAN, TokenPair};
use self::planted::{PlantedPair, Rule, planted_pairs};
use self::saes::TrainedSae;
use crate::assets::{LoadedModel, load_model, locate_model};
use crate::corpus;
use crate::device::device;
use crate::progress::{step, tell};

/// Latents named for a text of the user's.
const N_NAMED: usize = 8;

/// Runs it all.
///
/// # Errors
/// If the model cannot be had, or a step fails; the message says which.
pub fn run(options: &Options) -> Result<Results> {
    let start = Instant::now();
    let (scale, device) = (options.scale(), device(&options.device)?);
    step("Model");
    let loaded = load_model(options.model.as_deref(), &device)?;
    let body = &loaded.model;
    let config = body.config();
    let end = config.special_tokens.eos.first().copied();
    let layers = options.layers(&scale, config.n_layers);
    let points: Vec<HookPoint> = layers.iter().map(|&l| HookPoint::resid_post(l)).collect();
    points.iter().try_for_each(|&point| body.check_point(point))?;
    tell(&format!("{}, {} blocks of {}", loaded.name, config.n_layers, config.d_model));

    step("Preference model");
    let (training, selection) = (corpus::training(), corpus::selection());
    let planted = |turns, n, seed| -> Result<(Vec<PlantedPair>, Vec<TokenPair>)> {
        let planted = planted_pairs(turns, n, seed);
        let tokens = |pair: &PlantedPair| TokenPair::new(&pair.pair(), &loaded.tokenizer, end);
        let tokens = planted.iter().map(tokens).collect::<Result<_, _>>()?;
        Ok((planted, tokens))
    };
    let (_, train_pairs) = planted(&training.compliances, scale.n_train_pairs, options.seed)?;
    let (test, test_pairs) = planted(&selection.compliances, scale.n_test_pairs, options.seed + 1)?;
    let trained_on = model::read(body, &model::texts(&train_pairs), &points, "reading pairs")?;
    let tested_on = model::read(body, &model::texts(&test_pairs), &points, "reading test pairs")?;
    let head = model::head(&trained_on.last);
    let model = model::with_head(body, &head);
    let rewards = model::rewards(&tested_on.last, &head);
    let differences: Vec<f64> = rewards.chunks_exact(2).map(|pair| pair[0] - pair[1]).collect();
    let agreement = Agreement::new(&differences);
    let by_rule = by_rule(&test, &differences);
    tell(&format!(
        "agrees with the rules on {} of {} held-out pairs, calibration error {:.3}",
        agreement.accuracy, agreement.accuracy.n, agreement.calibration_error
    ));
    for (rule, rate) in &by_rule {
        tell(&format!("  {:<20} {rate}", rule.label()));
    }
    if let Some(folder) = &options.save {
        classifier::save(&locate_model(options.model.as_deref())?, &head, folder)?;
        tell(&format!("saved to {}", folder.display()));
    }

    let deviation = insertions::deviation(&differences);
    let n_attributed = scale.n_attributed_pairs.min(test_pairs.len());
    let question = Question {
        model: &model,
        tokenizer: &loaded.tokenizer,
        planted: &test[..n_attributed],
        pairs: &test_pairs[..n_attributed],
        scale: &scale,
        explained_threshold: 0.25 * deviation,
        seed: options.seed,
    };
    let (mut saes, mut explained, mut inserted) = (Vec::new(), Vec::new(), Vec::new());
    for (nth, &layer) in layers.iter().enumerate() {
        step(&format!("Autoencoder at {}", points[nth]));
        let activations = [&trained_on.activations[nth][..], &tested_on.activations[nth][..]];
        let trained =
            saes::train(nth, layer, activations, config.d_model, &scale, options.seed, &device)?;
        let found = effects::explain(&question, &trained)?;
        tell_sae(&found.results);
        if let Some(text) = &options.text {
            tell_text(text, &model, &loaded.tokenizer, &trained, end)?;
        }
        inserted.push(insertions::insert(
            &question,
            &trained,
            &found.raising,
            &selection.compliances,
            end,
        )?);
        saes.push(found.results);
        explained.extend(found.explained);
    }
    results(
        &loaded,
        options,
        Parts { agreement, by_rule, saes, explained, inserted, threshold: 0.25 * deviation },
        start,
    )
}

struct Parts {
    agreement: Agreement,
    by_rule: Vec<(Rule, Rate)>,
    saes: Vec<SaeResults>,
    explained: Vec<Explained>,
    inserted: Vec<insertions::Insertions>,
    threshold: f64,
}

fn results(
    loaded: &LoadedModel,
    options: &Options,
    parts: Parts,
    start: Instant,
) -> Result<Results> {
    let Parts { agreement, by_rule, saes, explained, inserted, threshold } = parts;
    ensure!(!saes.is_empty(), "no block was given to read after");
    let estimate =
        |of: &dyn Fn(&SaeResults) -> f64| Estimate::of(&saes.iter().map(of).collect::<Vec<f64>>());
    let places = || saes.iter().flat_map(|sae| &sae.recovered).filter(|(rule, _)| !rule.is_decoy());
    let n_found = places().filter(|(_, place)| place.is_some()).count();
    let pooled = |of: fn(&insertions::Insertions) -> Rate| {
        let rates = || inserted.iter().map(of);
        let successes = rates().map(|rate| (rate.rate * rate.n as f64).round() as usize).sum();
        Rate::wilson(successes, rates().map(|rate| rate.n).sum())
    };
    Ok(Results {
        model: loaded.name.clone(),
        pm_accuracy: agreement.accuracy,
        agreement,
        by_rule,
        planted_recall: Rate::wilson(n_found, places().count()),
        ig_pearson: estimate(&|sae| sae.ig.pearson),
        ig_top20_recall: estimate(&|sae| sae.ig.top_k_recall),
        gxa_pearson: estimate(&|sae| sae.gxa.pearson),
        gxa_top20_recall: estimate(&|sae| sae.gxa.top_k_recall),
        insertion_success: pooled(|inserted| inserted.success),
        control_success: pooled(|inserted| inserted.control),
        insertion_threshold: inserted[0].threshold,
        explained,
        explained_threshold: threshold,
        insertions: inserted.into_iter().flat_map(|inserted| inserted.insertions).collect(),
        saes,
        seed: options.seed,
        seconds: start.elapsed().as_secs_f64(),
    })
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

fn tell_sae(sae: &SaeResults) {
    tell(&format!(
        "{} of {}: L0 {:.1}, FVU {:.3} ({:.3} without outliers)",
        sae.kind, sae.d_sae, sae.l0, sae.fvu, sae.fvu_without_outliers
    ));
    for (name, check) in [("IG", sae.ig), ("gradient × activation", sae.gxa)] {
        tell(&format!(
            "{name} against {} ablated latents: r {:.3}, top {} recall {:.2}",
            check.n, check.pearson, check.top_k, check.top_k_recall
        ));
    }
    let places = sae.recovered.iter().map(|(rule, place)| match place {
        Some(place) => format!("{} #{}", rule.label(), place + 1),
        None => format!("{} not among {TOP}", rule.label()),
    });
    tell(&places.collect::<Vec<_>>().join(", "));
}

/// Scores and attributes a text of the user's.
fn tell_text(
    text: &str,
    model: &RewardModel,
    tokenizer: &Tokenizer,
    trained: &TrainedSae,
    end: Option<u32>,
) -> Result<()> {
    let text = match text.starts_with(HUMAN.trim_end()) {
        true => text.to_owned(),
        false => format!("{HUMAN}{ASSISTANT}{text}"),
    };
    let mut ids = tokenizer.encode(&text)?;
    ids.extend(end);
    let metric = Reward::new(model);
    let site = SaeSite::new(&trained.sae, trained.point());
    let study = Study::new(&metric, &[&ids])?.start_at(site.point)?;
    let integration = Integration::new(attribution::Rule::Left, 10);
    let effects =
        study.attribute(&[site], Baseline::Zero, AttributionConfig::integrated(integration))?;
    let effects = effects.first().context("one site was asked for")?;
    tell(&format!("reward of the text: {:.3}", study.clean()?[0]));
    let mut tokens: Vec<_> = effects.tokens().collect();
    tokens.sort_by(|a, b| b.effect.change().abs().total_cmp(&a.effect.change().abs()));
    for token in tokens.iter().take(N_NAMED) {
        let at = tokenizer.decode(&[ids[token.position]])?;
        tell(&format!(
            "  latent {:>6} at {at:?} adds {:+.3}",
            token.latent_idx,
            token.effect.contribution()
        ));
    }
    Ok(())
}
