//! Answers of the steered model, each made once.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use burn::tensor::TensorData;
use model_hooks::text::Message;
use model_hooks::{GenerateConfig, SharedPrefix, unobserved};
use sae_core::Sae;
use serde_json::json;
use steering::{Plan, Steerings};

use super::During;
use super::chats::{Chats, common_prefix};
use super::journal::{Journal, key};
use crate::assets::LoadedModel;
use crate::storage::hash_bytes;

/// Conversations generated together.
const BATCH_ROWS: usize = 80;
/// Tokens of a pass over prompts, padding included, so that a long one does not pad many.
const PREFILL_TOKENS: usize = 8192;
/// What plans call the autoencoder.
pub(super) const SAE: &str = "refusal";

/// A model that answers under steering plans.
pub(super) struct Generator<'a> {
    pub(super) loaded: &'a LoadedModel,
    pub(super) chats: &'a Chats<'a>,
    /// Those that plans name.
    saes: BTreeMap<String, &'a Sae>,
    pub(super) journal: &'a Journal,
}

/// A plan at work, or the model left alone.
pub(super) struct Steered<'a> {
    plan: Option<Plan>,
    /// What tells this plan from others.
    key: String,
    hook: Option<Steerings<'a>>,
}

impl<'a> Steered<'a> {
    /// A hook that does it, which has not seen anything yet.
    pub(super) fn hook(&self) -> Option<Steerings<'a>> {
        self.hook.clone()
    }

    /// What is done, as a document; nothing to the model left alone.
    pub(super) fn plan(&self) -> Option<&Plan> {
        self.plan.as_ref()
    }

    /// Hashes of what is made under it depend on this.
    pub(super) fn key(&self) -> &str {
        &self.key
    }
}

impl<'a> Generator<'a> {
    pub(super) fn new(
        loaded: &'a LoadedModel,
        chats: &'a Chats<'a>,
        sae: &'a Sae,
        journal: &'a Journal,
    ) -> Self {
        Self { loaded, chats, saes: BTreeMap::from([(SAE.to_owned(), sae)]), journal }
    }

    /// Puts a plan to work.
    ///
    /// # Errors
    /// If it does not fit.
    pub(super) fn steered(&self, plan: Option<Plan>) -> Result<Steered<'a>> {
        let LoadedModel { model, hash, .. } = self.loaded;
        let (hook, of) = match &plan {
            None => (None, "none".into()),
            Some(plan) => {
                let bound = plan.bind(model, Some(hash), &self.saes);
                (Some(bound.during("putting a steering plan to work")?), plan.to_json()?)
            }
        };
        Ok(Steered { plan, key: hash_bytes(of.as_bytes()), hook })
    }

    /// Answers to conversations that end with the user's turn, in order, each of so many tokens at
    /// most; `progress` is told how many are done after each batch.
    ///
    /// # Errors
    /// If a conversation does not fit the model, or the answers cannot be kept.
    pub(super) fn answers(
        &self,
        conversations: &[Vec<Message>],
        steered: &Steered<'_>,
        max_new_tokens: usize,
        mut progress: impl FnMut(u64),
    ) -> Result<Vec<String>> {
        let rows = conversations
            .iter()
            .map(|messages| self.chats.conversation(messages))
            .collect::<Result<Vec<_>>>()?;
        let key_of = |row: &Vec<u32>| {
            key(&json!({ "answer": row, "under": steered.key, "tokens": max_new_tokens }))
        };
        let keys: Vec<String> = rows.iter().map(key_of).collect();
        let config = GenerateConfig::greedy(max_new_tokens, self.chats.stop_ids.clone());
        let n_shared = common_prefix(&rows);
        let mut hook = steered.hook();
        let mut prefix = None;
        // Prompts of like length share a batch, so that little of it is padding. Which ones do
        // depends on nothing else: an interrupted run makes the same batches.
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_by_key(|&row| rows[row].len());
        let mut answers = vec![String::new(); rows.len()];
        let mut rest = order.as_slice();
        while !rest.is_empty() {
            let fits = |&n: &usize| n * (rows[rest[n - 1]].len() - n_shared) <= PREFILL_TOKENS;
            let n = (1..=rest.len().min(BATCH_ROWS)).take_while(fits).last().unwrap_or(1);
            let (batch, after) = rest.split_at(n);
            rest = after;
            let kept = batch.iter().map(|&row| self.journal.get::<String>(&keys[row]));
            let kept = kept.collect::<Result<Option<Vec<_>>>>()?;
            let made = match kept {
                Some(kept) => kept,
                None => {
                    let prefix = match &prefix {
                        Some(prefix) => prefix,
                        None => {
                            let shared = rows.first().map_or(&[][..], |row| &row[..n_shared]);
                            prefix.insert(self.prefix(shared, &mut hook)?)
                        }
                    };
                    let own: Vec<&[u32]> =
                        batch.iter().map(|&row| &rows[row][n_shared..]).collect();
                    let generated = self
                        .loaded
                        .model
                        .generate(&own, prefix, &config, &mut hook, unobserved)
                        .during("generating answers")?;
                    let texts = generated.iter().map(|ids| self.chats.text(ids));
                    let texts = texts.collect::<Result<Vec<_>>>()?;
                    let keys = batch.iter().map(|&row| keys[row].clone());
                    self.journal.keep(keys.zip(texts))?
                }
            };
            for (&row, text) in batch.iter().zip(made) {
                answers[row] = text;
            }
            progress(n as u64);
        }
        Ok(answers)
    }

    fn prefix(&self, shared: &[u32], hook: &mut Option<Steerings<'_>>) -> Result<SharedPrefix> {
        match shared {
            [] => Ok(SharedPrefix::default()),
            shared => self.loaded.model.prefix(shared, hook).during("running the prefix"),
        }
    }
}

/// The numbers of a direction.
pub(super) fn values<const D: usize>(direction: burn::tensor::Tensor<D>) -> Result<Vec<f32>> {
    let data: TensorData = direction.into_data();
    data.try_to_vec::<f32>().map_err(|error| anyhow::anyhow!("{error:?}")).context("a direction")
}
