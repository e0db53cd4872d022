//! What must hold of any model: hooks that change nothing, caches, batches, gradients, errors.

mod generation;
mod published;

use std::ops::ControlFlow;
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use goldens::assert_close;
use model_hooks::load::{LoadError, RawTensor, TensorSource};
use model_hooks::{
    Activation, ActivationCache, Axis, Continued, Edits, ForwardError, GenerateConfig,
    HarvestConfig, Harvested, Hook, HookError, HookPoint, KvCache, LanguageModel, Layout, NewToken,
    Place, Positions, Probe, RandomSampling, RewardHead, RewardModel, Sampling, SharedPrefix, Site,
    TokenBatch, TokenError, WeightDtype, load, unobserved,
};

const ROWS: [&[u32]; 3] = [&[5, 9, 40, 77, 12, 8, 101], &[44, 3, 90], &[7, 7, 19, 23, 60]];

fn model() -> LanguageModel {
    named("llama_gqa_theta_tied")
}

fn named(name: &str) -> LanguageModel {
    let mut checkpoint = load::open(&goldens::own("models").join(name)).unwrap();
    LanguageModel::load(checkpoint.config, checkpoint.tensors.as_mut(), &Device::flex()).unwrap()
}

/// A model of every architecture, and of every way to wire one.
fn models() -> impl Iterator<Item = (&'static str, LanguageModel)> {
    [
        "gpt2",
        "gptj",
        "gpt_neox",
        "gpt_neox_sequential",
        "opt",
        "llama_gqa_theta_tied",
        "llama_rope_yarn",
        "mistral_sliding",
        "qwen2_sliding",
        "qwen3",
        "phi3",
        "phi3_partial_longrope_long",
        "gemma2",
        "gemma3",
        "olmo2",
    ]
    .into_iter()
    .map(|name| (name, named(name)))
}

fn batch(model: &LanguageModel, rows: &[impl AsRef<[u32]>]) -> TokenBatch {
    TokenBatch::new(rows, model.config(), model.device()).unwrap()
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().unwrap()
}

#[test]
fn capturing_everything_changes_nothing_and_shapes_are_the_axes() {
    for (name, model) in models() {
        let tokens = batch(&model, &ROWS);
        let plain = floats(model.logits(&tokens, &mut ()).unwrap());
        let points = model.hook_points();
        let mut cache = ActivationCache::new(points.iter().copied());
        let captured = floats(model.logits(&tokens, &mut cache).unwrap());
        assert_close(name, &captured, &plain, 5e-5);

        let config = model.config();
        let [batch, pos] = tokens.dims();
        let mut n_seen = 0;
        for (point, activation) in cache.iter() {
            let length = |axis: &Axis| match axis {
                Axis::Batch => batch,
                Axis::Pos | Axis::Query | Axis::Key => pos,
                Axis::Head => config.attention.n_heads,
                Axis::KvHead => config.attention.n_kv_heads,
                Axis::DModel => config.d_model,
                Axis::DMlp => config.mlp.d_mlp,
                Axis::DHead => config.attention.d_head,
                Axis::One => 1,
            };
            let expected: Vec<usize> = point.axes().iter().map(length).collect();
            assert_eq!(activation.shape(), expected, "{name}: {point}");
            n_seen += 1;
        }
        assert_eq!(n_seen, points.len());
    }
}

#[test]
fn a_capture_runs_no_further_than_it_must() {
    let model = model();
    let tokens = batch(&model, &ROWS);
    let whole = model.capture(&tokens, model.hook_points()).unwrap();
    for point in model.hook_points() {
        let alone = model.capture(&tokens, [point]).unwrap();
        let [(_, alone)] = alone.iter().collect::<Vec<_>>()[..] else { panic!("one point") };
        let (_, together) = whole.iter().find(|(other, _)| *other == point).unwrap();
        assert_eq!(alone.shape(), together.shape(), "{point}");
    }
    let far = HookPoint::resid_post(7);
    let error = model.capture(&tokens, [far]).unwrap_err();
    assert!(matches!(error, ForwardError::Hook(HookError::NoSuchPoint { .. })));
}

/// Notes the points it sees.
#[derive(Default)]
struct Order(Vec<HookPoint>);

impl Hook for Order {
    fn wants(&self, _: HookPoint) -> bool {
        true
    }

    fn at<const D: usize>(&mut self, point: HookPoint, x: Tensor<D>, _: &Positions) -> Tensor<D> {
        self.0.push(point);
        x
    }
}

#[test]
fn points_come_in_the_order_that_the_model_says() {
    for (name, model) in models() {
        let mut order = Order::default();
        model.logits(&batch(&model, &ROWS), &mut order).unwrap();
        assert_eq!(order.0, model.hook_points(), "{name}");
    }
}

#[test]
fn an_edit_that_gives_back_the_value_changes_nothing_and_any_other_does() {
    for (name, model) in models() {
        let tokens = batch(&model, &ROWS);
        let plain = floats(model.logits(&tokens, &mut ()).unwrap());
        for point in model.hook_points() {
            let mut same = Edits::new();
            same.push(point, Box::new(|_: HookPoint, x: Activation, _: &Positions| x));
            let edited = floats(model.logits(&tokens, &mut same).unwrap());
            assert_close(&format!("{name}: {point}"), &edited, &plain, 5e-5);

            let mut moved = Edits::new();
            moved.push(point, Box::new(other));
            let edited = floats(model.logits(&tokens, &mut moved).unwrap());
            let differs = edited.iter().zip(&plain).any(|(a, b)| (a - b).abs() > 1e-3);
            assert!(differs, "{name}: an edit at {point} does nothing");
        }
    }
}

/// Another value. Norms undo a factor and may undo a summand, the softmax a summand.
fn other(_: HookPoint, x: Activation, _: &Positions) -> Activation {
    match x {
        Activation::Rank3(x) => Activation::Rank3(x.clone().square() * 0.3 + x + 0.7),
        Activation::Rank4(x) => Activation::Rank4(x.clone().tanh() + x * 0.5),
    }
}

#[test]
fn batched_is_alone() {
    for (name, model) in models() {
        let together = model.last_logits(&batch(&model, &ROWS), &mut ()).unwrap();
        for (row, ids) in ROWS.iter().enumerate() {
            let alone = model.last_logits(&batch(&model, &[ids]), &mut ()).unwrap();
            let row = floats(together.clone().narrow(0, row, 1));
            assert_close(name, &row, &floats(alone), 2e-5);
        }
    }
}

#[test]
fn direct_logits_of_the_components_add_up_to_the_logits() {
    for (name, model) in models() {
        let tokens = batch(&model, &ROWS[..1]);
        let n_layers = model.config().n_layers;
        let point = |layer, site| HookPoint::Block { layer, site };
        let added = (0..n_layers)
            .flat_map(|layer| [point(layer, Site::AttnOut), point(layer, Site::MlpOut)])
            .chain([point(0, Site::ResidPre)]);
        let end = HookPoint::resid_post(n_layers - 1);
        let cache = model.capture(&tokens, added.clone().chain([end])).unwrap();
        let residual = cache.get::<3>(end).unwrap();
        let share = |x| floats(model.direct_logits(x, residual.clone(), &[5, 77]).unwrap());
        let whole = share(residual.clone());
        let mut sum = vec![0.0; whole.len()];
        for point in added {
            let shares = share(cache.get::<3>(point).unwrap());
            sum.iter_mut().zip(shares).for_each(|(sum, share)| *sum += share);
        }
        assert_close(name, &sum, &whole, 1e-4);
        // Where nothing is added after the product, they are the logits.
        if name.starts_with("llama") {
            let logits = model.logits(&tokens, &mut ()).unwrap();
            let ids = Tensor::from_data([5, 77], model.device());
            assert_close(name, &whole, &floats(logits.select(2, ids)), 1e-4);
        }
    }
    let error = model()
        .direct_logits(
            Tensor::zeros([1, 1, 48], &Device::flex()),
            Tensor::ones([1, 1, 48], &Device::flex()),
            &[131],
        )
        .map(drop)
        .unwrap_err();
    assert!(matches!(error, ForwardError::Tokens(TokenError::UnknownId { id: 131, .. })));
}

#[test]
fn a_head_on_any_model_reads_the_last_token_of_each_row() {
    for (name, model) in models() {
        let d_model = model.config().d_model;
        let weight = (0..2 * d_model).map(|i| (i as f32).sin()).collect::<Vec<_>>();
        let weight = Tensor::from_data(TensorData::new(weight, [2, d_model]), model.device());
        let reward = RewardModel::new(model, RewardHead::new(weight.clone()));
        let together = reward.scores(&batch(reward.body(), &ROWS), &mut ()).unwrap();
        assert_eq!(together.dims(), [3, 2]);
        for (row, ids) in ROWS.iter().enumerate() {
            let tokens = batch(reward.body(), &[ids]);
            let alone = reward.scores(&tokens, &mut ()).unwrap();
            let row = floats(together.clone().narrow(0, row, 1));
            assert_close(name, &row, &floats(alone), 2e-5);
        }
    }
    let mut checkpoint = load::open(&goldens::own("models/llama_seqcls_reward")).unwrap();
    let model =
        RewardModel::load(checkpoint.config, checkpoint.tensors.as_mut(), &Device::flex()).unwrap();
    let error = model.body().logits(&batch(model.body(), &ROWS), &mut ()).map(drop);
    assert_eq!(error, Err(ForwardError::NoUnembedding));
}

#[test]
fn hooks_see_absolute_positions_in_prefix_prefill_and_steps() {
    #[derive(Default)]
    struct Seen(Vec<Vec<usize>>);
    impl Hook for Seen {
        fn wants(&self, point: HookPoint) -> bool {
            point == HookPoint::Embed
        }
        fn at<const D: usize>(&mut self, _: HookPoint, x: Tensor<D>, at: &Positions) -> Tensor<D> {
            self.0.resize(at.n_rows().max(self.0.len()), Vec::new());
            for row in 0..at.n_rows() {
                self.0[row].extend((0..at.n_columns()).filter_map(|column| at.get(row, column)));
            }
            x
        }
    }
    let model = model();
    let prefix = model.prefix(&[1, 2, 3, 4], &mut ()).unwrap();
    let config = GenerateConfig::greedy(3, vec![]);
    let mut seen = Seen::default();
    model.generate(&ROWS, &prefix, &config, &mut seen, unobserved).unwrap();
    for (row, ids) in ROWS.iter().enumerate() {
        let expected: Vec<usize> = (4..4 + ids.len() + 2).collect();
        assert_eq!(seen.0[row], expected);
    }
}

#[test]
fn harvest_gives_each_token_once_and_as_a_pass_alone_would() {
    const TEXTS: [&[u32]; 6] =
        [ROWS[0], ROWS[1], ROWS[2], &[61], &[9, 40, 3, 3], &[70, 12, 8, 9, 1, 66, 43, 2, 15]];
    let prefix_ids = [9, 8, 7];
    for name in ["llama_gqa_theta_tied", "mistral_sliding", "gpt2"] {
        let model = named(name);
        let points = vec![HookPoint::resid_post(1), HookPoint::Block { layer: 0, site: Site::Z }];
        let (none, prefix) = (SharedPrefix::default(), model.prefix(&prefix_ids, &mut ()).unwrap());
        let layouts = [Layout::OneByOne, Layout::Packed { row_tokens: 8 }];
        for (shared, skip_positions, layout) in
            layouts.into_iter().flat_map(|layout| [(&none, 1, layout), (&prefix, 0, layout)])
        {
            let config = HarvestConfig {
                points: points.clone(),
                batch_tokens: 16,
                layout,
                skip_positions,
                skip_ids: vec![9],
            };
            let mut rows = Vec::new();
            let sink = |harvested: Harvested| {
                for (row, place) in harvested.places.iter().enumerate() {
                    let of = |x: &Tensor<2>| floats(x.clone().narrow(0, row, 1));
                    assert_eq!(harvested.activations[0].dims()[0], harvested.places.len());
                    rows.push((*place, harvested.activations.iter().map(of).collect::<Vec<_>>()));
                }
                ControlFlow::Continue(())
            };
            let report = model.harvest(&TEXTS, shared, &config, sink).unwrap();
            let n_prefix = shared.n_tokens();
            let mut expected = Vec::new();
            for (text, ids) in TEXTS.iter().enumerate() {
                let own = ids.iter().enumerate().map(|(i, &id)| (n_prefix + i, id));
                let kept = own.filter(|&(position, id)| position >= skip_positions && id != 9);
                expected.extend(kept.map(|(position, _)| Place { text, position }));
            }
            let mut places: Vec<Place> = rows.iter().map(|(place, _)| *place).collect();
            places.sort_unstable();
            assert_eq!(places, expected);
            assert_eq!(report.n_taken, expected.len());
            let skipped = report.n_skipped_positions + report.n_skipped_ids;
            let n_tokens = TEXTS.iter().map(|text| text.len()).sum::<usize>();
            assert_eq!(report.n_taken + skipped, n_tokens);

            for (place, activations) in rows {
                let ids = [&prefix_ids[..n_prefix], TEXTS[place.text]].concat();
                let alone = model.capture(&batch(&model, &[&ids]), points.clone()).unwrap();
                let residual = alone.get::<3>(points[0]).unwrap().narrow(1, place.position, 1);
                assert_close("residual", &activations[0], &floats(residual), 1e-5);
                let heads = alone.get::<4>(points[1]).unwrap().narrow(1, place.position, 1);
                assert_close("heads", &activations[1], &floats(heads), 1e-5);
            }
        }
    }
}

#[test]
fn gradients_agree_with_finite_differences() {
    for (name, model) in models() {
        let tokens = batch(&model, &ROWS[..1]);
        let metric = |logits: Tensor<2>| logits.narrow(1, 17, 1).sum();
        let sites = model.hook_points().into_iter().filter(|point| point.layer() == Some(1));
        let probed: Vec<HookPoint> = sites.chain([HookPoint::Embed]).collect();
        // One backward pass for all of them.
        let mut probe = Probe::new(probed.iter().copied());
        let grads = metric(model.last_logits(&tokens, &mut probe).unwrap()).backward();
        for point in probed {
            // Along a fixed direction, with steps that f32 resolves.
            let (slope, direction) = match point.axes().len() {
                3 => along(probe.gradient::<3>(point, &grads).unwrap()),
                _ => along(probe.gradient::<4>(point, &grads).unwrap()),
            };
            let shifted = |step: f32| {
                let direction = direction.clone();
                let mut edits = Edits::new();
                let shift = move |_: HookPoint, x: Activation, _: &Positions| match x {
                    Activation::Rank3(x) => {
                        Activation::Rank3(x.clone() + like(&direction, x) * step)
                    }
                    Activation::Rank4(x) => {
                        Activation::Rank4(x.clone() + like(&direction, x) * step)
                    }
                };
                edits.push(point, Box::new(shift));
                metric(model.last_logits(&tokens, &mut edits).unwrap()).into_scalar::<f32>()
            };
            let difference = |step: f32| (shifted(step) - shifted(-step)) / (2.0 * step);
            // Richardson's extrapolation: the error of the third order falls out.
            let step = 2e-2;
            let difference = (4.0 * difference(step / 2.0) - difference(step)) / 3.0;
            let scale = slope.abs().max(0.05);
            let close = (difference - slope).abs() < 0.02 * scale;
            assert!(close, "{name}, {point}: {difference} and {slope}");
        }
    }
}

/// A unit direction that no gradient is likely to be orthogonal to, and the slope along it.
fn along<const D: usize>(gradient: Tensor<D>) -> (f32, Vec<f32>) {
    let gradient = floats(gradient);
    let noise: Vec<f32> = gradient
        .iter()
        .enumerate()
        .map(|(i, g)| g.signum() * (0.2 + (i as f32).sin().abs()))
        .collect();
    let norm = noise.iter().map(|x| x * x).sum::<f32>().sqrt();
    let direction: Vec<f32> = noise.iter().map(|x| x / norm).collect();
    (gradient.iter().zip(&direction).map(|(g, d)| g * d).sum(), direction)
}

fn like<const D: usize>(values: &[f32], x: Tensor<D>) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values.to_vec(), x.dims()), &x.device())
}

/// Weights kept in bf16 give what the same rounded weights give in f32, step by step as at once.
#[test]
fn weights_in_bf16_are_rounded_and_nothing_else_is() {
    struct Rounded(Box<dyn TensorSource>);
    impl TensorSource for Rounded {
        fn names(&self) -> Vec<String> {
            self.0.names()
        }
        fn tensor(&mut self, name: &str) -> Result<RawTensor, LoadError> {
            let mut tensor = self.0.tensor(name)?;
            if tensor.shape.len() == 2 && !name.contains("wpe") {
                let round = |x: &mut f32| *x = half::bf16::from_f32(*x).to_f32();
                tensor.values.iter_mut().for_each(round);
            }
            Ok(tensor)
        }
        fn path(&self) -> &Path {
            self.0.path()
        }
    }
    for name in ["llama_gqa_theta_tied", "gpt2", "gptj", "gemma2"] {
        let open = || load::open(&goldens::own("models").join(name)).unwrap();
        let (mut kept, rounded, device) = (open(), open(), Device::flex());
        let config = kept.config.clone();
        let kept =
            LanguageModel::load_as(WeightDtype::Bf16, config, kept.tensors.as_mut(), &device);
        let mut tensors = Rounded(rounded.tensors);
        let rounded = LanguageModel::load(rounded.config, &mut tensors, &device).unwrap();
        let (kept, tokens) = (kept.unwrap(), batch(&rounded, &ROWS));
        let logits = |model: &LanguageModel| floats(model.logits(&tokens, &mut ()).unwrap());
        assert_close(name, &logits(&kept), &logits(&rounded), 5e-5);
        let config = GenerateConfig::greedy(6, vec![]);
        let none = SharedPrefix::default();
        let ids = |model: &LanguageModel| {
            model.generate(&ROWS, &none, &config, &mut (), unobserved).unwrap()
        };
        assert_eq!(ids(&kept), ids(&rounded), "{name}");
        let point = HookPoint::resid_post(0);
        let gradient = |model: &LanguageModel| {
            let mut probe = Probe::new([point]);
            let grads = model.last_logits(&tokens, &mut probe).unwrap().sum().backward();
            floats(probe.gradient::<3>(point, &grads).unwrap())
        };
        assert_close(name, &gradient(&kept), &gradient(&rounded), 1e-4);
    }
}

#[test]
fn what_cannot_be_done_is_a_typed_error() {
    let model = model();
    let new = |rows: &[Vec<u32>]| TokenBatch::new(rows, model.config(), model.device()).map(drop);
    assert_eq!(new(&[]), Err(TokenError::EmptyBatch));
    assert_eq!(new(&[vec![1], vec![]]), Err(TokenError::EmptyPrompt { row: 1 }));
    let long = TokenError::TooLong { row: 0, expected: 64, actual: 65 };
    assert_eq!(new(&[vec![1; 65]]), Err(long));
    let unknown = TokenError::UnknownId { row: 0, id: 131, expected: 131 };
    assert_eq!(new(&[vec![1, 131]]), Err(unknown));

    let tokens = batch(&model, &ROWS);
    let error = model.run_until(&tokens, 4, &mut ()).unwrap_err();
    assert_eq!(error, ForwardError::NoSuchLayer { expected: 3, actual: 3 });
    let point = HookPoint::resid_post(3);
    let error = model.check_point(point).unwrap_err();
    assert!(matches!(error, HookError::NoSuchPoint { point: p, .. } if p == point));
    // A hook that the pass never reaches does not stay silent.
    let point = HookPoint::resid_post(2);
    let error = model.run_until(&tokens, 2, &mut ActivationCache::new([point])).unwrap_err();
    assert_eq!(error, ForwardError::Hook(HookError::NeverFired { point }));

    let config = GenerateConfig::greedy(62, vec![]);
    let none = SharedPrefix::default();
    let error = model.generate(&ROWS[1..2], &none, &config, &mut (), unobserved).map(drop);
    assert_eq!(error, Ok(()));
    let config = GenerateConfig { max_new_tokens: 63, ..config };
    let error = model.generate(&ROWS[1..2], &none, &config, &mut (), unobserved).unwrap_err();
    let too_long = TokenError::TooLong { row: 0, expected: 64, actual: 65 };
    assert_eq!(error, ForwardError::Tokens(too_long));
}

#[test]
fn cross_entropy_counts_every_token_but_the_first_of_each_text() {
    let model = model();
    let together = model.cross_entropy(&ROWS, 1000, &mut ()).unwrap();
    assert_eq!(together.n_tokens, 6 + 2 + 4);
    let alone = ROWS.map(|row| model.cross_entropy(&[row], 1000, &mut ()).unwrap().total);
    assert!((together.total - alone.iter().sum::<f64>()).abs() < 1e-3);
    // By hand for one text: −Σ ln softmax(logits)[next].
    let logits = floats(model.logits(&batch(&model, &ROWS[1..2]), &mut ()).unwrap());
    let by_hand: f64 = [3u32, 90]
        .iter()
        .zip(logits.chunks(131))
        .map(|(&next, row)| {
            let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
            sum.ln() - f64::from(row[next as usize])
        })
        .sum();
    assert!((alone[1] - by_hand).abs() < 1e-4, "{} and {by_hand}", alone[1]);
}
