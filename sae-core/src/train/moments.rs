//! What Adam remembers.

use burn::tensor::Tensor;
use kernels::{AdamConfig, AdamState, adam_step};

use super::parameters::Parameters;

/// Running means of the gradient and of its square.
#[derive(Debug, Clone)]
pub struct Moments {
    /// Of the gradient.
    pub first: Parameters,
    /// Of its square.
    pub second: Parameters,
}

impl Moments {
    /// Before the first step.
    pub fn new(parameters: &Parameters) -> Self {
        Self { first: parameters.zeros_like(), second: parameters.zeros_like() }
    }

    /// Moves the parameters by one step of Adam; `step` counts from 1.
    pub(super) fn update(
        &mut self,
        parameters: &mut Parameters,
        gradient: Parameters,
        step: usize,
        adam: AdamConfig,
    ) {
        let Self { first, second } = self;
        let step = Step { step, adam };
        step.take(&mut parameters.w_enc, gradient.w_enc, &mut first.w_enc, &mut second.w_enc);
        step.take(&mut parameters.b_enc, gradient.b_enc, &mut first.b_enc, &mut second.b_enc);
        step.take(&mut parameters.w_dec, gradient.w_dec, &mut first.w_dec, &mut second.w_dec);
        step.take(&mut parameters.b_dec, gradient.b_dec, &mut first.b_dec, &mut second.b_dec);
    }
}

#[derive(Clone, Copy)]
struct Step {
    step: usize,
    adam: AdamConfig,
}

impl Step {
    fn take<const D: usize>(
        self,
        parameter: &mut Tensor<D>,
        gradient: Tensor<D>,
        first: &mut Tensor<D>,
        second: &mut Tensor<D>,
    ) {
        let shape = parameter.dims();
        let row = |x: Tensor<D>| x.reshape([1, shape.iter().product()]);
        // Taken out of their places: what nobody else holds is updated in place.
        let state = AdamState { first: row(first.extract()), second: row(second.extract()) };
        let moved = adam_step(row(parameter.extract()), row(gradient), state, self.step, self.adam);
        *parameter = moved.0.reshape(shape);
        *first = moved.1.first.reshape(shape);
        *second = moved.1.second.reshape(shape);
    }
}
