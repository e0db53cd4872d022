//! Reconstructions by the first latents alone.

use burn::tensor::{Int, Tensor};
use kernels::{sparse_dot, sparse_grad_rows};
use serde::{Deserialize, Serialize};

use super::pass::{Entries, Pass, number};
use super::{Term, check, not_negative};
use crate::sae::row_squares;
use crate::train::error::TrainError;
use crate::train::parameters::ParameterName;

/// A reconstruction of a Matryoshka SAE (Bussmann et al., 2025): that by its first `width` latents.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Latents up to here take part.
    pub width: usize,
    /// The weight of its error: 1 in SAELens, a share of 1 over the number of groups in
    /// dictionary_learning.
    pub weight: f64,
}

/// What dead latents of a Matryoshka SAE are to reconstruct.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuxKTarget {
    /// What the whole SAE leaves over.
    Residual,
    /// What the latents up to their own group leave over, group by group.
    OwnResidual,
}

/// What the reconstructions of all groups come to.
pub(super) struct Reconstructed {
    /// At the latents.
    pub(super) gradient: Tensor<2>,
    /// Of each group.
    pub(super) errors: Vec<Tensor<2>>,
    pub(super) row_errors: Tensor<1>,
}

/// Latents `start..end`, among the entries.
struct Members {
    start: usize,
    end: usize,
    /// 1 for an entry of the group.
    is_member: Tensor<2>,
}

impl Members {
    fn new(latents: &Entries, start: usize, end: usize) -> Self {
        let within = |to: usize| latents.indices.clone().lower_elem(to as i64).float();
        Self { start, end, is_member: within(end) - within(start) }
    }
}

pub(super) fn reconstruct(pass: &mut Pass, groups: &[Group], latents: &Entries) -> Reconstructed {
    let scale = pass.error_scale();
    let starts = std::iter::once(0).chain(groups.iter().map(|group| group.width));
    let members: Vec<Members> = starts
        .zip(groups)
        .map(|(start, group)| Members::new(latents, start, group.width))
        .collect();
    let mut errors: Vec<Tensor<2>> = Vec::with_capacity(groups.len());
    for members in &members {
        let own = latents.with(latents.values.clone() * members.is_member.clone());
        let error = match errors.last() {
            None => pass.error(&own),
            Some(error) => error.clone() + pass.decode(&own),
        };
        errors.push(error);
    }
    let mut row_errors = row_squares(&errors[0]);
    let mut counted = Vec::with_capacity(groups.len());
    for (place, (group, error)) in groups.iter().zip(&errors).enumerate() {
        row_errors = row_squares(error);
        let term = match place + 1 == groups.len() {
            true => Term::Reconstruction,
            false => Term::Inner { width: group.width },
        };
        let (error, weight) = pass.counted(term, error, group.weight);
        pass.term(term, weight * scale * number(row_errors.clone().sum()));
        counted.push(error);
    }

    // A latent takes part in its group's reconstruction and in all behind it.
    let mut gradient = latents.values.zeros_like();
    let (mut rows, mut behind) = (Vec::new(), errors[0].zeros_like());
    for (error, members) in counted.into_iter().zip(&members).rev() {
        behind = behind + error;
        let dots = sparse_dot(latents.indices.clone(), pass.parameters.w_dec(), behind.clone());
        gradient = gradient + dots * members.is_member.clone().mul_scalar(2.0 * scale);
        rows.push(decoder_rows(latents, members, &behind).mul_scalar(2.0 * scale));
    }
    rows.reverse();
    pass.matrix_gradient(ParameterName::WDec, Tensor::cat(rows, 0));
    pass.output_gradient(&behind, scale);
    Reconstructed { gradient, errors, row_errors }
}

/// The gradient of the group's own rows of the decoder.
fn decoder_rows(latents: &Entries, members: &Members, error: &Tensor<2>) -> Tensor<2> {
    let Members { start, end, is_member } = members;
    let within = latents.indices.clone().sub_scalar(*start as i64);
    let is_member_int: Tensor<2, Int> = is_member.clone().int();
    let values = latents.values.clone() * is_member.clone();
    sparse_grad_rows(within * is_member_int, values, error.clone(), end - start)
}

pub(super) fn validate(groups: &[Group], d_sae: usize) -> Result<(), TrainError> {
    let mut start = 0;
    for group in groups {
        let rises = group.width > start;
        check("matryoshka.width", "above the one before", group.width as f64, rises)?;
        not_negative("matryoshka.weight", group.weight)?;
        start = group.width;
    }
    check("matryoshka.width", "d_sae at last", start as f64, start == d_sae)
}
