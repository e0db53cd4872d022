//! What must hold of any model: hooks that change nothing, caches, batches, gradients, errors.

use burn::tensor::{Device, Tensor, TensorData};
use goldens::assert_close;
use model_hooks::{
    Activation, ActivationCache, Edits, ForwardError, GenerateConfig, HarvestConfig, Hook,
    HookError, HookPoint, LanguageModel, Positions, Probe, SharedPrefix, Site, TokenBatch,
    TokenError, load,
};

const ROWS: [&[u32]; 3] = [&[5, 9, 40, 77, 12, 8, 101], &[44, 3, 90], &[7, 7, 19, 23, 60]];

fn model() -> LanguageModel {
    let mut checkpoint = load::open(&goldens::own("models/llama_gqa_theta_tied")).unwrap();
    LanguageModel::load(checkpoint.config, checkpoint.tensors.as_mut(), &Device::flex()).unwrap()
}

fn batch(model: &LanguageModel, rows: &[impl AsRef<[u32]>]) -> TokenBatch {
    TokenBatch::new(rows, model.config(), model.device()).unwrap()
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().unwrap()
}

#[test]
fn capturing_everything_changes_nothing_and_shapes_are_the_axes() {
    let model = model();
    let tokens = batch(&model, &ROWS);
    let plain = floats(model.logits(&tokens, &mut ()).unwrap());
    let points = model.hook_points();
    let mut cache = ActivationCache::new(points.iter().copied());
    let captured = floats(model.logits(&tokens, &mut cache).unwrap());
    assert_close("logits", &captured, &plain, 5e-5);

    let config = model.config();
    let [batch, pos] = tokens.dims();
    let mut seen = Vec::new();
    for (point, activation) in cache.iter() {
        use model_hooks::Axis;
        let expected: Vec<usize> = point
            .axes()
            .iter()
            .map(|axis| match axis {
                Axis::Batch => batch,
                Axis::Pos | Axis::Query | Axis::Key => pos,
                Axis::Head => config.attention.n_heads,
                Axis::KvHead => config.attention.n_kv_heads,
                Axis::DModel => config.d_model,
                Axis::DMlp => config.mlp.d_mlp,
                Axis::DHead => config.attention.d_head,
                Axis::One => 1,
            })
            .collect();
        assert_eq!(activation.shape(), expected, "{point}");
        seen.push(point);
    }
    assert_eq!(seen.len(), points.len());
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
    let model = model();
    let mut order = Order::default();
    model.logits(&batch(&model, &ROWS), &mut order).unwrap();
    assert_eq!(order.0, model.hook_points());
}

#[test]
fn an_edit_that_gives_back_the_value_changes_nothing_and_any_other_does() {
    let model = model();
    let tokens = batch(&model, &ROWS);
    let plain = floats(model.logits(&tokens, &mut ()).unwrap());
    for point in model.hook_points() {
        let mut same = Edits::new();
        same.push(point, Box::new(|_: HookPoint, x: Activation, _: &Positions| x));
        let edited = floats(model.logits(&tokens, &mut same).unwrap());
        assert_close(&point.to_string(), &edited, &plain, 5e-5);

        let mut moved = Edits::new();
        moved.push(point, Box::new(other));
        let edited = floats(model.logits(&tokens, &mut moved).unwrap());
        let differs = edited.iter().zip(&plain).any(|(a, b)| (a - b).abs() > 1e-3);
        assert!(differs, "an edit at {point} does nothing");
    }
}

/// Another value. Norms undo a factor, the softmax a summand.
fn other(_: HookPoint, x: Activation, _: &Positions) -> Activation {
    match x {
        Activation::Rank3(x) => Activation::Rank3(x + 0.7),
        Activation::Rank4(x) => Activation::Rank4(x * 0.5),
    }
}

#[test]
fn batched_is_alone() {
    let model = model();
    let together = model.last_logits(&batch(&model, &ROWS), &mut ()).unwrap();
    for (row, ids) in ROWS.iter().enumerate() {
        let alone = model.last_logits(&batch(&model, &[ids]), &mut ()).unwrap();
        let row = floats(together.clone().narrow(0, row, 1));
        assert_close("row", &row, &floats(alone), 1e-5);
    }
}

#[test]
fn steps_and_shared_prefixes_are_one_pass() {
    let model = model();
    let ids = ROWS[0];
    let whole = floats(model.last_logits(&batch(&model, &[ids]), &mut ()).unwrap());
    for n_prefix in 0..ids.len() {
        let prefix = match n_prefix {
            0 => SharedPrefix::default(),
            n => model.prefix(&ids[..n], &mut ()).unwrap(),
        };
        // The rest token by token, in two rows, the second with two columns of padding.
        let n_layers = model.config().n_layers;
        let mut cache = model.cache(prefix, vec![0]);
        let mut last = None;
        for id in &ids[n_prefix..] {
            let tokens = batch(&model, &[[*id]]);
            let positions = cache.next_positions(1);
            let residual = model.embed(&tokens, &positions, &mut ());
            let residual = model.blocks(residual, 0..n_layers, &mut cache, &mut ()).unwrap();
            last = Some(model.unembed_last(residual, &positions, &mut ()));
        }
        assert_close("logits", &floats(last.unwrap()), &whole, 1e-5);
    }
}

#[test]
fn generation_is_uncached_generation_whatever_the_batch_and_the_prefix() {
    let model = model();
    let shared = [11, 60, 2];
    let config = GenerateConfig { max_new_tokens: 9, min_new_tokens: 0, stop_ids: vec![93, 6] };
    let uncached: Vec<Vec<u32>> = ROWS
        .iter()
        .map(|row| {
            let mut ids = [&shared, *row].concat();
            let n = ids.len();
            while ids.len() < n + config.max_new_tokens {
                let logits = floats(model.last_logits(&batch(&model, &[&ids]), &mut ()).unwrap());
                let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
                ids.push(best.unwrap().0 as u32);
                if config.stop_ids.contains(ids.last().unwrap()) {
                    break;
                }
            }
            ids[n..].to_vec()
        })
        .collect();
    let prefix = model.prefix(&shared, &mut ()).unwrap();
    let behind = model.generate(&ROWS, &prefix, &config, &mut (), |_| ()).unwrap();
    assert_eq!(behind, uncached);
    let joined: Vec<Vec<u32>> = ROWS.iter().map(|row| [&shared, *row].concat()).collect();
    let none = SharedPrefix::default();
    assert_eq!(model.generate(&joined, &none, &config, &mut (), |_| ()).unwrap(), uncached);
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
    let config = GenerateConfig { max_new_tokens: 3, min_new_tokens: 0, stop_ids: vec![] };
    let mut seen = Seen::default();
    model.generate(&ROWS, &prefix, &config, &mut seen, |_| ()).unwrap();
    for (row, ids) in ROWS.iter().enumerate() {
        let expected: Vec<usize> = (4..4 + ids.len() + 2).collect();
        assert_eq!(seen.0[row], expected);
    }
}

#[test]
fn harvest_gives_each_token_once_and_as_a_pass_alone_would() {
    let model = model();
    let point = HookPoint::resid_post(1);
    let prefix_ids = [9, 8, 7];
    let prefix = model.prefix(&prefix_ids, &mut ()).unwrap();
    for (shared, skip) in [(&SharedPrefix::default(), 1), (&prefix, 0)] {
        let config = HarvestConfig { point, batch_tokens: 12, skip_positions: skip };
        let mut rows = Vec::new();
        let sink = |harvested: model_hooks::Harvested| {
            let [n, _] = harvested.activations.dims();
            assert_eq!(n, harvested.places.len());
            for (row, place) in harvested.places.iter().enumerate() {
                rows.push((*place, floats(harvested.activations.clone().narrow(0, row, 1))));
            }
            true
        };
        model.harvest(&ROWS, shared, &config, sink).unwrap();
        let n_prefix = shared.n_tokens();
        let kept = |ids: &&[u32]| ids.len() - skip.saturating_sub(n_prefix);
        assert_eq!(rows.len(), ROWS.iter().map(kept).sum::<usize>());
        for (place, row) in rows {
            let ids = [&prefix_ids[..n_prefix], ROWS[place.text]].concat();
            let alone = model.run_until(&batch(&model, &[&ids]), 2, &mut ()).unwrap();
            let alone = alone.narrow(1, place.position, 1);
            assert_close("activation", &row, &floats(alone), 1e-5);
        }
    }
}

#[test]
fn gradients_agree_with_finite_differences() {
    let model = model();
    let tokens = batch(&model, &ROWS[..1]);
    let metric = |logits: Tensor<2>| logits.narrow(1, 17, 1).sum();
    for site in [Site::ResidPre, Site::Z, Site::MlpPost, Site::Pattern, Site::Ln2Scale] {
        let point = HookPoint::Block { layer: 1, site };
        let mut probe = Probe::new([point]);
        let grads = metric(model.last_logits(&tokens, &mut probe).unwrap()).backward();
        // Along a fixed direction, with steps that f32 resolves.
        let (slope, direction) = match point.axes().len() {
            3 => along(probe.gradient::<3>(point, &grads).unwrap()),
            _ => along(probe.gradient::<4>(point, &grads).unwrap()),
        };
        let shifted = |step: f32| {
            let direction = direction.clone();
            let mut edits = Edits::new();
            let shift = move |_: HookPoint, x: Activation, _: &Positions| match x {
                Activation::Rank3(x) => Activation::Rank3(x.clone() + like(&direction, x) * step),
                Activation::Rank4(x) => Activation::Rank4(x.clone() + like(&direction, x) * step),
            };
            edits.push(point, Box::new(shift));
            metric(model.last_logits(&tokens, &mut edits).unwrap()).into_scalar::<f32>()
        };
        let step = 2e-2;
        let difference = (shifted(step) - shifted(-step)) / (2.0 * step);
        let scale = slope.abs().max(0.05);
        assert!((difference - slope).abs() < 0.03 * scale, "{point}: {difference} and {slope}");
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

    let config = GenerateConfig { max_new_tokens: 62, min_new_tokens: 0, stop_ids: vec![] };
    let none = SharedPrefix::default();
    let error = model.generate(&ROWS[1..2], &none, &config, &mut (), |_| ()).map(drop);
    assert_eq!(error, Ok(()));
    let config = GenerateConfig { max_new_tokens: 63, ..config };
    let error = model.generate(&ROWS[1..2], &none, &config, &mut (), |_| ()).unwrap_err();
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
