//! Token ids as a model takes them.

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::config::ModelConfig;

/// Rows of token ids, padded on the left to one length.
#[derive(Debug, Clone)]
pub struct TokenBatch {
    ids: Tensor<2, Int>,
    padding: Vec<usize>,
}

/// Why token ids cannot be run through a model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// No rows at all.
    #[error("the batch has no rows: at least one prompt is needed")]
    EmptyBatch,
    /// A row without tokens.
    #[error("prompt {row} is empty: at least one token is needed")]
    EmptyPrompt {
        /// Index of the row.
        row: usize,
    },
    /// A row, with what is to follow it, does not fit the context.
    #[error("prompt {row} needs {actual} positions, the model's context has {expected}")]
    TooLong {
        /// Index of the row.
        row: usize,
        /// The model's context.
        expected: usize,
        /// Positions needed.
        actual: usize,
    },
    /// An id that the model has no embedding for.
    #[error("token id {id} in prompt {row} is not below the model's vocabulary of {expected}")]
    UnknownId {
        /// Index of the row.
        row: usize,
        /// The id.
        id: u32,
        /// Size of the vocabulary.
        expected: usize,
    },
}

impl TokenBatch {
    /// Pads and checks rows of ids.
    ///
    /// # Errors
    /// If there is no row, a row is empty, longer than the context, or holds an unknown id.
    pub fn new(
        rows: &[impl AsRef<[u32]>],
        config: &ModelConfig,
        device: &Device,
    ) -> Result<Self, TokenError> {
        Self::after(rows, 0, config, device)
    }

    /// As [`new`](Self::new), for rows that follow `n_before` tokens and leave room in the context.
    pub(crate) fn after(
        rows: &[impl AsRef<[u32]>],
        n_before: usize,
        config: &ModelConfig,
        device: &Device,
    ) -> Result<Self, TokenError> {
        let rows: Vec<&[u32]> = rows.iter().map(AsRef::as_ref).collect();
        let n = rows.iter().map(|row| row.len()).max().ok_or(TokenError::EmptyBatch)?;
        for (row, ids) in rows.iter().enumerate() {
            let actual = n_before + ids.len();
            if ids.is_empty() {
                return Err(TokenError::EmptyPrompt { row });
            }
            if actual > config.n_ctx {
                return Err(TokenError::TooLong { row, expected: config.n_ctx, actual });
            }
            let expected = config.d_vocab;
            if let Some(&id) = ids.iter().find(|&&id| id as usize >= expected) {
                return Err(TokenError::UnknownId { row, id, expected });
            }
        }
        let padding: Vec<usize> = rows.iter().map(|row| n - row.len()).collect();
        // Padding takes id 0: any embedding does, since nothing attends to it.
        let ids: Vec<i64> = rows
            .iter()
            .zip(&padding)
            .flat_map(|(row, &padding)| {
                std::iter::repeat_n(0, padding).chain(row.iter().map(|&id| i64::from(id)))
            })
            .collect();
        let ids = Tensor::from_data(TensorData::new(ids, [rows.len(), n]), device);
        Ok(Self { ids, padding })
    }

    /// Rows and columns.
    pub fn dims(&self) -> [usize; 2] {
        self.ids.dims()
    }

    /// Padding columns at the start of each row.
    pub fn padding(&self) -> &[usize] {
        &self.padding
    }

    pub(crate) fn ids(&self) -> Tensor<2, Int> {
        self.ids.clone()
    }
}
