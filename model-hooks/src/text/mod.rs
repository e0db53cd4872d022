//! Between text and token ids: the tokenizer, and the layout of a conversation.

mod chat_template;
mod gguf_tokenizer;
mod tokenizer;
mod tokenizer_json;

use thiserror::Error;

use crate::load::MetadataError;

pub use chat_template::{ChatTemplate, Message, Role};
pub use tokenizer::Tokenizer;

/// What the `tokenizers` crate fails with.
type TokenizersError = Box<dyn std::error::Error + Send + Sync>;

/// Why a tokenizer or chat template cannot be read or used.
#[derive(Debug, Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the fields are named for what the message says of them")]
pub enum TextError {
    /// A metadata key is absent, or of another type than it should be.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// `tokenizer.json` describes no tokenizer.
    #[error("not the JSON of a tokenizer")]
    TokenizerJson { source: TokenizersError },
    /// A token that would not get the id that the file states.
    #[error("the token {token:?} should have the id {expected}, and would have {actual:?}")]
    TokenId { token: String, expected: u32, actual: Option<u32> },
    /// A setting of `tokenizer.json` that is not built here, or makes no sense.
    #[error("the tokenizer sets {setting} to {actual}, and should to {expected}")]
    TokenizerSetting { setting: String, expected: &'static str, actual: String },
    /// A kind of GGUF tokenizer that is not built here.
    #[error(
        "unknown tokenizer model `{actual}`; `gpt2` (byte-level BPE) is supported, other models \
         need the folder with their `tokenizer.json`"
    )]
    UnknownModel { actual: String },
    /// A way to split words that is not built here.
    #[error(
        "unknown pre-tokenizer `{actual}`; {supported} are supported, other models need the folder \
         with their `tokenizer.json`"
    )]
    UnknownPreTokenizer { supported: &'static str, actual: String },
    /// Not one type for each token.
    #[error("{expected} tokens have {actual} types")]
    TokenTypes { expected: usize, actual: usize },
    /// Two ids for the same token.
    #[error("the token {token:?} has two ids, {first} and {second}")]
    DuplicateToken { token: String, first: u32, second: u32 },
    /// A merge that is not two tokens.
    #[error("merge {merge_idx} is {actual:?}, and should be two tokens with a space between")]
    Merge { merge_idx: usize, actual: String },
    /// The parts of the tokenizer do not fit each other.
    #[error("the vocabulary and the merges make no tokenizer")]
    Vocabulary { source: TokenizersError },
    /// Text that cannot be encoded.
    #[error("cannot encode the text")]
    Encode { source: TokenizersError },
    /// Ids that cannot be decoded.
    #[error("cannot decode the token ids")]
    Decode { source: TokenizersError },
    /// An id that stands for no token.
    #[error("no token has the id {token_id}")]
    UnknownToken { token_id: u32 },
    /// A tokenizer of another model.
    #[error("the tokenizer has ids up to {actual}, and the model a vocabulary of {d_vocab}")]
    DoesNotFit { d_vocab: usize, actual: usize },
    /// `tokenizer_config.json` is not what it should be.
    #[error("not the JSON of a tokenizer's config")]
    TokenizerConfigJson { source: serde_json::Error },
    /// A template that is not UTF-8.
    #[error("the chat template is not UTF-8")]
    TemplateUtf8 { source: std::str::Utf8Error },
    /// Several templates, and none of them the default.
    #[error("no chat template is named `default`, but {actual:?}")]
    NoDefaultTemplate { actual: Vec<String> },
    /// A template that is longer than any real one.
    #[error("the chat template has {actual} bytes; at most {limit} are read")]
    TemplateTooLong { limit: usize, actual: usize },
    /// A template that is no Jinja, or uses what is not built here.
    #[error("the chat template cannot be parsed")]
    TemplateSyntax { source: minijinja::Error },
    /// A template that refuses the conversation, or runs wild.
    #[error("the chat template does not take this conversation")]
    TemplateRender { source: minijinja::Error },
}
