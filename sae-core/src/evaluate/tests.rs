use super::*;
use crate::activation::Activation;
use crate::config::SaeConfig;
use crate::sae::SaeWeights;
use burn::tensor::{Device, Distribution};
use model_hooks::{RewardModel, TokenBatch, load};

fn device() -> Device {
    Device::flex()
}

fn checkpoint(name: &str) -> load::Checkpoint {
    load::open(&goldens::own(&format!("models/{name}"))).expect("a golden")
}

fn model() -> LanguageModel {
    let mut checkpoint = checkpoint("llama_gqa_theta_tied");
    LanguageModel::load(checkpoint.config, checkpoint.tensors.as_mut(), &device()).expect("loads")
}

fn texts() -> Vec<Vec<u32>> {
    let text = |seed: u32, n: u32| (0..n).map(|i| (seed * 31 + i * i * 7 + i) % 131).collect();
    vec![text(1, 12), text(2, 1), text(3, 7), text(4, 12), text(5, 2)]
}

/// A TopK SAE of noise.
fn sae(d_in: usize, k: usize) -> Sae {
    let device = device();
    device.seed(7);
    let d_sae = 2 * d_in;
    let normal =
        |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Normal(0.0, 0.2), &device);
    let weights = SaeWeights::new(
        normal([d_in, d_sae]),
        Tensor::zeros([d_sae], &device),
        normal([d_sae, d_in]),
        Tensor::zeros([d_in], &device),
    );
    let activation = Activation::TopK { k, rescale_by_decoder_norm: false };
    Sae::new(SaeConfig::new(d_in, d_sae, activation), weights).expect("valid")
}

/// Reads and writes every dimension: `x̂ = relu(x) − relu(−x)`.
fn perfect(d_in: usize) -> Sae {
    let device = device();
    let eye = Tensor::<2>::eye(d_in, &device);
    let both = Tensor::cat(vec![eye.clone(), -eye], 1);
    let weights = SaeWeights::new(
        both.clone(),
        Tensor::zeros([2 * d_in], &device),
        both.transpose(),
        Tensor::zeros([d_in], &device),
    );
    Sae::new(SaeConfig::new(d_in, 2 * d_in, Activation::Relu), weights).expect("valid")
}

fn on(_: &MeasureProgress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn close(actual: f64, expected: f64, tolerance: f64) {
    assert!((actual - expected).abs() <= tolerance, "{actual}, expected {expected}");
}

#[test]
fn a_perfect_splice_changes_nothing() {
    let (model, sae, perfect) = (model(), sae(48, 4), perfect(48));
    let point = HookPoint::resid_post(1);
    let kept = Subject { error_term: ErrorTerm::Keep, ..Subject::new(&sae, point) };
    let subjects = [kept, Subject::new(&perfect, point)];
    for evaluation in language_model(&model, &subjects, &texts(), 24, on).expect("runs") {
        let figures = evaluation.next_tokens.expect("of a language model");
        close(figures.kl, 0.0, 1e-6);
        close(figures.ce_spliced, figures.ce_clean, 1e-5);
        close(figures.ce_recovered, 1.0, 1e-3);
    }
}

#[test]
fn the_figures_are_those_of_passes_by_hand() {
    let (model, sae, texts) = (model(), sae(48, 4), texts());
    let point = HookPoint::resid_post(1);
    let subject = Subject { from_position: 1, ..Subject::new(&sae, point) };
    let evaluations = language_model(&model, &[subject], &texts, 24, on).expect("runs");
    let Evaluation { reconstruction, next_tokens, .. } = &evaluations[0];
    let figures = next_tokens.as_ref().expect("of a language model");
    assert_eq!((figures.n_tokens, reconstruction.n_rows), (29, 29));
    assert_eq!(reconstruction.l0, 4.0);

    let clean = model.cross_entropy(&texts, 24, &mut ()).expect("runs");
    close(figures.ce_clean, clean.mean(), 1e-5);
    let mut splice = subject.splice();
    let spliced = model.cross_entropy(&texts, 24, &mut splice).expect("runs");
    close(figures.ce_spliced, spliced.mean(), 1e-5);
    assert!(figures.kl > 1e-4, "{}", figures.kl);
    let (zero, clean, spliced) = (figures.ce_zero_ablated, figures.ce_clean, figures.ce_spliced);
    close(figures.ce_recovered, (zero - spliced) / (zero - clean), 1e-9);

    // The mean over positions from 1 on, and KL, from captures and logits one by one.
    let mut sums = (vec![0.0f64; 48], 0.0);
    let mut kl = Vec::new();
    for text in &texts {
        let tokens = TokenBatch::new(&[text], model.config(), model.device()).expect("fits");
        let x = model.capture(&tokens, [point]).expect("runs").get::<3>(point).expect("captured");
        for row in x.into_data().try_to_vec::<f32>().expect("f32").chunks(48).skip(1) {
            sums.0.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x));
            sums.1 += 1.0;
        }
        let log_probs = |hook: &mut Spliced, plain: bool| -> Vec<Vec<f64>> {
            let logits = match plain {
                true => model.logits(&tokens, &mut ()),
                false => model.logits(&tokens, hook),
            };
            let logits = logits.expect("runs").into_data().try_to_vec::<f32>().expect("f32");
            let rows = logits.chunks(131).map(|row| {
                let row: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
                let sum = row.iter().map(|x| x.exp()).sum::<f64>().ln();
                row.iter().map(|x| x - sum).collect()
            });
            rows.collect()
        };
        let (p, q) = (log_probs(&mut splice, true), log_probs(&mut splice, false));
        for (p, q) in p.iter().zip(&q).take(text.len() - 1) {
            kl.push(p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>());
        }
    }
    close(figures.kl, kl.iter().sum::<f64>() / kl.len() as f64, 1e-6);
    let mean: Vec<f32> = sums.0.iter().map(|sum| (sum / sums.1) as f32).collect();
    let mean = Tensor::from_data(TensorData::new(mean, [1, 48]), model.device());
    let mut ablation = ablation::Ablation::new(&subject, mean.clone());
    let expected = model.cross_entropy(&texts, 24, &mut ablation).expect("runs").mean();
    close(figures.ce_mean_ablated, expected, 1e-5);
    let mut ablation = ablation::Ablation::new(&subject, mean.zeros_like());
    let expected = model.cross_entropy(&texts, 24, &mut ablation).expect("runs").mean();
    close(figures.ce_zero_ablated, expected, 1e-5);

    // Positions 0; 1; 2 and 3; 4 to 7; 8 to 10: four texts go on, three of them past position 1.
    let ranges: Vec<_> = figures.by_position.iter().map(|p| (p.from, p.to, p.n_tokens)).collect();
    assert_eq!(ranges, [(0, 1, 4), (1, 2, 3), (2, 4, 6), (4, 8, 10), (8, 11, 6)]);
    close(figures.by_position[0].kl, 0.0, 1e-6);
    let total = |of: fn(&PositionRange) -> f64| {
        figures.by_position.iter().map(|p| p.n_tokens as f64 * of(p)).sum::<f64>() / 29.0
    };
    close(total(|p| p.ce_spliced), figures.ce_spliced, 1e-9);
    close(total(|p| p.kl), figures.kl, 1e-9);
}

#[test]
fn batches_and_company_do_not_matter() {
    let (model, sae, other, texts) = (model(), sae(48, 4), perfect(48), texts());
    let point = HookPoint::resid_post(0);
    let subject = Subject { from_position: 1, ..Subject::new(&sae, point) };
    let alone = language_model(&model, &[subject], &texts, 1, on).expect("runs").remove(0);
    let company = [Subject::new(&other, HookPoint::resid_post(2)), subject];
    let batched = language_model(&model, &company, &texts, 64, on).expect("runs").remove(1);
    let figures = |evaluation: &Evaluation| {
        let lm = evaluation.next_tokens.as_ref().expect("of a language model");
        let by_position = lm.by_position.iter().flat_map(|p| [p.ce_clean, p.ce_spliced, p.kl]);
        let r = &evaluation.reconstruction;
        let whole = [lm.ce_zero_ablated, lm.ce_mean_ablated, lm.kl, r.fvu.global_centred, r.cosine];
        by_position.chain(whole).collect::<Vec<f64>>()
    };
    for (a, b) in figures(&alone).into_iter().zip(figures(&batched)) {
        close(a, b, 1e-4);
    }
    assert_eq!(alone.reconstruction.densities, batched.reconstruction.densities);
}

#[test]
fn a_transcoder_is_spliced_in_where_it_writes() {
    let (model, perfect, sae) = (model(), perfect(48), sae(48, 4));
    let [from, to] = ["blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"]
        .map(|name| name.parse::<HookPoint>().expect("a point"));
    let transcoder = |sae: &Sae| {
        let config = SaeConfig {
            transcodes_to: Some(48),
            apply_b_dec_to_input: false,
            ..sae.config().clone()
        };
        Sae::new(config, sae.weights().clone()).expect("valid")
    };
    let (other, identity) = (transcoder(&sae), transcoder(&perfect));
    let kept = Subject::transcoder(&other, from, to);
    let kept = Subject { error_term: ErrorTerm::Keep, ..kept };
    let subjects = [kept, Subject::transcoder(&identity, from, to)];
    let evaluations = language_model(&model, &subjects, &texts(), 24, on).expect("runs");
    let kept = evaluations[0].next_tokens.as_ref().expect("of a language model");
    close(kept.kl, 0.0, 1e-6);
    close(kept.ce_recovered, 1.0, 1e-3);

    // The identity writes the MLP's input in place of its output, which an edit can do as well.
    let written = evaluations[1].next_tokens.as_ref().expect("of a language model");
    let seen = std::rc::Rc::new(std::cell::RefCell::new(None));
    let taken = seen.clone();
    let mut edits = model_hooks::Edits::new();
    edits.push(
        from,
        Box::new(move |_: HookPoint, x: model_hooks::Activation, _: &_| {
            *seen.borrow_mut() = Some(x.clone());
            x
        }),
    );
    edits.push(
        to,
        Box::new(move |_: HookPoint, _: model_hooks::Activation, _: &_| {
            taken.borrow_mut().take().expect("it came before")
        }),
    );
    let expected = model.cross_entropy(&texts(), 24, &mut edits).expect("runs").mean();
    close(written.ce_spliced, expected, 1e-5);
    assert!((written.ce_spliced - written.ce_clean).abs() > 1e-4);
}

#[test]
fn rewards_with_the_error_are_the_clean_ones() {
    let mut checkpoint = checkpoint("llama_seqcls_reward");
    let model = RewardModel::load(checkpoint.config, checkpoint.tensors.as_mut(), &device());
    let model = model.expect("loads");
    let d_model = model.body().config().d_model;
    let (sae, point) = (sae(d_model, 2), HookPoint::resid_post(0));
    let kept = Subject { error_term: ErrorTerm::Keep, ..Subject::new(&sae, point) };
    let texts = texts();
    let pair = |chosen: usize, rejected: usize| Preference {
        chosen: texts[chosen].clone(),
        rejected: texts[rejected].clone(),
    };
    let pairs = [pair(0, 2), pair(3, 4), pair(2, 1)];
    let subjects = [kept, Subject::new(&sae, point)];
    let evaluations = reward_model(&model, &subjects, &pairs, 24, on).expect("runs");
    let [kept, dropped] = [0, 1].map(|at: usize| evaluations[at].rewards.expect("of rewards"));
    close(kept.mean_absolute_error, 0.0, 1e-5);
    close(kept.correlation, 1.0, 1e-6);
    assert_eq!(kept.pair_accuracy_spliced, kept.pair_accuracy_clean);
    assert!(dropped.mean_absolute_error > 1e-4);
    let mut last = None;
    let told = reward_model(&model, &subjects, &pairs, 24, |progress| {
        last = Some((progress.n_done, progress.n_tokens));
        ControlFlow::Continue(())
    });
    assert!(told.is_ok());
    // 12 and 7, 12 and 2, 7 and 1 tokens: activations, clean, and two splices.
    assert_eq!(last, Some((4 * 41, 4 * 41)));
    let none = reward_model(&model, &subjects, &[], 24, on);
    assert!(matches!(none, Err(EvaluateError::Nothing { .. })));
}

#[test]
fn progress_is_told_to_the_end_and_can_stop_it() {
    let (model, sae, other) = (model(), sae(48, 4), perfect(48));
    let texts = texts();
    let subjects = [
        Subject { from_position: 1, ..Subject::new(&sae, HookPoint::resid_post(1)) },
        Subject::new(&other, HookPoint::resid_post(2)),
    ];
    // Of 34 tokens: one pass for activations, a clean one, two ablations of each point, two splices.
    let mut seen = Vec::new();
    let progress = |progress: &MeasureProgress| {
        seen.push(*progress);
        ControlFlow::Continue(())
    };
    language_model(&model, &subjects, &texts, 24, progress).expect("runs");
    assert!(seen.is_sorted_by_key(|progress| progress.n_done) && seen.len() > 8);
    let last = seen.last().expect("some");
    assert_eq!((last.n_done, last.n_tokens), (8 * 34, 8 * 34));
    for stop_at in [1, 3, seen.len()] {
        let mut n_left = stop_at;
        let stopped = language_model(&model, &subjects, &texts, 24, |_| {
            n_left -= 1;
            if n_left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(matches!(stopped, Err(EvaluateError::Stopped)), "{stop_at}");
    }
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let (model, sae, narrow) = (model(), sae(48, 4), sae(47, 4));
    let point = HookPoint::resid_post(1);
    let refused = |subjects: &[Subject], texts: &[Vec<u32>]| {
        language_model(&model, subjects, texts, 24, on).expect_err("refused").to_string()
    };
    assert_eq!(refused(&[], &texts()), "nothing to measure on: expected an SAE");
    let expected = "nothing to measure on: expected a text of at least two tokens";
    assert_eq!(refused(&[Subject::new(&sae, point)], &[vec![1]]), expected);
    let expected = "the activation at blocks.1.hook_resid_post is 48 wide, the SAE 47";
    assert_eq!(refused(&[Subject::new(&narrow, point)], &texts()), expected);
    let config =
        SaeConfig { transcodes_to: Some(48), apply_b_dec_to_input: false, ..sae.config().clone() };
    let transcoder = Sae::new(config, sae.weights().clone()).expect("valid");
    let expected = "the SAE at blocks.1.hook_resid_post is a transcoder, expected an autoencoder";
    assert_eq!(refused(&[Subject::new(&transcoder, point)], &texts()), expected);
    let backwards = Subject::transcoder(&transcoder, point, HookPoint::resid_post(0));
    assert!(refused(&[backwards], &texts()).contains("blocks.1.hook_resid_post"));
    assert!(
        refused(&[Subject::new(&sae, HookPoint::resid_post(9))], &texts()).contains("blocks.9")
    );
}
