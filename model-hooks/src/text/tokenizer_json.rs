//! Checks of a `tokenizer.json` before the inner tokenizer reads it, which trusts the file: some
//! settings make it panic, others make it take memory without bound, or draw from the clock.

use std::collections::HashMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::TextError;

/// Bytes of one token. A Unigram model holds a token as a chain of nodes as long, and drops it by
/// recursion.
const MAX_TOKEN_BYTES: usize = 1024;
/// Regular expressions. Each may take megabytes, whatever its length.
const MAX_PATTERNS: usize = 16;
/// How much longer than its text all replacements together may make it. Those of Llama and Gemma
/// put three bytes for one.
const MAX_GROWTH: usize = 1024;

/// What a `tokenizer.json` states, as far as the inner tokenizer does not check it.
#[derive(Deserialize)]
pub(super) struct Stated {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    decoder: Option<Value>,
    model: Model,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type", default)]
    kind: String,
    continuing_subword_prefix: Option<String>,
    dropout: Option<f64>,
    vocab: Option<Vocab>,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
}

impl Stated {
    /// # Errors
    /// [`TextError`] if the inner tokenizer should not see the file.
    pub fn check(&self) -> Result<(), TextError> {
        self.model.check()?;
        // None in a normalizer: where it gives up on an added token, the inner tokenizer panics.
        let mut bounds = Bounds { patterns_left: 0, growth: 1 };
        self.normalizer.iter().try_for_each(|component| bounds.check(component))?;
        bounds.patterns_left = MAX_PATTERNS;
        for component in [&self.pre_tokenizer, &self.decoder].into_iter().flatten() {
            bounds.check(component)?;
        }
        Ok(())
    }

    /// Each added token with its id.
    pub fn into_added_tokens(self) -> impl Iterator<Item = (String, u32)> {
        self.added_tokens.into_iter().map(|AddedToken { id, content }| (content, id))
    }
}

impl Model {
    fn check(&self) -> Result<(), TextError> {
        // BPE panics on a merge that is shorter than this prefix. No language model sets it.
        if let Some(prefix) = &self.continuing_subword_prefix
            && self.kind != "WordPiece"
            && !prefix.is_empty()
        {
            return Err(setting("continuing_subword_prefix", "nothing", format!("{prefix:?}")));
        }
        // Left over from training: merges would be left out at random.
        if let Some(dropout) = self.dropout.filter(|&dropout| dropout != 0.0) {
            return Err(setting("dropout", "0", dropout));
        }
        let mut ids = HashMap::new();
        for (token, id) in self.vocab.iter().flat_map(|Vocab(tokens)| tokens) {
            if token.len() > MAX_TOKEN_BYTES {
                let actual = format!("a token of {} bytes", token.len());
                return Err(setting("the vocabulary", "tokens of 1024 bytes or less", actual));
            }
            if let Some(first) = ids.insert(token.as_str(), *id) {
                let token = token.clone();
                return Err(TextError::DuplicateToken { token, first, second: *id });
            }
        }
        Ok(())
    }
}

/// What the parts of a tokenizer may take together.
struct Bounds {
    /// Regular expressions that may still come.
    patterns_left: usize,
    /// How many bytes may come of one.
    growth: usize,
}

impl Bounds {
    /// Checks a normalizer, pre-tokenizer or decoder, and what is inside it.
    fn check(&mut self, component: &Value) -> Result<(), TextError> {
        let Value::Object(fields) = component else {
            return match component {
                Value::Array(components) => components.iter().try_for_each(|c| self.check(c)),
                _ => Ok(()),
            };
        };
        let kind = fields.get("type").and_then(Value::as_str).unwrap_or("");
        let number = |field| fields.get(field).and_then(Value::as_u64);
        if fields.contains_key("precompiled_charsmap") || kind == "Precompiled" {
            // Its table is read without any check.
            return Err(setting("a normalizer", "one of another type", "Precompiled"));
        }
        if kind == "FixedLength" && number("length") == Some(0) {
            return Err(setting("the length of FixedLength", "1 or more", 0));
        }
        if kind == "Strip" && number("stop").is_some_and(|stop| stop > 0) {
            // It looks for the last character of a token that has none.
            return Err(setting("the stop of Strip", "0", number("stop").unwrap_or(0)));
        }
        if fields.contains_key("Regex") {
            let left = self.patterns_left.checked_sub(1);
            let expected = "at most 16, and none in a normalizer";
            self.patterns_left =
                left.ok_or_else(|| setting("regular expressions", expected, "more"))?;
        }
        for field in ["content", "prepend"] {
            let len = fields.get(field).and_then(Value::as_str).map_or(0, str::len);
            self.growth = self.growth.saturating_mul(1 + len);
        }
        if self.growth > MAX_GROWTH {
            return Err(setting("replacements", "a few bytes", "many more"));
        }
        fields.values().try_for_each(|field| self.check(field))
    }
}

fn setting(setting: &str, expected: &'static str, actual: impl ToString) -> TextError {
    let (setting, actual) = (setting.to_owned(), actual.to_string());
    TextError::TokenizerSetting { setting, expected, actual }
}

/// The tokens of a model with their ids, in the order of the file. A map would drop the first of
/// two ids of the same token silently.
struct Vocab(Vec<(String, u32)>);

impl<'de> Deserialize<'de> for Vocab {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct VocabVisitor;

        impl<'de> Visitor<'de> for VocabVisitor {
            type Value = Vocab;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from tokens to their ids, or a list of tokens and their scores")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vocab, A::Error> {
                let mut tokens = Vec::new();
                while let Some(token) = map.next_entry()? {
                    tokens.push(token);
                }
                Ok(Vocab(tokens))
            }

            /// A Unigram model, whose ids are the places in the list.
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vocab, A::Error> {
                let mut tokens = Vec::new();
                for id in 0.. {
                    let Some((token, _)) = list.next_element::<(String, f64)>()? else { break };
                    tokens.push((token, id));
                }
                Ok(Vocab(tokens))
            }
        }

        deserializer.deserialize_any(VocabVisitor)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(field: &str, value: Value) -> Result<(), TextError> {
        let mut file = json!({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}});
        match field {
            "dropout" | "continuing_subword_prefix" | "vocab" => file["model"][field] = value,
            _ => file[field] = value,
        }
        serde_json::from_value::<Stated>(file).unwrap().check()
    }

    #[test]
    fn what_real_files_set_passes() {
        // Llama 2, Llama 3 and GPT-2.
        let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
        let prepend = json!({"type": "Prepend", "prepend": "▁"});
        let normalizer = json!({"type": "Sequence", "normalizers": [prepend, replace(" ", "▁")]});
        let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
        let decoder = json!({"type": "Sequence",
            "decoders": [replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}, strip]});
        let split = json!({"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}"},
            "behavior": "Isolated", "invert": false});
        for (field, value) in [
            ("normalizer", normalizer),
            ("decoder", decoder),
            ("pre_tokenizer", json!({"type": "Sequence", "pretokenizers": [split]})),
            ("normalizer", Value::Null),
            ("dropout", Value::Null),
            ("dropout", json!(0.0)),
            ("continuing_subword_prefix", json!("")),
        ] {
            check(field, value).unwrap_or_else(|error| panic!("{field}: {error}"));
        }
    }

    #[test]
    fn what_the_inner_tokenizer_cannot_bear_is_refused() {
        let regex = |kind: &str| json!({"type": kind, "pattern": {"Regex": "a"}, "content": ""});
        let double = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
        let many = |part: Value, n: usize| json!({"type": "Sequence", "parts": vec![part; n]});
        for (field, value, expected) in [
            ("dropout", json!(0.1), "dropout to 0.1"),
            ("continuing_subword_prefix", json!("##"), "continuing_subword_prefix to \"##\""),
            ("vocab", json!({"a".repeat(1025): 0}), "a token of 1025 bytes"),
            ("vocab", json!([["a", 0.0], ["b", 0.0], ["a", 0.0]]), "two ids, 0 and 2"),
            ("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": ""}), "Precomp"),
            ("normalizer", json!([{"precompiled_charsmap": "////"}]), "Precompiled"),
            ("normalizer", regex("Replace"), "none in a normalizer"),
            ("pre_tokenizer", many(regex("Split"), 17), "at most 16"),
            ("normalizer", many(double.clone(), 7), "replacements"),
            ("decoder", many(double, 40), "replacements"),
            ("pre_tokenizer", json!({"type": "FixedLength", "length": 0}), "FixedLength to 0"),
            ("decoder", json!({"type": "Strip", "content": "a", "start": 0, "stop": 1}), "Strip"),
        ] {
            let message = check(field, value).unwrap_err().to_string();
            assert!(message.contains(expected), "{field}: {message}");
        }
    }

    #[test]
    fn a_token_has_one_id() {
        let json = r#"{"model": {"vocab": {"a": 0, "b": 1, "a": 2}}}"#;
        let error = serde_json::from_str::<Stated>(json).unwrap().check().unwrap_err();
        assert_eq!(error.to_string(), "the token \"a\" has two ids, 0 and 2");
    }
}
