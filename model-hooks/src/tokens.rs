//! Token ids as a model takes them.

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::config::ModelConfig;
use crate::positions::Positions;

/// Rows of token ids, padded on the left to one length.
#[derive(Debug, Clone)]
pub struct TokenBatch {
    ids: Tensor<2, Int>,
    /// The same ids, for hooks.
    host_ids: Vec<u32>,
    /// Columns at which the conversations of each row begin.
    starts: Vec<Vec<usize>>,
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
        let rows: Vec<[&[u32]; 1]> = rows.iter().map(|row| [row.as_ref()]).collect();
        Self::packed(&rows, n_before, config, device)
    }

    /// Rows of several texts each, one after the other; they will not see each other.
    ///
    /// # Errors
    /// As [`new`](Self::new); the texts are numbered through all rows.
    pub(crate) fn packed<'a>(
        rows: &[impl AsRef<[&'a [u32]]>],
        n_before: usize,
        config: &ModelConfig,
        device: &Device,
    ) -> Result<Self, TokenError> {
        let length = |row: &[&[u32]]| row.iter().map(|text| text.len()).sum::<usize>();
        let n = rows.iter().map(|row| length(row.as_ref())).max().ok_or(TokenError::EmptyBatch)?;
        for (row, ids) in rows.iter().flat_map(|row| row.as_ref()).enumerate() {
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
        let (mut ids, mut starts) = (Vec::with_capacity(rows.len() * n), Vec::new());
        for row in rows {
            let row = row.as_ref();
            // Padding takes id 0: any embedding does, since nothing attends to it.
            let mut end = n - length(row);
            ids.extend(std::iter::repeat_n(0, end));
            ids.extend(row.iter().copied().flatten());
            starts.push(Vec::with_capacity(row.len()));
            for text in row {
                starts.last_mut().expect("just pushed").push(end);
                end += text.len();
            }
        }
        let host_ids = ids;
        let ids = host_ids.iter().map(|&id| i64::from(id)).collect();
        let ids = Tensor::from_data(TensorData::new(ids, [rows.len(), n]), device);
        Ok(Self { ids, host_ids, starts })
    }

    /// Rows and columns.
    pub fn dims(&self) -> [usize; 2] {
        self.ids.dims()
    }

    /// Where the tokens stand, in a pass behind a prefix of `n_prefix` tokens.
    pub fn positions(&self, n_prefix: usize) -> Positions {
        Positions::packed(n_prefix, 0, self.dims()[1], self.starts.clone())
    }

    pub(crate) fn starts(&self) -> &[Vec<usize>] {
        &self.starts
    }

    /// The ids, row by row; those of padding mean nothing.
    pub(crate) fn host_ids(&self) -> &[u32] {
        &self.host_ids
    }

    pub(crate) fn ids(&self) -> Tensor<2, Int> {
        self.ids.clone()
    }
}
