//! Measured effects: many interventions in one pass.

use burn::tensor::{Int, Tensor, TensorData};
use kernels::sparse_decode;
use model_hooks::{Activation, HookPoint};

use crate::activations::position_axis;
use crate::baseline::Baseline;
use crate::effect::Effect;
use crate::error::AttributionError;
use crate::metric::Metric;
use crate::shift::Shift;
use crate::site::{Changes, SaeMeans, SaeSite, joined_rows};
use crate::study::{Study, of_rows};

/// Some latents of one conversation, changed at all its positions at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// Index of the conversation.
    pub conversation: usize,
    /// Which of the SAE's latents and error.
    pub what: CutOf,
}

/// What a cut changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CutOf {
    /// Some latents, the error kept.
    Latents(Vec<usize>),
    /// All latents, the error kept.
    AllLatents,
    /// The error, the latents kept.
    Error,
    /// All latents and the error.
    Everything,
}

impl Cut {
    /// One latent.
    pub fn latent(conversation: usize, latent_idx: usize) -> Self {
        Self { conversation, what: CutOf::Latents(vec![latent_idx]) }
    }

    /// Some latents.
    pub fn latents(conversation: usize, latents: Vec<usize>) -> Self {
        Self { conversation, what: CutOf::Latents(latents) }
    }
}

/// An activation of one conversation, or a part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patch {
    /// Index of the conversation.
    pub conversation: usize,
    /// One position, or all of them.
    pub position: Option<usize>,
    /// One head, or all of them: at points that have heads.
    pub head: Option<usize>,
}

impl<M: Metric> Study<'_, M> {
    /// The effects of changing latents of an SAE, measured one by one: the model is run with each
    /// change, many of them in a pass, one to a row.
    ///
    /// # Errors
    /// If the SAE does not fit its point, or a pass fails.
    ///
    /// # Panics
    /// If a conversation or a latent is not there.
    pub fn measure_cuts(
        &self,
        site: &SaeSite<'_>,
        baseline: Baseline<'_, SaeMeans>,
        cuts: &[Cut],
    ) -> Result<Vec<Effect>, AttributionError> {
        site.check(self)?;
        let x = joined_rows(self.captured(site.point)?);
        let changes = Changes::new(self, site, baseline, x)?;
        let clean = self.clean()?;
        let changes = CutChanges::new(changes, clean.len());
        let rows: Vec<usize> = cuts.iter().map(|cut| cut.conversation).collect();
        let metrics = self.in_batches(&rows, |first, rows| {
            let n = rows.iter().map(|&row| self.own(row).len()).max().unwrap_or(0);
            let shift = changes.shift(&cuts[first..first + rows.len()], n);
            self.measure(rows, &mut Shift::new(site.point, Activation::new(shift)))
        })?;
        let effects = metrics.iter().zip(&rows);
        Ok(effects.map(|(&metric, &row)| Effect::between(metric, clean[row])).collect())
    }

    /// The effects of putting activations of another run into this one (activation patching; Meng et
    /// al., 2022), measured one by one.
    ///
    /// # Errors
    /// If the model does not have the point, it has no row for every position, or a pass fails.
    ///
    /// # Panics
    /// If a conversation, a position or a head is not there.
    pub fn measure_patches(
        &self,
        point: HookPoint,
        baseline: Baseline<'_, Tensor<1>>,
        patches: &[Patch],
    ) -> Result<Vec<Effect>, AttributionError> {
        if position_axis(point) != 1 {
            return Err(AttributionError::NotByPosition { point });
        }
        let deltas = self.activation_deltas(point, baseline)?;
        let clean = self.clean()?;
        let rows: Vec<usize> = patches.iter().map(|patch| patch.conversation).collect();
        let metrics = self.in_batches(&rows, |first, rows| {
            let tokens = self.tokens(rows)?;
            let n = tokens.dims()[1];
            let [_, _, heads, width] = deltas.dims();
            let mut mask = vec![0f32; rows.len() * n * heads];
            for (cell, patch) in patches[first..first + rows.len()].iter().enumerate() {
                let padding = n - self.own(patch.conversation).len();
                let columns = match patch.position {
                    Some(position) => {
                        let own = position.checked_sub(self.n_prefix());
                        let column = padding + own.expect("a position behind the shared prefix");
                        column..column + 1
                    }
                    None => padding..n,
                };
                for column in columns {
                    let of_heads = patch.head.map_or(0..heads, |head| head..head + 1);
                    of_heads.for_each(|head| mask[(cell * n + column) * heads + head] = 1.0);
                }
            }
            let mask = TensorData::new(mask, [rows.len(), n, heads, 1]);
            let mask = Tensor::<4>::from_data(mask, &deltas.device());
            let shift = of_rows(&deltas, rows, n) * mask;
            let shape = [rows.len(), n, heads * width];
            self.measure(rows, &mut Shift::new(point, Activation::new(shift.reshape(shape))))
        })?;
        let effects = metrics.iter().zip(&rows);
        Ok(effects.map(|(&metric, &row)| Effect::between(metric, clean[row])).collect())
    }
}

/// What a baseline changes at a site, ready to be taken apart.
struct CutChanges {
    /// Which latents, as the deltas lie.
    latents: Vec<i64>,
    /// `[batch, pos, k]`.
    deltas: Tensor<3>,
    /// `[batch, pos, d_in]`.
    error_deltas: Tensor<3>,
    /// `[d_sae, d_in]`.
    directions: Tensor<2>,
}

impl CutChanges {
    fn new(changes: Changes, n_conversations: usize) -> Self {
        let Changes { indices, deltas, error_deltas, directions } = changes;
        let ([n, k], [_, d_in]) = (indices.dims(), error_deltas.dims());
        let pos = n / n_conversations;
        let latents = indices.to_data().iter::<i64>().collect();
        Self {
            latents,
            deltas: deltas.reshape([n_conversations, pos, k]),
            error_deltas: error_deltas.reshape([n_conversations, pos, d_in]),
            directions,
        }
    }

    /// What some cuts add to the activation, the conversations padded to `n` columns.
    ///
    /// # Shapes
    /// `[cuts, n, d_in]`.
    fn shift(&self, cuts: &[Cut], n: usize) -> Tensor<3> {
        let ([_, pos, k], [d_sae, d_in]) = (self.deltas.dims(), self.directions.dims());
        let mut indices = Vec::with_capacity(cuts.len() * n * k);
        let mut of_latents = Vec::with_capacity(cuts.len() * n * k);
        let mut of_error = Vec::with_capacity(cuts.len());
        for cut in cuts {
            let (end, of_row) = (cut.conversation + 1, pos * k);
            let latents = &self.latents[end * of_row - n * k..end * of_row];
            indices.extend_from_slice(latents);
            let all = |share: f32| std::iter::repeat_n(share, n * k);
            match &cut.what {
                CutOf::Latents(some) => {
                    assert!(some.iter().all(|&l| l < d_sae), "{some:?} are not all below {d_sae}");
                    let mut some = some.clone();
                    some.sort_unstable();
                    let is_cut = |&l: &i64| some.binary_search(&(l as usize)).is_ok();
                    of_latents.extend(latents.iter().map(|latent| f32::from(is_cut(latent))));
                }
                CutOf::AllLatents | CutOf::Everything => of_latents.extend(all(1.0)),
                CutOf::Error => of_latents.extend(all(0.0)),
            }
            of_error.push(f32::from(matches!(cut.what, CutOf::Error | CutOf::Everything)));
        }
        let rows: Vec<usize> = cuts.iter().map(|cut| cut.conversation).collect();
        let n_rows = cuts.len() * n;
        let mask = TensorData::new(of_latents, [n_rows, k]);
        let mask = Tensor::<2>::from_data(mask, &self.deltas.device());
        let values = of_rows(&self.deltas, &rows, n).reshape([n_rows, k]) * mask;
        let indices = TensorData::new(indices, [n_rows, k]);
        let indices = Tensor::<2, Int>::from_data(indices, &self.deltas.device());
        let shift = sparse_decode(indices, values, self.directions.clone());
        let shift = shift.reshape([cuts.len(), n, d_in]);
        if of_error.iter().all(|&share| share == 0.0) {
            return shift;
        }
        let share = TensorData::new(of_error, [cuts.len(), 1, 1]);
        let share = Tensor::<3>::from_data(share, &self.deltas.device());
        shift + of_rows(&self.error_deltas, &rows, n) * share
    }
}
