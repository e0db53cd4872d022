//! Models by the configs that they are published with: read in full, loaded with random weights in
//! a size that fits a test.

use goldens::checkpoint;
use model_hooks::ModelConfig;
use model_hooks::config::{LongRope, RopeConfig, RopeScaling, RotaryPairs};
use serde_json::{Value, json};

use super::*;

const NAMES: [&str; 4] = ["smollm2_135m", "phi3_mini_4k", "phi3_mini_128k", "gptj_6b"];

fn published(name: &str) -> Value {
    let path = goldens::own("configs").join(format!("{name}.json"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn read(config: &Value) -> ModelConfig {
    ModelConfig::from_hf(&serde_json::to_vec(config).unwrap(), None).unwrap()
}

#[test]
fn published_configs_have_the_shapes_that_the_models_are_known_for() {
    let [smollm2, short, long, gptj] = NAMES.map(|name| read(&published(name)));
    assert_eq!((smollm2.attention.d_head, smollm2.unembedding.tied), (64, true));
    assert_eq!(smollm2.attention.rope.unwrap(), RopeConfig::new(1e5, 64));

    assert_eq!((short.attention.d_head, short.attention.window(31)), (96, Some(2047)));
    assert_eq!(short.attention.rope.unwrap(), RopeConfig::new(1e4, 96));

    assert_eq!((long.n_ctx, long.attention.window(31)), (131_072, Some(262_144)));
    let RopeScaling::LongRope(rope) = long.attention.rope.unwrap().scaling else {
        panic!("longrope")
    };
    let LongRope { short_factors, long_factors, original_n_ctx, attention_factor } = rope;
    // √(1 + ln 32 / ln 4096) = √(1 + 5/12), which GGUF files of the model have as f32.
    assert_eq!(attention_factor as f32, 1.190_238_1);
    assert!((attention_factor - (17.0f64 / 12.0).sqrt()).abs() < 1e-12);
    assert_eq!((original_n_ctx, short_factors.len(), long_factors.len()), (4096, 48, 48));
    assert!(short_factors.is_sorted() && long_factors.is_sorted());
    assert_eq!((short_factors[0], long_factors[47]), (1.1, 64.760_002_136_230_47));

    assert_eq!((gptj.attention.d_head, gptj.mlp.d_mlp, gptj.parallel), (256, 16384, true));
    let rope = gptj.attention.rope.unwrap();
    assert_eq!((rope.n_dims, rope.pairs), (64, RotaryPairs::Neighbours));
}

/// The counts that the models' authors give.
#[test]
fn published_configs_have_as_many_weights_as_the_models() {
    let counts = [134_515_008, 3_821_079_552, 3_821_079_552, 6_050_882_784];
    for (name, expected) in NAMES.into_iter().zip(counts) {
        let tensors = checkpoint::tensors(&published(name)).unwrap();
        let n_weights: usize =
            tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        assert_eq!(n_weights, expected, "{name}");
    }
}

/// The config with other widths and fewer blocks. Phi-3's context is shorter too, so that a test
/// reaches the long factors. The vocabulary stays, because the ids of special tokens do.
fn shrunk(name: &str) -> Value {
    let mut config = published(name);
    let sizes = match name {
        "smollm2_135m" => {
            json!({"hidden_size": 36, "intermediate_size": 96, "num_hidden_layers": 3})
        }
        "gptj_6b" => json!({"n_embd": 64, "n_head": 4, "n_layer": 3, "rotary_dim": 4}),
        _ => json!({
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 4,
            "max_position_embeddings": 128, "original_max_position_embeddings": 4,
        }),
    };
    config.as_object_mut().unwrap().extend(sizes.as_object().unwrap().clone());
    for factors in ["short_factor", "long_factor"] {
        if let Some(factors) = config.pointer_mut(&format!("/rope_scaling/{factors}")) {
            factors.as_array_mut().unwrap().truncate(4);
        }
    }
    config
}

#[test]
fn published_configs_load_and_run_in_either_precision() {
    // With LongRoPE's short factors, and with its long ones.
    let rows: [&[u32]; 2] = [&[5, 9, 40], &[7, 19, 23, 32]];
    let long: [&[u32]; 1] = [&[7, 7, 19, 23, 60, 44, 101, 12]];
    for name in NAMES {
        let folder = tempfile::tempdir().unwrap();
        checkpoint::write(folder.path(), &shrunk(name), 0).unwrap();
        let load = |dtype| {
            let mut checkpoint = load::open(folder.path()).unwrap();
            let (config, tensors) = (checkpoint.config, checkpoint.tensors.as_mut());
            LanguageModel::load_as(dtype, config, tensors, &Device::flex()).unwrap()
        };
        let (wide, narrow) = (load(WeightDtype::F32), load(WeightDtype::Bf16));
        for rows in [&rows[..], &long] {
            let tokens = batch(&wide, rows);
            let logits = floats(wide.logits(&tokens, &mut ()).unwrap());
            assert!(logits.iter().all(|x| x.is_finite()), "{name}");
            // The file is in bf16: nothing is rounded.
            let kept = floats(narrow.logits(&tokens, &mut ()).unwrap());
            assert_close(name, &kept, &logits, 5e-5);
        }
    }
}
