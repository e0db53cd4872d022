//! The index of weights that are spread over several safetensors files.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fmt;
use std::path::{Component, Path};

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use super::{LoadError, read_text};

/// `model.safetensors.index.json`: which file each tensor is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardIndex {
    shard_of: BTreeMap<String, String>,
}

impl ShardIndex {
    /// Reads an index.
    ///
    /// # Errors
    /// [`LoadError`] if the file cannot be read, or as [`from_json`](Self::from_json).
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        Self::from_json(&read_text(path)?, path)
    }

    /// Reads the text of an index; `path` is for messages.
    ///
    /// # Errors
    /// [`LoadError`] if it is not JSON, places a tensor twice, or names a shard that is not the
    /// name of a file in its folder.
    pub fn from_json(json: &[u8], path: &Path) -> Result<Self, LoadError> {
        let Index { weight_map: WeightMap(pairs) } = serde_json::from_slice(json)
            .map_err(|source| LoadError::Json { path: path.into(), source })?;
        let mut shard_of = BTreeMap::new();
        for (name, shard) in pairs {
            if !is_base_name(&shard) {
                return Err(LoadError::ShardName { path: path.into(), name: shard });
            }
            if shard_of.insert(name.clone(), shard).is_some() {
                return Err(LoadError::DuplicateTensor { path: path.into(), name });
            }
        }
        Ok(Self { shard_of })
    }

    /// The names of the shards, sorted.
    pub fn shards(&self) -> BTreeSet<&str> {
        self.shard_of.values().map(String::as_str).collect()
    }

    /// Each tensor with the name of its shard, sorted.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &str)> {
        self.shard_of.iter().map(|(name, shard)| (name.as_str(), shard.as_str()))
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: WeightMap,
}

/// Each tensor with its shard, in the order of the file. A map would drop the first of two shards
/// of the same tensor silently.
struct WeightMap(Vec<(String, String)>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct WeightMapVisitor;

        impl<'de> Visitor<'de> for WeightMapVisitor {
            type Value = WeightMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from tensor names to the names of their shards")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(WeightMap(pairs))
            }
        }

        deserializer.deserialize_map(WeightMapVisitor)
    }
}

/// An index is foreign: a path in it could name any file that this process may read.
fn is_base_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    components.next() == Some(Component::Normal(OsStr::new(name)))
        && components.next().is_none()
        && !name.contains(['/', '\\', '\0'])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<ShardIndex, LoadError> {
        ShardIndex::from_json(json.as_bytes(), Path::new("index.json"))
    }

    #[test]
    fn tells_the_shard_of_each_tensor() {
        let json =
            r#"{"metadata": {"total_size": 8}, "weight_map": {"b": "2", "a": "1", "c": "1"}}"#;
        let index = read(json).unwrap();
        assert_eq!(index.tensors().collect::<Vec<_>>(), [("a", "1"), ("b", "2"), ("c", "1")]);
        assert_eq!(index.shards().into_iter().collect::<Vec<_>>(), ["1", "2"]);
    }

    #[test]
    fn a_tensor_has_one_shard() {
        let error = read(r#"{"weight_map": {"a": "1", "a": "2"}}"#).unwrap_err();
        assert_eq!(error.to_string(), "`index.json` has the tensor `a` twice");
        let error = read(r#"{"weight_map": {}, "weight_map": {}}"#).unwrap_err();
        assert!(matches!(error, LoadError::Json { .. }), "{error}");
    }

    #[test]
    fn a_shard_is_a_file_in_the_folder() {
        for name in
            ["../1.safetensors", "/etc/passwd", "a/b", "a\\\\b", "..", ".", "", "a\\u0000", "./a"]
        {
            let error = read(&format!(r#"{{"weight_map": {{"a": "{name}"}}}}"#)).unwrap_err();
            assert!(matches!(error, LoadError::ShardName { .. }), "{name:?}: {error}");
        }
    }
}
