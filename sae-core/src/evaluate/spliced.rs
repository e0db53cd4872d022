//! An SAE or a transcoder in a pass.

use burn::tensor::Tensor;
use model_hooks::{Hook, HookError, HookPoint, Positions, RowEdit};

use crate::sae::Sae;
use crate::splice::{ErrorTerm, Splice};

/// Either of them.
pub(super) enum Spliced<'a> {
    Sae(Splice<'a>),
    Transcoder(Box<Transcoding<'a>>),
}

/// What a transcoder makes of the activation that it reads, in place of the one that it
/// reconstructs.
pub(super) struct Transcoding<'a> {
    sae: &'a Sae,
    reads: HookPoint,
    error_term: ErrorTerm,
    /// What came by, `[batch · pos, d_in]`.
    read: Option<Tensor<2>>,
    rows: RowEdit,
    outcome: Result<(), HookError>,
}

impl<'a> Transcoding<'a> {
    pub(super) fn new(
        sae: &'a Sae,
        reads: HookPoint,
        writes: HookPoint,
        from_position: usize,
        error_term: ErrorTerm,
    ) -> Self {
        let rows = RowEdit::new(writes, sae.config().d_out(), from_position);
        Self { sae, reads, error_term, read: None, rows, outcome: Ok(()) }
    }
}

impl Hook for Transcoding<'_> {
    fn wants(&self, point: HookPoint) -> bool {
        point == self.reads || self.rows.wants(point)
    }

    fn at<const D: usize>(
        &mut self,
        point: HookPoint,
        x: Tensor<D>,
        positions: &Positions,
    ) -> Tensor<D> {
        let Self { sae, reads, error_term, read, rows, outcome } = self;
        if point == *reads {
            let n = positions.n_rows() * positions.n_columns();
            let (actual, expected) = (x.shape().num_elements() / n, sae.config().d_in);
            match actual == expected {
                true => *read = Some(x.clone().reshape([n, expected])),
                false => *outcome = Err(HookError::Width { point, expected, actual }),
            }
        }
        if !rows.wants(point) {
            return x;
        }
        let Some(read) = read.take() else {
            // What it reads comes later in the pass, or had another width.
            if outcome.is_ok() {
                *outcome = Err(HookError::NeverFired { point: *reads });
            }
            return x;
        };
        rows.apply(x, positions, |x| {
            let (_, written) = sae.run(read);
            match error_term {
                ErrorTerm::Keep => written.clone() + (x - written),
                ErrorTerm::KeepDetached => written.clone() + (x - written).detach(),
                ErrorTerm::Drop => written,
            }
        })
    }

    fn finish(&mut self) -> Result<(), HookError> {
        self.read = None;
        let rows = self.rows.finish();
        std::mem::replace(&mut self.outcome, Ok(())).and(rows)
    }
}

impl Hook for Spliced<'_> {
    fn wants(&self, point: HookPoint) -> bool {
        match self {
            Self::Sae(splice) => splice.wants(point),
            Self::Transcoder(transcoding) => transcoding.wants(point),
        }
    }

    fn at<const D: usize>(
        &mut self,
        point: HookPoint,
        x: Tensor<D>,
        positions: &Positions,
    ) -> Tensor<D> {
        match self {
            Self::Sae(splice) => splice.at(point, x, positions),
            Self::Transcoder(transcoding) => transcoding.at(point, x, positions),
        }
    }

    fn finish(&mut self) -> Result<(), HookError> {
        match self {
            Self::Sae(splice) => splice.finish(),
            Self::Transcoder(transcoding) => transcoding.finish(),
        }
    }
}
