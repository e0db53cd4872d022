//! The optimiser, and what it remembers.

use burn::config::Config;
use burn::tensor::Tensor;
use kernels::{AdamConfig, AdamState, adam_step};

use super::error::TrainError;
use super::parameters::{ParameterName, Parameters};

/// How parameters follow their gradients.
#[derive(Config, Debug, Copy, PartialEq)]
pub enum Optimizer {
    /// Adam (Kingma & Ba, 2015).
    Adam(Betas),
    /// Adam that leaves alone, weights and moments, the rows of encoder and decoder that get no
    /// gradient in a step: another optimiser, under which rare latents keep their momentum.
    RowLazyAdam(Betas),
    /// Signum (Bernstein et al., 2018): a step of the learning rate along the sign of a running mean
    /// of the gradient. Without momentum it is sparsify's SignSGD.
    Signum(Momentum),
}

/// The constants of Adam, but for the learning rate.
#[derive(Config, Debug, Copy, PartialEq)]
pub struct Betas {
    /// Decay of the first moment; dictionary_learning trains gated and JumpReLU SAEs with 0.
    #[config(default = 0.9)]
    pub beta_1: f64,
    /// Decay of the second moment.
    #[config(default = 0.999)]
    pub beta_2: f64,
    /// Added to the root of the second moment.
    #[config(default = 1e-8)]
    pub epsilon: f64,
}

/// The constant of Signum.
#[derive(Config, Debug, Copy, PartialEq)]
pub struct Momentum {
    /// Decay of the running mean.
    #[config(default = 0.9)]
    pub beta: f64,
}

impl Default for Optimizer {
    fn default() -> Self {
        Self::Adam(Betas::new())
    }
}

impl Optimizer {
    /// Whether it keeps means of squared gradients.
    pub(super) fn has_second_moments(&self) -> bool {
        match self {
            Self::Adam(_) | Self::RowLazyAdam(_) => true,
            Self::Signum(_) => false,
        }
    }

    pub(super) fn validate(&self) -> Result<(), TrainError> {
        let check = |option, expected, actual, holds| match holds {
            true => Ok(()),
            false => Err(TrainError::Option { option, expected, actual }),
        };
        let share = |option, beta: f64| {
            check(
                option,
                "a number from 0 up to 1, less than that",
                beta,
                (0.0..1.0).contains(&beta),
            )
        };
        match *self {
            Self::Adam(betas) | Self::RowLazyAdam(betas) => {
                share("beta_1", betas.beta_1)?;
                share("beta_2", betas.beta_2)?;
                let epsilon = betas.epsilon;
                let positive = epsilon.is_finite() && epsilon > 0.0;
                check("epsilon", "a number above zero", epsilon, positive)
            }
            Self::Signum(Momentum { beta }) => share("beta", beta),
        }
    }
}

/// A gradient, and what it is to be multiplied by to be no longer than is allowed.
pub(super) struct Clipped {
    pub(super) gradient: Parameters,
    pub(super) scale: f64,
}

/// Running means of the gradient and of its square.
#[derive(Debug, Clone)]
pub struct Moments {
    /// Of the gradient.
    pub first: Parameters,
    /// Of its square; nothing where the optimiser does without.
    pub second: Parameters,
}

impl Moments {
    /// Before the first step.
    pub fn new(parameters: &Parameters, optimizer: &Optimizer) -> Self {
        let second = match optimizer.has_second_moments() {
            true => parameters.zeros_like(),
            false => Parameters::default(),
        };
        Self { first: parameters.zeros_like(), second }
    }

    /// Moves the parameters by one step; `step` counts from 1.
    ///
    /// # Panics
    /// If the parameters have another set of names, or the moments are of another optimiser.
    pub(super) fn update(
        &mut self,
        parameters: &mut Parameters,
        Clipped { mut gradient, scale }: Clipped,
        step: usize,
        learning_rate: f64,
        optimizer: &Optimizer,
    ) {
        for name in ParameterName::ALL {
            let Some(parameter) = parameters.get_mut(name) else { continue };
            let gradient = gradient.take(name).expect("a gradient for every parameter");
            let first = self.first.get_mut(name).expect("moments for every parameter");
            match *optimizer {
                Optimizer::Adam(betas) => {
                    let second = self.second.get_mut(name).expect("Adam has second moments");
                    let adam = betas.at(learning_rate, scale);
                    // Taken out of their places: what nobody else holds is updated in place.
                    let state = AdamState { first: first.extract(), second: second.extract() };
                    let moved = adam_step(parameter.extract(), gradient, state, step, adam);
                    (*parameter, *first, *second) = (moved.0, moved.1.first, moved.1.second);
                }
                Optimizer::RowLazyAdam(betas) => {
                    let second = self.second.get_mut(name).expect("Adam has second moments");
                    let adam = betas.at(learning_rate, scale);
                    let state = AdamState { first: first.clone(), second: second.clone() };
                    let idle = (name == ParameterName::WEnc || name == ParameterName::WDec)
                        .then(|| gradient.clone().abs().max_dim(1).equal_elem(0.0));
                    let moved = adam_step(parameter.clone(), gradient, state, step, adam);
                    let keep = |new: Tensor<2>, old: &Tensor<2>| match &idle {
                        Some(idle) => {
                            let shape = new.dims();
                            new.mask_where(idle.clone().expand(shape), old.clone())
                        }
                        None => new,
                    };
                    *parameter = keep(moved.0, parameter);
                    *first = keep(moved.1.first, first);
                    *second = keep(moved.1.second, second);
                }
                Optimizer::Signum(Momentum { beta }) => {
                    let mean = first.extract().mul_scalar(beta)
                        + gradient.mul_scalar(scale * (1.0 - beta));
                    let step = mean.clone().sign().mul_scalar(learning_rate);
                    (*parameter, *first) = (parameter.extract() - step, mean);
                }
            }
        }
    }

    /// Forgets what concerns some latents.
    pub(super) fn forget(&mut self, latents: &[u32]) {
        for moments in [&mut self.first, &mut self.second] {
            moments.map_latents(latents, |_, _, row| row.fill(0.0));
        }
    }
}

impl Betas {
    fn at(self, learning_rate: f64, gradient_scale: f64) -> AdamConfig {
        let Self { beta_1, beta_2, epsilon } = self;
        AdamConfig { learning_rate, beta_1, beta_2, epsilon, gradient_scale }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};

    fn parameters(w_dec: [[f32; 2]; 2], b_dec: [f32; 2]) -> Parameters {
        let device = Device::flex();
        Parameters::tied(Tensor::from_data(w_dec, &device), Tensor::from_data(b_dec, &device))
    }

    fn after(optimizer: Optimizer, gradients: &[Parameters]) -> (Parameters, Moments) {
        let mut at = parameters([[1.0, 1.0], [1.0, 1.0]], [1.0, 1.0]);
        let mut moments = Moments::new(&at, &optimizer);
        for (step, gradient) in gradients.iter().enumerate() {
            let clipped = Clipped { gradient: gradient.clone(), scale: 1.0 };
            moments.update(&mut at, clipped, step + 1, 0.5, &optimizer);
        }
        (at, moments)
    }

    fn assert_w_dec(actual: &Parameters, expected: [[f32; 2]; 2]) {
        let tolerance = burn::tensor::Tolerance::<f32>::absolute(1e-6);
        actual.w_dec().into_data().assert_approx_eq(&TensorData::from(expected), tolerance);
    }

    #[test]
    fn signum_steps_along_the_sign_of_the_mean() {
        let there = parameters([[4.0, -0.1], [0.0, 1.0]], [0.0, 0.0]);
        let back = parameters([[-1.0, -0.1], [0.0, -9.0]], [0.0, 0.0]);
        // Means with β = ½: 2, −.05, 0, .5; then .5, −.075, 0, −4.25.
        let (at, moments) = after(Optimizer::Signum(Momentum { beta: 0.5 }), &[there, back]);
        assert_w_dec(&at, [[0.0, 2.0], [1.0, 1.0]]);
        assert_w_dec(&moments.first, [[0.5, -0.075], [0.0, -4.25]]);
        assert_eq!(moments.second.named().count(), 0);
    }

    #[test]
    fn adam_moves_on_by_its_momentum_and_row_lazy_adam_does_not() {
        let first = parameters([[2.0, -3.0], [0.0, 0.0]], [0.0, 1.0]);
        let then = parameters([[0.0, 0.0], [1.0, 0.0]], [0.0, 1.0]);
        let lazy = after(Optimizer::RowLazyAdam(Betas::new()), &[first.clone(), then.clone()]).0;
        let eager = after(Optimizer::default(), &[first, then]).0;
        let value = |p: &Parameters, at: usize| {
            p.w_dec().into_data().iter::<f32>().nth(at).expect("four values")
        };
        // The first step of Adam is the learning rate; the second one has momentum in row 0.
        let is_close = |value: f32, expected: f32| (value - expected).abs() < 1e-4;
        assert!(is_close(value(&lazy, 0), 0.5) && is_close(value(&lazy, 1), 1.5));
        assert!(value(&eager, 0) < 0.2 && value(&eager, 1) > 1.8);
        assert_eq!(value(&lazy, 2), value(&eager, 2));
        // Biases belong to no row.
        let b_dec = |p: &Parameters| p.vector(ParameterName::BDec).into_data();
        assert_eq!(b_dec(&lazy), b_dec(&eager));
    }

    #[test]
    fn constants_out_of_range_are_named() {
        let refused = |optimizer: Optimizer| match optimizer.validate().unwrap_err() {
            TrainError::Option { option, .. } => option,
            error => panic!("{error}"),
        };
        assert_eq!(Optimizer::default().validate(), Ok(()));
        assert_eq!(refused(Optimizer::Adam(Betas::new().with_beta_1(1.0))), "beta_1");
        assert_eq!(refused(Optimizer::RowLazyAdam(Betas::new().with_beta_2(-0.1))), "beta_2");
        assert_eq!(refused(Optimizer::Adam(Betas::new().with_epsilon(0.0))), "epsilon");
        assert_eq!(refused(Optimizer::Signum(Momentum { beta: 1.5 })), "beta");
    }
}
