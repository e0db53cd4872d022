//! The decoder's own rows, picked one by one.

use std::collections::{BTreeMap, HashSet};

use burn::tensor::{Int, Tensor, TensorData};
use kernels::{Select, sparse_decode, sparse_dot, sparse_encode, sparse_grad_rows};
use serde::{Deserialize, Serialize};

use super::pass::{number, where_positive};
use super::{Batch, Differentiated, ErrorMeasure, Objective, Term, not_negative, positive};
use crate::activation::Activation;
use crate::latents::SparseLatents;
use crate::sae::row_squares;
use crate::train::error::TrainError;
use crate::train::parameters::{ParameterName, Parameters};

/// Again and again, the decoder row that explains most of what is left (SAELens'
/// `matching_pursuit`):
///
/// ```text
/// r₀ = x − b_dec,   vₜ = relu(rₜ · wᵢ) for the i where it is largest,   rₜ₊₁ = rₜ − vₜ wᵢ
/// ```
///
/// There is no encoder: `w_dec` and `b_dec` are all that is trained.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MatchingPursuit {
    /// A row ends where the norm of its residual is below this.
    pub residual_threshold: f64,
    /// Picks per row, at most; as many as `d_in` unless given.
    pub max_iterations: Option<usize>,
    /// Whether a row also ends where it picks nothing new.
    pub stop_on_duplicate_support: bool,
}

/// One pick of every row.
struct Pick {
    /// `[n, 1]`
    indices: Tensor<2, Int>,
    /// `[n, 1]`; zero for a row that has ended.
    values: Tensor<2>,
}

impl MatchingPursuit {
    pub(super) fn differentiate(
        &self,
        objective: &Objective,
        parameters: &Parameters,
        batch: &Batch,
    ) -> Differentiated {
        let (w_dec, b_dec) = (parameters.w_dec(), parameters.matrix(ParameterName::BDec));
        let ([n, _], d_sae) = (batch.x.dims(), parameters.d_sae());
        let start = match objective.apply_b_dec_to_input {
            true => batch.x.clone() - b_dec.clone(),
            false => batch.x.clone(),
        };
        let scale = match objective.error {
            ErrorMeasure::Squared => 1.0 / n as f64,
            ErrorMeasure::Fvu => {
                1.0 / number(row_squares(&(batch.x.clone() - batch.x.clone().mean_dim(0))).sum())
            }
        };
        let (picks, mut residual) = self.pick(start, &w_dec);
        let row_errors = row_squares(&residual);
        let loss = scale * number(row_errors.clone().sum());

        // Back through the picks; each residual follows from the one behind it.
        let mut by_residual = residual.clone().mul_scalar(2.0 * scale);
        let mut by_w_dec = w_dec.zeros_like();
        for Pick { indices, values } in picks.iter().rev() {
            let written = sparse_decode(indices.clone(), values.clone(), w_dec.clone());
            residual = residual + written;
            let by_value = sparse_dot(indices.clone(), w_dec.clone(), by_residual.clone()).neg();
            let by_value = where_positive(by_value, values.clone());
            let rows = |values, x| sparse_grad_rows(indices.clone(), values, x, d_sae);
            by_w_dec = by_w_dec
                + rows(values.clone().neg(), by_residual.clone())
                + rows(by_value.clone(), residual.clone());
            by_residual = by_residual + sparse_decode(indices.clone(), by_value, w_dec.clone());
        }
        // What is added behind the picks cancels against the target; before them it moves r₀.
        let by_b_dec = match objective.apply_b_dec_to_input {
            true => by_residual.sum_dim(0).neg(),
            false => b_dec.zeros_like(),
        };
        let gradient = [(ParameterName::WDec, by_w_dec), (ParameterName::BDec, by_b_dec)];
        Differentiated {
            loss,
            terms: vec![(Term::Reconstruction, loss)],
            gradient: gradient.into_iter().collect(),
            latents: merged(&picks, n, d_sae, &w_dec),
            row_errors,
        }
    }

    /// The picks, and what they leave over.
    fn pick(&self, start: Tensor<2>, w_dec: &Tensor<2>) -> (Vec<Pick>, Tensor<2>) {
        let ([n, d_in], [d_sae, _]) = (start.dims(), w_dec.dims());
        let (zeros, device) = (Tensor::<1>::zeros([d_sae], &start.device()), start.device());
        let (mut residual, mut picks) = (start, Vec::new());
        let mut supports = vec![HashSet::new(); n];
        let mut goes_on = vec![true; n];
        for _ in 0..self.max_iterations.unwrap_or(d_in) {
            let encoder = w_dec.clone().transpose();
            let (values, indices) = sparse_encode(
                residual.clone(),
                encoder,
                zeros.clone(),
                zeros.ones_like(),
                Select::TopK(1),
            );
            let active: Vec<f32> = goes_on.iter().map(|&goes_on| f32::from(goes_on)).collect();
            let active = Tensor::<2>::from_data(TensorData::new(active, [n, 1]), &device);
            let values = values * active;
            residual = residual - sparse_decode(indices.clone(), values.clone(), w_dec.clone());
            let picked = host::<i64>(indices.to_data());
            let sizes = host::<f32>(values.to_data());
            let left = host::<f32>(row_squares(&residual).to_data());
            for (row, goes_on) in goes_on.iter_mut().enumerate() {
                let is_new = sizes[row] != 0.0 && supports[row].insert(picked[row]);
                let is_small = f64::from(left[row]).sqrt() < self.residual_threshold;
                *goes_on &= (is_new || !self.stop_on_duplicate_support) && !is_small;
            }
            picks.push(Pick { indices, values });
            if !goes_on.contains(&true) {
                break;
            }
        }
        (picks, residual)
    }

    pub(super) fn activation(&self) -> Activation {
        let Self { residual_threshold, max_iterations, stop_on_duplicate_support } = *self;
        Activation::MatchingPursuit {
            residual_threshold,
            max_iterations,
            stop_on_duplicate_support,
        }
    }

    pub(super) fn validate(&self) -> Result<(), TrainError> {
        not_negative("residual_threshold", self.residual_threshold)?;
        positive("max_iterations", self.max_iterations.unwrap_or(1) as f64)
    }
}

/// The latents of each row; what was picked twice counts with the sum.
fn merged(picks: &[Pick], n: usize, d_sae: usize, like: &Tensor<2>) -> SparseLatents {
    let mut rows: Vec<BTreeMap<i64, f32>> = vec![BTreeMap::new(); n];
    for Pick { indices, values } in picks {
        let picked = host::<i64>(indices.to_data()).into_iter().zip(host::<f32>(values.to_data()));
        for (row, (index, value)) in rows.iter_mut().zip(picked) {
            if value != 0.0 {
                *row.entry(index).or_default() += value;
            }
        }
    }
    let k = rows.iter().map(BTreeMap::len).max().unwrap_or(0).max(1);
    let (mut indices, mut values) = (vec![0i64; n * k], vec![0f32; n * k]);
    for (row, latents) in rows.into_iter().enumerate() {
        for (at, (index, value)) in latents.into_iter().enumerate() {
            (indices[row * k + at], values[row * k + at]) = (index, value);
        }
    }
    let device = like.device();
    SparseLatents::new(
        Tensor::from_data(TensorData::new(indices, [n, k]), &device),
        Tensor::from_data(TensorData::new(values, [n, k]), &device),
        d_sae,
    )
}

fn host<E: burn::tensor::Element>(data: TensorData) -> Vec<E> {
    data.try_into_vec_as().expect("numbers convert to numbers")
}
