//! What an SAE is, apart from its weights.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::activation::Activation;
use crate::normalization::Normalization;

/// The shape and the equation of an SAE, and where it belongs.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct SaeConfig {
    /// Width of the activations.
    pub d_in: usize,
    /// Number of latents.
    pub d_sae: usize,
    /// What makes the latents sparse.
    pub activation: Activation,
    /// Whether `b_dec` is subtracted from the input before encoding.
    pub apply_b_dec_to_input: bool,
    /// What is done to activations first.
    pub normalization: Normalization,
    /// The width of the activation that a transcoder writes; none of an autoencoder, which
    /// reconstructs what it reads.
    pub transcodes_to: Option<usize>,
    /// Whether `d_in` joins the heads and their width (an SAE on `attn.hook_z`).
    pub joins_heads: bool,
    /// Which model and hook point it was trained on.
    pub metadata: SaeMetadata,
    /// Keys of the file that mean nothing to us, kept for a round trip.
    pub other: Map<String, Value>,
}

/// Which model and hook point an SAE was trained on, under SAELens' names.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SaeMetadata {
    /// The model, as its hub names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_name: Option<String>,
    /// The hook point.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hook_name: Option<String>,
    /// Tokens per training sequence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context_size: Option<usize>,
    /// Whether training sequences began with a BOS token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prepend_bos: Option<bool>,
    /// The positions trained on, as the arguments of Python's `slice`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seqpos_slice: Option<Vec<Option<i64>>>,
    /// All other keys, as they came.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// Why a configuration describes no SAE.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A dimension is zero.
    #[error("an SAE needs dimensions above zero; d_in is {d_in}, d_sae {d_sae}")]
    Empty {
        /// Width of the activations.
        d_in: usize,
        /// Number of latents.
        d_sae: usize,
    },
    /// The number of latents kept is zero or above the number there are, or groups of latents
    /// would differ in size.
    #[error("k = {k} does not fit d_sae = {d_sae}")]
    K {
        /// Latents kept per row.
        k: usize,
        /// Latents there are.
        d_sae: usize,
    },
    /// A pursuit that picks nothing.
    #[error("a matching pursuit needs at least one iteration")]
    NoIterations,
    /// The decoder bias of a transcoder has the width of what it writes, not of what it reads.
    #[error("a transcoder cannot subtract b_dec from its input")]
    TranscoderCentres,
    /// A matching pursuit takes what it decodes off its input.
    #[error("a matching pursuit cannot be a transcoder")]
    PursuitTranscodes,
}

impl SaeConfig {
    /// An SAE that subtracts `b_dec` from its input, with nothing known of its origin.
    pub fn new(d_in: usize, d_sae: usize, activation: Activation) -> Self {
        Self {
            d_in,
            d_sae,
            activation,
            apply_b_dec_to_input: true,
            normalization: Normalization::None,
            transcodes_to: None,
            joins_heads: false,
            metadata: SaeMetadata::default(),
            other: Map::new(),
        }
    }

    /// Checks that such an SAE can exist.
    ///
    /// # Errors
    /// If a dimension is zero, `k` does not fit, a pursuit has no iterations, or a transcoder is
    /// asked for what it cannot do.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let Self { d_in, d_sae, .. } = *self;
        if d_in == 0 || d_sae == 0 || self.transcodes_to == Some(0) {
            return Err(ConfigError::Empty { d_in, d_sae });
        }
        if self.transcodes_to.is_some() && self.apply_b_dec_to_input {
            return Err(ConfigError::TranscoderCentres);
        }
        match self.activation {
            Activation::MatchingPursuit { max_iterations: Some(0), .. } => {
                Err(ConfigError::NoIterations)
            }
            Activation::MatchingPursuit { .. } if self.transcodes_to.is_some() => {
                Err(ConfigError::PursuitTranscodes)
            }
            Activation::TopK { k, .. } | Activation::AbsTopK { k, .. } if k == 0 || k > d_sae => {
                Err(ConfigError::K { k, d_sae })
            }
            Activation::GroupMax { k } if k == 0 || !d_sae.is_multiple_of(k) => {
                Err(ConfigError::K { k, d_sae })
            }
            _ => Ok(()),
        }
    }

    /// The width of what is decoded.
    pub fn d_out(&self) -> usize {
        self.transcodes_to.unwrap_or(self.d_in)
    }

    /// Whether `b_dec` is added to what is decoded: a matching pursuit adds it back where it was
    /// taken off, the others always.
    pub(crate) fn adds_b_dec(&self) -> bool {
        match self.activation {
            Activation::MatchingPursuit { .. } => self.apply_b_dec_to_input,
            _ => true,
        }
    }
}

impl SaeMetadata {
    /// The first position trained on, where the file says so.
    pub fn first_position(&self) -> Option<usize> {
        // Python's slice takes one argument as the stop, two or three as start, stop and step.
        match self.seqpos_slice.as_deref()? {
            [Some(start), _, ..] => usize::try_from(*start).ok(),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn top_k(k: usize) -> SaeConfig {
        let rescale_by_decoder_norm = false;
        SaeConfig::new(4, 8, Activation::TopK { k, rescale_by_decoder_norm })
    }

    #[test]
    fn k_must_fit() {
        assert_eq!(top_k(8).validate(), Ok(()));
        assert_eq!(top_k(0).validate(), Err(ConfigError::K { k: 0, d_sae: 8 }));
        assert_eq!(top_k(9).validate(), Err(ConfigError::K { k: 9, d_sae: 8 }));
        let empty = SaeConfig { d_in: 0, ..top_k(1) };
        assert_eq!(empty.validate(), Err(ConfigError::Empty { d_in: 0, d_sae: 8 }));
    }

    #[test]
    fn groups_must_be_of_one_size() {
        let groups = |k| SaeConfig::new(4, 8, Activation::GroupMax { k }).validate();
        assert_eq!(groups(4), Ok(()));
        assert_eq!(groups(3), Err(ConfigError::K { k: 3, d_sae: 8 }));
        assert_eq!(groups(0), Err(ConfigError::K { k: 0, d_sae: 8 }));
    }

    #[test]
    fn transcoders_do_not_centre_their_input() {
        let transcoder = SaeConfig { transcodes_to: Some(3), ..top_k(1) };
        assert_eq!(transcoder.validate(), Err(ConfigError::TranscoderCentres));
        let transcoder = SaeConfig { apply_b_dec_to_input: false, ..transcoder };
        assert_eq!(transcoder.validate(), Ok(()));
        let empty = SaeConfig { transcodes_to: Some(0), ..transcoder };
        assert_eq!(empty.validate(), Err(ConfigError::Empty { d_in: 4, d_sae: 8 }));
    }

    #[test]
    fn a_pursuit_picks_something_of_its_input() {
        let pursuit = |max_iterations| Activation::MatchingPursuit {
            residual_threshold: 0.0,
            max_iterations,
            stop_on_duplicate_support: false,
        };
        let config = |max_iterations| SaeConfig::new(4, 8, pursuit(max_iterations));
        assert_eq!(config(None).validate(), Ok(()));
        assert_eq!(config(Some(0)).validate(), Err(ConfigError::NoIterations));
        let transcoder =
            SaeConfig { transcodes_to: Some(3), apply_b_dec_to_input: false, ..config(None) };
        assert_eq!(transcoder.validate(), Err(ConfigError::PursuitTranscodes));
    }

    #[test]
    fn first_position_is_the_start_of_the_slice() {
        let first = |slice: &str| {
            let text = format!(r#"{{"seqpos_slice": {slice}}}"#);
            serde_json::from_str::<SaeMetadata>(&text).expect("valid").first_position()
        };
        assert_eq!(first("[1, null]"), Some(1));
        assert_eq!(first("[2, 10, 1]"), Some(2));
        assert_eq!(first("[null]"), None);
        assert_eq!(first("[10]"), None);
        assert_eq!(first("[-3, null]"), None);
        assert_eq!(first("null"), None);
    }
}
