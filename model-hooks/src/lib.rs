//! A language model you can look into and change while it runs.
//!
//! Hook points have TransformerLens' names ([`HookPoint`]); positions are absolute in the
//! conversation ([`Positions`]), whatever the padding and the cache. What a hook was to do and did
//! not is an error, never silence.
//!
//! # Load
//!
//! [`load::open`] takes a GGUF file or a Hugging Face folder (`load::hub` fetches one), of the
//! architectures in [`config::Architecture`].
//!
//! ```no_run
//! use burn::tensor::Device;
//! use model_hooks::{LanguageModel, load};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Device::flex();
//! let mut checkpoint = load::open("SmolLM2-135M-Instruct.Q4_1.gguf".as_ref())?;
//! let model = LanguageModel::load(checkpoint.config, checkpoint.tensors.as_mut(), &device)?;
//! println!("{} hook points", model.hook_points().len());
//! # Ok(()) }
//! ```
//!
//! # Chat
//!
//! [`LanguageModel::generate`] continues any number of conversations, behind a prefix that is run
//! once for all of them, greedily or by [`Sampling`]. What watches it can end a row.
//!
//! ```no_run
//! # use model_hooks::{LanguageModel, load};
//! use std::ops::ControlFlow;
//!
//! use model_hooks::text::{Message, Role};
//! use model_hooks::{GenerateConfig, NewToken, RandomSampling, Sampling, SharedPrefix};
//!
//! # fn f(model: &LanguageModel, checkpoint: load::Checkpoint) -> Result<(), Box<dyn std::error::Error>> {
//! let tokenizer = checkpoint.tokenizer.ok_or("no tokenizer")?;
//! let template = checkpoint.chat_template.ok_or("no chat template")?;
//! let question = Message::new(Role::User, "How do plants drink?");
//! let ids = tokenizer.encode(&template.render(&[question], true)?)?;
//!
//! let mut config = GenerateConfig::greedy(64, model.config().special_tokens.eos.clone());
//! let sampling = RandomSampling { top_p: Some(0.9), ..RandomSampling::new(0.7, 1) };
//! config.sampling = Sampling::Random(sampling);
//! let until_full_stop = |new: NewToken<'_>| match tokenizer.decode_plain(new.answer) {
//!     Ok(text) if text.ends_with(". ") => ControlFlow::Break(()),
//!     _ => ControlFlow::Continue(()),
//! };
//! let none = SharedPrefix::default();
//! let answers = model.generate(&[ids], &none, &config, &mut (), until_full_stop)?;
//! println!("{}", tokenizer.decode_plain(&answers[0])?);
//! # Ok(()) }
//! ```
//!
//! # Capture
//!
//! [`LanguageModel::capture`] runs no further than the points need. [`ActivationCache`] is the hook
//! behind it, for passes that do other things too.
//!
//! ```no_run
//! # use model_hooks::LanguageModel;
//! use model_hooks::{HookPoint, TokenBatch};
//!
//! # fn f(model: &LanguageModel, ids: &[u32]) -> Result<(), Box<dyn std::error::Error>> {
//! let tokens = TokenBatch::new(&[ids], model.config(), model.device())?;
//! let pattern: HookPoint = "blocks.3.attn.hook_pattern".parse()?;
//! let cache = model.capture(&tokens, [pattern, HookPoint::resid_post(5)])?;
//! let pattern = cache.get::<4>(pattern).ok_or("not captured")?; // [batch, head, query, key]
//! let residual = cache.get::<3>(HookPoint::resid_post(5)).ok_or("not captured")?;
//! // The logit lens: what the model would say if it ended here.
//! let logits = model.unembed(residual, &tokens.positions(0), &mut ());
//! # Ok(()) }
//! ```
//!
//! # Edit
//!
//! Implement [`Hook`], or make a list at run time out of closures ([`Edits`]). Two hooks in a tuple
//! run one after the other.
//!
//! ```no_run
//! # use model_hooks::{LanguageModel, TokenBatch};
//! use model_hooks::{Activation, Edits, HookPoint, Positions};
//!
//! # fn f(model: &LanguageModel, tokens: &TokenBatch) -> Result<(), Box<dyn std::error::Error>> {
//! let mut edits = Edits::new();
//! let silence = |_: HookPoint, x: Activation, _: &Positions| {
//!     Activation::new(x.into_tensor::<4>() * 0.0)
//! };
//! edits.push("blocks.7.attn.hook_z".parse()?, Box::new(silence));
//! let logits = model.last_logits(tokens, &mut edits)?; // an edit that never fired is an error
//! # Ok(()) }
//! ```
//!
//! # Differentiate
//!
//! [`Probe`] gives `d metric / d activation` at any set of points by one backward pass.
//!
//! ```no_run
//! # use model_hooks::{LanguageModel, TokenBatch};
//! use model_hooks::{HookPoint, Probe};
//!
//! # fn f(model: &LanguageModel, tokens: &TokenBatch) -> Result<(), Box<dyn std::error::Error>> {
//! let point = HookPoint::resid_post(5);
//! let mut probe = Probe::new([point]);
//! let logits = model.last_logits(tokens, &mut probe)?;
//! let grads = logits.narrow(1, 42, 1).sum().backward();
//! let gradient = probe.gradient::<3>(point, &grads).ok_or("not probed")?;
//! # Ok(()) }
//! ```
//!
//! # Train
//!
//! [`LanguageModel::map_weights`] puts other weights into some blocks. Where those are part of a graph,
//! so is what comes out, and one backward pass gives their gradients.
//!
//! ```no_run
//! # use burn::tensor::{Device, Tensor};
//! # use model_hooks::{LanguageModel, TokenBatch};
//! # fn f(model: &LanguageModel, tokens: &TokenBatch) -> Result<(), Box<dyn std::error::Error>> {
//! let mut leaves = Vec::new();
//! let trained = model.map_weights(28..30, |_, weight| {
//!     let leaf = weight.autodiff().require_grad();
//!     leaves.push(leaf.clone());
//!     leaf
//! })?;
//! let logits = trained.last_logits(tokens, &mut ())?;
//! let grads = logits.narrow(1, 42, 1).sum().backward();
//! let gradient = leaves[0].grad(&grads).ok_or("not reached")?;
//! # Ok(()) }
//! ```
//!
//! # Harvest
//!
//! [`LanguageModel::harvest`] streams one row per token of many texts, at several points at once.
//!
//! ```no_run
//! # use model_hooks::LanguageModel;
//! use std::ops::ControlFlow;
//!
//! use model_hooks::{HarvestConfig, HookPoint, Layout, SharedPrefix};
//!
//! # fn f(model: &LanguageModel, texts: &[Vec<u32>]) -> Result<(), Box<dyn std::error::Error>> {
//! let mut config = HarvestConfig::new(HookPoint::resid_post(5), 1024);
//! config.layout = Layout::Packed { row_tokens: 128 };
//! config.skip_positions = 1;
//! let report = model.harvest(texts, &SharedPrefix::default(), &config, |harvested| {
//!     let [n, width] = harvested.activations[0].dims();
//!     println!("{n} rows of {width}, the first at {:?}", harvested.places[0]);
//!     ControlFlow::Continue(())
//! })?;
//! println!("{report:?}");
//! # Ok(()) }
//! ```
//!
//! # Score
//!
//! [`RewardModel`] reads scores off the last token: a sequence classifier of the hub, or a head put
//! on any model.
//!
//! ```no_run
//! use burn::tensor::Device;
//! use model_hooks::{RewardModel, TokenBatch, load};
//!
//! # fn f(ids: &[u32]) -> Result<(), Box<dyn std::error::Error>> {
//! let mut checkpoint = load::open("a-reward-model".as_ref())?;
//! let device = Device::flex();
//! let model = RewardModel::load(checkpoint.config, checkpoint.tensors.as_mut(), &device)?;
//! let tokens = TokenBatch::new(&[ids], model.body().config(), &device)?;
//! let scores = model.scores(&tokens, &mut ())?; // [batch, n_scores]
//! # Ok(()) }
//! ```
//!
//! # Add an architecture
//!
//! A block is data: which norms it has, its attention (with a window, a soft cap, norms on queries
//! and keys, a rotary), its MLP, and whether both halves run in parallel. An architecture's file in
//! `architectures/` says so and names the weights; its config is read in `config/hf/`. Hook points,
//! caching, generation and gradients come by themselves, and the golden tests pick up a case that
//! `goldens/make.py` makes. CONTRIBUTING.md has the steps.

mod activation;
mod architectures;
mod cache;
pub mod config;
mod continuations;
mod cross_entropy;
mod edit;
mod generate;
mod harvest;
mod hook;
mod hook_point;
mod layers;
pub mod load;
mod model;
mod positions;
mod probe;
mod projections;
mod reward;
mod row_edit;
mod sampling;
pub mod text;
mod tokens;

pub use activation::Activation;
pub use architectures::WeightDtype;
pub use cache::ActivationCache;
pub use config::ModelConfig;
pub use continuations::Continued;
pub use cross_entropy::{CrossEntropy, Predictions, batches_in_order};
pub use edit::{Edit, Edits};
pub use generate::{GenerateConfig, NewToken, unobserved};
pub use harvest::{HarvestConfig, HarvestReport, Harvested, Layout, Place};
pub use hook::{Hook, HookError};
pub use hook_point::{Axis, HookPoint, Site, UnknownHookPoint};
pub use layers::{KvCache, RopeLength, SharedPrefix};
pub use model::{ForwardError, LanguageModel};
pub use positions::Positions;
pub use probe::Probe;
pub use projections::{Projection, WeightOf};
pub use reward::{RewardHead, RewardModel};
pub use row_edit::RowEdit;
pub use sampling::{RandomSampling, Sampling, SamplingError};
pub use tokens::{TokenBatch, TokenError};
