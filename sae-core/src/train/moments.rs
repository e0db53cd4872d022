//! The optimiser, and what it remembers.

use burn::config::Config;
use burn::tensor::{Device, Tensor};
use kernels::{AdamConfig, AdamState, adam_step};

use super::decoder_norm::{DecoderNorm, unit_rows};
use super::error::TrainError;
use super::parameters::{ParameterName, Parameters};

/// How parameters follow their gradients.
#[derive(Config, Debug, Copy, PartialEq)]
pub enum Optimizer {
    /// Adam (Kingma & Ba, 2015).
    Adam(Betas),
    /// Adam that leaves alone, weights and moments, what latents get no gradient in a step: their
    /// rows of encoder and decoder, their biases and thresholds, each where its own gradient is
    /// zero. Another optimiser, under which rare latents keep their momentum, and whose cost falls
    /// with the share of rows that move.
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

    /// The same on another device.
    pub fn to_device(self, device: &Device) -> Self {
        Self { first: self.first.to_device(device), second: self.second.to_device(device) }
    }

    /// Moves the parameters by one step, and brings the decoder's rows back to the norm that they are
    /// held at; `step` counts from 1.
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
        decoder: DecoderNorm,
    ) {
        for name in ParameterName::ALL {
            let Some(parameter) = parameters.get_mut(name) else { continue };
            let gradient = gradient.take(name).expect("a gradient for every parameter");
            let first = self.first.get_mut(name).expect("moments for every parameter");
            match *optimizer {
                Optimizer::Adam(betas) | Optimizer::RowLazyAdam(betas) => {
                    let second = self.second.get_mut(name).expect("Adam has second moments");
                    let shape @ [n_rows, n_columns] = gradient.dims();
                    // A latent is a row, in biases too.
                    let latent_width = match optimizer {
                        Optimizer::RowLazyAdam(_) => name.latent_width(n_columns),
                        _ => None,
                    };
                    let width = latent_width.unwrap_or(n_columns);
                    let by_row = [n_rows * n_columns / width, width];
                    let rows = |tensor: Tensor<2>| tensor.reshape(by_row);
                    let config = AdamConfig {
                        gradient_scale: scale,
                        skips_idle_rows: latent_width.is_some(),
                        unit_rows: decoder.holds(name),
                        ..betas.at(learning_rate)
                    };
                    // Taken out of their places: what nobody else holds is updated in place.
                    let state =
                        AdamState { first: rows(first.extract()), second: rows(second.extract()) };
                    let moved =
                        adam_step(rows(parameter.extract()), rows(gradient), state, step, config);
                    *parameter = moved.0.reshape(shape);
                    *first = moved.1.first.reshape(shape);
                    *second = moved.1.second.reshape(shape);
                }
                Optimizer::Signum(Momentum { beta }) => {
                    let mean = first.extract().mul_scalar(beta)
                        + gradient.mul_scalar(scale * (1.0 - beta));
                    let step = mean.clone().sign().mul_scalar(learning_rate);
                    (*parameter, *first) = (parameter.extract() - step, mean);
                    if decoder.holds(name) {
                        *parameter = unit_rows(parameter.extract());
                    }
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
    fn at(self, learning_rate: f64) -> AdamConfig {
        let Self { beta_1, beta_2, epsilon } = self;
        AdamConfig { beta_1, beta_2, epsilon, ..AdamConfig::new(learning_rate) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::TensorData;

    fn parameters(w_dec: [[f32; 2]; 2], b_dec: [f32; 2]) -> Parameters {
        let device = Device::flex();
        Parameters::tied(Tensor::from_data(w_dec, &device), Tensor::from_data(b_dec, &device))
    }

    fn after(optimizer: Optimizer, gradients: &[Parameters]) -> (Parameters, Moments) {
        let mut at = parameters([[1.0, 1.0], [1.0, 1.0]], [1.0, 1.0]);
        let mut moments = Moments::new(&at, &optimizer);
        for (step, gradient) in gradients.iter().enumerate() {
            let clipped = Clipped { gradient: gradient.clone(), scale: 1.0 };
            moments.update(&mut at, clipped, step + 1, 0.5, &optimizer, DecoderNorm::Free);
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
        // What all latents share moves with all of them.
        let b_dec = |p: &Parameters| p.vector(ParameterName::BDec).into_data();
        assert_eq!(b_dec(&lazy), b_dec(&eager));
    }

    #[test]
    fn row_lazy_adam_touches_nothing_of_an_idle_latent() {
        let device = Device::flex();
        let of = |w_dec: [[f32; 2]; 2], b_enc: [f32; 2]| {
            let mut parameters = parameters(w_dec, [1.0, 1.0]);
            parameters.insert(ParameterName::BEnc, Tensor::from_data([b_enc], &device));
            parameters
        };
        let optimizer = Optimizer::RowLazyAdam(Betas::new());
        let mut at = of([[0.1, 0.2], [0.3, 0.4]], [0.5, 0.6]);
        let mut moments = Moments::new(&at, &optimizer);
        let all = of([[1.0, 0.0], [1.0, 2.0]], [3.0, -1.0]);
        let first_alone = of([[0.5, 0.0], [0.0, -0.0]], [1.0, 0.0]);
        let free = DecoderNorm::Free;
        moments.update(&mut at, Clipped { gradient: all, scale: 1.0 }, 1, 0.1, &optimizer, free);
        let bits = |at: &Parameters, moments: &Moments| {
            let sets = [at, &moments.first, &moments.second];
            let values = |name| {
                let tensors = sets.map(|set| set.get(name).expect("there").to_data());
                tensors.map(|data| data.iter::<f32>().map(f32::to_bits).collect::<Vec<_>>())
            };
            (values(ParameterName::WDec), values(ParameterName::BEnc))
        };
        let before = bits(&at, &moments);
        let gradient = Clipped { gradient: first_alone, scale: 0.5 };
        moments.update(&mut at, gradient, 2, 0.1, &optimizer, free);
        let after = bits(&at, &moments);
        for set in 0..3 {
            assert_eq!(before.0[set][2..], after.0[set][2..]);
            assert_eq!(before.1[set][1], after.1[set][1]);
            assert_ne!(before.0[set][0], after.0[set][0]);
            assert_ne!(before.1[set][0], after.1[set][0]);
        }
        // A row moves whole: what has no gradient in it goes on by its momentum, of zero here.
        let second = moments.second.w_dec().into_data().iter::<f32>().collect::<Vec<_>>();
        // Means of squares after 1 and then ½ · ½.
        let expected = 0.999 * 0.001 + 0.001 * 0.0625;
        assert!((second[0] - expected).abs() < 1e-7, "{second:?}");
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
