//! Builds the byte-level BPE tokenizer that a GGUF file describes.

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{AddedToken, Tokenizer as Inner};

use super::{TextError, Tokenizer};
use crate::load::Metadata;

/// `LLAMA_TOKEN_TYPE_CONTROL`: shown to the model, and not to the reader.
const CONTROL: u64 = 3;
/// `LLAMA_TOKEN_TYPE_USER_DEFINED`: never split, but text like any other.
const USER_DEFINED: u64 = 4;

/// The splits of Llama 3 and Qwen 2, from their `tokenizer.json`.
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

impl Tokenizer {
    /// Builds the tokenizer that llama.cpp's metadata describes (`tokenizer.ggml.*`).
    ///
    /// # Errors
    /// [`TextError`] if a key is missing, the vocabulary contradicts itself, or it is of a kind
    /// that is not built here.
    pub fn from_gguf(metadata: &Metadata) -> Result<Self, TextError> {
        let model = metadata.string("tokenizer.ggml.model")?;
        if model != "gpt2" {
            return Err(TextError::UnknownModel { actual: model.to_owned() });
        }
        let rule = Rule::from_name(metadata.string("tokenizer.ggml.pre")?)?;
        let tokens = metadata.strings("tokenizer.ggml.tokens")?;
        let vocabulary = |source| TextError::Vocabulary { source };
        let bpe = BPE::builder()
            .vocab_and_merges(vocab(&tokens)?, merges(metadata)?)
            .ignore_merges(matches!(rule, Rule::Llama3))
            .build()
            .map_err(vocabulary)?;

        let mut inner = Inner::new(bpe);
        inner.with_normalizer(matches!(rule, Rule::Qwen2).then_some(NFC));
        inner.with_pre_tokenizer(Some(rule.pre_tokenizer().map_err(vocabulary)?));
        inner.with_decoder(Some(ByteLevel::default()));
        inner.add_tokens(&added_tokens(metadata, &tokens)?);
        Ok(Self::new(inner))
    }
}

fn vocab(tokens: &[&str]) -> Result<Vocab, TextError> {
    let mut vocab = Vocab::with_capacity(tokens.len());
    for (second, &token) in (0..).zip(tokens) {
        if let Some(first) = vocab.insert(token.to_owned(), second) {
            return Err(TextError::DuplicateToken { token: token.to_owned(), first, second });
        }
    }
    Ok(vocab)
}

fn merges(metadata: &Metadata) -> Result<Vec<(String, String)>, TextError> {
    let pair = |(merge_idx, &merge): (usize, &&str)| match merge.split_once(' ') {
        Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
        None => Err(TextError::Merge { merge_idx, actual: merge.to_owned() }),
    };
    metadata.strings("tokenizer.ggml.merges")?.iter().enumerate().map(pair).collect()
}

fn added_tokens(metadata: &Metadata, tokens: &[&str]) -> Result<Vec<AddedToken>, TextError> {
    let types = metadata.integers("tokenizer.ggml.token_type")?;
    if types.len() != tokens.len() {
        return Err(TextError::TokenTypes { expected: tokens.len(), actual: types.len() });
    }
    let added = tokens.iter().zip(types).filter_map(|(&token, kind)| match kind {
        CONTROL => Some(AddedToken::from(token, true)),
        USER_DEFINED => Some(AddedToken::from(token, false).normalized(false)),
        _ => None,
    });
    Ok(added.collect())
}

/// How a text is cut into words before the merges, by the name that llama.cpp's conversion gives
/// it (`tokenizer.ggml.pre`).
#[derive(Clone, Copy)]
enum Rule {
    Gpt2,
    SmolLm,
    Llama3,
    Qwen2,
}

impl Rule {
    fn from_name(name: &str) -> Result<Self, TextError> {
        match name {
            "gpt-2" => Ok(Self::Gpt2),
            "smollm" => Ok(Self::SmolLm),
            "llama-bpe" => Ok(Self::Llama3),
            "qwen2" => Ok(Self::Qwen2),
            _ => Err(TextError::UnknownPreTokenizer {
                supported: "`gpt-2`, `smollm`, `llama-bpe` and `qwen2`",
                actual: name.to_owned(),
            }),
        }
    }

    fn pre_tokenizer(self) -> Result<PreTokenizerWrapper, super::TokenizersError> {
        let bytes = |use_regex| ByteLevel::new(false, true, use_regex).into();
        let regex = |pattern: &str| {
            let pattern = SplitPattern::Regex(pattern.to_owned());
            Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
        };
        Ok(match self {
            Self::Gpt2 => bytes(true),
            Self::SmolLm => Sequence::new(vec![Digits::new(true).into(), bytes(true)]).into(),
            Self::Llama3 => Sequence::new(vec![regex(LLAMA3_SPLIT)?.into(), bytes(false)]).into(),
            Self::Qwen2 => Sequence::new(vec![regex(QWEN2_SPLIT)?.into(), bytes(false)]).into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    use super::*;
    use crate::load::MetadataValue;

    fn strings(texts: &[&str]) -> MetadataValue {
        MetadataValue::Array(texts.iter().map(|&text| MetadataValue::String(text.into())).collect())
    }

    fn read(extra: &[(&str, MetadataValue)]) -> Result<Tokenizer, TextError> {
        let types = [3, 4, 1, 1, 1, 1, 1].map(MetadataValue::I32).to_vec();
        let base = [
            ("tokenizer.ggml.model", MetadataValue::String("gpt2".into())),
            ("tokenizer.ggml.pre", MetadataValue::String("smollm".into())),
            ("tokenizer.ggml.tokens", strings(&["<|end|>", "a b", "a", "b", "Ġ", "1", "ab"])),
            ("tokenizer.ggml.merges", strings(&["a b"])),
            ("tokenizer.ggml.token_type", MetadataValue::Array(types)),
        ];
        let pairs = base.iter().chain(extra);
        let metadata = pairs.map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
        Tokenizer::from_gguf(&metadata)
    }

    #[test]
    fn builds_a_tokenizer() {
        let tokenizer = read(&[]).unwrap();
        assert_eq!(tokenizer.encode("ab 11<|end|>a ba b").unwrap(), [6, 4, 5, 5, 0, 1, 1]);
        assert_eq!(tokenizer.decode_plain(&[6, 1, 0]).unwrap(), "aba b");
        assert_eq!((tokenizer.n_vocab(), tokenizer.special_ids()), (7, &[0][..]));
    }

    #[test]
    fn what_contradicts_itself_or_is_not_built_is_refused() {
        let string = |text: &str| MetadataValue::String(text.into());
        for (key, value, expected) in [
            ("tokenizer.ggml.model", string("llama"), "unknown tokenizer model `llama`"),
            ("tokenizer.ggml.pre", string("tekken"), "unknown pre-tokenizer `tekken`"),
            ("tokenizer.ggml.tokens", strings(&["a", "b", "a"]), "\"a\" has two ids, 0 and 2"),
            ("tokenizer.ggml.tokens", strings(&["a", "b", "ab"]), "3 tokens have 7 types"),
            ("tokenizer.ggml.merges", strings(&["a b", "ab"]), "merge 1 is \"ab\""),
            ("tokenizer.ggml.merges", strings(&["b a"]), "make no tokenizer"),
            ("tokenizer.ggml.merges", MetadataValue::Bool(true), "an array of strings"),
        ] {
            let message = read(&[(key, value)]).unwrap_err().to_string();
            assert!(message.contains(expected), "{key}: {message}");
        }
    }

    #[test]
    fn each_rule_splits_as_published() {
        let text = "I'LL pay  12345 yen!\n\n";
        let splits: [(&str, &[&str]); 4] = [
            ("gpt-2", &["I", "'", "LL", "Ġpay", "Ġ", "Ġ12345", "Ġyen", "!", "ĊĊ"]),
            ("smollm", &["I", "'", "LL", "Ġpay", "ĠĠ", "1", "2", "3", "4", "5", "Ġyen", "!", "ĊĊ"]),
            ("llama-bpe", &["I", "'LL", "Ġpay", "Ġ", "Ġ", "123", "45", "Ġyen", "!ĊĊ"]),
            ("qwen2", &["I", "'LL", "Ġpay", "Ġ", "Ġ", "1", "2", "3", "4", "5", "Ġyen", "!ĊĊ"]),
        ];
        for (name, expected) in splits {
            let mut words = PreTokenizedString::from(text);
            let rule = Rule::from_name(name).unwrap().pre_tokenizer().unwrap();
            rule.pre_tokenize(&mut words).unwrap();
            let words = words.get_splits(OffsetReferential::Original, OffsetType::Byte);
            let words: Vec<&str> = words.into_iter().map(|(word, ..)| word).collect();
            assert_eq!(words, expected, "{name}");
        }
    }
}
