//! The top blocks of a preference model, learnt with its head: by additions of low rank (LoRA; Hu et
//! al., 2021), or whole.

use anyhow::{Context, Result, ensure};
use burn::tensor::activation::log_sigmoid;
use burn::tensor::{Device, Tensor, TensorData};
use kernels::{AdamConfig, AdamState, adam_step};
use model_hooks::{LanguageModel, RewardHead, RewardModel, SharedPrefix, TokenBatch, WeightOf};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use serde_json::json;

use super::model::{self, BATCH_TOKENS, CHOOSES, Wanted, read, texts};
use super::pairs::TokenPair;
use super::sources::Sources;
use super::stages::{Fingerprint, Stages};
use crate::assets::TextModel;
use crate::progress::{bar, tell};
use crate::storage::hash_bytes;

/// How blocks learn.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct TuneConfig {
    /// Blocks from the top.
    pub n_blocks: usize,
    /// Rank of what is added to each weight; without one, any matrix may be.
    pub rank: Option<usize>,
    /// Times that every pair is seen, at most.
    pub n_epochs: usize,
    /// Of the first step; it falls to nothing.
    pub learning_rate: f64,
    /// Of the draws.
    pub seed: u64,
}

impl TuneConfig {
    /// The top blocks, by additions of this rank: 8 if none is named, any matrix if 0.
    pub(super) fn new(n_blocks: usize, rank: Option<usize>, seed: u64) -> Self {
        let rank = Some(rank.unwrap_or(8)).filter(|&rank| rank > 0);
        // Whole matrices move by all their entries, those of low rank by few.
        let learning_rate = if rank.is_some() { 1e-3 } else { 5e-5 };
        Self { n_blocks, rank, n_epochs: 4, learning_rate, seed }
    }
}

/// A model whose top blocks have learnt.
pub(super) struct Tuned {
    pub(super) model: RewardModel,
    /// Of what it was made of.
    pub(super) hash: String,
    /// The weights that are not the checkpoint's.
    pub(super) changed: Vec<(WeightOf, Tensor<2>)>,
}

/// Pairs of a batch, with what the blocks that learn begin with.
struct Batch {
    tokens: TokenBatch,
    residual: Tensor<3>,
    n_pairs: usize,
    /// Whether neither text is preferred.
    is_tie: bool,
}

/// What is learnt: for each weight one or two matrices, whose product is added to it; then the head.
struct Parameters {
    tensors: Vec<Tensor<2>>,
    n_factors: usize,
}

/// Lets the top blocks learn from the pairs to learn from, or takes what was kept of that.
pub(super) fn tune(
    loaded: &TextModel,
    sources: &Sources,
    config: TuneConfig,
    stages: &Stages,
) -> Result<Tuned> {
    let body = loaded.model.body();
    let (n_layers, n_blocks) = (body.config().n_layers, config.n_blocks);
    ensure!(
        (1..=n_layers).contains(&n_blocks),
        "--tune {n_blocks}: the model has {n_layers} blocks"
    );
    let (pairs, ties) = (texts(&sources.train), texts(&sources.ties));
    let key = Fingerprint::new(&json!({
        "model": loaded.hash, "config": config, "pairs": Fingerprint::of_texts(&pairs),
        "ties": Fingerprint::of_texts(&ties), "device": format!("{:?}", body.device()),
    }));
    let beginning = Parameters::new(body, &vec![0.0; body.config().d_model], config)?;
    let values = stages.rows("tuned", &key, [1, beginning.values().len()], || {
        let all = [pairs.as_slice(), &ties].concat();
        let states = read(body, &all, Wanted { points: &[], last: true }, "reading pairs")?.last;
        let (of_pairs, of_ties) = states.split_at(pairs.len());
        // Those that choose are new to the head, too.
        let head = model::head(&of_pairs[..2 * n_learnt(sources)], of_ties);
        Ok(vec![learn(body, &head, sources, config)?.values()])
    })?;
    let parameters = beginning.with_values(&values[0]);
    let mut changed = Vec::new();
    let model = parameters.model(body, config, |of, weight| changed.push((of, weight)))?;
    let bytes: Vec<u8> = values[0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let hash = hash_bytes(&[loaded.hash.as_bytes(), &bytes].concat());
    Ok(Tuned { model, hash, changed })
}

/// Pairs that are learnt from; those behind them choose after which pass to stop.
fn n_learnt(sources: &Sources) -> usize {
    sources.train.len() - sources.train.len() / CHOOSES
}

/// Learns by the model of Bradley and Terry, with Adam.
fn learn(
    body: &LanguageModel,
    head: &[f32],
    sources: &Sources,
    config: TuneConfig,
) -> Result<Parameters> {
    let first = body.config().n_layers - config.n_blocks;
    let (pairs, chooses) = sources.train.split_at(n_learnt(sources));
    let mut training = batches(body, pairs, false, first)?;
    training.extend(batches(body, &sources.ties, true, first)?);
    let choosing = batches(body, chooses, false, first)?;
    let mut parameters = Parameters::new(body, head, config)?;
    let mut states: Vec<AdamState> = parameters
        .tensors
        .iter()
        .map(|of| AdamState { first: of.zeros_like(), second: of.zeros_like() })
        .collect();
    let n_steps = config.n_epochs * training.len();
    let mut best = (mean_loss(body, &parameters, &choosing, config)?, parameters.tensors.clone());
    let told =
        |epoch: usize, loss: f64| tell(&format!("after {epoch} passes, held-out loss {loss:.4}"));
    told(0, best.0);
    let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
    let learning = bar("top blocks", n_steps as u64);
    let mut step = 0;
    for epoch in 1..=config.n_epochs {
        training.shuffle(&mut rng);
        for batch in &training {
            let leaves = parameters.leaves();
            let model = leaves.model(body, config, |_, _| ())?;
            let grads = loss(&model, batch, first)?.backward();
            let left = (n_steps - step) as f64 / n_steps as f64;
            step += 1;
            let adam = AdamConfig::new(config.learning_rate * left);
            for ((parameter, leaf), state) in
                parameters.tensors.iter_mut().zip(&leaves.tensors).zip(&mut states)
            {
                let gradient = leaf.grad(&grads).context("a weight that nothing hangs on")?;
                let (moved, after) =
                    adam_step(parameter.clone(), gradient, state.clone(), step, adam);
                (*parameter, *state) = (moved, after);
            }
            learning.inc(1);
        }
        let loss = mean_loss(body, &parameters, &choosing, config)?;
        told(epoch, loss);
        if loss < best.0 {
            best = (loss, parameters.tensors.clone());
        }
    }
    learning.finish();
    ensure!(best.0.is_finite(), "the held-out loss is no number: the head cannot be learnt from");
    Ok(Parameters { tensors: best.1, ..parameters })
}

/// Pairs of about the same length together, run up to a block.
fn batches(
    body: &LanguageModel,
    pairs: &[TokenPair],
    is_tie: bool,
    first: usize,
) -> Result<Vec<Batch>> {
    let longest = |pair: &TokenPair| pair.chosen.len().max(pair.rejected.len());
    let mut order: Vec<&TokenPair> = pairs.iter().collect();
    order.sort_by_key(|pair| longest(pair));
    let mut batches = Vec::new();
    while let Some(last) = order.last() {
        // The longest come first, so that a batch is as long as its first pair.
        let n_pairs = (BATCH_TOKENS / (2 * longest(last))).clamp(1, order.len());
        let of_batch = order.split_off(order.len() - n_pairs);
        let rows: Vec<&[u32]> = of_batch.iter().flat_map(|pair| pair.texts()).collect();
        let tokens = TokenBatch::new(&rows, body.config(), body.device())?;
        let residual = body.run_until(&tokens, first, &mut ())?;
        batches.push(Batch { tokens, residual, n_pairs, is_tie });
    }
    Ok(batches)
}

/// `mean(−log σ(Δ))`; of ties the mean over both directions.
fn loss(model: &RewardModel, batch: &Batch, first: usize) -> Result<Tensor<1>> {
    let body = model.body();
    let mut cache = body.cache(SharedPrefix::default(), &batch.tokens);
    let positions = batch.tokens.positions(0);
    let mut residual = batch.residual.clone();
    if model.head().weight().device().is_autodiff() {
        residual = residual.autodiff();
    }
    let layers = first..body.config().n_layers;
    let residual = body.blocks(residual, layers, &mut cache, &mut ())?;
    let rewards = model.score(residual, &positions, &mut ()).reshape([batch.n_pairs, 2]);
    let difference = rewards.clone().narrow(1, 0, 1) - rewards.narrow(1, 1, 1);
    let told = match batch.is_tie {
        true => (log_sigmoid(difference.clone()) + log_sigmoid(-difference)) / 2.0,
        false => log_sigmoid(difference),
    };
    Ok(-told.mean())
}

/// The mean over the pairs of some batches.
fn mean_loss(
    body: &LanguageModel,
    parameters: &Parameters,
    batches: &[Batch],
    config: TuneConfig,
) -> Result<f64> {
    let first = body.config().n_layers - config.n_blocks;
    let model = parameters.model(body, config, |_, _| ())?;
    let (mut sum, mut n) = (0.0, 0);
    for batch in batches {
        let loss = loss(&model, batch, first)?.into_scalar::<f32>();
        sum += f64::from(loss) * batch.n_pairs as f64;
        n += batch.n_pairs;
    }
    Ok(sum / n.max(1) as f64)
}

impl Parameters {
    /// Such that the model is what it was, with this head.
    fn new(body: &LanguageModel, head: &[f32], config: TuneConfig) -> Result<Self> {
        let (n_layers, device) = (body.config().n_layers, body.device());
        let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
        let mut tensors = Vec::new();
        body.map_weights(n_layers - config.n_blocks..n_layers, |_, weight| {
            let [d_in, d_out] = weight.dims();
            match config.rank {
                Some(rank) => {
                    let most = 1.0 / (d_in as f32).sqrt();
                    let values = (0..d_in * rank).map(|_| rng.random_range(-most..most)).collect();
                    tensors.push(matrix(values, [d_in, rank], device));
                    tensors.push(Tensor::zeros([rank, d_out], device));
                }
                None => tensors.push(Tensor::zeros([d_in, d_out], device)),
            }
            weight
        })?;
        tensors.push(matrix(head.to_vec(), [1, head.len()], device));
        Ok(Self { tensors, n_factors: if config.rank.is_some() { 2 } else { 1 } })
    }

    /// All numbers, one tensor behind the other.
    fn values(&self) -> Vec<f32> {
        let values = |tensor: &Tensor<2>| tensor.clone().into_data().iter().collect::<Vec<f32>>();
        self.tensors.iter().flat_map(values).collect()
    }

    /// The same with other numbers, as [`values`](Self::values) gives them.
    fn with_values(mut self, mut values: &[f32]) -> Self {
        for tensor in &mut self.tensors {
            let shape @ [n, m] = tensor.dims();
            let (own, rest) = values.split_at(n * m);
            *tensor = matrix(own.to_vec(), shape, &tensor.device());
            values = rest;
        }
        self
    }

    /// The same as leaves of a graph.
    fn leaves(&self) -> Self {
        let leaf = |tensor: &Tensor<2>| tensor.clone().autodiff().require_grad();
        Self { tensors: self.tensors.iter().map(leaf).collect(), n_factors: self.n_factors }
    }

    /// The model that they make of a body; `changed` sees the weights that are not the body's.
    fn model(
        &self,
        body: &LanguageModel,
        config: TuneConfig,
        mut changed: impl FnMut(WeightOf, Tensor<2>),
    ) -> Result<RewardModel> {
        let n_layers = body.config().n_layers;
        let (head, factors) = self.tensors.split_last().context("a head")?;
        let mut of_weights = factors.chunks_exact(self.n_factors);
        let body = body.map_weights(n_layers - config.n_blocks..n_layers, |of, weight| {
            let factors = of_weights.next().expect("those of each weight").iter().cloned();
            let added = factors.reduce(Tensor::matmul).expect("one at least");
            let weight = if added.device().is_autodiff() { weight.autodiff() } else { weight };
            let weight = weight + added;
            changed(of.clone(), weight.clone());
            weight
        })?;
        Ok(RewardModel::new(body, RewardHead::new(head.clone())))
    }
}

fn matrix(values: Vec<f32>, shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, shape), device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preference::classifier;
    use crate::preference::pairs::divergence;
    use crate::preference::sources::Origin;
    use model_hooks::load;

    const MODEL: &str = "llama_mha";

    fn body() -> LanguageModel {
        let mut checkpoint = load::open(&goldens::own("models").join(MODEL)).unwrap();
        let device = Device::flex();
        LanguageModel::load(checkpoint.config, checkpoint.tensors.as_mut(), &device).unwrap()
    }

    /// Pairs whose preferred text has one of two tokens near its beginning.
    fn sources(n: usize) -> Sources {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let mut pair = |is_tie: bool| {
            let n = rng.random_range(30..40);
            let rejected: Vec<u32> = (0..n).map(|_| rng.random_range(10..60)).collect();
            let mut chosen = rejected.clone();
            let place = rng.random_range(1..8);
            chosen[place] = if is_tie { 70 } else { rng.random_range(71..73) };
            TokenPair { divergence: divergence(&chosen, &rejected), chosen, rejected }
        };
        Sources {
            train: (0..n).map(|_| pair(false)).collect(),
            ties: (0..n / 8).map(|_| pair(true)).collect(),
            test: Vec::new(),
            origin: Origin::Planted { test: Vec::new() },
            hosts: Vec::new(),
            chat: [Vec::new(), Vec::new()],
        }
    }

    fn config(rank: Option<usize>, n_epochs: usize) -> TuneConfig {
        TuneConfig { n_epochs, learning_rate: 1e-2, ..TuneConfig::new(1, rank, 5) }
    }

    fn head(body: &LanguageModel, pairs: &[TokenPair]) -> Vec<f32> {
        let wanted = Wanted { points: &[], last: true };
        model::head(&read(body, &texts(pairs), wanted, "").unwrap().last, &[])
    }

    #[test]
    fn without_a_pass_the_model_is_what_it_was() {
        let (body, sources) = (body(), sources(40));
        let head = head(&body, &sources.train);
        for rank in [None, Some(0)] {
            let config = config(rank, 0);
            let learnt = learn(&body, &head, &sources, config).unwrap();
            let mut n_changed = 0;
            let model = learnt.model(&body, config, |of, _| {
                assert_eq!(of.layer, body.config().n_layers - 1);
                n_changed += 1;
            });
            let plain = model::with_head(&body, &head);
            let tokens =
                TokenBatch::new(&sources.train[0].texts(), body.config(), body.device()).unwrap();
            let rewards = |model: &RewardModel| -> Vec<f32> {
                model.scores(&tokens, &mut ()).unwrap().into_data().try_to_vec().unwrap()
            };
            assert_eq!(rewards(&model.unwrap()), rewards(&plain));
            assert_eq!(n_changed, 7);
        }
    }

    #[test]
    fn blocks_and_head_learn() {
        let (body, sources) = (body(), sources(160));
        let head = vec![0.0; body.config().d_model];
        let first = body.config().n_layers - 1;
        let pairs = batches(&body, &sources.train, false, first).unwrap();
        for rank in [Some(4), Some(0)] {
            let loss = |n_epochs: usize| {
                let config = config(rank, n_epochs);
                let learnt = learn(&body, &head, &sources, config).unwrap();
                mean_loss(&body, &learnt, &pairs, config).unwrap()
            };
            assert!((loss(0) - 2f64.ln()).abs() < 1e-6, "nothing is preferred to begin with");
            let after = loss(8);
            assert!(after < 0.4, "rank {rank:?}: {after}");
        }
    }

    #[test]
    fn additions_have_their_rank_and_the_same_numbers_every_time() {
        let (body, sources) = (body(), sources(24));
        let head = vec![0.1; body.config().d_model];
        let config = config(Some(2), 1);
        let values = || learn(&body, &head, &sources, config).unwrap().values();
        assert_eq!(values(), values());
        let learnt = Parameters::new(&body, &head, config).unwrap().with_values(&values());
        assert_eq!(learnt.values(), values());
        let shapes: Vec<usize> =
            learnt.tensors.iter().map(|of| of.dims()[1].min(of.dims()[0])).collect();
        assert!(shapes[..14].iter().all(|&rank| rank == 2), "{shapes:?}");
    }

    #[test]
    fn a_saved_model_gives_the_rewards_of_the_tuned_one() {
        let (body, sources) = (body(), sources(24));
        let head = vec![0.1; body.config().d_model];
        let config = config(Some(2), 2);
        let learnt = Parameters::new(&body, &head, config).unwrap();
        let values: Vec<f32> = (0..learnt.values().len()).map(|i| (i as f32).sin() * 0.1).collect();
        let mut changed = Vec::new();
        let model = learnt
            .with_values(&values)
            .model(&body, config, |of, weight| changed.push((of, weight)))
            .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let head: Vec<f32> = model.head().weight().into_data().iter().collect();
        let source = goldens::own("models").join(MODEL);
        classifier::save(&source, &head, &changed, folder.path()).unwrap();
        let mut saved = load::open(folder.path()).unwrap();
        let saved = RewardModel::load(saved.config, saved.tensors.as_mut(), body.device()).unwrap();
        let tokens = TokenBatch::new(&sources.train[0].texts(), body.config(), body.device());
        let tokens = tokens.unwrap();
        let rewards = |model: &RewardModel| -> Vec<f32> {
            model.scores(&tokens, &mut ()).unwrap().into_data().try_to_vec().unwrap()
        };
        assert_eq!(rewards(&saved), rewards(&model));
        assert_ne!(rewards(&saved), rewards(&model::with_head(&body, &head)));
    }
}
