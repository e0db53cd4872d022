//! How likely a model finds what might follow.

use burn::tensor::activation::log_softmax;
use burn::tensor::{Int, Tensor, TensorData};

use crate::cross_entropy::batches_in_order;
use crate::hook::Hook;
use crate::layers::{KvCache, SharedPrefix};
use crate::model::{ForwardError, LanguageModel};
use crate::tokens::{TokenBatch, TokenError};

/// A prompt, and what might follow it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Continued<'a> {
    /// Up to where a continuation begins.
    pub prompt: &'a [u32],
    /// Each of one token at least.
    pub continuations: &'a [Vec<u32>],
}

impl LanguageModel {
    /// The log-probabilities of the continuations of every prompt, in nats, under a hook. A prompt is
    /// run once, however many continuations it has; the last token of one is not run.
    ///
    /// To a hook a continuation is what was generated after its prompt. Each is run under a clone of
    /// the hook as it was behind the prompts, so that it sees none of the others. Prompts of like
    /// length share a pass, of `batch_tokens` at most (a longer one runs alone), and are numbered in
    /// it.
    ///
    /// # Errors
    /// If a prompt is empty, does not fit the context with what follows it, or holds an unknown id, or
    /// the hook fails.
    ///
    /// # Panics
    /// If a continuation has no tokens.
    pub fn continuation_log_probs<H: Hook + Clone>(
        &self,
        texts: &[Continued<'_>],
        batch_tokens: usize,
        hook: &H,
    ) -> Result<Vec<Vec<f64>>, ForwardError> {
        self.check_continuations(texts)?;
        let mut order: Vec<usize> = (0..texts.len()).collect();
        order.sort_by_key(|&text| texts[text].prompt.len());
        let texts: Vec<Continued<'_>> = order.iter().map(|&text| texts[text]).collect();
        let prompts: Vec<&[u32]> = texts.iter().map(|text| text.prompt).collect();
        let mut log_probs = vec![Vec::new(); texts.len()];
        for batch in batches_in_order(&prompts, batch_tokens) {
            let found = self.batch_continuations(&texts[batch.clone()], &mut hook.clone())?;
            order[batch].iter().zip(found).for_each(|(&text, found)| log_probs[text] = found);
        }
        Ok(log_probs)
    }

    fn batch_continuations<H: Hook + Clone>(
        &self,
        texts: &[Continued<'_>],
        hook: &mut H,
    ) -> Result<Vec<Vec<f64>>, ForwardError> {
        let prompts: Vec<&[u32]> = texts.iter().map(|text| text.prompt).collect();
        let tokens = TokenBatch::new(&prompts, self.config(), self.device())?;
        let mut cache = self.cache(SharedPrefix::default(), &tokens);
        let positions = cache.next_positions(tokens.dims()[1]);
        let residual = self.embed(&tokens, &positions, hook);
        let residual = self.blocks(residual, 0..self.config().n_layers, &mut cache, hook)?;
        let logits = self.unembed_last(residual, &positions, hook);
        let first = |text: &Continued<'_>| text.continuations.iter().map(|ids| ids[0]).collect();
        let mut log_probs = log_probs_of(logits, &texts.iter().map(first).collect::<Vec<_>>());
        let most = texts.iter().map(|text| text.continuations.len()).max().unwrap_or(0);
        for index in 0..most {
            for (row, rest) in self.rests(texts, index, &cache, hook)? {
                let log_probs = &mut log_probs[row];
                log_probs[index] += rest;
            }
        }
        hook.finish()?;
        Ok(log_probs)
    }

    /// The log-probability of all but the first token of this continuation of each text, behind the
    /// cached prompts; only of those that are longer.
    fn rests<H: Hook + Clone>(
        &self,
        texts: &[Continued<'_>],
        index: usize,
        cache: &KvCache,
        hook: &H,
    ) -> Result<Vec<(usize, f64)>, ForwardError> {
        let of = |row: usize| texts[row].continuations.get(index).filter(|ids| ids.len() > 1);
        let (rows, continuations): (Vec<usize>, Vec<&[u32]>) =
            (0..texts.len()).filter_map(|row| Some((row, of(row)?.as_slice()))).unzip();
        let Some(n) = continuations.iter().map(|ids| ids.len() - 1).max() else {
            return Ok(Vec::new());
        };
        let mut branch = cache.clone();
        branch.select_rows(&rows);
        let rests = match self.rope_switch(&branch, n) {
            None => self.behind(branch, &continuations, n, &mut hook.clone())?,
            // What is cached was turned by other angles, or would be by the padding of others.
            Some(_) => {
                let anew = rows.iter().zip(&continuations);
                let anew = anew.map(|(&row, ids)| self.anew(row, texts[row].prompt, ids, hook));
                anew.collect::<Result<_, _>>()?
            }
        };
        Ok(rows.into_iter().zip(rests).collect())
    }

    /// The log-probability of every continuation but its first token, in a pass of `n` columns
    /// behind the cached prompts.
    fn behind<H: Hook>(
        &self,
        mut cache: KvCache,
        continuations: &[&[u32]],
        n: usize,
        hook: &mut H,
    ) -> Result<Vec<f64>, ForwardError> {
        // On the right, where nothing sees it, any token will do.
        let padded = |ids: &&[u32]| -> Vec<u32> {
            let (&last, run) = ids.split_last().expect("no continuation is empty");
            run.iter().copied().chain(std::iter::repeat(last)).take(n).collect()
        };
        let padded: Vec<Vec<u32>> = continuations.iter().map(padded).collect();
        let tokens = TokenBatch::new(&padded, self.config(), self.device())?;
        let positions = cache.next_positions(n);
        let residual = self.embed(&tokens, &positions, hook);
        let residual = self.blocks(residual, 0..self.config().n_layers, &mut cache, hook)?;
        let logits = self.unembed(residual, &positions, hook);
        hook.finish()?;
        let [batch, _, d_vocab] = logits.dims();
        let next = |ids: &&[u32]| -> Vec<Vec<u32>> {
            (1..=n).map(|at| ids.get(at).copied().into_iter().collect()).collect()
        };
        let next: Vec<Vec<u32>> = continuations.iter().flat_map(next).collect();
        let log_probs = log_probs_of(logits.reshape([batch * n, d_vocab]), &next);
        Ok(log_probs.chunks_exact(n).map(|row| row.iter().flatten().sum()).collect())
    }

    /// The same of one continuation, every token by a pass over all before it, as it would have been
    /// generated.
    fn anew<H: Hook + Clone>(
        &self,
        row: usize,
        prompt: &[u32],
        continuation: &[u32],
        hook: &H,
    ) -> Result<f64, ForwardError> {
        let mut log_prob = 0.0;
        for at in 1..continuation.len() {
            let text = [prompt, &continuation[..at]].concat();
            let tokens = TokenBatch::new(&[&text], self.config(), self.device())?;
            let mut cache =
                self.cache(SharedPrefix::default(), &tokens).anew(vec![row], prompt.len());
            let positions = cache.next_positions(text.len());
            let mut hook = hook.clone();
            let residual = self.embed(&tokens, &positions, &mut hook);
            let layers = 0..self.config().n_layers;
            let residual = self.blocks(residual, layers, &mut cache, &mut hook)?;
            let logits = self.unembed_last(residual, &positions, &mut hook);
            hook.finish()?;
            log_prob += log_probs_of(logits, &[vec![continuation[at]]])[0][0];
        }
        Ok(log_prob)
    }

    fn check_continuations(&self, texts: &[Continued<'_>]) -> Result<(), TokenError> {
        let config = self.config();
        for (row, Continued { prompt, continuations }) in texts.iter().enumerate() {
            for ids in *continuations {
                assert!(!ids.is_empty(), "a continuation of prompt {row} has no tokens");
                let actual = prompt.len() + ids.len() - 1;
                if actual > config.n_ctx {
                    return Err(TokenError::TooLong { row, expected: config.n_ctx, actual });
                }
                let expected = config.d_vocab;
                if let Some(&id) = ids.iter().find(|&&id| id as usize >= expected) {
                    return Err(TokenError::UnknownId { row, id, expected });
                }
            }
        }
        Ok(())
    }
}

/// The log-probabilities of some tokens by each row of logits.
///
/// # Shapes
/// `logits`: `[n, d_vocab]`.
fn log_probs_of(logits: Tensor<2>, ids: &[Vec<u32>]) -> Vec<Vec<f64>> {
    let (n, most) = (ids.len(), ids.iter().map(Vec::len).max().unwrap_or(0).max(1));
    let padded = |ids: &Vec<u32>| -> Vec<i64> {
        let ids = ids.iter().map(|&id| i64::from(id));
        ids.chain(std::iter::repeat(0)).take(most).collect()
    };
    let padded = TensorData::new(ids.iter().flat_map(padded).collect(), [n, most]);
    let padded = Tensor::<2, Int>::from_data(padded, &logits.device());
    let found = log_softmax(logits, 1).gather(1, padded).into_data();
    let found = found.as_slice::<f32>().expect("logits are f32");
    let rows = ids.iter().zip(found.chunks_exact(most));
    rows.map(|(ids, row)| row[..ids.len()].iter().copied().map(f64::from).collect()).collect()
}
