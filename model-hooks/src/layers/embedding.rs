//! From token ids to the residual stream, and from there to logits.

use burn::tensor::{DType, Int, Tensor, TensorData};

use crate::positions::Positions;

/// Token embeddings, and position embeddings where they are learned.
#[derive(Debug, Clone)]
pub(crate) struct Embedding {
    /// `[d_vocab, d_model]`.
    pub(crate) tokens: Tensor<2>,
    /// By what token embeddings are multiplied.
    pub(crate) scale: Option<f32>,
    pub(crate) positions: Option<LearnedPositions>,
}

/// An embedding for every position.
#[derive(Debug, Clone)]
pub(crate) struct LearnedPositions {
    /// `[n_ctx + offset, d_model]`.
    pub(crate) table: Tensor<2>,
    /// The row of position 0.
    pub(crate) offset: usize,
}

impl Embedding {
    /// # Shapes
    /// `ids`: `[batch, pos]`; result: `[batch, pos, d_model]`.
    pub(crate) fn tokens(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let ([batch, n], [_, d_model]) = (ids.dims(), self.tokens.dims());
        let rows = self.tokens.clone().select(0, ids.reshape([batch * n]));
        let embedded = rows.cast(DType::F32).reshape([batch, n, d_model]);
        match self.scale {
            Some(scale) => embedded * scale,
            None => embedded,
        }
    }
}

impl LearnedPositions {
    /// The embeddings of a pass; padding gets position 0.
    ///
    /// # Shapes
    /// `[batch, pos, d_model]`.
    pub(crate) fn embed(&self, positions: &Positions) -> Tensor<3> {
        let (batch, n) = (positions.n_rows(), positions.n_columns());
        let row = |row, column| (self.offset + positions.get(row, column).unwrap_or(0)) as i64;
        let rows = TensorData::new(positions.cells(row), [batch * n]);
        let rows = Tensor::<1, Int>::from_data(rows, &self.table.device());
        let [_, d_model] = self.table.dims();
        self.table.clone().select(0, rows).reshape([batch, n, d_model])
    }
}

/// From the normed residual stream to logits.
#[derive(Debug, Clone)]
pub(crate) struct Unembedding {
    /// `[d_vocab, d_model]`, as checkpoints have it: the embedding itself where the two are tied.
    pub(crate) weight: Tensor<2>,
    pub(crate) bias: Option<Tensor<1>>,
    pub(crate) soft_cap: Option<f64>,
}

impl Unembedding {
    /// # Shapes
    /// `x`: `[n, d_model]`; result: `[n, d_vocab]`.
    pub(crate) fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let logits = kernels::dot_rows(x, self.weight.clone());
        let logits = match &self.bias {
            Some(bias) => logits + bias.clone().unsqueeze(),
            None => logits,
        };
        match self.soft_cap {
            Some(cap) => (logits / cap).tanh() * cap,
            None => logits,
        }
    }
}
