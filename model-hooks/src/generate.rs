//! Generation with a KV cache and hooks.

use std::ops::ControlFlow;

use crate::hook::Hook;
use crate::layers::SharedPrefix;
use crate::model::{ForwardError, LanguageModel};
use crate::sampling::{Sampler, Sampling};
use crate::tokens::{TokenBatch, TokenError};

/// How tokens are chosen, and when a generation ends.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateConfig {
    /// Tokens to generate at most.
    pub max_new_tokens: usize,
    /// Tokens to generate at least: until then, a stop id is not chosen.
    pub min_new_tokens: usize,
    /// Ids that end a row. They are part of what is returned.
    pub stop_ids: Vec<u32>,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// Logits of tokens that the conversation has already are divided by this where they are
    /// positive, and multiplied where they are negative (Keskar et al., 2019); 1 for none.
    pub repetition_penalty: f64,
}

impl GenerateConfig {
    /// Greedily, up to so many tokens or one of the stop ids.
    pub fn greedy(max_new_tokens: usize, stop_ids: Vec<u32>) -> Self {
        Self {
            max_new_tokens,
            min_new_tokens: 0,
            stop_ids,
            sampling: Sampling::Greedy,
            repetition_penalty: 1.0,
        }
    }
}

/// A token as it is chosen.
#[derive(Debug, Clone, Copy)]
pub struct NewToken<'a> {
    /// Index of the prompt.
    pub row: usize,
    /// What has been generated for it; the last is new.
    pub answer: &'a [u32],
}

/// Lets every row go on: for generations that nobody watches.
pub fn unobserved(_: NewToken<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

impl LanguageModel {
    /// Continues every prompt behind a shared prefix; gives the new tokens of each.
    ///
    /// Rows that have ended leave the batch. The result for a prompt does not depend on the others,
    /// and is the one that an uncached pass over the whole conversation would give. `observe` is
    /// called with every new token (to show it, or to look for a stop string), and can end its row;
    /// [`unobserved`] does neither.
    ///
    /// # Errors
    /// If a prompt is empty, does not fit the context together with the prefix and the new tokens,
    /// an option of sampling cannot be, or the hook fails.
    pub fn generate<H: Hook>(
        &self,
        prompts: &[impl AsRef<[u32]>],
        prefix: &SharedPrefix,
        config: &GenerateConfig,
        hook: &mut H,
        mut observe: impl FnMut(NewToken<'_>) -> ControlFlow<()>,
    ) -> Result<Vec<Vec<u32>>, ForwardError> {
        self.check_room(prompts, prefix, config)?;
        let mut sampler = Sampler::new(config.sampling, config.repetition_penalty, prompts.len())?;
        let mut answers = vec![Vec::new(); prompts.len()];
        let mut rows: Vec<usize> = (0..prompts.len()).collect();
        let mut next = TokenBatch::after(prompts, prefix.n_tokens(), self.config(), self.device())?;
        let mut cache = self.cache(prefix.clone(), &next);
        for step in 0..config.max_new_tokens {
            if self.rope_switch(&cache, next.dims()[1]).is_some() {
                // What is cached was turned by other angles: the conversations are run anew.
                let whole = |&row: &usize| {
                    [prefix.ids(), prompts[row].as_ref(), answers[row].as_slice()].concat()
                };
                let whole: Vec<Vec<u32>> = rows.iter().map(whole).collect();
                next = TokenBatch::new(&whole, self.config(), self.device())?;
                let n_prompt = next.dims()[1] - step;
                cache = self.cache(SharedPrefix::default(), &next).anew(rows.clone(), n_prompt);
            }
            let [_, n] = next.dims();
            let positions = cache.next_positions(n);
            let residual = self.embed(&next, &positions, hook);
            let layers = 0..self.config().n_layers;
            let residual = self.blocks(residual, layers, &mut cache, hook)?;
            let logits = self.unembed_last(residual, &positions, hook);
            let mut logits = logits.into_data().try_to_vec::<f32>().expect("logits are f32");

            let banned =
                if step < config.min_new_tokens { config.stop_ids.as_slice() } else { &[] };
            let mut kept = Vec::new();
            let d_vocab = self.config().d_vocab;
            for (slot, (&row, logits)) in rows.iter().zip(logits.chunks_mut(d_vocab)).enumerate() {
                let seen = prefix.ids().iter().chain(prompts[row].as_ref()).chain(&answers[row]);
                let id = sampler.next(row, logits, seen, banned);
                answers[row].push(id);
                let goes_on = observe(NewToken { row, answer: &answers[row] }).is_continue();
                if goes_on && !config.stop_ids.contains(&id) {
                    kept.push(slot);
                }
            }
            if kept.is_empty() {
                break;
            }
            if kept.len() < rows.len() {
                cache.select_rows(&kept);
                rows = kept.iter().map(|&slot| rows[slot]).collect();
            }
            let last = |&row: &usize| [*answers[row].last().expect("just pushed")];
            let chosen: Vec<[u32; 1]> = rows.iter().map(last).collect();
            next = TokenBatch::new(&chosen, self.config(), self.device())?;
        }
        hook.finish()?;
        Ok(answers)
    }

    fn check_room(
        &self,
        prompts: &[impl AsRef<[u32]>],
        prefix: &SharedPrefix,
        config: &GenerateConfig,
    ) -> Result<(), TokenError> {
        let expected = self.config().n_ctx;
        for (row, prompt) in prompts.iter().enumerate() {
            // The last new token is not run.
            let new = config.max_new_tokens.saturating_sub(1);
            let actual = prefix.n_tokens() + prompt.as_ref().len() + new;
            if actual > expected {
                return Err(TokenError::TooLong { row, expected, actual });
            }
        }
        Ok(())
    }
}
