//! What steering does to activations.

use burn::tensor::Tensor;
use sae_core::Sae;

use crate::error::{SteeringError, finite};
use crate::latent_edit::{LatentEdit, LatentEdits, LatentMap, Remainder};
use crate::latent_reader::Reading;

/// A change of the activation `x` at every steered position.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "one of them for a whole generation")]
pub enum Intervention<'a> {
    /// Changes latents: `x' = x + Σ (z' − z) · W_dec[latent]`, the error term kept or dropped.
    Latents(LatentEdits<'a>),
    /// `x' = x + direction`.
    Add {
        /// `[d_model]`.
        direction: Tensor<1>,
    },
    /// Projects a direction out: `x' = x − r̂ r̂ᵀ x` (Arditi et al., 2024).
    Ablate {
        /// `[d_model]`, of any norm but zero.
        direction: Tensor<1>,
    },
    /// Affine concept editing: `x' = x − r̂ r̂ᵀ (x − μ) + α r`. What `x` has of the direction becomes
    /// what the mean has of it, plus `α r` (Marshall et al., 2024).
    Affine {
        /// `r`, `[d_model]`, of any norm but zero.
        direction: Tensor<1>,
        /// `μ`, `[d_model]`: activations where the concept is absent.
        mean: Tensor<1>,
        /// `α`.
        strength: f64,
    },
}

impl<'a> Intervention<'a> {
    /// Sets latents to values, the error term kept.
    pub fn clamp(sae: &'a Sae, values: impl IntoIterator<Item = (usize, f64)>) -> Self {
        let edits =
            values.into_iter().map(|(latent, value)| LatentEdit::clamp(latent, value as f32));
        Self::edit(sae, edits)
    }

    /// Changes latents, read exactly and the error term kept.
    pub fn edit(sae: &'a Sae, edits: impl IntoIterator<Item = LatentEdit>) -> Self {
        let (remainder, reading) = (Remainder::Keep, Reading::Exact);
        let edits = edits.into_iter().collect();
        Self::Latents(LatentEdits { sae, edits, remainder, reading })
    }
}

/// An intervention, checked and made ready.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "one of them for a whole generation")]
pub(crate) enum Change<'a> {
    Latents(Box<LatentMap<'a>>),
    Add(Tensor<1>),
    Project {
        /// `[d_model, 1]`, of norm 1.
        unit: Tensor<2>,
        /// What is added after the projection, `[1, d_model]`.
        offset: Option<Tensor<2>>,
    },
}

impl<'a> Change<'a> {
    pub(crate) fn new(intervention: Intervention<'a>) -> Result<Self, SteeringError> {
        match intervention {
            Intervention::Latents(edits) => Ok(Self::Latents(Box::new(LatentMap::new(edits)?))),
            Intervention::Add { direction } => {
                finite_norm("the direction", &direction)?;
                Ok(Self::Add(direction))
            }
            Intervention::Ablate { direction } => {
                Ok(Self::Project { unit: unit_column(direction)?, offset: None })
            }
            Intervention::Affine { direction, mean, strength } => {
                let strength = finite("the direction", strength)?;
                finite_norm("the mean", &mean)?;
                let ([expected], [actual]) = (direction.dims(), mean.dims());
                if expected != actual {
                    return Err(SteeringError::Width { name: "the mean".into(), expected, actual });
                }
                let unit = unit_column(direction.clone())?;
                // r̂ r̂ᵀ μ + α r.
                let kept =
                    mean.unsqueeze::<2>().matmul(unit.clone()).matmul(unit.clone().transpose());
                let offset = kept + direction.mul_scalar(strength).unsqueeze();
                Ok(Self::Project { unit, offset: Some(offset) })
            }
        }
    }

    /// The width of the activations that it works on.
    pub(crate) fn width(&self) -> usize {
        match self {
            Self::Latents(map) => map.width(),
            Self::Add(direction) => direction.dims()[0],
            Self::Project { unit, .. } => unit.dims()[0],
        }
    }

    /// `x': [n, d_model]`.
    pub(crate) fn apply(&self, x: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Latents(map) => map.apply(x),
            Self::Add(direction) => x + direction.clone().unsqueeze(),
            Self::Project { unit, offset } => {
                let along = x.clone().matmul(unit.clone()).matmul(unit.clone().transpose());
                match offset {
                    Some(offset) => x - along + offset.clone(),
                    None => x - along,
                }
            }
        }
    }
}

/// `[d_model, 1]`, of norm 1.
pub(crate) fn unit_column(direction: Tensor<1>) -> Result<Tensor<2>, SteeringError> {
    let [d_model] = direction.dims();
    let norm = finite_norm("the direction", &direction)?;
    if norm == 0.0 {
        return Err(SteeringError::Nothing { name: "the direction".into() });
    }
    Ok(direction.div_scalar(norm).reshape([d_model, 1]))
}

pub(crate) fn finite_norm(name: &str, direction: &Tensor<1>) -> Result<f64, SteeringError> {
    let value = crate::norm(direction);
    if value.is_finite() {
        Ok(value)
    } else {
        Err(SteeringError::NotFinite { name: name.to_owned(), value })
    }
}
