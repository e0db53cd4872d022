//! A few latents, read without the others.

use burn::tensor::activation::relu;
use burn::tensor::{Int, Tensor, TensorData};
use sae_core::{Activation, Sae, SparseLatents};
use serde::{Deserialize, Serialize};

use crate::error::{SteeringError, finite};

/// How latents whose neighbours decide about them are read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reading {
    /// As the autoencoder says. A ReLU, JumpReLU or gated latent takes one column of its encoder;
    /// where latents are ranked against each other, all of it.
    #[default]
    Exact,
    /// A TopK latent as if it were a JumpReLU one with this threshold, by one column of the
    /// encoder: an approximation, whose threshold [`running_threshold`] measures. In the units in
    /// which the latents are ranked.
    Threshold(f32),
}

/// Reads some latents of an autoencoder, by no more of its encoder than they need.
#[derive(Debug, Clone)]
pub struct LatentReader<'a> {
    sae: &'a Sae,
    latents: Vec<usize>,
    columns: Option<Columns>,
}

/// Latents that do not depend on others.
#[derive(Debug, Clone)]
struct Columns {
    /// `[d_in, n_latents]`.
    w_enc: Tensor<2>,
    /// Pre-activations of zeros, `[1, n_latents]`.
    bias: Tensor<2>,
    gate: Gate,
}

#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "one of them for a whole generation")]
enum Gate {
    Relu,
    /// Thresholds, `[1, n_latents]`.
    Jump(Tensor<2>),
    /// All `[1, n_latents]`.
    Gated {
        b_enc: Tensor<2>,
        scale: Tensor<2>,
        b_mag: Tensor<2>,
    },
}

impl<'a> LatentReader<'a> {
    /// Of these latents, in this order.
    ///
    /// # Errors
    /// If there are none, one is out of range or given twice, or there is to be a threshold for
    /// other than TopK latents, or one that is not finite.
    pub fn new(sae: &'a Sae, latents: &[usize], reading: Reading) -> Result<Self, SteeringError> {
        if latents.is_empty() {
            return Err(SteeringError::Nothing { name: "the list of latents".into() });
        }
        let d_sae = sae.config().d_sae;
        for (i, &latent) in latents.iter().enumerate() {
            if latent >= d_sae {
                return Err(SteeringError::NoSuchLatent { latent, d_sae });
            }
            if latents[..i].contains(&latent) {
                return Err(SteeringError::DuplicateLatent { latent });
            }
        }
        let columns = Columns::new(sae, latents, reading)?;
        Ok(Self { sae, latents: latents.to_vec(), columns })
    }

    /// The autoencoder.
    pub fn sae(&self) -> &'a Sae {
        self.sae
    }

    /// The latents read.
    pub fn latents(&self) -> &[usize] {
        &self.latents
    }

    /// Whether it takes only the latents' own columns of the encoder.
    pub fn is_by_column(&self) -> bool {
        self.columns.is_some()
    }

    /// The values of the latents, zero where they are inactive.
    ///
    /// # Shapes
    /// `x`: `[n, d_in]`; result: `[n, n_latents]`.
    ///
    /// # Panics
    /// If `x` is not `d_in` wide.
    pub fn read(&self, x: Tensor<2>) -> Tensor<2> {
        if let Some(columns) = &self.columns {
            return columns.read(x);
        }
        self.among(&self.sae.encode(x))
    }

    /// The same, of rows that are encoded.
    pub(crate) fn among(&self, encoded: &SparseLatents) -> Tensor<2> {
        let n = encoded.n_rows();
        let values = self.latents.iter().map(|&latent| encoded.latent(latent).reshape([n, 1]));
        Tensor::cat(values.collect(), 1)
    }
}

impl Columns {
    /// `None` where the latents depend on others.
    fn new(sae: &Sae, latents: &[usize], reading: Reading) -> Result<Option<Self>, SteeringError> {
        let (config, weights) = (sae.config(), sae.weights());
        let n = latents.len();
        let picked = TensorData::new(latents.iter().map(|&i| i as i64).collect(), [n]);
        let picked = Tensor::<1, Int>::from_data(picked, &weights.w_enc.device());
        let row = |values: &Tensor<1>| values.clone().select(0, picked.clone()).reshape([1, n]);
        let mut w_enc = weights.w_enc.clone().select(1, picked.clone());
        let mut b_enc = row(&weights.b_enc);
        let gate = match (config.activation, reading) {
            (Activation::TopK { rescale_by_decoder_norm, .. }, Reading::Threshold(threshold)) => {
                let threshold = finite("the threshold", threshold.into())?;
                if rescale_by_decoder_norm {
                    let norms = row(&sae.decoder_norms());
                    (w_enc, b_enc) = (w_enc * norms.clone(), b_enc * norms);
                }
                Gate::Jump(b_enc.full_like(threshold))
            }
            (activation, Reading::Threshold(_)) => {
                return Err(SteeringError::NoThreshold { activation: format!("{activation:?}") });
            }
            // What the rows are divided by is found from all of them, which the encoder does.
            _ if config.normalization.is_by_row() => return Ok(None),
            (Activation::Relu, _) => Gate::Relu,
            (Activation::JumpRelu, _) => {
                Gate::Jump(row(weights.threshold.as_ref().expect("checked when made")))
            }
            (Activation::Gated, _) => {
                let magnitude = weights.magnitude.as_ref().expect("checked when made");
                let (scale, b_mag) = (row(&magnitude.r_mag).exp(), row(&magnitude.b_mag));
                Gate::Gated { b_enc: b_enc.clone(), scale, b_mag }
            }
            _ => return Ok(None),
        };
        if config.normalization.is_by_row() {
            return Err(SteeringError::NoThreshold {
                activation: format!("latents behind {:?}", config.normalization),
            });
        }
        let bias = match config.apply_b_dec_to_input {
            true => b_enc - weights.b_dec.clone().unsqueeze::<2>().matmul(w_enc.clone()),
            false => b_enc,
        };
        Ok(Some(Self { w_enc, bias, gate }))
    }

    fn read(&self, x: Tensor<2>) -> Tensor<2> {
        let pre = x.matmul(self.w_enc.clone()) + self.bias.clone();
        match &self.gate {
            Gate::Relu => relu(pre),
            Gate::Jump(threshold) => {
                let [n, n_latents] = pre.dims();
                let below = pre.clone().lower_equal(threshold.clone().expand([n, n_latents]));
                relu(pre.mask_fill(below, 0.0))
            }
            Gate::Gated { b_enc, scale, b_mag } => {
                let closed = pre.clone().lower_equal_elem(0.0);
                let size = (pre - b_enc.clone()) * scale.clone() + b_mag.clone();
                relu(size).mask_fill(closed, 0.0)
            }
        }
    }
}

/// The mean, over activations, of the least latent that a TopK autoencoder keeps: the threshold
/// that [`Reading::Threshold`] puts in place of the selection.
///
/// # Shapes
/// `x`: `[n, d_in]`.
///
/// # Errors
/// If the latents are not TopK, or none is active on any row.
pub fn running_threshold(sae: &Sae, x: Tensor<2>) -> Result<f32, SteeringError> {
    let activation = sae.config().activation;
    if !matches!(activation, Activation::TopK { .. }) {
        return Err(SteeringError::NoThreshold { activation: format!("{activation:?}") });
    }
    let latents = sae.encode(x);
    let mut least = vec![f32::INFINITY; latents.n_rows()];
    for entry in latents.entries() {
        least[entry.row] = least[entry.row].min(entry.value);
    }
    let least: Vec<f64> = least.into_iter().filter(|l| l.is_finite()).map(f64::from).collect();
    if least.is_empty() {
        return Err(SteeringError::Nothing { name: "every latent".into() });
    }
    finite("the threshold", least.iter().sum::<f64>() / least.len() as f64)
}
