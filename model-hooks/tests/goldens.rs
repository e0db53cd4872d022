//! Models against what transformers computes on the same weights.

use burn::tensor::{Device, Tensor};
use goldens::{Case, assert_close};
use model_hooks::{
    ActivationCache, GenerateConfig, HookPoint, LanguageModel, Probe, SharedPrefix, Site,
    TokenBatch, load,
};

const TOLERANCE: f32 = 1e-4;

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().expect("an f32 tensor")
}

/// The model of a case, or why it is not supported.
fn model(case: &Case) -> Result<LanguageModel, String> {
    let (shape, _) = case.floats("logits");
    if shape.len() != 3 {
        return Err("a reward head".into());
    }
    open(case.folder())
}

fn open(folder: &std::path::Path) -> Result<LanguageModel, String> {
    let mut checkpoint = match load::open(folder) {
        Ok(checkpoint) => checkpoint,
        Err(error @ load::LoadError::Config { .. }) => return Err(chain(&error)),
        Err(error) => panic!("{}", chain(&error)),
    };
    let model =
        LanguageModel::load(checkpoint.config, checkpoint.tensors.as_mut(), &Device::flex());
    Ok(model.unwrap_or_else(|error| panic!("{}", chain(&error))))
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
        let model = model(case)?;
        let tokens = batch(&model, &case.ids("input_ids"));
        let sites = [
            ("block_out", Site::ResidPost),
            ("attn_out", Site::AttnOut),
            ("mlp_out", Site::MlpOut),
        ];
        let layers = 0..model.config().n_layers;
        let point = |layer, site| HookPoint::Block { layer, site };
        let points = layers.clone().flat_map(|layer| sites.map(|(_, site)| point(layer, site)));
        let mut cache = ActivationCache::new(points.chain([HookPoint::Embed]));
        let logits = model.logits(&tokens, &mut cache).unwrap();
        assert_close("logits", &floats(logits), &case.floats("logits").1, TOLERANCE);
        let embedded = floats(cache.get::<3>(HookPoint::Embed).unwrap());
        assert_close("embed", &embedded, &case.floats("hidden_states.0").1, TOLERANCE);
        for layer in layers.clone() {
            for (name, site) in sites {
                let name = format!("{name}.{layer}");
                let actual = floats(cache.get::<3>(point(layer, site)).unwrap());
                assert_close(&name, &actual, &case.floats(&name).1, TOLERANCE);
            }
        }
        // Asking for the pattern takes the plain path through attention: same logits.
        let mut patterns = ActivationCache::new(layers.clone().map(|l| point(l, Site::Pattern)));
        let logits = model.logits(&tokens, &mut patterns).unwrap();
        assert_close("plain logits", &floats(logits), &case.floats("logits").1, TOLERANCE);
        for layer in layers {
            let name = format!("attn_weights.{layer}");
            let actual = floats(patterns.get::<4>(point(layer, Site::Pattern)).unwrap());
            assert_close(&name, &actual, &case.floats(&name).1, TOLERANCE);
        }
        Ok(())
    });
}

#[test]
fn golden_config_of_either_spelling() {
    goldens::for_each_case("models", |case| {
        model(case)?;
        let folder = tempfile::tempdir().unwrap();
        for (from, to) in
            [("config.v4.json", "config.json"), ("model.safetensors", "model.safetensors")]
        {
            std::fs::copy(case.folder().join(from), folder.path().join(to)).unwrap();
        }
        let model = open(folder.path())?;
        let logits = model.logits(&batch(&model, &case.ids("input_ids")), &mut ()).unwrap();
        assert_close("logits", &floats(logits), &case.floats("logits").1, TOLERANCE);
        Ok(())
    });
}

#[test]
fn golden_padded_rows() {
    goldens::for_each_case("models", |case| {
        let model = model(case)?;
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
            let tokens = batch(&model, &rows);
            let logits = model.logits(&tokens, &mut ()).unwrap();
            let [_, _, d_vocab] = logits.dims();
            let logits = floats(logits);
            let name = match side {
                "leftpad" => "leftpad.logits_with_position_ids",
                _ => "rightpad.logits",
            };
            let (_, expected) = case.floats(name);
            for (row, kept) in kept.iter().enumerate() {
                for (i, &column) in kept.iter().enumerate() {
                    let own = (row * n + n - kept.len() + i) * d_vocab;
                    let theirs = (row * n + column) * d_vocab;
                    let (own, theirs) = (&logits[own..][..d_vocab], &expected[theirs..][..d_vocab]);
                    assert_close(name, own, theirs, TOLERANCE);
                }
            }
            if side == "leftpad" {
                let greedy = case.ids("leftpad.greedy_ids");
                let expected: Vec<_> = greedy.iter().map(|row| row[n..].to_vec()).collect();
                assert_eq!(
                    generate(&model, &rows, expected[0].len()),
                    expected,
                    "leftpad.greedy_ids"
                );
            }
        }
        Ok(())
    });
}

fn generate(model: &LanguageModel, rows: &[Vec<u32>], n: usize) -> Vec<Vec<u32>> {
    let config = GenerateConfig {
        max_new_tokens: n,
        min_new_tokens: n,
        stop_ids: model.config().special_tokens.eos.clone(),
    };
    model.generate(rows, &SharedPrefix::default(), &config, &mut (), |_| ()).unwrap()
}

#[test]
fn golden_cached_greedy_ids() {
    goldens::for_each_case("models", |case| {
        let model = model(case)?;
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
        let model = model(case)?;
        let point = HookPoint::resid_post(0);
        let mut probe = Probe::new([point]);
        let logits = model.last_logits(&batch(&model, &case.ids("input_ids")), &mut probe).unwrap();
        let metric = logits.narrow(1, 7, 1).sum();
        let gradient = probe.gradient::<3>(point, &metric.backward()).unwrap();
        let (shape, expected) = case.floats("grad.hidden_states.1");
        assert_eq!(gradient.dims().to_vec(), shape);
        assert_close("gradient", &floats(gradient.clone()), &expected, TOLERANCE);

        // Starting from the residual gives the same gradient as a probe in the middle.
        let mut cache = ActivationCache::new([point]);
        let tokens = batch(&model, &case.ids("input_ids"));
        let residual = model.run_until(&tokens, 1, &mut cache).unwrap();
        let leaf = residual.autodiff().require_grad();
        let mut kv = model.cache(SharedPrefix::default(), tokens.padding().to_vec());
        let positions = kv.next_positions(tokens.dims()[1]);
        let last = model.config().n_layers;
        let end = model.blocks(leaf.clone(), 1..last, &mut kv, &mut ()).unwrap();
        let logits = model.unembed_last(end, &positions, &mut ());
        let grads = logits.narrow(1, 7, 1).sum().backward();
        assert_close(
            "gradient from a residual",
            &floats(leaf.grad(&grads).unwrap()),
            &expected,
            TOLERANCE,
        );
        Ok(())
    });
}
