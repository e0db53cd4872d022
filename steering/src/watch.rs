//! Latents of a running model, as they come by.

use burn::tensor::Tensor;
use model_hooks::{Hook, HookError, HookPoint, Positions, RowEdit};

use crate::latent_reader::LatentReader;

/// Shows some latents' values at every token, and changes nothing.
///
/// `seen` is given the values of each pass, `[batch · pos, n_latents]` row by row, those of padding
/// included. In a tuple before a [`Steering`](crate::Steering), it sees what the model itself makes;
/// behind one, what becomes of that.
#[derive(Debug, Clone)]
pub struct LatentWatch<'a, F> {
    reader: LatentReader<'a>,
    rows: RowEdit,
    seen: F,
}

impl<'a, F: FnMut(&[f32])> LatentWatch<'a, F> {
    /// Of these latents, at a point.
    pub fn new(reader: LatentReader<'a>, point: HookPoint, seen: F) -> Self {
        let rows = RowEdit::new(point, reader.sae().config().d_in, 0);
        Self { reader, rows, seen }
    }
}

impl<F: FnMut(&[f32])> Hook for LatentWatch<'_, F> {
    fn wants(&self, point: HookPoint) -> bool {
        self.rows.wants(point)
    }

    fn at<const D: usize>(
        &mut self,
        _: HookPoint,
        x: Tensor<D>,
        positions: &Positions,
    ) -> Tensor<D> {
        let Self { reader, rows, seen } = self;
        rows.apply(x, positions, |x| {
            let values = reader.read(x.clone()).into_data();
            seen(values.as_slice::<f32>().expect("latents are f32"));
            x
        })
    }

    fn finish(&mut self) -> Result<(), HookError> {
        self.rows.finish()
    }
}
