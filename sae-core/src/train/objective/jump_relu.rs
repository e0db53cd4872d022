//! Thresholds that are trained.

use burn::tensor::{Bool, Tensor};
use kernels::Select;
use serde::{Deserialize, Serialize};

use super::aux_k::latents as latents_tensor;
use super::pass::{Entries, Pass, globally, number};
use super::{Term, check, not_negative, positive};
use crate::train::error::TrainError;
use crate::train::parameters::ParameterName;

/// `z = p` where `p > θ`; the loss counts latents.
///
/// Neither is differentiable in `θ`. The gradients there are those of straight-through estimators
/// with a rectangle of width `ε`: where `|p − θ| < ε/2`,
///
/// ```text
/// ∂z/∂θ := −θ/ε        ∂[p > θ]/∂θ := −1/ε
/// ```
///
/// and zero elsewhere, for entries on either side of the threshold.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JumpRelu {
    /// `ε`.
    pub bandwidth: f64,
    /// Where thresholds start.
    pub initial_threshold: f64,
    /// What of a threshold is trained.
    pub threshold: ThresholdParameter,
    /// The weight of the count.
    pub l0_coefficient: f64,
    /// What is made of the count.
    pub l0: L0Loss,
    /// Where the straight-through gradients go.
    pub straight_through: StraightThrough,
    /// The weight of `mean Σ relu(θ − p) · ‖w_dec[i]‖` over dead latents, if it is wanted.
    pub pre_activation: Option<f64>,
}

/// What of a threshold is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ThresholdParameter {
    /// The threshold, kept from falling below zero (SAELens, dictionary_learning).
    Itself,
    /// Its logarithm (the paper).
    Logarithm,
}

impl ThresholdParameter {
    /// The parameter that is trained.
    pub(in crate::train) fn name(self) -> ParameterName {
        match self {
            Self::Itself => ParameterName::Threshold,
            Self::Logarithm => ParameterName::LogThreshold,
        }
    }
}

/// What is made of the number of latents.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum L0Loss {
    /// `mean L0` (the paper).
    Step,
    /// `mean Σ tanh(scale · z · ‖w_dec[i]‖)` (Anthropic).
    Tanh {
        /// How soon it saturates.
        scale: f64,
    },
    /// `mean (L0 − target)² · 2 / target`, row by row (Gemma Scope 2, SAELens' `quadratic`).
    Quadratic {
        /// Latents per row.
        target: f64,
    },
    /// `(mean L0 / target − 1)²`, over the batch (dictionary_learning). Its estimator looks at `z`
    /// in place of `p`: all latents that are off count as `z = 0`, close to every threshold below
    /// `ε/2`, and it never reaches the input.
    BatchQuadratic {
        /// Latents per row.
        target: f64,
    },
}

/// Where straight-through gradients go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StraightThrough {
    /// To the threshold alone (the paper).
    Threshold,
    /// With the opposite sign to `p` as well, and so to the encoder (Anthropic, SAELens'
    /// `jumprelu_ste_to_input`).
    ThresholdAndInput,
}

/// What the count adds to the gradient.
struct CountGradient {
    /// At the latents.
    latents: Option<Tensor<2>>,
    /// At `[p > θ]`, `[n, 1]`.
    open: Option<Tensor<2>>,
}

impl JumpRelu {
    /// SAELens' defaults.
    pub fn new(l0_coefficient: f64) -> Self {
        Self {
            bandwidth: 0.05,
            initial_threshold: 0.01,
            threshold: ThresholdParameter::Itself,
            l0_coefficient,
            l0: L0Loss::Step,
            straight_through: StraightThrough::Threshold,
            pre_activation: None,
        }
    }

    /// Where the parameter that is trained starts.
    pub(in crate::train) fn start(&self) -> f64 {
        match self.threshold {
            ThresholdParameter::Itself => self.initial_threshold,
            ThresholdParameter::Logarithm => self.initial_threshold.ln(),
        }
    }

    pub(super) fn run(&self, pass: &mut Pass, dead: &[u32]) -> (Entries, Tensor<1>) {
        let threshold = pass.parameters.threshold().expect("a JumpReLU has a threshold");
        // Entries just below their thresholds take part in the estimators. What the kernel looks at
        // is `p + ε/2 > θ`: unlike `θ − ε/2`, neither side is cut off at zero.
        let half = self.bandwidth / 2.0;
        let near = pass.encode(threshold.clone(), Select::Above, half);
        let fills_up = near.values.clone().lower_equal_elem(0.0);
        let p = near.values.clone().sub_scalar(half);
        let thresholds = near.gather(threshold.clone());
        let above = p.clone().greater(thresholds.clone()).bool_and(fills_up.clone().bool_not());
        let below = above.clone().bool_not();
        let beside = (p.clone() - thresholds.clone()).abs().greater_equal_elem(half);
        let beside = beside.bool_or(fills_up);
        let latents = near.with(p.mask_fill(below.clone(), 0.0));

        let (by_latent, _, row_errors) = pass.reconstruct(Term::Reconstruction, &latents, 1.0);
        let count = self.count(pass, &latents, above.clone().float());
        let by_latent = match count.latents {
            Some(more) => by_latent + more,
            None => by_latent,
        };
        // −1 times the estimators' gradient at θ, which is that at p where it goes there.
        let through = (by_latent.clone() * thresholds).div_scalar(self.bandwidth);
        let (estimated, through) = match (count.open, self.l0) {
            (Some(open), L0Loss::BatchQuadratic { .. }) => {
                let at_open = open.expand(through.dims()).div_scalar(self.bandwidth);
                let through = through.mask_fill(beside.clone(), 0.0);
                let of_count = at_open.mask_fill(beside.bool_or(below.clone()), 0.0);
                (of_count + through.clone(), through)
            }
            (Some(open), _) => {
                let through = through + open.div_scalar(self.bandwidth);
                let through = through.mask_fill(beside, 0.0);
                (through.clone(), through)
            }
            (None, _) => {
                let through = through.mask_fill(beside, 0.0);
                (through.clone(), through)
            }
        };
        let by_threshold = pass.by_latent(&near, estimated.neg());
        self.threshold_gradient(pass, &threshold, by_threshold);
        let by_p = by_latent.mask_fill(below, 0.0);
        let by_p = match self.straight_through {
            StraightThrough::Threshold => by_p,
            StraightThrough::ThresholdAndInput => by_p + through,
        };
        pass.projection_gradient(near.with(by_p));
        if let L0Loss::BatchQuadratic { target } = self.l0 {
            self.count_what_is_off(pass, &threshold, &near, above, target);
        }
        if let Some(coefficient) = self.pre_activation {
            self.pre_activation(pass, &threshold, coefficient, dead);
        }
        (latents, row_errors)
    }

    /// Adds the term of the count.
    fn count(&self, pass: &mut Pass, latents: &Entries, is_open: Tensor<2>) -> CountGradient {
        let (n, coefficient) = (pass.n as f64, self.l0_coefficient);
        let counts = is_open.sum_dim(1);
        let (value, gradient) = match self.l0 {
            L0Loss::Step => {
                let slope = counts.ones_like().mul_scalar(coefficient / n);
                (number(counts.mean()), CountGradient { latents: None, open: Some(slope) })
            }
            L0Loss::Quadratic { target } => {
                let off = counts.sub_scalar(target);
                let slope = off.clone().mul_scalar(coefficient * 4.0 / (target * n));
                let value = 2.0 / target * number(off.square().mean());
                (value, CountGradient { latents: None, open: Some(slope) })
            }
            L0Loss::BatchQuadratic { target } => {
                let off = number(counts.clone().mean()) / target - 1.0;
                let slope = counts.ones_like().mul_scalar(coefficient * 2.0 * off / (target * n));
                (off * off, CountGradient { latents: None, open: Some(slope) })
            }
            L0Loss::Tanh { scale } => {
                let weights = latents.gather(pass.norms()).mul_scalar(scale);
                let squashed = (latents.values.clone() * weights.clone()).tanh();
                let slope = squashed.clone().square().neg().add_scalar(1.0);
                let slope = slope.mul_scalar(coefficient / n);
                let by_norm = slope.clone() * latents.values.clone().mul_scalar(scale);
                let by_norm = pass.by_latent(latents, by_norm);
                pass.norm_gradient(by_norm);
                let by_latent = Some(slope * weights);
                let value = number(squashed.sum()) / n;
                (value, CountGradient { latents: by_latent, open: None })
            }
        };
        pass.term(Term::Sparsity, coefficient * value);
        gradient
    }

    /// What latents that are off add where the estimator takes them for `z = 0`.
    fn count_what_is_off(
        &self,
        pass: &mut Pass,
        threshold: &Tensor<1>,
        near: &Entries,
        above: Tensor<2, Bool>,
        target: f64,
    ) {
        let n_open = pass.by_latent(near, above.float());
        let mean = number(n_open.clone().sum()) / pass.n as f64;
        let slope = self.l0_coefficient * 2.0 * (mean / target - 1.0) / (target * pass.n as f64);
        let n_off = n_open.neg().add_scalar(pass.n as f64);
        let far = threshold.clone().greater_equal_elem(self.bandwidth / 2.0);
        let gradient = n_off.mul_scalar(-slope / self.bandwidth).mask_fill(far, 0.0);
        self.threshold_gradient(pass, threshold, gradient);
    }

    /// Pulls dead latents up to their thresholds, and those down to them.
    fn pre_activation(
        &self,
        pass: &mut Pass,
        threshold: &Tensor<1>,
        coefficient: f64,
        dead: &[u32],
    ) {
        if dead.is_empty() {
            return pass.term(Term::PreActivation, 0.0);
        }
        let norms = pass.norms();
        let among = latents_tensor(dead, &norms.clone().unsqueeze());
        let shift = threshold.clone().select(0, among.clone());
        // θ − p where it is above zero.
        let zeros = shift.zeros_like();
        let gaps = globally(&among, pass.encode_among(&among, -1.0, shift, zeros, Select::Above));
        let scale = coefficient / pass.n as f64;
        let weights = gaps.gather(norms);
        let value = number((gaps.values.clone() * weights.clone()).sum());
        pass.term(Term::PreActivation, scale * value);
        let by_norm = pass.by_latent(&gaps, gaps.values.clone().mul_scalar(scale));
        pass.norm_gradient(by_norm);
        let fills_up = gaps.values.clone().lower_equal_elem(0.0);
        let by_gap = weights.mul_scalar(scale).mask_fill(fills_up, 0.0);
        let by_threshold = pass.by_latent(&gaps, by_gap.clone());
        self.threshold_gradient(pass, threshold, by_threshold);
        pass.projection_gradient(gaps.with(by_gap.neg()));
    }

    fn threshold_gradient(&self, pass: &mut Pass, threshold: &Tensor<1>, gradient: Tensor<1>) {
        match self.threshold {
            ThresholdParameter::Itself => {
                pass.vector_gradient(ParameterName::Threshold, gradient);
            }
            ThresholdParameter::Logarithm => {
                let gradient = gradient * threshold.clone();
                pass.vector_gradient(ParameterName::LogThreshold, gradient);
            }
        }
    }

    pub(super) fn validate(&self, d_sae: usize) -> Result<(), TrainError> {
        positive("bandwidth", self.bandwidth)?;
        not_negative("l0_coefficient", self.l0_coefficient)?;
        not_negative("pre_activation", self.pre_activation.unwrap_or(0.0))?;
        match self.threshold {
            ThresholdParameter::Itself => {
                not_negative("initial_threshold", self.initial_threshold)?;
            }
            ThresholdParameter::Logarithm => positive("initial_threshold", self.initial_threshold)?,
        }
        match self.l0 {
            L0Loss::Step => Ok(()),
            L0Loss::Tanh { scale } => positive("tanh.scale", scale),
            L0Loss::Quadratic { target } | L0Loss::BatchQuadratic { target } => {
                let fits = target > 0.0 && target <= d_sae as f64;
                check("l0.target", "above zero and at most d_sae", target, fits)
            }
        }
    }
}
