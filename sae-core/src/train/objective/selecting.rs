//! The largest pre-activations: TopK and its kin.

use burn::tensor::Tensor;
use kernels::{Search, Select};
use serde::{Deserialize, Serialize};

use super::aux_k::{AuxK, Ranking};
use super::matryoshka::{self, AuxKTarget, Group};
use super::pass::{Entries, Pass, where_positive};
use super::{Term, check, positive};
use crate::activation::Activation;
use crate::config::ConfigError;
use crate::latents::SparseLatents;
use crate::sae::row_norms;
use crate::train::error::TrainError;
use crate::train::parameters::Parameters;

/// The weight of the reconstruction by more latents, and how many times as many they are (sparsify).
const MULTI_WEIGHT: f64 = 1.0 / 8.0;
const MULTI_TIMES: usize = 4;

/// Keeps the largest pre-activations; nothing is penalised.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Selecting {
    /// Which ones.
    pub selection: Selection,
    /// Whether latents are ranked by what they write, `p ⊙ ‖w_dec[i]‖` (SAELens'
    /// `rescale_acts_by_decoder_norm`). Between encoder and decoder the norms cancel, values and
    /// gradients, so they appear in the ranking alone. Groups are not ranked: false there.
    pub rescale_by_decoder_norm: bool,
    /// A gradient for dead latents.
    pub aux_k: Option<AuxK>,
    /// How the threshold is found that stands in for a selection over the batch afterwards. Others
    /// may have one taken too: it stands in [`TrainState::threshold`](crate::train::TrainState).
    pub threshold: Option<RunningThreshold>,
    /// How the latents are found, where each row has its own `k`. It decides on the time of a step
    /// alone: the latents are the same, bit for bit.
    #[serde(default)]
    pub search: Search,
}

/// Which pre-activations are kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Selection {
    /// The `k` largest of each row, as far as they are above zero (Gao et al., 2024).
    TopK {
        /// Latents per row.
        k: usize,
    },
    /// TopK; the loss adds 1/8 of the error of what the `4k` largest reconstruct, `b_dec` and skip
    /// included (sparsify's `multi_topk`, which leaves out the skip).
    MultiTopK {
        /// Latents per row.
        k: usize,
    },
    /// The `k` of largest magnitude of each row: latents may be negative.
    AbsTopK {
        /// Latents per row.
        k: usize,
    },
    /// The largest of each of `k` groups of neighbouring latents (sparsify).
    GroupMax {
        /// Groups.
        k: usize,
    },
    /// The `k · n` largest of all `n` rows together (Bussmann et al., 2024).
    BatchTopK {
        /// Latents per row, on average.
        k: f64,
    },
    /// BatchTopK whose first latents have to reconstruct alone.
    Matryoshka {
        /// Latents per row, on average.
        k: f64,
        /// The reconstructions; the last has all latents.
        groups: Vec<Group>,
        /// What dead latents reconstruct, with AuxK.
        aux_k_target: AuxKTarget,
    },
}

/// A running mean of the smallest latents kept.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RunningThreshold {
    /// `t ← (1 − rate) · t + rate · smallest`, from 0 on; `t` stays where nothing is active.
    SaeLens {
        /// Share of the new value.
        rate: f64,
    },
    /// `t ← beta · t + (1 − beta) · smallest`, beginning with the smallest of the first step after
    /// `start_step`; zero where nothing is active.
    DictionaryLearning {
        /// Share of the old value.
        beta: f64,
        /// Steps up to this one are left out.
        start_step: usize,
    },
    /// The same, of the mean over the rows of their smallest (dictionary_learning's TopK).
    DictionaryLearningByRow {
        /// Share of the old value.
        beta: f64,
        /// Steps up to this one are left out.
        start_step: usize,
    },
}

impl Selecting {
    /// Ranked by what latents write and found by proposals, unless in groups; without AuxK and
    /// threshold.
    pub fn new(selection: Selection) -> Self {
        let in_groups = matches!(selection, Selection::GroupMax { .. });
        Self {
            rescale_by_decoder_norm: !in_groups,
            selection,
            aux_k: None,
            threshold: None,
            search: if in_groups { Search::Full } else { Search::Proposed },
        }
    }

    pub(super) fn run(&self, pass: &mut Pass, dead: &[u32]) -> (Entries, Tensor<1>) {
        let scale = pass.norms();
        let scale = match self.rescale_by_decoder_norm {
            true => scale,
            false => scale.ones_like(),
        };
        let by_magnitude = matches!(self.selection, Selection::AbsTopK { .. });
        let ranking = Ranking { scale: scale.clone(), by_magnitude };
        let own_residuals = matches!(
            self.selection,
            Selection::Matryoshka { aux_k_target: AuxKTarget::OwnResidual, .. }
        );
        let [_, d_out] = pass.parameters.w_dec().dims();
        // A full search comes by the products that AuxK takes.
        let seen = match self.aux_k {
            Some(aux_k) if aux_k.takes_all(dead, d_out) && !own_residuals => dead,
            _ => &[],
        };
        let select = self.selection.select(pass.n, pass.d_sae);
        let kept = match (self.search, seen) {
            (Search::Full, [_, ..]) => pass.encode_with(scale, select, seen),
            (search, _) => pass.encode_by(search, scale, select, 0.0),
        };
        let cut = |gradient, latents: &Entries| match by_magnitude {
            true => latents.with(gradient),
            false => latents.with(where_positive(gradient, latents.values.clone())),
        };
        match &self.selection {
            Selection::Matryoshka { groups, aux_k_target, .. } => {
                let parts = matryoshka::reconstruct(pass, groups, &kept);
                pass.projection_gradient(cut(parts.gradient, &kept));
                if let Some(aux_k) = self.aux_k {
                    let dead = match aux_k_target {
                        AuxKTarget::Residual => vec![(dead, parts.errors.last())],
                        AuxKTarget::OwnResidual => {
                            by_group(dead, groups).zip(parts.errors.iter().map(Some)).collect()
                        }
                    };
                    let dead = dead.into_iter().filter_map(|(dead, error)| Some((dead, error?)));
                    aux_k.run_all(pass, &ranking, dead);
                }
                (kept, parts.row_errors)
            }
            selection => {
                let latents = match selection {
                    Selection::MultiTopK { k } => kept.first(*k),
                    _ => kept.clone(),
                };
                let (gradient, error, rows) = pass.reconstruct(Term::Reconstruction, &latents, 1.0);
                pass.projection_gradient(cut(gradient, &latents));
                if let Selection::MultiTopK { .. } = selection {
                    let (gradient, ..) = pass.reconstruct(Term::MultiTopK, &kept, MULTI_WEIGHT);
                    pass.projection_gradient(cut(gradient, &kept));
                }
                if let Some(aux_k) = self.aux_k {
                    aux_k.run_all(pass, &ranking, [(dead, &error)].into_iter());
                }
                (latents, rows)
            }
        }
    }

    pub(super) fn activation(&self) -> Activation {
        let rescale_by_decoder_norm = self.rescale_by_decoder_norm;
        match self.selection {
            Selection::TopK { k } | Selection::MultiTopK { k } => {
                Activation::TopK { k, rescale_by_decoder_norm }
            }
            Selection::AbsTopK { k } => Activation::AbsTopK { k, rescale_by_decoder_norm },
            Selection::GroupMax { k } => Activation::GroupMax { k },
            Selection::BatchTopK { .. } | Selection::Matryoshka { .. } => Activation::JumpRelu,
        }
    }

    /// Latents as they were ranked, zero where there are none.
    pub(in crate::train) fn measured(
        &self,
        parameters: &Parameters,
        latents: &SparseLatents,
    ) -> Tensor<2> {
        let SparseLatents { indices, values, .. } = latents.clone();
        match self.rescale_by_decoder_norm {
            true => {
                let entries = Entries { indices, values: values.clone() };
                values * entries.gather(row_norms(parameters.w_dec()))
            }
            false => values,
        }
    }

    pub(super) fn validate(&self, d_sae: usize) -> Result<(), TrainError> {
        let k = self.selection.k();
        positive("k", k)?;
        check("k", "at most d_sae", k, k <= d_sae as f64)?;
        if let Some(aux_k) = self.aux_k {
            aux_k.validate()?;
        }
        match &self.selection {
            Selection::GroupMax { .. } if self.search != Search::Full => {
                let (option, with) = ("search", "groups, which are not ranked");
                return Err(TrainError::Conflict { option, with });
            }
            Selection::GroupMax { .. } if self.rescale_by_decoder_norm => {
                let (option, with) = ("rescale_by_decoder_norm", "groups, which are not ranked");
                return Err(TrainError::Conflict { option, with });
            }
            Selection::GroupMax { k } if !d_sae.is_multiple_of(*k) => {
                return Err(ConfigError::K { k: *k, d_sae }.into());
            }
            Selection::Matryoshka { groups, .. } => matryoshka::validate(groups, d_sae)?,
            _ => {}
        }
        let over_batch = self.activation() == Activation::JumpRelu;
        if over_batch && self.threshold.is_none() {
            return Err(TrainError::NoThreshold);
        }
        match self.threshold {
            Some(RunningThreshold::SaeLens { rate: share })
            | Some(RunningThreshold::DictionaryLearning { beta: share, .. })
            | Some(RunningThreshold::DictionaryLearningByRow { beta: share, .. }) => {
                check("threshold", "a share of 1", share, (0.0..=1.0).contains(&share))
            }
            None => Ok(()),
        }
    }
}

/// The dead latents of each group.
fn by_group<'a>(dead: &'a [u32], groups: &'a [Group]) -> impl Iterator<Item = &'a [u32]> {
    let below = |width: usize| dead.partition_point(|&latent| (latent as usize) < width);
    let starts = std::iter::once(0).chain(groups.iter().map(|group| group.width));
    starts.zip(groups).map(move |(start, group)| &dead[below(start)..below(group.width)])
}

impl Selection {
    pub(super) fn k(&self) -> f64 {
        match *self {
            Self::TopK { k }
            | Self::MultiTopK { k }
            | Self::AbsTopK { k }
            | Self::GroupMax { k } => k as f64,
            Self::BatchTopK { k } | Self::Matryoshka { k, .. } => k,
        }
    }

    /// Whole numbers are rounded.
    pub(super) fn set_k(&mut self, to: f64) {
        match self {
            Self::TopK { k }
            | Self::MultiTopK { k }
            | Self::AbsTopK { k }
            | Self::GroupMax { k } => *k = to.round() as usize,
            Self::BatchTopK { k } | Self::Matryoshka { k, .. } => *k = to,
        }
    }

    fn select(&self, n: usize, d_sae: usize) -> Select {
        match *self {
            Self::TopK { k } => Select::TopK(k),
            Self::MultiTopK { k } => Select::TopK((MULTI_TIMES * k).min(d_sae)),
            Self::AbsTopK { k } => Select::TopKMagnitude(k),
            Self::GroupMax { k } => Select::GroupMax(k),
            Self::BatchTopK { k } | Self::Matryoshka { k, .. } => {
                Select::BatchTopK(((k * n as f64) as usize).clamp(1, n * d_sae))
            }
        }
    }
}

/// The smallest latents of a batch: the smallest of all, or the sum of the smallest of each row, with
/// the number of those that it is of.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(in crate::train) struct Smallest {
    pub(in crate::train) value: f64,
    pub(in crate::train) n: usize,
}

impl RunningThreshold {
    /// The smallest of these values (`k` a row, those above zero are latents).
    pub(in crate::train) fn smallest(self, values: &[f32], k: usize) -> Smallest {
        let smallest = |values: &[f32]| {
            let active = values.iter().copied().filter(|value| *value > 0.0);
            active.min_by(f32::total_cmp).map(|value| Smallest { value: f64::from(value), n: 1 })
        };
        let parts = match self {
            Self::DictionaryLearningByRow { .. } => values.chunks(k.max(1)),
            _ => values.chunks(values.len().max(1)),
        };
        self.of_all(parts.filter_map(smallest))
    }

    /// The smallest of several batches.
    pub(in crate::train) fn of_all(self, parts: impl Iterator<Item = Smallest>) -> Smallest {
        let of_two = |a: Smallest, b: Smallest| match self {
            Self::DictionaryLearningByRow { .. } => {
                Smallest { value: a.value + b.value, n: a.n + b.n }
            }
            _ => Smallest { value: a.value.min(b.value), n: 1 },
        };
        parts.filter(|part| part.n > 0).reduce(of_two).unwrap_or_default()
    }

    /// The threshold after a step, counted from 0.
    pub(in crate::train) fn next(
        self,
        current: Option<f64>,
        smallest: Smallest,
        step: usize,
    ) -> Option<f64> {
        let seen = smallest.value / smallest.n.max(1) as f64;
        let (beta, start_step) = match self {
            Self::SaeLens { rate } => {
                let current = current.unwrap_or(0.0);
                return Some(match smallest.n {
                    0 => current,
                    _ => (1.0 - rate) * current + rate * seen,
                });
            }
            Self::DictionaryLearning { beta, start_step }
            | Self::DictionaryLearningByRow { beta, start_step } => (beta, start_step),
        };
        match current {
            current if step <= start_step => current,
            None => Some(seen),
            Some(current) => Some(beta * current + (1.0 - beta) * seen),
        }
    }
}
