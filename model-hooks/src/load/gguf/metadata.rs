//! The typed key-value pairs at the head of a GGUF file.

use std::collections::BTreeMap;
use std::fmt;

use thiserror::Error;

/// One value of GGUF metadata.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "a variant is named for the type of its value")]
pub enum MetadataValue {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Array(Vec<MetadataValue>),
}

/// The metadata of a GGUF file, read by key with the type that the caller needs.
///
/// An integer of any width serves where an integer is asked for, since writers differ; nothing
/// else is converted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata(BTreeMap<String, MetadataValue>);

/// Why a metadata key does not give what was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MetadataError {
    /// The key is absent.
    #[error("the metadata lacks `{key}`")]
    Missing {
        /// The key.
        key: String,
    },
    /// The value has another type, or does not fit the type asked for.
    #[error("metadata `{key}` is {actual}, and should be {expected}")]
    Type {
        /// The key.
        key: String,
        /// The type asked for.
        expected: &'static str,
        /// The value, shortened.
        actual: String,
    },
}

impl Metadata {
    /// Adds a pair; false, and nothing added, if the key is there already.
    pub(super) fn insert(&mut self, key: String, value: MetadataValue) -> bool {
        let is_new = !self.0.contains_key(&key);
        if is_new {
            self.0.insert(key, value);
        }
        is_new
    }

    /// The keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// The value of a key, whatever its type.
    pub fn get(&self, key: &str) -> Option<&MetadataValue> {
        self.0.get(key)
    }

    /// `read(key)` if the key is there: `metadata.optional("a.key", Metadata::usize)`.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn optional<'a, T>(
        &'a self,
        key: &str,
        read: impl FnOnce(&'a Self, &str) -> Result<T, MetadataError>,
    ) -> Result<Option<T>, MetadataError> {
        self.0.contains_key(key).then(|| read(self, key)).transpose()
    }

    /// A text.
    ///
    /// # Errors
    /// [`MetadataError`] if the key is absent or not a string.
    pub fn string(&self, key: &str) -> Result<&str, MetadataError> {
        self.typed(key, "a string", MetadataValue::as_str)
    }

    /// A truth value.
    ///
    /// # Errors
    /// [`MetadataError`] if the key is absent or not a boolean.
    pub fn bool(&self, key: &str) -> Result<bool, MetadataError> {
        self.typed(key, "a boolean", |value| match value {
            MetadataValue::Bool(value) => Some(*value),
            _ => None,
        })
    }

    /// A token id.
    ///
    /// # Errors
    /// [`MetadataError`] if the key is absent, not an integer, or not in the range of u32.
    pub fn u32(&self, key: &str) -> Result<u32, MetadataError> {
        self.typed(key, "an integer below 2^32", |value| value.to_u64()?.try_into().ok())
    }

    /// A size.
    ///
    /// # Errors
    /// [`MetadataError`] if the key is absent, not an integer, or negative.
    pub fn usize(&self, key: &str) -> Result<usize, MetadataError> {
        self.typed(key, "a size", |value| value.to_u64()?.try_into().ok())
    }

    /// A real number, of either width.
    ///
    /// # Errors
    /// [`MetadataError`] if the key is absent or not a float.
    pub fn f64(&self, key: &str) -> Result<f64, MetadataError> {
        self.typed(key, "a float", |value| match value {
            MetadataValue::F32(value) => Some((*value).into()),
            MetadataValue::F64(value) => Some(*value),
            _ => None,
        })
    }

    /// A list of texts.
    ///
    /// # Errors
    /// [`MetadataError`] if the key is absent or not an array of strings alone.
    pub fn strings(&self, key: &str) -> Result<Vec<&str>, MetadataError> {
        self.typed(key, "an array of strings", |value| {
            value.as_array()?.iter().map(MetadataValue::as_str).collect()
        })
    }

    /// A list of integers.
    ///
    /// # Errors
    /// [`MetadataError`] if the key is absent or not an array of non-negative integers alone.
    pub fn integers(&self, key: &str) -> Result<Vec<u64>, MetadataError> {
        self.typed(key, "an array of integers", |value| {
            value.as_array()?.iter().map(MetadataValue::to_u64).collect()
        })
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        read: impl FnOnce(&'a MetadataValue) -> Option<T>,
    ) -> Result<T, MetadataError> {
        let key_of_error = || key.to_owned();
        let value = self.get(key).ok_or_else(|| MetadataError::Missing { key: key_of_error() })?;
        read(value).ok_or_else(|| MetadataError::Type {
            key: key_of_error(),
            expected,
            actual: value.to_string(),
        })
    }
}

impl FromIterator<(String, MetadataValue)> for Metadata {
    fn from_iter<I: IntoIterator<Item = (String, MetadataValue)>>(pairs: I) -> Self {
        Self(pairs.into_iter().collect())
    }
}

impl MetadataValue {
    fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(value) => Some(value),
            _ => None,
        }
    }

    fn as_array(&self) -> Option<&[Self]> {
        match self {
            Self::Array(values) => Some(values),
            _ => None,
        }
    }

    fn to_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(value) => Some(value.into()),
            Self::U16(value) => Some(value.into()),
            Self::U32(value) => Some(value.into()),
            Self::U64(value) => Some(value),
            Self::I8(value) => value.try_into().ok(),
            Self::I16(value) => value.try_into().ok(),
            Self::I32(value) => value.try_into().ok(),
            Self::I64(value) => value.try_into().ok(),
            _ => None,
        }
    }
}

/// For messages: long texts are cut, arrays counted.
impl fmt::Display for MetadataValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::U8(value) => write!(f, "{value}"),
            Self::I8(value) => write!(f, "{value}"),
            Self::U16(value) => write!(f, "{value}"),
            Self::I16(value) => write!(f, "{value}"),
            Self::U32(value) => write!(f, "{value}"),
            Self::I32(value) => write!(f, "{value}"),
            Self::U64(value) => write!(f, "{value}"),
            Self::I64(value) => write!(f, "{value}"),
            Self::F32(value) => write!(f, "{value:?}"),
            Self::F64(value) => write!(f, "{value:?}"),
            Self::Bool(value) => write!(f, "{value}"),
            Self::String(value) => {
                let shown: String = value.chars().take(40).collect();
                let more = if shown.len() < value.len() { "…" } else { "" };
                write!(f, "{shown:?}{more}")
            }
            Self::Array(values) => write!(f, "an array of {}", values.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_by_type_and_names_what_is_wrong() {
        let strings = ["a", "b"].map(|text| MetadataValue::String(text.into()));
        let metadata: Metadata = [
            ("n", MetadataValue::I64(7)),
            ("negative", MetadataValue::I8(-1)),
            ("wide", MetadataValue::U64(1 << 32)),
            ("x", MetadataValue::F32(0.5)),
            ("yes", MetadataValue::Bool(true)),
            ("texts", MetadataValue::Array(strings.to_vec())),
            ("mixed", MetadataValue::Array(vec![strings[0].clone(), MetadataValue::U8(1)])),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into_iter()
        .collect();

        assert_eq!(metadata.usize("n"), Ok(7));
        assert_eq!(metadata.f64("x"), Ok(0.5));
        assert_eq!(metadata.bool("yes"), Ok(true));
        assert_eq!(metadata.strings("texts"), Ok(vec!["a", "b"]));
        assert_eq!(metadata.optional("absent", Metadata::u32), Ok(None));
        assert_eq!(metadata.u32("absent"), Err(MetadataError::Missing { key: "absent".into() }));
        for (error, expected) in [
            (metadata.usize("negative").unwrap_err(), "`negative` is -1, and should be a size"),
            (metadata.u32("wide").unwrap_err(), "`wide` is 4294967296, and should be an integer"),
            (metadata.usize("x").unwrap_err(), "`x` is 0.5, and should be a size"),
            (metadata.f64("n").unwrap_err(), "`n` is 7, and should be a float"),
            (metadata.strings("mixed").unwrap_err(), "`mixed` is an array of 2, and should be"),
        ] {
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}
