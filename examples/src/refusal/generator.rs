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
use crate::pool::side_by_side;
use crate::storage::hash_bytes;

/// Conversations generated together, at most.
const BATCH_ROWS: usize = 40;
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
        progress: impl Fn(u64) + Sync,
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
        let batches = batches(&rows, n_shared);
        let mut kept = Vec::new();
        for batch in &batches {
            let answers = batch.iter().map(|&row| self.journal.get::<String>(&keys[row]));
            kept.push((batch, answers.collect::<Result<Option<Vec<_>>>>()?));
        }
        let shared = match kept.iter().all(|(_, answers)| answers.is_some()) {
            true => &[],
            false => &rows[0][..n_shared],
        };
        let mut hook = steered.hook();
        let prefix = self.prefix(shared, &mut hook)?;
        let made = side_by_side(&kept, |(batch, kept)| {
            let answers = match kept {
                Some(kept) => kept.clone(),
                None => {
                    let own: Vec<&[u32]> =
                        batch.iter().map(|&row| &rows[row][n_shared..]).collect();
                    let model = &self.loaded.model;
                    let generated = model
                        .generate(&own, &prefix, &config, &mut hook.clone(), unobserved)
                        .during("generating answers")?;
                    let texts = generated.iter().map(|ids| self.chats.text(ids));
                    let texts = texts.collect::<Result<Vec<_>>>()?;
                    let keys = batch.iter().map(|&row| keys[row].clone());
                    self.journal.keep(keys.zip(texts))?
                }
            };
            progress(batch.len() as u64);
            anyhow::Ok(answers)
        })?;
        let mut answers = vec![String::new(); rows.len()];
        for (&row, text) in batches.iter().flatten().zip(made.into_iter().flatten()) {
            answers[row] = text;
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

/// Rows that are run together. Prompts of like length share a batch, so that little of it is
/// padding. Which ones do depends on nothing else: an interrupted run makes the same batches.
fn batches(rows: &[Vec<u32>], n_shared: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by_key(|&row| rows[row].len());
    // Alike in size, rather than a small one at the end.
    let n_rows = rows.len().div_ceil(rows.len().div_ceil(BATCH_ROWS).max(1));
    let mut batches = Vec::new();
    let mut rest = order.as_slice();
    while !rest.is_empty() {
        let fits = |&n: &usize| n * (rows[rest[n - 1]].len() - n_shared) <= PREFILL_TOKENS;
        let n = (1..=rest.len().min(n_rows)).take_while(fits).last().unwrap_or(1);
        let (batch, after) = rest.split_at(n);
        batches.push(batch.to_vec());
        rest = after;
    }
    batches
}

/// The numbers of a direction.
pub(super) fn values<const D: usize>(direction: burn::tensor::Tensor<D>) -> Result<Vec<f32>> {
    let data: TensorData = direction.into_data();
    data.try_to_vec::<f32>().map_err(|error| anyhow::anyhow!("{error:?}")).context("a direction")
}
