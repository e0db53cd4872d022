//! Text to token ids and back.

use tokenizers::decoders::DecoderWrapper;
use tokenizers::{Decoder, PostProcessorWrapper};

use super::TextError;
use super::tokenizer_json::Stated;
use crate::config::ModelConfig;

/// A model's tokenizer.
///
/// Never adds a token that the text does not show: no opening token, no padding, no cut.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    n_vocab: usize,
    special_ids: Vec<u32>,
}

impl Tokenizer {
    /// Reads the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`TextError`] if it describes no tokenizer, or its tokens would not get the ids that it
    /// states.
    pub fn from_json(json: &[u8]) -> Result<Self, TextError> {
        // First, because the inner tokenizer panics on what is not JSON.
        let stated: Stated = serde_json::from_slice(json)
            .map_err(|error| TextError::TokenizerJson { source: error.into() })?;
        stated.check()?;
        let inner = tokenizers::Tokenizer::from_bytes(json)
            .map_err(|source| TextError::TokenizerJson { source })?;
        // It counts on from the vocabulary's size whatever id an added token states, which is
        // another one where the vocabulary has a hole.
        for (token, expected) in stated.into_added_tokens() {
            let actual = inner.token_to_id(&token);
            if actual != Some(expected) {
                return Err(TextError::TokenId { token, expected, actual });
            }
        }
        Ok(Self::new(inner))
    }

    pub(super) fn new(mut inner: tokenizers::Tokenizer) -> Self {
        // Files carry the settings of somebody's training run, which would cut long texts silently.
        inner.with_padding(None);
        // Fails only for a truncation with too long a stride.
        let _ = inner.with_truncation(None);
        // It adds tokens, of which none are wanted, and a damaged one repeats the text or drops it.
        inner.with_post_processor(None::<PostProcessorWrapper>);
        // One more than the largest id: files may leave ids out.
        let n_vocab = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let added = inner.get_added_tokens_decoder();
        let mut special_ids: Vec<u32> =
            added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect();
        special_ids.sort_unstable();
        Self { inner, n_vocab, special_ids }
    }

    /// The ids of a text. Special tokens written out in the text become their ids.
    ///
    /// # Errors
    /// [`TextError::Encode`] if the text has a character that the vocabulary cannot express.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.inner
            .encode_fast(text, false)
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|source| TextError::Encode { source })
    }

    /// The text of a sequence of ids, with its special tokens written out. Bytes that are no
    /// UTF-8, as where a character is cut, become `U+FFFD`.
    ///
    /// # Errors
    /// [`TextError::UnknownToken`] if an id stands for no token.
    pub fn decode(&self, token_ids: &[u32]) -> Result<String, TextError> {
        self.decode_as(token_ids, false)
    }

    /// [`decode`](Self::decode) without the special tokens.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub fn decode_plain(&self, token_ids: &[u32]) -> Result<String, TextError> {
        self.decode_as(token_ids, true)
    }

    fn decode_as(&self, token_ids: &[u32], skip_special: bool) -> Result<String, TextError> {
        // The inner tokenizer drops ids that it does not know.
        if let Some(&token_id) = token_ids.iter().find(|&&id| self.inner.id_to_token(id).is_none())
        {
            return Err(TextError::UnknownToken { token_id });
        }
        // The BPE decoder subtracts one from the number of tokens without a look, which panics where
        // overflow is checked.
        let is_kept = |&id: &u32| {
            let added = self.inner.get_added_vocabulary();
            let piece = self.inner.id_to_token(id);
            !skip_special || !piece.is_some_and(|piece| added.is_special_token(&piece))
        };
        if !token_ids.iter().any(is_kept) {
            return Ok(String::new());
        }
        self.inner.decode(token_ids, skip_special).map_err(|source| TextError::Decode { source })
    }

    /// One token as a reader wants to see it: `" the"` rather than `"Ġthe"`. A token that is part
    /// of a character is given as the vocabulary spells it.
    pub fn token(&self, token_id: u32) -> Option<String> {
        let piece = self.inner.id_to_token(token_id)?;
        if self.inner.get_added_vocabulary().simple_id_to_token(token_id).is_some() {
            return Some(piece);
        }
        match self.inner.get_decoder() {
            Some(DecoderWrapper::ByteLevel(bytes)) => {
                let text = bytes.decode_chain(vec![piece.clone()]).ok()?.concat();
                Some(if text.contains(char::REPLACEMENT_CHARACTER) { piece } else { text })
            }
            // SentencePiece: its decoders would take the space from a text's first token.
            _ => Some(piece.replace('▁', " ")),
        }
    }

    /// The id of a token, as the vocabulary spells it: `"Ġthe"`, `"<|im_end|>"`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// One more than the largest id.
    pub fn n_vocab(&self) -> usize {
        self.n_vocab
    }

    /// The ids of the special tokens, sorted.
    pub fn special_ids(&self) -> &[u32] {
        &self.special_ids
    }

    /// Checks that the model has an embedding for every id. It may have more: many are padded.
    ///
    /// # Errors
    /// [`TextError::DoesNotFit`] if an id is beyond the model's vocabulary.
    pub fn check_fits(&self, config: &ModelConfig) -> Result<(), TextError> {
        let (d_vocab, n_vocab) = (config.d_vocab, self.n_vocab);
        match n_vocab <= d_vocab {
            true => Ok(()),
            false => Err(TextError::DoesNotFit { d_vocab, actual: n_vocab - 1 }),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A byte-level tokenizer, with all that could add to a text or cut it.
    fn tiny(extra: &[(&str, Value)]) -> Result<Tokenizer, TextError> {
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true});
        let mut file = json!({
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst",
                "stride": 0},
            "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "a"},
            "added_tokens": added("<s>", 5),
            "normalizer": null,
            "pre_tokenizer": byte_level,
            "post_processor": {"type": "TemplateProcessing", "pair": [],
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [5], "tokens": ["<s>"]}}},
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "ð": 4},
                "merges": ["a b"]},
        });
        for (key, value) in extra {
            file[key] = value.clone();
        }
        Tokenizer::from_json(&serde_json::to_vec(&file).unwrap())
    }

    fn added(content: &str, id: u32) -> Value {
        json!([{"id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true}])
    }

    #[test]
    fn no_tokens_are_no_text_whatever_the_decoder() {
        let bpe = json!({"type": "BPEDecoder", "suffix": "</w>"});
        for decoder in [("decoder", bpe), ("decoder", Value::Null)] {
            let tokenizer = tiny(&[decoder]).unwrap();
            assert_eq!(tokenizer.decode(&[]).unwrap(), "");
            assert_eq!(tokenizer.decode_plain(&[5, 5]).unwrap(), "");
            assert_eq!(tokenizer.decode_plain(&[5, 2]).unwrap(), "ab");
        }
    }

    #[test]
    fn adds_nothing_and_cuts_nothing() {
        let tokenizer = tiny(&[]).unwrap();
        assert_eq!(tokenizer.encode("ab a<s>bb").unwrap(), [2, 3, 0, 5, 1, 1]);
        assert_eq!(tokenizer.decode(&[2, 3, 0, 5, 1]).unwrap(), "ab a<s>b");
        assert_eq!(tokenizer.decode_plain(&[2, 3, 0, 5, 1]).unwrap(), "ab ab");
        assert!(tokenizer.encode("").unwrap().is_empty());
    }

    #[test]
    fn knows_its_tokens() {
        let tokenizer = tiny(&[]).unwrap();
        assert_eq!(tokenizer.n_vocab(), 6);
        assert_eq!(tokenizer.special_ids(), [5]);
        assert_eq!(tokenizer.token_id("ab"), Some(2));
        let tokens = [3, 5, 4, 6].map(|id| tokenizer.token(id));
        assert_eq!(tokens, [Some(" ".into()), Some("<s>".into()), Some("ð".into()), None]);
        let error = tokenizer.decode(&[0, 6]).unwrap_err();
        assert!(matches!(error, TextError::UnknownToken { token_id: 6 }), "{error}");
    }

    #[test]
    fn a_token_keeps_the_id_that_the_file_states() {
        let error = tiny(&[("added_tokens", added("<s>", 7))]).unwrap_err();
        assert!(error.to_string().contains("\"<s>\" should have the id 7"), "{error}");
        let error = tiny(&[("added_tokens", added("b", 2))]).unwrap_err();
        assert!(matches!(error, TextError::TokenId { actual: Some(1), .. }), "{error}");
    }

    #[test]
    fn pieces_of_sentencepiece_keep_their_space() {
        let decoder = json!({"type": "Metaspace", "replacement": "▁",
            "prepend_scheme": "always", "split": true});
        let vocab = json!({"▁the": 0, "a": 1, "b": 2, "c": 3, "d": 4});
        let model = json!({"type": "BPE", "vocab": vocab, "merges": []});
        let tokenizer = tiny(&[("decoder", decoder), ("model", model)]).unwrap();
        assert_eq!(tokenizer.token(0).unwrap(), " the");
    }

    #[test]
    fn a_broken_file_is_an_error() {
        for json in [
            "",
            "{}",
            "[1]",
            r#"{"version": "1.0", "model": {"type": "BPE"}}"#,
            r#"{"version": "1.0", "decoder": {"type" "ByteLevel"}, "model": {"type": "BPE"}}"#,
        ] {
            let read = Tokenizer::from_json(json.as_bytes());
            assert!(matches!(read, Err(TextError::TokenizerJson { .. })), "{json}");
        }
    }
}
