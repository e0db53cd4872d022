//! Activations and the autoencoder trained on them, kept in the cache folder.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use burn::tensor::{Device, Tensor, TensorData};
use model_hooks::{
    Activation, Edits, HarvestConfig, Harvested, HookPoint, Positions, SharedPrefix,
};
use sae_core::format::saelens;
use sae_core::metrics::{Reconstruction, ce_recovered};
use sae_core::train::{ActivationMatrix, Objective, Schedule, TrainConfig, Trainer};
use sae_core::{ErrorTerm, Sae, Splice};
use serde::{Deserialize, Serialize};
use steering::norm;

use super::chats::{Corpus, common_prefix};
use super::options::{Options, Scale};
use super::{During, FIRST_POSITION, tell};
use crate::assets::LoadedModel;
use crate::progress::bar;
use crate::results::SaeSummary;
use crate::storage::{cache_folder, hash_bytes, write_whole};

/// Tokens per forward pass.
const BATCH_TOKENS: usize = 1024;
/// High, because the run is short.
const LEARNING_RATE: f64 = 1e-3;
/// Activations encoded at a time.
const ENCODE_ROWS: usize = 4096;
/// Tokens remembered for each latent.
const N_TOP_TOKENS: usize = 8;
/// Raised when what is cached means something else.
const CACHE_VERSION: u32 = 1;

/// An autoencoder with what its training text showed.
pub(super) struct TrainedSae {
    pub(super) sae: Sae,
    pub(super) quality: Quality,
    survey: Survey,
    /// Where it is kept.
    folder: PathBuf,
}

/// How good the autoencoder is on held-out text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Quality {
    pub(super) n_tokens: u64,
    pub(super) l0: f64,
    pub(super) fvu: f64,
    pub(super) dead_share: f64,
    pub(super) ce_recovered: f64,
}

/// What each latent does on the training text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Survey {
    /// Largest value.
    max: Vec<f32>,
    /// Tokens on which it is active.
    n_active: Vec<u64>,
    /// Tokens of the text.
    n_tokens: u64,
    /// Tokens on which it is most active, without repetition.
    top_tokens: Vec<Vec<(f32, u32)>>,
}

impl Survey {
    fn fits(&self, sae: &Sae) -> bool {
        let lengths = [self.max.len(), self.n_active.len(), self.top_tokens.len()];
        lengths == [sae.config().d_sae; 3]
    }
}

/// What lies beside the weights.
#[derive(Serialize, Deserialize)]
struct Record {
    quality: Quality,
    survey: Survey,
}

impl TrainedSae {
    /// The largest value of a latent in training: strength 1 of a clamp.
    pub(super) fn max_activation(&self, latent: usize) -> f64 {
        self.survey.max.get(latent).copied().map_or(0.0, f64::from)
    }

    /// How far some latents reach in the residual stream, each clamped to its largest activation in
    /// training.
    pub(super) fn reach(&self, latents: &[usize]) -> f64 {
        let directions = self.sae.directions();
        let d_in = directions.dims()[1];
        let reach = latents
            .iter()
            .map(|&latent| directions.clone().narrow(0, latent, 1) * self.max_activation(latent));
        reach.reduce(|a, b| a + b).map_or(0.0, |sum| norm(&sum.reshape([d_in])))
    }

    /// How far one unit of a latent reaches.
    pub(super) fn direction_norm(&self, latent: usize) -> f64 {
        let directions = self.sae.directions();
        let d_in = directions.dims()[1];
        norm(&directions.narrow(0, latent, 1).reshape([d_in]))
    }

    /// The file that others read it from.
    pub(super) fn path(&self) -> PathBuf {
        weights_path(&self.folder)
    }

    /// The share of training tokens on which a latent is active.
    pub(super) fn density(&self, latent: usize) -> f64 {
        self.survey.n_active[latent] as f64 / self.survey.n_tokens.max(1) as f64
    }

    pub(super) fn top_tokens(&self, latent: usize) -> Vec<u32> {
        self.survey.top_tokens[latent].iter().map(|&(_, id)| id).collect()
    }

    pub(super) fn summary(&self, scale: &Scale, d_in: usize) -> SaeSummary {
        SaeSummary {
            architecture: "topk".into(),
            k: scale.k,
            d_in,
            d_sae: self.sae.config().d_sae,
            n_tokens: self.quality.n_tokens,
            l0: self.quality.l0,
            fvu: self.quality.fvu,
            dead_share: self.quality.dead_share,
            ce_recovered: self.quality.ce_recovered,
        }
    }
}

/// The autoencoder for these texts and settings: out of the cache, or trained.
pub(super) fn trained_sae(
    loaded: &LoadedModel,
    corpus: &Corpus,
    point: HookPoint,
    scale: &Scale,
    options: &Options,
) -> Result<TrainedSae> {
    let d_sae = scale.d_sae(loaded.model.config().d_model);
    let config = TrainConfig::new(d_sae, Objective::top_k(scale.k))
        .with_batch(scale.training.batch)
        .with_n_passes(scale.training.n_passes)
        .with_clip_norm(Some(1.0))
        .with_schedule(Schedule::new().with_learning_rate(LEARNING_RATE))
        .with_seed(options.seed);
    let folder = cache_folder()?.join("sae").join(key(loaded, corpus, point, &config, options));
    if !options.retrain
        && let Some(trained) = cached(&folder, loaded.model.device())
    {
        tell(&format!("trained before: {}", folder.display()));
        return Ok(trained);
    }
    let trained = train(loaded, corpus, point, &config, &folder)?;
    save(&trained, &folder)?;
    tell(&format!("saved to {}", folder.display()));
    Ok(trained)
}

/// Everything that shapes the autoencoder.
fn key(
    loaded: &LoadedModel,
    corpus: &Corpus,
    point: HookPoint,
    config: &TrainConfig,
    options: &Options,
) -> String {
    let texts = |texts: &[Vec<u32>]| {
        let bytes = texts.iter().flat_map(|text| {
            let length = (text.len() as u32).to_le_bytes();
            length.into_iter().chain(text.iter().flat_map(|id| id.to_le_bytes()))
        });
        hash_bytes(&bytes.collect::<Vec<u8>>())
    };
    let key = serde_json::json!({
        "version": CACHE_VERSION,
        "model": loaded.hash,
        "training": texts(&corpus.training),
        "held_out": texts(&corpus.held_out),
        "point": point.to_string(),
        "skip_positions": FIRST_POSITION,
        "device": options.device,
        "config": config,
    });
    hash_bytes(key.to_string().as_bytes())[..16].to_owned()
}

/// What is in the cache, if it is whole. A damaged one is trained anew.
fn cached(folder: &Path, device: &Device) -> Option<TrainedSae> {
    let record = fs::read(record_path(folder)).ok()?;
    let Record { quality, survey } = serde_json::from_slice(&record).ok()?;
    match saelens::read(&weights_path(folder), device) {
        Ok(sae) if survey.fits(&sae) => {
            Some(TrainedSae { sae, quality, survey, folder: folder.to_owned() })
        }
        Ok(_) => None,
        Err(error) => {
            tell(&format!("the cached autoencoder is damaged and will be trained anew: {error}"));
            None
        }
    }
}

fn save(trained: &TrainedSae, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)
        .with_context(|| format!("cannot make the folder {}", folder.display()))?;
    saelens::write(&trained.sae, &weights_path(folder)).during("saving the autoencoder")?;
    let record = Record { quality: trained.quality.clone(), survey: trained.survey.clone() };
    write_whole(&record_path(folder), &serde_json::to_vec(&record)?)
}

fn weights_path(folder: &Path) -> PathBuf {
    folder.join("sae")
}

fn record_path(folder: &Path) -> PathBuf {
    folder.join("survey.json")
}

/// Activations in memory with the token that each stands on.
struct Activations {
    values: Vec<f32>,
    tokens: Vec<u32>,
}

impl Activations {
    fn chunks(&self, d_in: usize, device: &Device) -> impl Iterator<Item = (Tensor<2>, &[u32])> {
        let tensor = move |values: &[f32]| {
            let shape = [values.len() / d_in, d_in];
            Tensor::from_data(TensorData::new(values.to_vec(), shape), device)
        };
        self.values.chunks(ENCODE_ROWS * d_in).map(tensor).zip(self.tokens.chunks(ENCODE_ROWS))
    }
}

/// All texts begin with the same tokens (the system prompt): these are run, and taken, once.
fn harvest(
    loaded: &LoadedModel,
    texts: &[Vec<u32>],
    point: HookPoint,
    label: &'static str,
) -> Result<Activations> {
    let n_shared = common_prefix(texts);
    let n_tokens = texts.iter().map(|text| text.len() - n_shared).sum::<usize>() + n_shared;
    let bar = bar(label, n_tokens as u64);
    let d_model = loaded.model.config().d_model;
    let mut activations = Activations {
        values: Vec::with_capacity(n_tokens * d_model),
        tokens: Vec::with_capacity(n_tokens),
    };
    let mut config = HarvestConfig::new(point, BATCH_TOKENS);
    config.skip_positions = FIRST_POSITION;
    let mut harvest_after = |texts: &[&[u32]], prefix: &SharedPrefix| {
        let sink = |harvested: Harvested| {
            let [rows] = harvested.activations.try_into().expect("one point was asked for");
            let rows = Tensor::into_data(rows);
            activations.values.extend_from_slice(rows.as_slice::<f32>().expect("f32 activations"));
            let token =
                |place: &model_hooks::Place| texts[place.text][place.position - prefix.n_tokens()];
            activations.tokens.extend(harvested.places.iter().map(token));
            bar.inc(harvested.places.len() as u64);
            ControlFlow::Continue(())
        };
        let report = loaded.model.harvest(texts, prefix, &config, sink);
        report.map(drop).during("harvesting activations")
    };
    let own: Vec<&[u32]> = texts.iter().map(|text| &text[n_shared..]).collect();
    if n_shared > 0 {
        let shared = &texts[0][..n_shared];
        harvest_after(&[shared], &SharedPrefix::default())?;
        let prefix = loaded.model.prefix(shared, &mut ()).during("running the shared prefix")?;
        harvest_after(&own, &prefix)?;
    } else {
        harvest_after(&own, &SharedPrefix::default())?;
    }
    bar.finish();
    Ok(activations)
}

fn train(
    loaded: &LoadedModel,
    corpus: &Corpus,
    point: HookPoint,
    config: &TrainConfig,
    folder: &Path,
) -> Result<TrainedSae> {
    let (device, d_in) = (loaded.model.device(), loaded.model.config().d_model);
    let activations = harvest(loaded, &corpus.training, point, "harvesting")?;
    let matrix = ActivationMatrix::new(&activations.values, d_in)?;
    let mut trainer = Trainer::new(config.clone(), &matrix, device)?;
    let n_steps = config.n_passes * (matrix.n_rows() / config.batch);
    let bar = bar("training", n_steps as u64);
    trainer.run(&matrix, |progress| {
        bar.set_position(progress.step as u64);
        bar.set_message(format!("loss {:.1}", progress.loss));
        ControlFlow::Continue(())
    })?;
    bar.finish();
    let sae = trainer.sae();
    drop(trainer);
    let sae = with_metadata(sae, loaded, point);
    let survey = survey(&sae, &activations, device);
    let quality = quality(&sae, loaded, corpus, point, &survey)?;
    Ok(TrainedSae { sae, quality, survey, folder: folder.to_owned() })
}

fn with_metadata(sae: Sae, loaded: &LoadedModel, point: HookPoint) -> Sae {
    let mut metadata = sae.config().metadata.clone();
    metadata.model_name = Some(loaded.name.clone());
    metadata.hook_name = Some(point.to_string());
    metadata.prepend_bos = Some(false);
    metadata.seqpos_slice = Some(vec![Some(FIRST_POSITION as i64), None]);
    sae.with_metadata(metadata)
}

fn survey(sae: &Sae, activations: &Activations, device: &Device) -> Survey {
    let (d_in, d_sae) = (sae.config().d_in, sae.config().d_sae);
    let mut survey = Survey {
        max: vec![0.0; d_sae],
        n_active: vec![0; d_sae],
        n_tokens: activations.tokens.len() as u64,
        top_tokens: vec![Vec::new(); d_sae],
    };
    for (x, tokens) in activations.chunks(d_in, device) {
        for entry in sae.encode(x).entries() {
            let latent = entry.latent_idx;
            survey.n_active[latent] += 1;
            survey.max[latent] = survey.max[latent].max(entry.value);
            remember(&mut survey.top_tokens[latent], entry.value, tokens[entry.row]);
        }
    }
    survey
}

/// Keeps the tokens of the largest values, each once, in order.
fn remember(top: &mut Vec<(f32, u32)>, value: f32, token: u32) {
    match top.iter().position(|&(_, other)| other == token) {
        Some(at) if top[at].0 >= value => return,
        Some(at) => drop(top.remove(at)),
        None if top.len() == N_TOP_TOKENS && top[N_TOP_TOKENS - 1].0 >= value => return,
        None => {}
    }
    let at = top.partition_point(|&(other, _)| other >= value);
    top.insert(at, (value, token));
    top.truncate(N_TOP_TOKENS);
}

fn quality(
    sae: &Sae,
    loaded: &LoadedModel,
    corpus: &Corpus,
    point: HookPoint,
    survey: &Survey,
) -> Result<Quality> {
    let held_out = harvest(loaded, &corpus.held_out, point, "measuring")?;
    let (d_in, d_sae) = (sae.config().d_in, sae.config().d_sae);
    let mut reconstruction = Reconstruction::new(d_sae);
    for (x, _) in held_out.chunks(d_in, loaded.model.device()) {
        let parts = sae.decompose(x.clone());
        reconstruction.update(x, parts.reconstruction, &parts.latents);
    }
    let model = &loaded.model;
    let texts = &corpus.held_out[..corpus.held_out.len().min(16)];
    let clean = model.cross_entropy(texts, BATCH_TOKENS, &mut ()).during("measuring")?;
    let mut splice = Splice::new(sae, point, ErrorTerm::Drop).from_position(FIRST_POSITION);
    let spliced = model.cross_entropy(texts, BATCH_TOKENS, &mut splice).during("measuring")?;
    let mut zero = Edits::new();
    zero.push(point, Box::new(zeroed));
    let zeroed = model.cross_entropy(texts, BATCH_TOKENS, &mut zero).during("measuring")?;
    let n_dead = survey.n_active.iter().filter(|&&n| n == 0).count();
    Ok(Quality {
        n_tokens: survey.n_tokens,
        l0: reconstruction.l0(),
        fvu: reconstruction.fvu(),
        dead_share: n_dead as f64 / d_sae as f64,
        ce_recovered: ce_recovered(clean.mean(), spliced.mean(), zeroed.mean()),
    })
}

/// Zeros in place of every activation that the autoencoder would reconstruct.
fn zeroed(_: HookPoint, x: Activation, positions: &Positions) -> Activation {
    let x = x.into_tensor::<3>();
    let replaced = positions.mask_from(FIRST_POSITION, &x.device());
    Activation::new(x * (-replaced + 1.0))
}
