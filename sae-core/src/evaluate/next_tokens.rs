//! What splicing an SAE in does to a language model's predictions.

use std::ops::ControlFlow;

use burn::tensor::{Tensor, TensorData};
use model_hooks::{Hook, HookPoint, LanguageModel, Predictions, TokenBatch, batches_in_order};
use serde::Serialize;

use super::ablation::Ablation;
use super::{EvaluateError, Evaluation, MeasureProgress, Meter, Subject, reconstructions};
use crate::metrics::{Reconstruction, ce_recovered};

/// How well a language model predicts text with an SAE in it. Cross-entropies are in nats, and
/// means over every token of the texts but each one's first.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NextTokens {
    /// Tokens predicted.
    pub n_tokens: usize,
    /// Cross-entropy of the model as it is.
    pub ce_clean: f64,
    /// With the SAE spliced in.
    pub ce_spliced: f64,
    /// With zeros in place of the activation.
    pub ce_zero_ablated: f64,
    /// With its mean over these texts in its place.
    pub ce_mean_ablated: f64,
    /// See [`ce_recovered`](crate::metrics::ce_recovered): of what zeros damage.
    pub ce_recovered: f64,
    /// The same of what the mean damages, which is less as a rule.
    pub ce_recovered_from_mean: f64,
    /// `KL(clean ‖ spliced)` of the predictions, in nats.
    pub kl: f64,
    /// By the position of the token that predicts.
    pub by_position: Vec<PositionRange>,
}

/// Means over some positions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PositionRange {
    /// The first position.
    pub from: usize,
    /// The one behind the last.
    pub to: usize,
    /// Tokens predicted from there.
    pub n_tokens: usize,
    /// Cross-entropy of the model as it is.
    pub ce_clean: f64,
    /// With the SAE spliced in.
    pub ce_spliced: f64,
    /// `KL(clean ‖ spliced)`.
    pub kl: f64,
}

/// Measures SAEs in a language model, on texts.
///
/// The texts are run through the model once up to the last SAE, for the figures of the
/// reconstruction and the mean; then once clean, once with each point ablated in either way, and
/// once with each SAE spliced in. Of the predictions, nothing is kept beyond a batch of
/// `batch_tokens` (a longer text runs alone). `progress` is called after every batch of every pass,
/// and can stop the measurement.
///
/// # Errors
/// If there is no SAE or no token to predict, an SAE does not fit its points, a pass fails, or
/// `progress` asks to stop.
pub fn language_model(
    model: &LanguageModel,
    subjects: &[Subject],
    texts: &[impl AsRef<[u32]>],
    batch_tokens: usize,
    progress: impl FnMut(&MeasureProgress) -> ControlFlow<()>,
) -> Result<Vec<Evaluation>, EvaluateError> {
    let mut ablations: Vec<(HookPoint, usize)> = Vec::new();
    for subject in subjects {
        let place = (subject.replaced(), subject.from_position);
        if !ablations.contains(&place) {
            ablations.push(place);
        }
    }
    let n_passes = 2 + 2 * ablations.len() + subjects.len();
    let mut meter = Meter::new(texts, n_passes, progress);
    let metrics = reconstructions(model, subjects, texts, batch_tokens, &mut meter)?;
    let mut ablated: Vec<Ablated> = Vec::new();
    let mut measured: Vec<Measured> = Vec::new();
    for (subject, metrics) in subjects.iter().zip(&metrics) {
        let same = |a: &Ablated| {
            let place = |s: &Subject| (s.replaced(), s.from_position);
            place(&a.subject) == place(subject)
        };
        let ablation = ablated.iter().position(same).unwrap_or_else(|| {
            ablated.push(Ablated::new(*subject, metrics, model));
            ablated.len() - 1
        });
        measured.push(Measured { ablation, positions: Vec::new() });
    }
    for batch in batches_in_order(texts, batch_tokens) {
        let n_tokens = texts[batch.clone()].iter().map(|text| text.as_ref().len()).sum::<usize>();
        let tokens = TokenBatch::new(&texts[batch], model.config(), model.device())?;
        if tokens.dims()[1] == 1 {
            meter.add((n_passes - 1) * n_tokens)?;
            continue;
        }
        let clean = Predictions::new(model.logits(&tokens, &mut ())?, &tokens);
        let clean_losses = host(clean.losses);
        meter.add(n_tokens)?;
        for ablated in &mut ablated {
            ablated.zero.add(losses(model, &tokens, &mut ablated.to_zero)?, &tokens);
            ablated.mean.add(losses(model, &tokens, &mut ablated.to_mean)?, &tokens);
            meter.add(2 * n_tokens)?;
        }
        for (subject, measured) in subjects.iter().zip(&mut measured) {
            let logits = model.logits(&tokens, &mut subject.splice())?;
            let spliced = Predictions::new(logits, &tokens);
            let log_ratio = clean.log_probs.clone() - spliced.log_probs;
            let kl = (clean.log_probs.clone().exp() * log_ratio).sum_dim(2);
            let [batch, n, _] = kl.dims();
            let figures =
                [clean_losses.clone(), host(spliced.losses), host(kl.reshape([batch, n]))];
            measured.add(&figures, &tokens);
            meter.add(n_tokens)?;
        }
    }
    let nothing = EvaluateError::Nothing { expected: "a text of at least two tokens" };
    if measured.iter().all(|measured| measured.positions.is_empty()) {
        return Err(nothing);
    }
    let evaluations = subjects.iter().zip(&metrics).zip(measured);
    Ok(evaluations
        .map(|((subject, metrics), measured)| Evaluation {
            hook_point: subject.point.to_string(),
            target_hook_point: subject.target.map(|target| target.to_string()),
            from_position: subject.from_position,
            reconstruction: metrics.into(),
            next_tokens: Some(measured.figures(&ablated)),
            rewards: None,
        })
        .collect())
}

/// A point without what it says, for all SAEs on it.
struct Ablated<'a> {
    subject: Subject<'a>,
    to_zero: Ablation,
    to_mean: Ablation,
    zero: Mean,
    mean: Mean,
}

impl<'a> Ablated<'a> {
    fn new(subject: Subject<'a>, metrics: &Reconstruction, model: &LanguageModel) -> Self {
        let width = subject.sae.config().d_out();
        let mean: Vec<f32> = metrics.mean().iter().map(|&x| x as f32).collect();
        // Where every position is left alone, there is no mean, and nothing to replace by it.
        let mean = if mean.is_empty() { vec![0.0; width] } else { mean };
        let mean = Tensor::from_data(TensorData::new(mean, [1, width]), model.device());
        Self {
            subject,
            to_zero: Ablation::new(&subject, mean.zeros_like()),
            to_mean: Ablation::new(&subject, mean),
            zero: Mean::default(),
            mean: Mean::default(),
        }
    }
}

#[derive(Default)]
struct Mean {
    total: f64,
    n: usize,
}

impl Mean {
    fn add(&mut self, values: Vec<f32>, tokens: &TokenBatch) {
        for (_, at) in predicting(tokens) {
            self.total += f64::from(values[at]);
            self.n += 1;
        }
    }

    fn value(&self) -> f64 {
        self.total / self.n as f64
    }
}

/// The figures of an SAE on the way.
struct Measured {
    /// Which of the ablations is of its point.
    ablation: usize,
    /// By position.
    positions: Vec<Sums>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    n_tokens: usize,
    clean: f64,
    spliced: f64,
    kl: f64,
}

impl Sums {
    fn add(&mut self, other: &Self) {
        self.n_tokens += other.n_tokens;
        self.clean += other.clean;
        self.spliced += other.spliced;
        self.kl += other.kl;
    }
}

impl Measured {
    fn add(&mut self, [clean, spliced, kl]: &[Vec<f32>; 3], tokens: &TokenBatch) {
        for (position, at) in predicting(tokens) {
            if self.positions.len() <= position {
                self.positions.resize(position + 1, Sums::default());
            }
            let [clean, spliced, kl] = [clean, spliced, kl].map(|values| f64::from(values[at]));
            self.positions[position].add(&Sums { n_tokens: 1, clean, spliced, kl });
        }
    }

    fn figures(&self, ablated: &[Ablated]) -> NextTokens {
        let means = |from: usize, to: usize| {
            let mut sums = Sums::default();
            self.positions[from..to].iter().for_each(|position| sums.add(position));
            let Sums { n_tokens, clean, spliced, kl } = sums;
            let n = n_tokens as f64;
            let (ce_clean, ce_spliced, kl) = (clean / n, spliced / n, kl / n);
            PositionRange { from, to, n_tokens, ce_clean, ce_spliced, kl }
        };
        let n_positions = self.positions.len();
        let whole = means(0, n_positions);
        let mut by_position = Vec::new();
        let mut from = 0;
        while from < n_positions {
            let to = (2 * from).max(1).min(n_positions);
            by_position.push(means(from, to));
            from = to;
        }
        let Ablated { zero, mean, .. } = &ablated[self.ablation];
        let recovered = |ablated: f64| ce_recovered(whole.ce_clean, whole.ce_spliced, ablated);
        NextTokens {
            n_tokens: whole.n_tokens,
            ce_clean: whole.ce_clean,
            ce_spliced: whole.ce_spliced,
            ce_zero_ablated: zero.value(),
            ce_mean_ablated: mean.value(),
            ce_recovered: recovered(zero.value()),
            ce_recovered_from_mean: recovered(mean.value()),
            kl: whole.kl,
            by_position,
        }
    }
}

fn losses(
    model: &LanguageModel,
    tokens: &TokenBatch,
    hook: &mut impl Hook,
) -> Result<Vec<f32>, EvaluateError> {
    Ok(host(Predictions::new(model.logits(tokens, hook)?, tokens).losses))
}

/// Position and cell of every token that another one follows.
fn predicting(tokens: &TokenBatch) -> impl Iterator<Item = (usize, usize)> {
    let positions = Predictions::positions(tokens);
    let n = positions.n_columns();
    (0..positions.n_rows() * n).filter_map(move |at| Some((positions.get(at / n, at % n)?, at)))
}

fn host(x: Tensor<2>) -> Vec<f32> {
    x.into_data().try_into_vec_as().expect("numbers convert to numbers")
}
