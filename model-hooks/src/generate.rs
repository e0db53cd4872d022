//! Generation with a KV cache and hooks.

use burn::tensor::Tensor;

use crate::hook::Hook;
use crate::layers::SharedPrefix;
use crate::model::{ForwardError, LanguageModel};
use crate::tokens::{TokenBatch, TokenError};

/// When a generation ends. Tokens are chosen greedily, ties going to the lowest id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GenerateConfig {
    /// Tokens to generate at most.
    pub max_new_tokens: usize,
    /// Tokens to generate at least: until then, a stop id is not chosen.
    pub min_new_tokens: usize,
    /// Ids that end a row. They are part of what is returned.
    pub stop_ids: Vec<u32>,
}

impl LanguageModel {
    /// Continues every prompt behind a shared prefix; gives the new tokens of each.
    ///
    /// Rows that have ended leave the batch. The result for a prompt does not depend on the others,
    /// and is the one that an uncached pass over the whole conversation would give. `progress` is
    /// called with the number of unfinished rows before each step.
    ///
    /// # Errors
    /// If a prompt is empty, does not fit the context together with the prefix and the new tokens,
    /// or the hook fails.
    pub fn generate<H: Hook>(
        &self,
        prompts: &[impl AsRef<[u32]>],
        prefix: &SharedPrefix,
        config: &GenerateConfig,
        hook: &mut H,
        mut progress: impl FnMut(usize),
    ) -> Result<Vec<Vec<u32>>, ForwardError> {
        self.check_room(prompts, prefix, config)?;
        let mut answers = vec![Vec::new(); prompts.len()];
        let mut rows: Vec<usize> = (0..prompts.len()).collect();
        let mut next = TokenBatch::after(prompts, prefix.n_tokens(), self.config(), self.device())?;
        let mut cache = self.cache(prefix.clone(), next.padding().to_vec());
        for step in 0..config.max_new_tokens {
            progress(rows.len());
            let [_, n] = next.dims();
            let positions = cache.next_positions(n);
            let residual = self.embed(&next, &positions, hook);
            let layers = 0..self.config().n_layers;
            let residual = self.blocks(residual, layers, &mut cache, hook)?;
            let banned =
                if step < config.min_new_tokens { config.stop_ids.as_slice() } else { &[] };
            let ids = argmax(self.unembed_last(residual, &positions, hook), banned);

            let mut kept = Vec::new();
            for (slot, (&row, &id)) in rows.iter().zip(&ids).enumerate() {
                answers[row].push(id);
                if !config.stop_ids.contains(&id) {
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
            let chosen: Vec<[u32; 1]> = kept.iter().map(|&slot| [ids[slot]]).collect();
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

/// The id of the largest logit of each row that is not banned, the lowest id among equals.
///
/// # Shapes
/// `logits`: `[n, d_vocab]`; one id for each of the `n` rows.
fn argmax(logits: Tensor<2>, banned: &[u32]) -> Vec<u32> {
    let [_, d_vocab] = logits.dims();
    let logits = logits.into_data();
    let logits = logits.as_slice::<f32>().expect("logits are f32");
    let best = |row: &[f32]| {
        let mut best = (0, f32::NEG_INFINITY);
        for (id, &logit) in (0..).zip(row) {
            if logit > best.1 && !banned.contains(&id) {
                best = (id, logit);
            }
        }
        best.0
    };
    logits.chunks(d_vocab).map(best).collect()
}
