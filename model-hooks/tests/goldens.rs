//! Models against what transformers computes on the same weights.

use std::path::Path;

use burn::tensor::{Device, Tensor};
use goldens::{Case, assert_close};
use model_hooks::config::ConfigError;
use model_hooks::load::{self, Checkpoint, LoadError};
use model_hooks::{
    ActivationCache, GenerateConfig, HookPoint, LanguageModel, Probe, RewardModel, RopeLength,
    SharedPrefix, Site, TokenBatch, unobserved,
};

const TOLERANCE: f32 = 1e-4;

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().expect("an f32 tensor")
}

/// A model of either kind; its switch of LongRoPE is that of transformers.
enum Model {
    Language(Box<LanguageModel>),
    Reward(Box<RewardModel>),
}

impl Model {
    /// The model in a folder, or why it is not supported.
    fn open(folder: &Path) -> Result<Self, String> {
        let is_unknown = |error: &LoadError| {
            let LoadError::Config { source, .. } = error else { return false };
            matches!(source, ConfigError::UnknownArchitecture { .. })
        };
        let Checkpoint { config, mut tensors, .. } = match load::open(folder) {
            Ok(checkpoint) => checkpoint,
            Err(error) if is_unknown(&error) => return Err(chain(&error)),
            Err(error) => panic!("{}", chain(&error)),
        };
        let device = Device::flex();
        let is_reward = tensors.names().iter().any(|name| name == "score.weight");
        let model = if is_reward {
            RewardModel::load(config, tensors.as_mut(), &device)
                .map(|model| Self::Reward(Box::new(model)))
        } else {
            let model = LanguageModel::load(config, tensors.as_mut(), &device);
            let longest = RopeLength::LongestOfBatch;
            model.map(|model| Self::Language(Box::new(model.with_rope_length(longest))))
        };
        Ok(model.unwrap_or_else(|error| panic!("{}", chain(&error))))
    }

    fn body(&self) -> &LanguageModel {
        match self {
            Self::Language(model) => model,
            Self::Reward(model) => model.body(),
        }
    }

    /// Logits at every position, or scores.
    fn logits(&self, tokens: &TokenBatch, hook: &mut impl model_hooks::Hook) -> Vec<f32> {
        match self {
            Self::Language(model) => floats(model.logits(tokens, hook).unwrap()),
            Self::Reward(model) => floats(model.scores(tokens, hook).unwrap()),
        }
    }
}

fn language(case: &Case) -> Result<LanguageModel, String> {
    match Model::open(case.folder())? {
        Model::Language(model) => Ok(*model),
        Model::Reward(_) => Err("a reward model generates nothing".into()),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

fn batch(model: &LanguageModel, rows: &[Vec<u32>]) -> TokenBatch {
    TokenBatch::new(rows, model.config(), model.device()).expect("golden ids fit the model")
}

#[test]
fn golden_logits_and_activations() {
    goldens::for_each_case("models", |case| {
        let model = Model::open(case.folder())?;
        let tokens = batch(model.body(), &case.ids("input_ids"));
        let points = model.body().hook_points();
        let mut cache = ActivationCache::new(points.iter().copied());
        let expected = case.floats("logits").1;
        // Capturing scores and patterns takes the plain path through attention.
        assert_close("plain logits", &model.logits(&tokens, &mut cache), &expected, TOLERANCE);
        assert_close("logits", &model.logits(&tokens, &mut ()), &expected, TOLERANCE);

        let n_layers = model.body().config().n_layers;
        let point = |layer, site| HookPoint::Block { layer, site };
        let kept = |point| floats(cache.get::<3>(point).unwrap());
        let first = kept(point(0, Site::ResidPre));
        assert_close("embedded", &first, &case.floats("hidden_states.0").1, TOLERANCE);
        for layer in 0..n_layers {
            // The goldens have what comes out of attention and MLP, before a norm behind them.
            let out = |site, scale, normalized| match cache.get::<3>(point(layer, normalized)) {
                Some(x) => floats(x * cache.get::<3>(point(layer, scale)).unwrap()),
                None => kept(point(layer, site)),
            };
            let attn_out = out(Site::AttnOut, Site::Ln1PostScale, Site::Ln1PostNormalized);
            let mlp_out = out(Site::MlpOut, Site::Ln2PostScale, Site::Ln2PostNormalized);
            let block_out = kept(point(layer, Site::ResidPost));
            let pattern = floats(cache.get::<4>(point(layer, Site::Pattern)).unwrap());
            for (name, actual) in [
                ("attn_out", attn_out),
                ("mlp_out", mlp_out),
                ("block_out", block_out),
                ("attn_weights", pattern),
            ] {
                let name = format!("{name}.{layer}");
                assert_close(&name, &actual, &case.floats(&name).1, TOLERANCE);
            }
        }
        Ok(())
    });
}

#[test]
fn golden_config_of_either_spelling() {
    goldens::for_each_case("models", |case| {
        let folder = tempfile::tempdir().unwrap();
        for (from, to) in
            [("config.v4.json", "config.json"), ("model.safetensors", "model.safetensors")]
        {
            std::fs::copy(case.folder().join(from), folder.path().join(to)).unwrap();
        }
        let (old, new) = (Model::open(folder.path())?, Model::open(case.folder())?);
        assert_eq!(old.body().config(), new.body().config());
        let tokens = batch(old.body(), &case.ids("input_ids"));
        assert_close("logits", &old.logits(&tokens, &mut ()), &case.floats("logits").1, TOLERANCE);
        Ok(())
    });
}

#[test]
fn golden_padded_rows() {
    goldens::for_each_case("models", |case| {
        let model = Model::open(case.folder())?;
        for side in ["leftpad", "rightpad"] {
            let (shape, mask) = case.ints(&format!("{side}.attention_mask"));
            let n = shape[1];
            let kept: Vec<Vec<usize>> = mask
                .chunks(n)
                .map(|row| (0..n).filter(|&column| row[column] == 1).collect())
                .collect();
            let ids = case.ids(&format!("{side}.input_ids"));
            let rows: Vec<Vec<u32>> = ids
                .iter()
                .zip(&kept)
                .map(|(ids, kept)| kept.iter().map(|&c| ids[c]).collect())
                .collect();
            let logits = model.logits(&batch(model.body(), &rows), &mut ());
            // Positions of their own, where the model takes them.
            let by_position = format!("{side}.logits_with_position_ids");
            let name = match case.has(&by_position) {
                true => by_position,
                false => format!("{side}.logits"),
            };
            let (shape, expected) = case.floats(&name);
            let Model::Language(model) = &model else {
                assert_close(&name, &logits, &expected, TOLERANCE);
                continue;
            };
            let d_vocab = shape[2];
            for (row, kept) in kept.iter().enumerate() {
                for (i, &column) in kept.iter().enumerate() {
                    let own = (row * n + n - kept.len() + i) * d_vocab;
                    let theirs = (row * n + column) * d_vocab;
                    let (own, theirs) = (&logits[own..][..d_vocab], &expected[theirs..][..d_vocab]);
                    assert_close(&name, own, theirs, TOLERANCE);
                }
            }
            if side == "leftpad" {
                let greedy = case.ids("leftpad.greedy_ids");
                let expected: Vec<_> = greedy.iter().map(|row| row[n..].to_vec()).collect();
                assert_eq!(generate(model, &rows, expected[0].len()), expected, "{side}.greedy");
            }
        }
        Ok(())
    });
}

fn generate(model: &LanguageModel, rows: &[Vec<u32>], n: usize) -> Vec<Vec<u32>> {
    let stop_ids = model.config().special_tokens.eos.clone();
    let config = GenerateConfig { min_new_tokens: n, ..GenerateConfig::greedy(n, stop_ids) };
    model.generate(rows, &SharedPrefix::default(), &config, &mut (), unobserved).unwrap()
}

#[test]
fn golden_cached_greedy_ids() {
    goldens::for_each_case("models", |case| {
        let model = language(case)?;
        let rows = case.ids("input_ids");
        let n = rows[0].len();
        let expected: Vec<_> = case.ids("greedy_ids").iter().map(|row| row[n..].to_vec()).collect();
        assert_eq!(generate(&model, &rows, expected[0].len()), expected);
        for (row, expected) in rows.iter().zip(&expected) {
            let alone = generate(&model, std::slice::from_ref(row), expected.len());
            assert_eq!(&alone[0], expected, "alone");
        }
        Ok(())
    });
}

#[test]
fn golden_gradient_at_a_hook_point() {
    goldens::for_each_case("models", |case| {
        let model = Model::open(case.folder())?;
        let body = model.body();
        let point = HookPoint::resid_post(0);
        let tokens = batch(body, &case.ids("input_ids"));
        let mut probe = Probe::new([point]);
        let metric = match &model {
            Model::Language(model) => {
                model.last_logits(&tokens, &mut probe).unwrap().narrow(1, 7, 1).sum()
            }
            Model::Reward(model) => model.scores(&tokens, &mut probe).unwrap().sum(),
        };
        let gradient = probe.gradient::<3>(point, &metric.backward()).unwrap();
        let (shape, expected) = case.floats("grad.hidden_states.1");
        assert_eq!(gradient.dims().to_vec(), shape);
        assert_close("gradient", &floats(gradient), &expected, TOLERANCE);

        // Starting from the residual gives the same gradient as a probe in the middle.
        let residual = body.run_until(&tokens, 1, &mut ()).unwrap();
        let leaf = residual.autodiff().require_grad();
        let metric = match &model {
            Model::Language(model) => {
                let logits = model.logits_from(leaf.clone(), 1, &tokens, &mut ()).unwrap();
                let last = logits.dims()[1] - 1;
                logits.narrow(1, last, 1).narrow(2, 7, 1).sum()
            }
            Model::Reward(model) => {
                let mut cache = body.cache(SharedPrefix::default(), &tokens);
                let layers = 1..body.config().n_layers;
                let end = body.blocks(leaf.clone(), layers, &mut cache, &mut ()).unwrap();
                model.score(end, &tokens.positions(0), &mut ()).sum()
            }
        };
        let gradient = floats(leaf.grad(&metric.backward()).unwrap());
        assert_close("gradient from a residual", &gradient, &expected, TOLERANCE);
        Ok(())
    });
}
