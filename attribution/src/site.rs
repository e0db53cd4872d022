//! SAEs at their points, and what a baseline changes there.

use std::collections::HashMap;

use burn::tensor::{Int, Tensor, TensorData};
use kernels::sparse_decode;
use model_hooks::{Activation, Axis, HookError, HookPoint, TokenBatch};
use sae_core::{Sae, SparseLatents};

use crate::baseline::Baseline;
use crate::error::AttributionError;
use crate::metric::Metric;
use crate::study::Study;

/// An SAE at a point of the pass.
///
/// Positions that the SAE was not trained on, as far as its file says so, are left alone.
#[derive(Debug, Clone, Copy)]
pub struct SaeSite<'a> {
    /// The SAE.
    pub sae: &'a Sae,
    /// Where it reads and writes.
    pub point: HookPoint,
}

/// Means that latents and the error are changed to.
#[derive(Debug, Clone)]
pub struct SaeMeans {
    /// Of every latent, `[d_sae]`.
    pub latents: Tensor<1>,
    /// Of the error, `[d_in]`.
    pub error: Tensor<1>,
}

/// What a baseline changes at a site, for all conversations: one row for every position of every
/// conversation in turn.
pub(crate) struct Changes {
    /// Which latents, `[n, k]`.
    pub(crate) indices: Tensor<2, Int>,
    /// By how much, `[n, k]`; zero at positions that are left alone.
    pub(crate) deltas: Tensor<2>,
    /// By how much the error changes, `[n, d_in]`.
    pub(crate) error_deltas: Tensor<2>,
    /// What a unit of each latent writes, `[d_sae, d_in]`.
    pub(crate) directions: Tensor<2>,
}

impl<'a> SaeSite<'a> {
    /// An SAE at this point.
    pub fn new(sae: &'a Sae, point: HookPoint) -> Self {
        Self { sae, point }
    }

    /// The first position that the SAE was trained on.
    pub(crate) fn first_position(&self) -> usize {
        self.sae.config().metadata.first_position().unwrap_or(0)
    }

    pub(crate) fn check<M: Metric>(&self, study: &Study<'_, M>) -> Result<(), AttributionError> {
        let point = self.point;
        study.body().check_point(point)?;
        let config = self.sae.config();
        if config.transcodes_to.is_some() || config.normalization.is_by_row() {
            return Err(AttributionError::NoDirections { point });
        }
        match point.axes() {
            [Axis::Batch, Axis::Pos, ..] => Ok(()),
            _ => Err(AttributionError::NotByPosition { point }),
        }
    }
}

impl SaeSite<'_> {
    fn check_width(&self, x: &Tensor<2>) -> Result<(), HookError> {
        let (point, expected, actual) = (self.point, self.sae.config().d_in, x.dims()[1]);
        if expected == actual { Ok(()) } else { Err(HookError::Width { point, expected, actual }) }
    }
}

impl Changes {
    /// # Shapes
    /// `x`: the clean activation at the site, `[n, d_in]`.
    pub(crate) fn new<M: Metric>(
        study: &Study<'_, M>,
        site: &SaeSite<'_>,
        baseline: Baseline<'_, SaeMeans>,
        x: Tensor<2>,
    ) -> Result<Self, AttributionError> {
        site.check_width(&x)?;
        let clean = site.sae.decompose(x);
        let mask = study.mask(site.first_position())?;
        let (indices, deltas, error_deltas) = match baseline {
            Baseline::Zero => (clean.latents.indices, -clean.latents.values, -clean.error),
            Baseline::Mean(SaeMeans { latents, error }) => {
                let indices = clean.latents.indices;
                let means = latents.clone().select(0, indices.clone().flatten(0, 1));
                // An entry that only fills its row up is no latent that could be changed.
                let values = clean.latents.values;
                let fills_up = values.clone().equal_elem(0.0);
                let deltas = (means.reshape(indices.dims()) - values).mask_fill(fills_up, 0.0);
                (indices, deltas, error.clone().unsqueeze() - clean.error)
            }
            Baseline::Run(other) => {
                let other = joined_rows(study.captured_other(site.point, other)?);
                let other = site.sae.decompose(other);
                let (indices, deltas) = between(&clean.latents, &other.latents);
                (indices, deltas, other.error - clean.error)
            }
        };
        Ok(Self {
            indices,
            deltas: deltas * mask.clone(),
            error_deltas: error_deltas * mask,
            directions: site.sae.directions(),
        })
    }

    /// Those of one group of latents, with its share of the error's.
    pub(crate) fn group(&self, group: usize, n_groups: usize) -> Self {
        let of_group = self.indices.clone().remainder_scalar(n_groups as i64);
        let of_others = of_group.not_equal_elem(group as i64);
        Self {
            indices: self.indices.clone(),
            deltas: self.deltas.clone().mask_fill(of_others, 0.0),
            error_deltas: self.error_deltas.clone() / n_groups as f64,
            directions: self.directions.clone(),
        }
    }

    /// What all latents' changes write together, and the error's if it goes along.
    ///
    /// # Shapes
    /// `[n, d_in]`.
    pub(crate) fn whole(&self, with_error: bool) -> Tensor<2> {
        let latents =
            sparse_decode(self.indices.clone(), self.deltas.clone(), self.directions.clone());
        if with_error { latents + self.error_deltas.clone() } else { latents }
    }
}

/// The tokens of another run, as long as the study's.
pub(crate) fn other_run<M: Metric>(
    study: &Study<'_, M>,
    other: &[Vec<u32>],
) -> Result<TokenBatch, AttributionError> {
    let lengths = |conversations: &[Vec<u32>]| conversations.iter().map(Vec::len).collect();
    let (expected, actual): (Vec<usize>, Vec<usize>) =
        (lengths(study.conversations()), lengths(other));
    for conversation in 0..expected.len().max(actual.len()) {
        let length = |lengths: &[usize]| lengths.get(conversation).copied().unwrap_or(0);
        let (expected, actual) = (length(&expected), length(&actual));
        if expected != actual {
            return Err(AttributionError::RunDiffers { conversation, expected, actual });
        }
    }
    let body = study.body();
    Ok(TokenBatch::new(other, body.config(), body.device())?)
}

/// The latents of either run, each once a row, and what takes the one to the other.
fn between(clean: &SparseLatents, other: &SparseLatents) -> (Tensor<2, Int>, Tensor<2>) {
    let mut by_row: Vec<HashMap<usize, f32>> = vec![HashMap::new(); clean.n_rows()];
    for entry in other.entries() {
        *by_row[entry.row].entry(entry.latent_idx).or_default() += entry.value;
    }
    for entry in clean.entries() {
        *by_row[entry.row].entry(entry.latent_idx).or_default() -= entry.value;
    }
    let k = by_row.iter().map(HashMap::len).max().unwrap_or(0).max(1);
    let (mut indices, mut deltas) = (Vec::new(), Vec::new());
    for row in &by_row {
        let mut entries: Vec<(usize, f32)> = row.iter().map(|(&l, &delta)| (l, delta)).collect();
        entries.sort_unstable_by_key(|&(latent, _)| latent);
        entries.resize(k, (0, 0.0));
        indices.extend(entries.iter().map(|&(latent, _)| latent as i64));
        deltas.extend(entries.iter().map(|&(_, delta)| delta));
    }
    let (shape, device) = ([by_row.len(), k], clean.values.device());
    (
        Tensor::from_data(TensorData::new(indices, shape), &device),
        Tensor::from_data(TensorData::new(deltas, shape), &device),
    )
}

/// One row for every position of every conversation in turn, heads joined.
pub(crate) fn joined_rows(x: Activation) -> Tensor<2> {
    match x {
        Activation::Rank3(x) => x.flatten(0, 1),
        Activation::Rank4(x) => x.flatten::<3>(2, 3).flatten(0, 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn what_lies_between_two_runs_has_the_latents_of_both() {
        let device = Device::flex();
        let latents = |indices: [[i64; 2]; 2], values: [[f32; 2]; 2]| {
            SparseLatents::new(
                Tensor::from_data(indices, &device),
                Tensor::from_data(values, &device),
                9,
            )
        };
        let clean = latents([[3, 5], [1, 2]], [[1.0, 2.0], [4.0, 0.0]]);
        let other = latents([[5, 7], [1, 0]], [[0.5, 6.0], [4.5, 0.0]]);
        let (indices, deltas) = between(&clean, &other);
        let deltas = SparseLatents::new(indices, deltas, 9);
        let entries: Vec<_> = deltas.entries().map(|e| (e.row, e.latent_idx, e.value)).collect();
        assert_eq!(entries, [(0, 3, -1.0), (0, 5, -1.5), (0, 7, 6.0), (1, 1, 0.5)]);
    }
}
