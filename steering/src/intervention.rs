//! What steering does to the residual stream.

use burn::tensor::{Tensor, TensorData};
use model_hooks::{Hook, HookError, HookPoint, Positions, RowEdit};
use sae_core::Sae;

/// A change of the residual stream `x` at every steered position.
#[derive(Debug, Clone)]
pub enum Intervention<'a> {
    /// Sets latents to values, the error term kept: `x' = x + Σ (value − z) · W_dec[latent]`.
    Clamp {
        /// The autoencoder that the latents belong to.
        sae: &'a Sae,
        /// Latents with the values they are set to.
        values: Vec<(usize, f64)>,
    },
    /// `x' = x + direction`.
    Add {
        /// `[d_model]`.
        direction: Tensor<1>,
    },
    /// Projects a direction out: `x' = x − r̂ r̂ᵀ x`.
    Ablate {
        /// `[d_model]`, of any norm but zero.
        direction: Tensor<1>,
    },
}

/// An intervention at a hook point, from some absolute position of every conversation on.
#[derive(Debug, Clone)]
pub struct Steering<'a> {
    change: Change<'a>,
    rows: RowEdit,
}

/// An intervention, checked and made ready.
#[derive(Debug, Clone)]
enum Change<'a> {
    Clamp(Box<Clamp<'a>>),
    Add(Tensor<1>),
    /// A unit vector.
    Ablate(Tensor<1>),
}

#[derive(Debug, Clone)]
struct Clamp<'a> {
    sae: &'a Sae,
    latents: Vec<usize>,
    /// `[1, n_latents]`.
    values: Tensor<2>,
    /// `[n_latents, d_model]`.
    directions: Tensor<2>,
}

/// Why an intervention cannot be made.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SteeringError {
    /// A latent that the autoencoder does not have.
    #[error("latent {latent} is out of range: the autoencoder has {d_sae} latents")]
    NoSuchLatent {
        /// The latent asked for.
        latent: usize,
        /// Latents of the autoencoder.
        d_sae: usize,
    },
    /// A latent that is to be set to two values.
    #[error("latent {latent} is clamped twice")]
    DuplicateLatent {
        /// The latent.
        latent: usize,
    },
    /// A value that is not a number, or infinite.
    #[error("the strength of {name} is {value}: expected a finite number")]
    NotFinite {
        /// What it was to steer.
        name: String,
        /// The value.
        value: f64,
    },
    /// Nothing to steer by.
    #[error("{name} is zero or empty: there is nothing to steer by")]
    Nothing {
        /// What was empty.
        name: String,
    },
}

impl<'a> Steering<'a> {
    /// Steers at `point` from position `from_position` on. Autoencoders trained without position 0
    /// should leave it alone: its activation is unlike all others.
    ///
    /// # Errors
    /// If a latent is out of range or given twice, a value is not finite, or a direction is zero.
    pub fn new(
        point: HookPoint,
        intervention: Intervention<'a>,
        from_position: usize,
    ) -> Result<Self, SteeringError> {
        let change = Change::new(intervention)?;
        let rows = RowEdit::new(point, change.width(), from_position);
        Ok(Self { change, rows })
    }
}

impl<'a> Change<'a> {
    fn new(intervention: Intervention<'a>) -> Result<Self, SteeringError> {
        match intervention {
            Intervention::Clamp { sae, values } => {
                Ok(Self::Clamp(Box::new(Clamp::new(sae, &values)?)))
            }
            Intervention::Add { direction } => {
                finite_norm("the direction", &direction)?;
                Ok(Self::Add(direction))
            }
            Intervention::Ablate { direction } => {
                let norm = finite_norm("the direction", &direction)?;
                if norm == 0.0 {
                    return Err(SteeringError::Nothing { name: "the direction".into() });
                }
                Ok(Self::Ablate(direction / norm))
            }
        }
    }

    /// The width of the activations that it works on.
    fn width(&self) -> usize {
        match self {
            Self::Clamp(clamp) => clamp.sae.config().d_in,
            Self::Add(direction) | Self::Ablate(direction) => direction.dims()[0],
        }
    }

    /// What is added to `x: [n, d_model]`, broadcast over rows where it is the same for all.
    fn delta(&self, x: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Clamp(clamp) => clamp.delta(x),
            Self::Add(direction) => direction.clone().unsqueeze(),
            Self::Ablate(unit) => {
                let [_, d_model] = x.dims();
                let column = unit.clone().reshape([d_model, 1]);
                -x.matmul(column.clone()).matmul(column.transpose())
            }
        }
    }
}

impl<'a> Clamp<'a> {
    fn new(sae: &'a Sae, values: &[(usize, f64)]) -> Result<Self, SteeringError> {
        if values.is_empty() {
            return Err(SteeringError::Nothing { name: "the list of latents".into() });
        }
        let d_sae = sae.config().d_sae;
        for (i, &(latent, value)) in values.iter().enumerate() {
            if latent >= d_sae {
                return Err(SteeringError::NoSuchLatent { latent, d_sae });
            }
            if values[..i].iter().any(|&(other, _)| other == latent) {
                return Err(SteeringError::DuplicateLatent { latent });
            }
            if !(value as f32).is_finite() {
                return Err(SteeringError::NotFinite { name: format!("latent {latent}"), value });
            }
        }
        let rows = sae.directions();
        let directions = values.iter().map(|&(latent, _)| rows.clone().narrow(0, latent, 1));
        let targets: Vec<f32> = values.iter().map(|&(_, value)| value as f32).collect();
        Ok(Self {
            sae,
            latents: values.iter().map(|&(latent, _)| latent).collect(),
            values: Tensor::from_data(TensorData::new(targets, [1, values.len()]), &rows.device()),
            directions: Tensor::cat(directions.collect(), 0),
        })
    }

    /// `Σ (value − z) · W_dec[latent]`.
    fn delta(&self, x: Tensor<2>) -> Tensor<2> {
        let encoded = self.sae.encode(x);
        let n = encoded.n_rows();
        let current = self.latents.iter().map(|&latent| encoded.latent(latent).reshape([n, 1]));
        let current = Tensor::cat(current.collect(), 1);
        (self.values.clone() - current).matmul(self.directions.clone())
    }
}

fn finite_norm(name: &str, direction: &Tensor<1>) -> Result<f64, SteeringError> {
    let value = crate::norm(direction);
    if value.is_finite() {
        Ok(value)
    } else {
        Err(SteeringError::NotFinite { name: name.to_owned(), value })
    }
}

impl Hook for Steering<'_> {
    fn wants(&self, point: HookPoint) -> bool {
        self.rows.wants(point)
    }

    fn at<const D: usize>(
        &mut self,
        _: HookPoint,
        x: Tensor<D>,
        positions: &Positions,
    ) -> Tensor<D> {
        let Self { change, rows } = self;
        rows.apply(x, positions, |x| x.clone() + change.delta(x))
    }

    fn finish(&mut self) -> Result<(), HookError> {
        self.rows.finish()
    }
}
