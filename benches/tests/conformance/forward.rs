//! Models: every architecture, its activations and their gradients, weights in bf16, generation.

use burn::tensor::{DType, Device};
use model_hooks::load::{LoadError, open};
use model_hooks::{
    ActivationCache, GenerateConfig, HookPoint, LanguageModel, Probe, RewardModel, SharedPrefix,
    TokenBatch, WeightDtype, unobserved,
};

use crate::beside::{BF16, DEEP, agree, assert_near, device};

pub const ROWS: [&[u32]; 3] = [&[5, 9, 40, 77, 12, 8, 101], &[44, 3, 90], &[7, 7, 19, 23, 60]];

const ARCHITECTURES: [&str; 16] = [
    "gpt2",
    "gptj",
    "gpt_neox",
    "gpt_neox_sequential",
    "opt",
    "llama_gqa_theta_tied",
    "llama_rope_llama3",
    "llama_rope_yarn",
    "mistral_sliding",
    "qwen2_sliding",
    "qwen3",
    "phi3",
    "phi3_partial_longrope_long",
    "gemma2",
    "gemma3",
    "olmo2",
];

pub fn model(name: &str, device: &Device) -> LanguageModel {
    load(name, WeightDtype::F32, device).unwrap()
}

fn load(name: &str, dtype: WeightDtype, device: &Device) -> Result<LanguageModel, LoadError> {
    let mut checkpoint = open(&goldens::own("models").join(name))?;
    LanguageModel::load_as(dtype, checkpoint.config, checkpoint.tensors.as_mut(), device)
}

pub fn tokens(model: &LanguageModel) -> TokenBatch {
    TokenBatch::new(&ROWS, model.config(), model.device()).unwrap()
}

#[test]
fn logits_and_activations_of_every_architecture() {
    for name in ARCHITECTURES {
        agree(DEEP, |device, found| {
            let model = model(name, device);
            let points: Vec<HookPoint> = (0..2).map(HookPoint::resid_post).collect();
            let mut cache = ActivationCache::new(points.clone());
            let logits = model.last_logits(&tokens(&model), &mut cache).unwrap();
            found.put(&format!("{name}, logits"), logits);
            for point in points {
                found.put(&format!("{name}, {point}"), cache.get::<3>(point).unwrap());
            }
        });
    }
}

#[test]
fn gradients_of_every_architecture() {
    for name in ARCHITECTURES {
        agree(DEEP, |device, found| {
            let model = model(name, &device.clone().autodiff());
            let point = HookPoint::resid_post(0);
            let mut probe = Probe::new([point]);
            let logits = model.last_logits(&tokens(&model), &mut probe).unwrap();
            let grads = logits.narrow(1, 7, 1).sum().backward();
            found.put(name, probe.gradient::<3>(point, &grads).unwrap());
        });
    }
}

/// Near to what weights in f32 give; or an error, where the device has no bf16.
#[test]
fn weights_in_bf16() {
    let device = device();
    let logits = |dtype| {
        let model = load("llama_gqa_theta_tied", dtype, &device)?;
        let logits = model.last_logits(&tokens(&model), &mut ()).unwrap();
        Ok::<Vec<f32>, LoadError>(logits.into_data().try_to_vec().unwrap())
    };
    match logits(WeightDtype::Bf16) {
        Ok(rounded) => {
            assert!(device.supports_dtype(DType::BF16));
            let whole = logits(WeightDtype::F32).unwrap();
            assert_ne!(rounded, whole);
            assert_near("logits", &rounded, &whole, BF16);
        }
        Err(error) => {
            assert!(!device.supports_dtype(DType::BF16));
            assert!(matches!(error, LoadError::Dtype { .. }), "{error}");
        }
    }
}

#[test]
fn rewards() {
    for name in ["llama_seqcls_reward", "gptj_seqcls_reward"] {
        agree(DEEP, |device, found| {
            let mut checkpoint = open(&goldens::own("models").join(name)).unwrap();
            let source = checkpoint.tensors.as_mut();
            let model = RewardModel::load(checkpoint.config, source, device).unwrap();
            let tokens = TokenBatch::new(&ROWS, model.body().config(), device).unwrap();
            found.put(name, model.scores(&tokens, &mut ()).unwrap());
        });
    }
}

/// Cached steps give the ids that whole passes give, on this device.
#[test]
fn cached_generation_is_uncached_generation() {
    let device = device();
    for name in ARCHITECTURES {
        let model = model(name, &device);
        let config = GenerateConfig::greedy(9, Vec::new());
        let none = SharedPrefix::default();
        let cached = model.generate(&ROWS, &none, &config, &mut (), unobserved).unwrap();
        for (row, cached) in ROWS.iter().zip(cached) {
            let mut ids = row.to_vec();
            for _ in 0..9 {
                let tokens = TokenBatch::new(&[&ids], model.config(), &device).unwrap();
                let logits = model.last_logits(&tokens, &mut ()).unwrap();
                let logits: Vec<f32> = logits.into_data().try_to_vec().unwrap();
                let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
                ids.push(best.unwrap().0 as u32);
            }
            assert_eq!(cached, ids[row.len()..], "{name}");
        }
    }
}
