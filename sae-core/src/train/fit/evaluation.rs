//! How good the SAEs are on activations that they are not trained on.

use burn::tensor::{Tensor, TensorData};
use serde::Serialize;

use super::{FitError, Member, Outliers};
use crate::metrics::Reconstruction;
use crate::source::{ActivationSource, Position, Rows};

/// How good an SAE is after some steps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct HeldOutFigures {
    /// Which run.
    pub run_idx: usize,
    /// Steps done.
    pub step: usize,
    /// Activations that this is over.
    pub n_rows: usize,
    /// Activations that are left out for their norm, as in training.
    pub n_left_out: u64,
    /// `mean ‖x̂ − x‖²`, in the scale that training has its loss in.
    pub loss: f64,
    /// Fraction of variance unexplained, see [`Reconstruction::fvu`].
    pub fvu: f64,
    /// Latents above zero per activation.
    pub l0: f64,
    /// The share of latents that are active on none of the activations.
    pub dead_share: f64,
}

/// A stream to evaluate on, always from the same place.
pub(super) struct HeldOut<'a> {
    source: &'a mut dyn ActivationSource,
    start: Position,
}

impl<'a> HeldOut<'a> {
    pub(super) fn new(source: &'a mut dyn ActivationSource) -> Self {
        Self { start: source.position(), source }
    }

    pub(super) fn evaluate(
        &mut self,
        members: &[Member],
        step: usize,
        n_rows: usize,
        outliers: Option<&Outliers>,
    ) -> Result<Vec<HeldOutFigures>, FitError> {
        let mut outliers = outliers.map(Outliers::uncounted);
        self.source.seek(&self.start)?;
        let columns = self.source.columns().to_vec();
        let mut parts = Vec::new();
        for member in members {
            let columns = member.run.columns(&*self.source)?;
            let sae = member.trainer.sae();
            let metrics = Reconstruction::new(sae.config().d_sae);
            parts.push((columns, sae, metrics));
        }
        let batch = members[0].run.config.batch;
        let device = members[0].trainer.state().parameters.w_dec().device();
        let mut rows = Rows::empty(&columns);
        let mut n_left = n_rows;
        while n_left > 0 {
            rows.clear();
            let n = self.source.read(batch.min(n_left), &mut rows)?;
            if n == 0 {
                break;
            }
            n_left -= n;
            if let Some(outliers) = &mut outliers {
                outliers.leave_out(&mut rows, 0);
            }
            let n = rows.n_rows();
            if n == 0 {
                continue;
            }
            for (columns, sae, metrics) in &mut parts {
                let tensor = |column: usize| {
                    let values = rows.column(column).to_vec();
                    let data = TensorData::new(values, [n, rows.width(column)]);
                    Tensor::<2>::from_data(data, &device)
                };
                let x = tensor(columns.read);
                let target = columns.reconstructed.map_or_else(|| x.clone(), tensor);
                let (latents, reconstruction) = sae.run(x);
                metrics.update(target, reconstruction, &latents);
            }
        }
        let evaluations = parts.iter().zip(members).enumerate();
        Ok(evaluations
            .map(|(run_idx, ((_, sae, metrics), member))| HeldOutFigures {
                run_idx,
                step,
                n_rows: metrics.n_rows(),
                n_left_out: outliers.as_ref().map_or(0, |outliers| outliers.n_left_out),
                loss: metrics.mse() * member.trainer.state().input_scale.powi(2),
                fvu: metrics.fvu(),
                l0: metrics.l0(),
                dead_share: metrics.n_dead() as f64 / sae.config().d_sae as f64,
            })
            .collect())
    }
}
