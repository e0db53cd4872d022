//! An SAE in a forward pass.

use burn::tensor::Tensor;
use model_hooks::{Hook, HookError, HookPoint, Positions, RowEdit};

use crate::latents::SparseLatents;
use crate::sae::{Decomposition, Sae};

/// What a splice does about the part of the activation that the SAE does not explain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorTerm {
    /// Adds it: `x̂ + (x − x̂)`, which is `x` up to rounding, and so is the gradient.
    Keep,
    /// Adds it as a constant: the value is `x`, but gradients pass through the latents alone
    /// (Marks et al., 2024).
    KeepDetached,
    /// Leaves it out: the pass goes on with the reconstruction.
    Drop,
}

/// Runs the activation at a hook point through an SAE.
///
/// ```no_run
/// # use model_hooks::{ForwardError, HookPoint, LanguageModel, TokenBatch};
/// # use sae_core::{ErrorTerm, Sae, Splice};
/// # fn f(model: &LanguageModel, tokens: &TokenBatch, sae: &Sae) -> Result<(), ForwardError> {
/// let mut splice = Splice::new(sae, HookPoint::resid_post(15), ErrorTerm::Drop).recording();
/// let logits = model.logits(tokens, &mut splice)?;
/// let latents = &splice.latents()[0];
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct Splice<'a> {
    sae: &'a Sae,
    error_term: ErrorTerm,
    recorded: Option<Vec<SparseLatents>>,
    rows: RowEdit,
}

impl<'a> Splice<'a> {
    /// A splice at every position that the SAE was trained on, as far as its file says so: from
    /// [`first_position`](crate::SaeMetadata::first_position) on, or else from 0.
    ///
    /// # Panics
    /// If this is a transcoder: it writes another activation than it reads.
    pub fn new(sae: &'a Sae, point: HookPoint, error_term: ErrorTerm) -> Self {
        assert!(sae.config().transcodes_to.is_none(), "a transcoder cannot stand for its input");
        let first = sae.config().metadata.first_position().unwrap_or(0);
        let rows = RowEdit::new(point, sae.config().d_in, first);
        Self { sae, error_term, recorded: None, rows }
    }

    /// Leaves the positions of each conversation alone that come before this one.
    #[must_use]
    pub fn from_position(mut self, position: usize) -> Self {
        self.rows = self.rows.from_position(position);
        self
    }

    /// Keeps the latents that pass by.
    #[must_use]
    pub fn recording(mut self) -> Self {
        self.recorded = Some(Vec::new());
        self
    }

    /// The latents of each pass since [`recording`](Self::recording), in its graph: one row for
    /// every position of every conversation in turn, those that were left alone included.
    pub fn latents(&self) -> &[SparseLatents] {
        self.recorded.as_deref().unwrap_or_default()
    }
}

impl Hook for Splice<'_> {
    fn wants(&self, point: HookPoint) -> bool {
        self.rows.wants(point)
    }

    fn at<const D: usize>(
        &mut self,
        _: HookPoint,
        x: Tensor<D>,
        positions: &Positions,
    ) -> Tensor<D> {
        let Self { sae, error_term, recorded, rows } = self;
        rows.apply(x, positions, |x| {
            let Decomposition { latents, reconstruction, error } = sae.decompose(x);
            if let Some(recorded) = recorded {
                recorded.push(latents);
            }
            match error_term {
                ErrorTerm::Keep => reconstruction + error,
                ErrorTerm::KeepDetached => reconstruction + error.detach(),
                ErrorTerm::Drop => reconstruction,
            }
        })
    }

    fn finish(&mut self) -> Result<(), HookError> {
        self.rows.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activation::Activation;
    use crate::config::SaeConfig;
    use crate::sae::SaeWeights;
    use burn::tensor::{Device, TensorData};
    use model_hooks::Site;

    const POINT: HookPoint = HookPoint::Block { layer: 1, site: Site::ResidPost };

    /// One latent that reads and writes x₀.
    fn sae() -> Sae {
        let device = Device::flex();
        let weights = SaeWeights::new(
            Tensor::from_data([[1.0], [0.0]], &device),
            Tensor::zeros([1], &device),
            Tensor::from_data([[1.0, 0.0]], &device),
            Tensor::zeros([2], &device),
        );
        let activation = Activation::TopK { k: 1, rescale_by_decoder_norm: false };
        Sae::new(SaeConfig::new(2, 1, activation), weights).expect("valid")
    }

    /// Two conversations of two positions, the second padded by one.
    fn x() -> Tensor<3> {
        let rows = [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]];
        Tensor::from_data(rows, &Device::flex())
    }

    fn positions() -> Positions {
        Positions::new(0, 0, 2, vec![0, 1])
    }

    fn assert_is<const D: usize>(actual: Tensor<D>, expected: impl Into<TensorData>) {
        actual.into_data().assert_eq(&expected.into(), true);
    }

    #[test]
    fn the_error_term_is_kept_or_dropped() {
        let (sae, x) = (sae(), x());
        let run =
            |error_term| Splice::new(&sae, POINT, error_term).at(POINT, x.clone(), &positions());
        assert_is(run(ErrorTerm::Keep), x.to_data());
        assert_is(run(ErrorTerm::KeepDetached), x.to_data());
        let dropped = [[[1.0f32, 0.0], [3.0, 0.0]], [[5.0, 0.0], [7.0, 0.0]]];
        assert_is(run(ErrorTerm::Drop), dropped);
    }

    #[test]
    #[should_panic(expected = "a transcoder cannot stand for its input")]
    fn transcoders_are_refused() {
        let sae = sae();
        let config = SaeConfig {
            transcodes_to: Some(2),
            apply_b_dec_to_input: false,
            ..sae.config().clone()
        };
        let transcoder = Sae::new(config, sae.weights().clone()).expect("valid");
        let _ = Splice::new(&transcoder, POINT, ErrorTerm::Drop);
    }

    #[test]
    fn early_positions_are_left_alone_wherever_they_stand() {
        let sae = sae();
        let mut splice = Splice::new(&sae, POINT, ErrorTerm::Drop).from_position(1).recording();
        // Position 0 is in column 0 of the first row, and behind the padding of the second.
        let spliced = splice.at(POINT, x(), &positions());
        assert_is(spliced, [[[1.0f32, 2.0], [3.0, 0.0]], [[5.0, 6.0], [7.0, 8.0]]]);
        let step = Positions::new(0, 2, 2, vec![0, 1]);
        let spliced = splice.at(POINT, x(), &step);
        assert_is(spliced, [[[1.0f32, 0.0], [3.0, 0.0]], [[5.0, 0.0], [7.0, 0.0]]]);
        assert_eq!(splice.latents().len(), 2);
        assert_is(splice.latents()[0].latent(0), [1.0f32, 3.0, 5.0, 7.0]);
    }

    #[test]
    fn the_metadata_says_where_to_begin() {
        let seqpos_slice = Some(vec![Some(1), None]);
        let metadata = crate::SaeMetadata { seqpos_slice, ..Default::default() };
        let sae = sae().with_metadata(metadata);
        let spliced = Splice::new(&sae, POINT, ErrorTerm::Drop).at(POINT, x(), &positions());
        assert_is(spliced, [[[1.0f32, 2.0], [3.0, 0.0]], [[5.0, 6.0], [7.0, 8.0]]]);
    }

    #[test]
    fn gradients_pass_as_the_error_term_says() {
        let sae = sae();
        let gradient = |error_term| {
            let x = x().autodiff().require_grad();
            let mut splice = Splice::new(&sae, POINT, error_term);
            let grads = splice.at(POINT, x.clone(), &positions()).sum().backward();
            x.grad(&grads).expect("in the graph")
        };
        let through_latents = [[[1.0f32, 0.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]];
        assert_is(gradient(ErrorTerm::Keep), x().ones_like().into_data());
        assert_is(gradient(ErrorTerm::KeepDetached), through_latents);
        assert_is(gradient(ErrorTerm::Drop), through_latents);
    }
}
