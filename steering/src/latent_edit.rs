//! What is done to latents.

use burn::tensor::{Int, Tensor, TensorData};
use sae_core::{Sae, SparseLatents};
use serde::{Deserialize, Serialize};

use crate::error::{SteeringError, finite};
use crate::latent_reader::{LatentReader, Reading};

/// How much of a latent. Values do not carry over from one autoencoder to another; multiples of
/// what was observed do, somewhat.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Amount {
    /// In the units of the latent.
    Value(f32),
    /// In the largest value that was observed of it.
    OfMaximum {
        /// How many of these.
        multiple: f32,
        /// The largest value.
        maximum: f32,
    },
}

impl Amount {
    /// In the units of the latent.
    pub fn value(self) -> f32 {
        match self {
            Self::Value(value) => value,
            Self::OfMaximum { multiple, maximum } => multiple * maximum,
        }
    }
}

/// What becomes of a latent's value `z`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum LatentChange {
    /// `a`; with zero, the latent is ablated.
    Clamp(Amount),
    /// `max(z, a)`.
    AtLeast(Amount),
    /// `a` where the latent is active, else nothing (unlearning, Farrell et al., 2024).
    ClampActive(Amount),
    /// `f · z`.
    Scale(f32),
}

/// A latent, and what becomes of it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LatentEdit {
    /// The latent.
    pub latent: usize,
    /// What becomes of it.
    pub change: LatentChange,
}

/// What an edit of latents does about the part of the activation that they do not explain.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Remainder {
    /// Keeps it: `x' = x + decode(z') − decode(z)`.
    #[default]
    Keep,
    /// Leaves it out: `x' = decode(z')`. Takes the whole autoencoder, and so reads exactly.
    Drop,
}

/// Latents, and what becomes of them.
#[derive(Debug, Clone)]
pub struct LatentEdits<'a> {
    /// The autoencoder that they belong to.
    pub sae: &'a Sae,
    /// What becomes of which.
    pub edits: Vec<LatentEdit>,
    /// The error term, kept or dropped.
    pub remainder: Remainder,
    /// How the latents are read.
    pub reading: Reading,
}

impl LatentEdit {
    /// Sets a latent to a value.
    pub fn clamp(latent: usize, value: f32) -> Self {
        Self { latent, change: LatentChange::Clamp(Amount::Value(value)) }
    }

    /// Sets a latent to zero.
    pub fn ablate(latent: usize) -> Self {
        Self::clamp(latent, 0.0)
    }

    /// The number that it goes by, if it is a finite one.
    pub(crate) fn strength(&self) -> Result<f32, SteeringError> {
        let strength = match self.change {
            LatentChange::Scale(factor) => factor,
            LatentChange::Clamp(a) | LatentChange::AtLeast(a) | LatentChange::ClampActive(a) => {
                a.value()
            }
        };
        finite(format!("latent {}", self.latent), strength.into())
    }
}

/// Edits, checked and made ready.
#[derive(Debug, Clone)]
pub(crate) struct LatentMap<'a> {
    reader: LatentReader<'a>,
    rule: Rule,
    remainder: Remainder,
    /// `[n_latents, d_in]`, where they do not depend on the activation.
    directions: Option<Tensor<2>>,
}

/// `z' = max(z · factor + shift, floor)`, all `[1, n_latents]`.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "one of them for a whole generation")]
enum Rule {
    /// `z' = shift`.
    Clamp(Tensor<2>),
    Any {
        factor: Tensor<2>,
        shift: Tensor<2>,
        floor: Tensor<2>,
        /// 1 where an inactive latent stays inactive.
        active_only: Option<Tensor<2>>,
    },
}

impl<'a> LatentMap<'a> {
    pub(crate) fn new(edits: LatentEdits<'a>) -> Result<Self, SteeringError> {
        let LatentEdits { sae, edits, remainder, reading } = edits;
        if sae.config().transcodes_to.is_some() {
            return Err(SteeringError::Transcoder);
        }
        let latents: Vec<usize> = edits.iter().map(|edit| edit.latent).collect();
        if remainder == Remainder::Drop && reading != Reading::Exact {
            return Err(SteeringError::NeedlessThreshold);
        }
        let reader = LatentReader::new(sae, &latents, reading)?;
        let rule = Rule::new(&edits, sae)?;
        let directions = (!sae.config().normalization.is_by_row()).then(|| {
            let rows = sae.directions();
            Tensor::cat(latents.iter().map(|&i| rows.clone().narrow(0, i, 1)).collect(), 0)
        });
        Ok(Self { reader, rule, remainder, directions })
    }

    pub(crate) fn width(&self) -> usize {
        self.reader.sae().config().d_in
    }

    /// `x': [n, d_in]`.
    pub(crate) fn apply(&self, x: Tensor<2>) -> Tensor<2> {
        match self.remainder {
            Remainder::Keep => {
                let delta = self.delta(self.reader.read(x.clone()), &x);
                x + delta
            }
            Remainder::Drop => {
                let (latents, decoded) = self.reader.sae().run(x.clone());
                decoded + self.delta(self.reader.among(&latents), &x)
            }
        }
    }

    /// What the change of the latents, `[n, n_latents]`, decodes to.
    fn delta(&self, current: Tensor<2>, x: &Tensor<2>) -> Tensor<2> {
        let difference = self.rule.apply(current.clone()) - current;
        match &self.directions {
            Some(directions) => difference.matmul(directions.clone()),
            None => self.decoded(difference, x),
        }
    }

    /// What latents decode to, in rows that are each normalised by themselves.
    fn decoded(&self, difference: Tensor<2>, x: &Tensor<2>) -> Tensor<2> {
        let sae = self.reader.sae();
        let [n, n_latents] = difference.dims();
        let latents: Vec<i64> = self.reader.latents().iter().map(|&i| i as i64).collect();
        let indices = TensorData::new(latents, [1, n_latents]);
        let indices = Tensor::<2, Int>::from_data(indices, &x.device());
        let sparse = |values: Tensor<2>| {
            SparseLatents::new(indices.clone().expand([n, n_latents]), values, sae.config().d_sae)
        };
        // Biases and shifts are in both, and leave.
        let nothing = sae.decode_for(&sparse(difference.zeros_like()), x.clone());
        sae.decode_for(&sparse(difference), x.clone()) - nothing
    }
}

impl Rule {
    fn new(edits: &[LatentEdit], sae: &Sae) -> Result<Self, SteeringError> {
        use LatentChange::{AtLeast, Clamp, ClampActive, Scale};
        let (device, shape) = (sae.weights().w_dec.device(), [1, edits.len()]);
        let strengths = edits.iter().map(LatentEdit::strength).collect::<Result<Vec<f32>, _>>()?;
        let row = |values: Vec<f32>| Tensor::from_data(TensorData::new(values, shape), &device);
        if edits.iter().all(|edit| matches!(edit.change, Clamp(_))) {
            return Ok(Self::Clamp(row(strengths)));
        }
        let each = |value: &dyn Fn(LatentChange, f32) -> f32| {
            row(edits.iter().zip(&strengths).map(|(edit, &s)| value(edit.change, s)).collect())
        };
        let is_active_only = |edit: &LatentEdit| matches!(edit.change, ClampActive(_));
        Ok(Self::Any {
            factor: each(&|change, s| match change {
                Clamp(_) | ClampActive(_) => 0.0,
                AtLeast(_) => 1.0,
                Scale(_) => s,
            }),
            shift: each(&|change, s| match change {
                Clamp(_) | ClampActive(_) => s,
                AtLeast(_) | Scale(_) => 0.0,
            }),
            floor: each(&|change, s| if matches!(change, AtLeast(_)) { s } else { f32::MIN }),
            active_only: edits
                .iter()
                .any(is_active_only)
                .then(|| each(&|change, _| f32::from(u8::from(matches!(change, ClampActive(_)))))),
        })
    }

    /// `z: [n, n_latents]`.
    fn apply(&self, z: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Clamp(values) => values.clone().expand(z.dims()),
            Self::Any { factor, shift, floor, active_only } => {
                let shape = z.dims();
                let changed = z.clone() * factor.clone() + shift.clone();
                let changed = changed.max_pair(floor.clone().expand(shape));
                let Some(active_only) = active_only else { return changed };
                let inactive = z.clone().equal_elem(0.0);
                let stays = active_only.clone().expand(shape).equal_elem(1.0).bool_and(inactive);
                changed.mask_where(stays, z)
            }
        }
    }
}
