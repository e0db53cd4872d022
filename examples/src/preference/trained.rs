//! The preference model and the autoencoders on it: trained, or as an earlier run left them.

use anyhow::{Result, ensure};
use burn::tensor::Device;
use model_hooks::{HookPoint, LanguageModel, RewardModel};
use serde_json::json;

use super::bradley_terry::Agreement;
use super::model::{self, Read, Wanted, read, texts};
use super::options::{Options, SaeKind, Scale};
use super::saes::{self, TrainedSae};
use super::sources::{Origin, Sources};
use super::stages::{Fingerprint, Stages};
use crate::assets::{HeadedModel, TextModel};
use crate::clock::Clock;
use crate::progress::tell;

/// What a run works with.
pub(super) struct Run<'a> {
    pub(super) options: &'a Options,
    pub(super) scale: &'a Scale,
    pub(super) loaded: &'a TextModel,
    pub(super) stages: &'a Stages,
    pub(super) device: &'a Device,
}

/// A preference model, and autoencoders on it.
pub(super) struct Trained {
    pub(super) model: RewardModel,
    pub(super) key: Fingerprint,
    /// Of the pairs to measure on, the preferred text of each first.
    pub(super) rewards: Vec<f64>,
    pub(super) saes: Vec<TrainedSae>,
}

impl Run<'_> {
    fn body(&self) -> &LanguageModel {
        self.loaded.model.body()
    }

    /// Trains the head, if the model has none, and the autoencoders, reading each text once.
    pub(super) fn train(
        &self,
        sources: &Sources,
        layers: &[usize],
        clock: &mut Clock,
    ) -> Result<Trained> {
        let Self { options, scale, loaded, stages, device } = *self;
        let (pairs, test) = (texts(&sources.train), texts(&sources.test));
        let train = [pairs.as_slice(), &texts(&sources.ties)].concat();
        let [chat, held_out] = &sources.chat;
        let (chat, held_out) = (as_slices(chat), as_slices(held_out));
        let key_of_head = Fingerprint::new(&json!({
            "model": loaded.hash, "pairs": Fingerprint::of_texts(&pairs),
            "ties": Fingerprint::of_texts(&train[pairs.len()..]), "device": options.device,
        }));
        let all = [&train, &chat, &test, &held_out].map(|texts| Fingerprint::of_texts(texts));
        let d_in = self.body().config().d_model;
        let kinds = scale.kinds.iter().cycle();
        let keys: Vec<(usize, SaeKind, Fingerprint)> = layers
            .iter()
            .zip(kinds)
            .map(|(&layer, &kind)| {
                let key = Fingerprint::new(&json!({
                    "model": loaded.hash,
                    "texts": all,
                    "layer": layer,
                    "config": saes::config(kind, d_in, usize::MAX, scale, options.seed),
                    "device": options.device,
                }));
                (layer, kind, key)
            })
            .collect();
        let name = |layer: usize| format!("block{layer}-sae");
        let missing: Vec<HookPoint> = keys
            .iter()
            .filter(|(layer, _, key)| !stages.has_sae(&name(*layer), key))
            .map(|&(layer, ..)| HookPoint::resid_post(layer))
            .collect();
        // A text is read once for both the head and the autoencoders, where both are missing.
        let mut read_train = None;
        let read_both = |last: bool| -> Result<Read> {
            read(self.body(), &train, Wanted { points: &missing, last }, "reading pairs")
        };
        let model = match &loaded.model {
            HeadedModel::Reward(model) => model.as_ref().clone(),
            HeadedModel::Language(body) => {
                let head: Vec<f32> = stages.value("head", &key_of_head, || {
                    let read = read_train.insert(read_both(true)?);
                    let (pairs, ties) = read.last.split_at(pairs.len());
                    Ok(model::head(pairs, ties))
                })?;
                ensure!(
                    head.len() == body.config().d_model && head.iter().all(|w| w.is_finite()),
                    "the head that was kept is not this model's: run with --retrain"
                );
                model::with_head(body, &head)
            }
        };
        let weights: Vec<u32> =
            model.head().weight().into_data().iter::<f32>().map(f32::to_bits).collect();
        let key = Fingerprint::new(&json!({
            "model": loaded.hash, "head": weights, "device": options.device,
        }));
        let key_of_rewards =
            Fingerprint::new(&json!({"model": key, "texts": Fingerprint::of_texts(&test)}));
        let mut read_test = None;
        let rewards: Vec<f64> = stages.value("rewards", &key_of_rewards, || {
            let wanted = Wanted { points: &missing, last: true };
            let read = read_test.insert(read(self.body(), &test, wanted, "reading test pairs")?);
            Ok(model::rewards(&read.last, &model))
        })?;
        ensure!(rewards.len() == test.len(), "the rewards that were kept are of other texts");
        let differences: Vec<f64> = rewards.chunks_exact(2).map(|pair| pair[0] - pair[1]).collect();
        let agreement = Agreement::new(&differences);
        tell(&format!(
            "agrees with {} of {} held-out pairs, calibration error {:.3}",
            agreement.accuracy, agreement.accuracy.n, agreement.calibration_error
        ));
        clock.step("Autoencoders");
        let mut activations = vec![[Vec::new(), Vec::new()]; missing.len()];
        if !missing.is_empty() {
            let plain = Wanted { points: &missing, last: false };
            let of_pairs = match read_train {
                Some(read) => read,
                None => read_both(false)?,
            };
            let of_test = match read_test {
                Some(read) => read,
                None => read(self.body(), &test, plain, "reading test pairs")?,
            };
            let of_chat = read(self.body(), &chat, plain, "reading chats")?;
            let of_held_out = read(self.body(), &held_out, plain, "reading chats")?;
            for (part, reads) in
                [[of_pairs, of_chat], [of_test, of_held_out]].into_iter().enumerate()
            {
                for read in reads {
                    for (all, of) in activations.iter_mut().zip(read.activations) {
                        all[part].extend(of);
                    }
                }
            }
        }
        let mut trained = Vec::new();
        for (layer, kind, key) in keys {
            let (sae, quality) = stages.sae(&name(layer), &key, device, || {
                let point = HookPoint::resid_post(layer);
                let nth = missing.iter().position(|&of| of == point);
                // One that was there and proved to be damaged has not been read for.
                let [training, held_out] = match nth {
                    Some(nth) => std::mem::take(&mut activations[nth]),
                    None => self.read_for(point, [&train, &chat], [&test, &held_out])?,
                };
                let training = saes::ordinary(&training, d_in);
                let n_rows = training.len() / d_in;
                let config = saes::config(kind, d_in, n_rows, scale, options.seed);
                saes::train(&config, layer, [&training, &held_out], d_in, device)
            })?;
            ensure!(
                sae.config().d_in == d_in && quality.densities.len() == sae.config().d_sae,
                "the autoencoder that was kept for block {layer} is not this model's: run with \
                 --retrain"
            );
            tell(&format!(
                "block {layer}, {} of {}: L0 {:.1}, FVU {:.3} ({:.3} without {} outliers of {} tokens)",
                kind.label(),
                sae.config().d_sae,
                quality.l0,
                quality.fvu,
                quality.fvu_without_outliers,
                quality.n_outliers,
                quality.n_tokens
            ));
            trained.push(TrainedSae { sae, kind, layer, quality, key });
        }
        Ok(Trained { model, key, rewards, saes: trained })
    }

    /// Activations at one point: to train on, and to measure on.
    fn read_for(
        &self,
        point: HookPoint,
        training: [&[&[u32]]; 2],
        held_out: [&[&[u32]]; 2],
    ) -> Result<[Vec<f32>; 2]> {
        let mut activations = [Vec::new(), Vec::new()];
        for (all, texts) in activations.iter_mut().zip([training, held_out]) {
            for texts in texts {
                let wanted = Wanted { points: &[point], last: false };
                let mut read = read(self.body(), texts, wanted, "reading")?;
                all.append(&mut read.activations[0]);
            }
        }
        Ok(activations)
    }

    /// Which of the pairs to measure on are explained: of planted ones the first, which have each
    /// rule equally often; of others those whose rewards differ most, as in the source work.
    pub(super) fn chosen(&self, sources: &Sources, differences: &[f64]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..differences.len()).collect();
        if matches!(sources.origin, Origin::File(_)) {
            let size = |pair: &usize| differences[*pair].abs();
            order.sort_by(|a, b| size(b).total_cmp(&size(a)));
        }
        order.truncate(self.scale.n_attributed_pairs);
        order
    }
}

fn as_slices(texts: &[Vec<u32>]) -> Vec<&[u32]> {
    texts.iter().map(Vec::as_slice).collect()
}
