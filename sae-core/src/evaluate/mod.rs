//! How good an SAE is: on activations, and spliced into the model that it was trained on.
//!
//! | of | see |
//! |---|---|
//! | activations alone | [`Reconstruction`] |
//! | a language model: cross-entropy and KL divergence | [`language_model`] |
//! | a reward model: rewards and preferences | [`reward_model`] |
//!
//! Several SAEs are measured at once, and share the passes that do not depend on them.

mod ablation;
mod next_tokens;
mod rewards;
mod spliced;

pub use next_tokens::{NextTokens, PositionRange, language_model};
pub use rewards::{Preference, Rewards, reward_model};

use std::ops::ControlFlow;

use self::spliced::{Spliced, Transcoding};
use burn::tensor::{Int, Tensor, TensorData};
use model_hooks::{
    ForwardError, HarvestConfig, Harvested, HookPoint, LanguageModel, SharedPrefix, TokenError,
};
use serde::Serialize;

use crate::metrics::{DensityHistogram, Reconstruction};
use crate::sae::Sae;
use crate::splice::{ErrorTerm, Splice};

/// An SAE that is measured, and where it stands.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// The SAE.
    pub sae: &'a Sae,
    /// The activation that it reads.
    pub point: HookPoint,
    /// The activation that a transcoder reconstructs; of others, it is the one that they read.
    pub target: Option<HookPoint>,
    /// Positions before this one are left alone, by ablations too.
    pub from_position: usize,
    /// What a splice does with the error: [`Drop`](ErrorTerm::Drop), if the SAE is to be measured.
    pub error_term: ErrorTerm,
}

impl<'a> Subject<'a> {
    /// An SAE at this point, from the position on that its file says, or else from 0.
    pub fn new(sae: &'a Sae, point: HookPoint) -> Self {
        let from_position = sae.config().metadata.first_position().unwrap_or(0);
        Self { sae, point, target: None, from_position, error_term: ErrorTerm::Drop }
    }

    /// A transcoder between these points.
    pub fn transcoder(sae: &'a Sae, point: HookPoint, target: HookPoint) -> Self {
        Self { target: Some(target), ..Self::new(sae, point) }
    }

    /// The activation that is replaced.
    fn replaced(&self) -> HookPoint {
        self.target.unwrap_or(self.point)
    }

    fn splice(&self) -> Spliced<'a> {
        let Self { sae, point, target, from_position, error_term } = *self;
        match target {
            None => Spliced::Sae(Splice::new(sae, point, error_term).from_position(from_position)),
            Some(target) => {
                let transcoding = Transcoding::new(sae, point, target, from_position, error_term);
                Spliced::Transcoder(Box::new(transcoding))
            }
        }
    }
}

/// What was measured of an SAE. Figures that there is nothing to take over are NaN, which is
/// written as `null`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Evaluation {
    /// What it reads.
    pub hook_point: String,
    /// What a transcoder reconstructs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_hook_point: Option<String>,
    /// Positions before this one were left alone.
    pub from_position: usize,
    /// On activations.
    pub reconstruction: ReconstructionSummary,
    /// In a language model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_tokens: Option<NextTokens>,
    /// In a reward model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rewards: Option<Rewards>,
}

/// The figures of a [`Reconstruction`], whose methods define them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ReconstructionSummary {
    /// Activations.
    pub n_rows: usize,
    /// Latents other than zero per activation.
    pub l0: f64,
    /// Squared error, summed over the width.
    pub mse: f64,
    /// Fraction of variance unexplained, by definition.
    pub fvu: FvuByDefinition,
    /// Mean cosine between activation and reconstruction.
    pub cosine: f64,
    /// Mean ratio of the norms of reconstruction and activation.
    pub l2_ratio: f64,
    /// Below 1 if the reconstruction shrinks.
    pub relative_bias: f64,
    /// The share of latents that were never active.
    pub dead_share: f64,
    /// How many latents are how dense.
    pub densities: DensityHistogram,
}

/// The fraction of variance unexplained means several things.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct FvuByDefinition {
    /// [`Reconstruction::fvu`].
    pub global_centred: f64,
    /// [`Reconstruction::fvu_per_dimension`].
    pub per_dimension: f64,
    /// [`Reconstruction::fvu_without_outliers`].
    pub without_outliers: f64,
    /// Rows that the last one leaves out.
    pub n_outliers: usize,
}

impl From<&Reconstruction> for ReconstructionSummary {
    fn from(metrics: &Reconstruction) -> Self {
        let densities = metrics.density_histogram();
        let n_alive: usize = densities.n_latents.iter().sum();
        Self {
            n_rows: metrics.n_rows(),
            l0: metrics.l0(),
            mse: metrics.mse(),
            fvu: FvuByDefinition {
                global_centred: metrics.fvu(),
                per_dimension: metrics.fvu_per_dimension(),
                without_outliers: metrics.fvu_without_outliers(),
                n_outliers: metrics.n_outliers(),
            },
            cosine: metrics.cosine(),
            l2_ratio: metrics.l2_ratio(),
            relative_bias: metrics.relative_bias(),
            dead_share: densities.n_dead as f64 / (n_alive + densities.n_dead) as f64,
            densities,
        }
    }
}

/// How far a measurement has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct MeasureProgress {
    /// Tokens that the model has run on, in all passes together.
    pub n_done: usize,
    /// Tokens that it will have run on in the end.
    pub n_tokens: usize,
}

/// Counts tokens, and tells of them.
struct Meter<F> {
    seen: MeasureProgress,
    progress: F,
}

impl<F: FnMut(&MeasureProgress) -> ControlFlow<()>> Meter<F> {
    fn new(texts: &[impl AsRef<[u32]>], n_passes: usize, progress: F) -> Self {
        let n_tokens = n_passes * texts.iter().map(|text| text.as_ref().len()).sum::<usize>();
        Self { seen: MeasureProgress { n_done: 0, n_tokens }, progress }
    }

    /// Takes in a pass over some tokens, or the end of one.
    fn add(&mut self, n_tokens: usize) -> Result<(), EvaluateError> {
        self.seen.n_done += n_tokens;
        match (self.progress)(&self.seen) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(EvaluateError::Stopped),
        }
    }
}

/// Why an SAE could not be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvaluateError {
    /// A pass failed.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// A transcoder writes another activation than it reads, and that was not said; or it was said
    /// of an autoencoder.
    #[error("the SAE at {point} is {actual}, expected {expected}")]
    Target {
        /// Where it reads.
        point: HookPoint,
        /// What the target says.
        expected: &'static str,
        /// What it is.
        actual: &'static str,
    },
    /// The activation has another width than the SAE.
    #[error("the activation at {point} is {actual} wide, the SAE {expected}")]
    Width {
        /// Where it was to be.
        point: HookPoint,
        /// The SAE's width.
        expected: usize,
        /// The activation's.
        actual: usize,
    },
    /// The callback asked to stop.
    #[error("the measurement was stopped")]
    Stopped,
    /// There is nothing to measure on.
    #[error("nothing to measure on: expected {expected}")]
    Nothing {
        /// What is needed.
        expected: &'static str,
    },
    /// A reward model gives several scores, of which none is the reward.
    #[error("the reward model gives {actual} scores, expected 1")]
    Scores {
        /// How many it gives.
        actual: usize,
    },
}

impl From<TokenError> for EvaluateError {
    fn from(error: TokenError) -> Self {
        Self::Forward(error.into())
    }
}

/// How well the SAEs reconstruct the activations of the texts, behind which nothing is run.
fn reconstructions(
    model: &LanguageModel,
    subjects: &[Subject],
    texts: &[impl AsRef<[u32]>],
    batch_tokens: usize,
    meter: &mut Meter<impl FnMut(&MeasureProgress) -> ControlFlow<()>>,
) -> Result<Vec<Reconstruction>, EvaluateError> {
    let mut points: Vec<HookPoint> = Vec::new();
    for subject in subjects {
        let is_transcoder = subject.sae.config().transcodes_to.is_some();
        if is_transcoder != subject.target.is_some() {
            let kinds = ["an autoencoder", "a transcoder"];
            let [expected, actual] =
                [subject.target.is_some(), is_transcoder].map(|kind| kinds[usize::from(kind)]);
            return Err(EvaluateError::Target { point: subject.point, expected, actual });
        }
        for point in [subject.point, subject.replaced()] {
            if !points.contains(&point) {
                points.push(point);
            }
        }
    }
    let Some(skip_positions) = subjects.iter().map(|subject| subject.from_position).min() else {
        return Err(EvaluateError::Nothing { expected: "an SAE" });
    };
    let mut metrics: Vec<_> =
        subjects.iter().map(|subject| Reconstruction::new(subject.sae.config().d_sae)).collect();
    let (mut wrong, mut n_done) = (None, 0);
    let config = HarvestConfig {
        points: points.clone(),
        skip_positions,
        ..HarvestConfig::new(subjects[0].point, batch_tokens)
    };
    model.harvest(texts, &SharedPrefix::default(), &config, |harvested| {
        for (subject, metrics) in subjects.iter().zip(&mut metrics) {
            let config = subject.sae.config();
            let mut rows = |point: HookPoint, expected: usize| {
                let idx = points.iter().position(|&other| other == point);
                let rows = rows_from(&harvested, idx.expect("all are there"), subject)?;
                let actual = rows.dims()[1];
                if actual != expected {
                    wrong.get_or_insert(EvaluateError::Width { point, expected, actual });
                    return None;
                }
                Some(rows)
            };
            let read = rows(subject.point, config.d_in);
            let target = rows(subject.replaced(), config.d_out());
            let Some((x, target)) = read.zip(target) else {
                continue;
            };
            let (latents, reconstruction) = subject.sae.run(x);
            metrics.update(target, reconstruction, &latents);
        }
        n_done += harvested.places.len();
        if let Err(stopped) = meter.add(harvested.places.len()) {
            wrong.get_or_insert(stopped);
        }
        match wrong {
            Some(_) => ControlFlow::Break(()),
            None => ControlFlow::Continue(()),
        }
    })?;
    if let Some(error) = wrong {
        return Err(error);
    }
    // Positions that are left alone are not handed over.
    let n_tokens = texts.iter().map(|text| text.as_ref().len()).sum::<usize>();
    meter.add(n_tokens - n_done)?;
    Ok(metrics)
}

/// The rows at positions that the subject does not leave alone.
fn rows_from(harvested: &Harvested, point: usize, subject: &Subject) -> Option<Tensor<2>> {
    let rows = harvested.activations[point].clone();
    let places = harvested.places.iter().enumerate();
    let taken = places.filter(|(_, place)| place.position >= subject.from_position);
    let taken: Vec<i64> = taken.map(|(row, _)| row as i64).collect();
    if taken.is_empty() || taken.len() == harvested.places.len() {
        return (!taken.is_empty()).then_some(rows);
    }
    let shape = [taken.len()];
    let taken = Tensor::<1, Int>::from_data(TensorData::new(taken, shape), &rows.device());
    Some(rows.select(0, taken))
}

#[cfg(test)]
mod tests;
