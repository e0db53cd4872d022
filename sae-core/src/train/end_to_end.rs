//! Training on what a language model makes of the reconstruction.

use burn::tensor::activation::log_softmax;
use burn::tensor::{Int, Tensor, TensorData};
use model_hooks::{
    ForwardError, Hook, HookError, HookPoint, LanguageModel, Positions, RowEdit, TokenBatch,
};

use super::config::TrainConfig;
use super::error::TrainError;
use super::objective::{Batch, Differentiated, Kind, Objective, Upstream};
use super::parameters::Parameters;
use super::state::{StepOutcome, TrainState};

/// The divergence of a model's predictions, with the reconstruction in place of an activation, from
/// its own (Braun et al., 2024), beside or instead of the error of the reconstruction:
///
/// ```text
/// loss = kl_weight · mean KL(clean ‖ spliced) + error_weight · mean ‖e‖² + what the kind adds
/// ```
///
/// The mean is over every token from `from_position` of its text on; padding has no part in it. A
/// step is a pass of the model, and another one from the activation on and back.
///
/// ```no_run
/// # use model_hooks::{HookPoint, LanguageModel, TokenBatch};
/// # use sae_core::train::{EndToEnd, EndToEndError, TrainConfig, TrainState};
/// # fn f(model: &LanguageModel, tokens: &TokenBatch, config: &TrainConfig, mut state: TrainState)
/// # -> Result<(), EndToEndError> {
/// let end_to_end = EndToEnd::new(model, HookPoint::resid_post(15), config)?.from_position(1);
/// let outcome = end_to_end.step(&mut state, config, tokens, 1000)?;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy)]
pub struct EndToEnd<'a> {
    model: &'a LanguageModel,
    point: HookPoint,
    from_position: usize,
    kl_weight: f64,
    error_weight: f64,
}

/// Why a step against a model's predictions cannot be made.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum EndToEndError {
    /// The SAE cannot be trained like this, or not on this activation.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// The pass through the model failed.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// All tokens are padding, or stand before the first position.
    #[error("no token stands at position {from_position} of its text or behind it")]
    NoTokens {
        /// The first position.
        from_position: usize,
    },
}

/// What the model does by itself.
struct Clean<'a> {
    tokens: &'a TokenBatch,
    /// The activation at the tokens that count, `[n, d_in]`.
    x: Tensor<2>,
    /// For every token in turn, its row in `x`, or any where it does not count.
    rows: Tensor<1, Int>,
    /// `[batch, pos, 1]`; 1 for the tokens that count.
    counts: Tensor<3>,
    log_probs: Tensor<3>,
}

impl<'a> EndToEnd<'a> {
    /// Of the divergence alone, at all positions.
    ///
    /// # Errors
    /// If the model has no such point, or the SAE writes another activation than it reads or has no
    /// encoder.
    pub fn new(
        model: &'a LanguageModel,
        point: HookPoint,
        config: &TrainConfig,
    ) -> Result<Self, EndToEndError> {
        model.check_point(point).map_err(ForwardError::from)?;
        let conflict = |with| Err(TrainError::Conflict { option: "end-to-end training", with });
        if config.transcoder.is_some() {
            conflict("a transcoder")?;
        }
        if matches!(config.objective.kind, Kind::MatchingPursuit(_)) {
            conflict("matching pursuit")?;
        }
        Ok(Self { model, point, from_position: 0, kl_weight: 1.0, error_weight: 0.0 })
    }

    /// Leaves the positions of each text alone that come before this one.
    #[must_use]
    pub fn from_position(mut self, position: usize) -> Self {
        self.from_position = position;
        self
    }

    /// What the divergence counts, and what the error of the reconstruction counts beside it.
    #[must_use]
    pub fn weighing(mut self, kl_weight: f64, error_weight: f64) -> Self {
        (self.kl_weight, self.error_weight) = (kl_weight, error_weight);
        self
    }

    /// One step on the tokens of some texts, out of `n_steps`.
    ///
    /// # Errors
    /// If the model's pass fails, no token counts, or the activation has another width than the
    /// SAE. No step was taken.
    ///
    /// # Panics
    /// As [`TrainState::step`].
    pub fn step(
        &self,
        state: &mut TrainState,
        config: &TrainConfig,
        tokens: &TokenBatch,
        n_steps: usize,
    ) -> Result<StepOutcome, EndToEndError> {
        let clean = self.clean(tokens, state.parameters.d_in())?;
        let scale = state.input_scale;
        let batch = Batch::from(clean.x.clone().mul_scalar(scale));
        state.step_with(batch, config, n_steps, |reconstruction| {
            self.upstream(&clean, reconstruction, scale)
        })
    }

    /// The loss and its gradient on the tokens of some texts, for inputs times `input_scale`.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    ///
    /// # Panics
    /// As [`Objective::differentiate`].
    pub fn differentiate(
        &self,
        objective: &Objective,
        parameters: &Parameters,
        input_scale: f64,
        tokens: &TokenBatch,
        dead: &[u32],
    ) -> Result<Differentiated, EndToEndError> {
        let clean = self.clean(tokens, parameters.d_in())?;
        let batch = Batch::from(clean.x.clone().mul_scalar(input_scale));
        objective.differentiate_with(parameters, &batch, dead, |reconstruction| {
            self.upstream(&clean, reconstruction, input_scale)
        })
    }

    fn clean<'t>(&self, tokens: &'t TokenBatch, d_in: usize) -> Result<Clean<'t>, EndToEndError> {
        let &Self { point, from_position, .. } = self;
        let [batch, n] = tokens.dims();
        let positions = tokens.positions(0);
        let (mut places, mut rows) = (Vec::new(), Vec::with_capacity(batch * n));
        for row in 0..batch {
            for column in 0..n {
                let counts = positions.get(row, column).is_some_and(|at| at >= from_position);
                rows.push(if counts { places.len() as i32 } else { 0 });
                if counts {
                    places.push((row * n + column) as i32);
                }
            }
        }
        if places.is_empty() {
            return Err(EndToEndError::NoTokens { from_position });
        }
        let mut read = Read { rows: RowEdit::new(point, d_in, 0), x: None };
        let logits = self.model.logits(tokens, &mut read)?;
        let device = logits.device();
        let x = read.x.expect("the hook has fired");
        let n_places = places.len();
        let places = Tensor::from_data(TensorData::new(places, [n_places]), &device);
        Ok(Clean {
            tokens,
            x: x.select(0, places),
            rows: Tensor::from_data(TensorData::new(rows, [batch * n]), &device),
            counts: positions.mask_from(from_position, &device),
            log_probs: log_softmax(logits, 2),
        })
    }

    /// What a reconstruction, times `scale`, does to the predictions.
    fn upstream(
        &self,
        clean: &Clean,
        reconstruction: Tensor<2>,
        scale: f64,
    ) -> Result<Upstream, EndToEndError> {
        let [n, width] = reconstruction.dims();
        let leaf = reconstruction.div_scalar(scale).autodiff().require_grad();
        let rows = RowEdit::new(self.point, width, self.from_position);
        let mut write = Write { rows, by: leaf.clone().select(0, clean.rows.clone()) };
        let logits = self.model.logits(clean.tokens, &mut write)?;
        let own = clean.log_probs.clone().autodiff();
        let log_ratio = own.clone() - log_softmax(logits, 2);
        let divergences = (own.exp() * log_ratio).sum_dim(2) * clean.counts.clone().autodiff();
        let loss = divergences.sum().mul_scalar(self.kl_weight / n as f64);
        let value = f64::from(loss.clone().inner().into_scalar::<f32>());
        let gradient = leaf.grad(&loss.backward());
        let gradient = gradient.unwrap_or_else(|| leaf.inner().zeros_like());
        Ok(Upstream {
            loss: value,
            // Of what is a scaled reconstruction to the SAE.
            gradient: gradient.div_scalar(scale),
            error_weight: self.error_weight,
        })
    }
}

/// Takes the rows at a point.
struct Read {
    rows: RowEdit,
    x: Option<Tensor<2>>,
}

/// Puts other rows in place of those at a point.
struct Write {
    rows: RowEdit,
    by: Tensor<2>,
}

impl Hook for Read {
    fn wants(&self, point: HookPoint) -> bool {
        self.rows.wants(point)
    }

    fn at<const D: usize>(
        &mut self,
        _: HookPoint,
        x: Tensor<D>,
        positions: &Positions,
    ) -> Tensor<D> {
        self.rows.apply(x, positions, |x| {
            self.x = Some(x.clone());
            x
        })
    }

    fn finish(&mut self) -> Result<(), HookError> {
        self.rows.finish()
    }
}

impl Hook for Write {
    fn wants(&self, point: HookPoint) -> bool {
        self.rows.wants(point)
    }

    fn at<const D: usize>(
        &mut self,
        _: HookPoint,
        x: Tensor<D>,
        positions: &Positions,
    ) -> Tensor<D> {
        self.rows.apply(x.autodiff(), positions, |_| self.by.clone())
    }

    fn finish(&mut self) -> Result<(), HookError> {
        self.rows.finish()
    }
}
