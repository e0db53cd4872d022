//! One safetensors file: a JSON header, then the bytes of the tensors.
//!
//! The header is read whole and the tensors one at a time, so that a model needs no more memory
//! than its weights. The checks are those of the `safetensors` crate: the ranges of the tensors
//! must cover the rest of the file without gap or overlap, which leaves no place for anything
//! hidden.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use super::element::Element;
use super::{LoadError, RawTensor, TensorSource};

/// The limit of the `safetensors` crate.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// More dimensions than any model has.
const MAX_RANK: u32 = 16;

/// An opened safetensors file.
#[derive(Debug)]
pub struct Safetensors<R = File> {
    path: PathBuf,
    reader: R,
    tensors: BTreeMap<String, TensorInfo>,
}

/// Where a tensor lies, checked to be inside the file.
#[derive(Debug)]
struct TensorInfo {
    shape: Vec<usize>,
    dtype: String,
    /// From the start of the file.
    offset: u64,
}

impl Safetensors {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// [`LoadError`] if the file cannot be read, or its header is damaged.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let file =
            File::open(path).map_err(|source| LoadError::Io { path: path.into(), source })?;
        Self::read(file, path)
    }
}

impl<R: Read + Seek> Safetensors<R> {
    /// Reads the header of what `reader` gives; `path` is for messages.
    ///
    /// # Errors
    /// As [`Safetensors::open`].
    pub fn read(mut reader: R, path: &Path) -> Result<Self, LoadError> {
        let io = |source| LoadError::Io { path: path.into(), source };
        let truncated = |what: &str, expected, actual| {
            let (path, what) = (path.into(), what.to_owned());
            LoadError::Truncated { path, what, expected, actual }
        };
        let file_len = reader.seek(SeekFrom::End(0)).map_err(io)?;
        reader.rewind().map_err(io)?;
        let Some(after_len) = file_len.checked_sub(8) else {
            return Err(truncated("the length of the header", 8, file_len));
        };
        let mut len = [0; 8];
        reader.read_exact(&mut len).map_err(io)?;
        let header_len = u64::from_le_bytes(len);
        let Some(data_len) = after_len.checked_sub(header_len) else {
            return Err(truncated("the header", header_len, after_len));
        };
        if header_len > MAX_HEADER_BYTES {
            let (path, what, limit) = (path.into(), "the header".to_owned(), MAX_HEADER_BYTES);
            return Err(LoadError::TooLarge { path, what, limit, actual: header_len });
        }
        let mut header = vec![0; header_len as usize];
        reader.read_exact(&mut header).map_err(io)?;
        let Header(entries) = serde_json::from_slice(&header)
            .map_err(|source| LoadError::Json { path: path.into(), source })?;
        let tensors = check(entries, 8 + header_len, data_len, path)?;
        Ok(Self { path: path.into(), reader, tensors })
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }
}

impl<R: Read + Seek> TensorSource for Safetensors<R> {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn tensor(&mut self, name: &str) -> Result<RawTensor, LoadError> {
        let path = || self.path.clone();
        let name = || name.to_owned();
        let Some(info) = self.tensors.get(&name()) else {
            return Err(LoadError::MissingTensor { path: path(), name: name() });
        };
        let element = element(&info.dtype).ok_or_else(|| LoadError::TensorEncoding {
            path: path(),
            name: name(),
            supported: "F64, F32, F16 and BF16",
            actual: info.dtype.clone(),
        })?;
        let io = |source| LoadError::Io { path: path(), source };
        self.reader.seek(SeekFrom::Start(info.offset)).map_err(io)?;
        let n_values = info.shape.iter().product();
        let values = element.read(&mut self.reader, n_values).map_err(io)?;
        Ok(RawTensor { shape: info.shape.clone(), values })
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

/// Checks that the tensors cover `data_len` bytes exactly, and that each has as many as it needs.
fn check(
    mut entries: Vec<(String, Entry)>,
    data_start: u64,
    data_len: u64,
    path: &Path,
) -> Result<BTreeMap<String, TensorInfo>, LoadError> {
    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    let path = || path.to_owned();
    let mut end = 0;
    let mut tensors = BTreeMap::new();
    for (name, entry) in entries {
        let Entry { dtype, shape: sizes, data_offsets: [begin, next] } = entry;
        if begin != end || next < begin {
            let expected = format!("{end} of the data, and end after that");
            return Err(LoadError::TensorOffset { path: path(), name, expected, actual: begin });
        }
        if next > data_len {
            let (what, expected) = (format!("tensor `{name}`"), next - begin);
            let actual = data_len - begin;
            return Err(LoadError::Truncated { path: path(), what, expected, actual });
        }
        end = next;
        if sizes.len() > MAX_RANK as usize {
            let actual = u32::try_from(sizes.len()).unwrap_or(u32::MAX);
            return Err(LoadError::TensorRank { path: path(), name, limit: MAX_RANK, actual });
        }
        // An encoding that is not known is an error only where that tensor is asked for: old
        // checkpoints carry integer buffers that no model reads.
        let n_bytes = match element(&dtype) {
            None => Some(next - begin),
            Some(element) => usizes(&sizes).and_then(|shape| element.n_bytes(&shape)),
        };
        let (Some(expected), Some(shape)) = (n_bytes, usizes(&sizes)) else {
            let expected = "a size that fits in memory".to_owned();
            return Err(LoadError::TensorShape { path: path(), name, expected, actual: sizes });
        };
        if expected != next - begin {
            let actual = next - begin;
            return Err(LoadError::TensorBytes { path: path(), name, expected, actual });
        }
        let info = TensorInfo { shape, dtype, offset: data_start + begin };
        if tensors.insert(name.clone(), info).is_some() {
            return Err(LoadError::DuplicateTensor { path: path(), name });
        }
    }
    match end == data_len {
        true => Ok(tensors),
        false => {
            let name = "__metadata__".to_owned();
            Err(LoadError::TensorBytes { path: path(), name, expected: end, actual: data_len })
        }
    }
}

fn usizes(sizes: &[u64]) -> Option<Vec<usize>> {
    sizes.iter().map(|&size| size.try_into().ok()).collect()
}

fn element(dtype: &str) -> Option<Element> {
    match dtype {
        "F64" => Some(Element::F64),
        "F32" => Some(Element::F32),
        "F16" => Some(Element::F16),
        "BF16" => Some(Element::Bf16),
        _ => None,
    }
}

/// The tensors of a header in the order of the file. A map would drop the first of two tensors of
/// the same name silently.
struct Header(Vec<(String, Entry)>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    /// From the end of the header.
    data_offsets: [u64; 2],
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;

        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from tensor names to their dtype, shape and data_offsets")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<BTreeMap<String, String>>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(Header(entries))
            }
        }

        deserializer.deserialize_map(HeaderVisitor)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;
    use safetensors::tensor::{Dtype, TensorView, serialize};

    use super::*;

    fn file(header: &str, n_bytes: usize) -> Vec<u8> {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.resize(file.len() + n_bytes, 0);
        file
    }

    fn read(bytes: &[u8]) -> Result<Vec<RawTensor>, LoadError> {
        let mut file = Safetensors::read(Cursor::new(bytes), Path::new("tiny.safetensors"))?;
        file.names().iter().map(|name| file.tensor(name)).collect()
    }

    fn refusal(header: &str, n_bytes: usize) -> String {
        read(&file(header, n_bytes)).unwrap_err().to_string()
    }

    /// Two tensors, as the `safetensors` crate writes them.
    fn good() -> Vec<u8> {
        let a: Vec<u8> = [1.0f32, -2.0, 0.5].iter().flat_map(|x| x.to_le_bytes()).collect();
        let b = [0x80, 0x3f, 0x00, 0xc0];
        let views = [
            ("a", TensorView::new(Dtype::F32, vec![3, 1], &a).unwrap()),
            ("b", TensorView::new(Dtype::BF16, vec![2], &b).unwrap()),
        ];
        let note = [("format".to_owned(), "pt".to_owned())];
        serialize(views, Some(note.into_iter().collect())).unwrap()
    }

    #[test]
    fn reads_what_the_crate_writes() {
        let expected = [
            RawTensor { shape: vec![3, 1], values: vec![1.0, -2.0, 0.5] },
            RawTensor { shape: vec![2], values: vec![1.0, -2.0] },
        ];
        assert_eq!(read(&good()).unwrap(), expected);
        let mut opened = Safetensors::read(Cursor::new(good()), Path::new("x")).unwrap();
        assert!(opened.has("a") && !opened.has("c"));
        assert!(matches!(opened.tensor("c"), Err(LoadError::MissingTensor { .. })));
    }

    #[test]
    fn no_truncation_and_no_flipped_bit_panics() {
        let mut file = good();
        for len in 0..file.len() {
            assert!(read(&file[..len]).is_err(), "{len} bytes");
        }
        for byte_idx in 0..file.len() {
            for bit in 0..8 {
                file[byte_idx] ^= 1 << bit;
                let _ = read(&file);
                file[byte_idx] ^= 1 << bit;
            }
        }
    }

    proptest! {
        #[test]
        fn accepts_no_more_than_the_crate(
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)
        ) {
            let mut file = good();
            for (place, byte) in edits {
                let place = place.index(file.len());
                file[place] = byte;
            }
            if read(&file).is_ok() {
                prop_assert!(safetensors::SafeTensors::deserialize(&file).is_ok());
            }
        }
    }

    #[test]
    fn a_bad_header_is_refused_by_what_is_wrong() {
        let entry = |name: &str, shape: &str, begin: u64, end: u64| {
            format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
        };
        let one = |shape, begin, end| format!("{{{}}}", entry("w", shape, begin, end));
        let two = |a: String, b: String| format!("{{{a},{b}}}");
        for (header, n_bytes, expected) in [
            (one("[2]", 0, 8), 7, "tensor `w` takes 8 bytes, and 7 are left"),
            (one("[2]", 0, 4), 4, "tensor `w` needs 8 bytes, and has 4"),
            (one("[2]", 0, 8), 9, "needs 8 bytes, and has 9"),
            (one("[2]", 4, 12), 12, "tensor `w` begins at byte 4, and should at 0"),
            (one("[2]", 8, 0), 8, "tensor `w` begins at byte 8"),
            (one("[4294967296,4294967296]", 0, 0), 0, "a size that fits in memory"),
            (one("[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]", 0, 4), 4, "has 17 dimensions"),
            (two(entry("w", "[1]", 0, 4), entry("w", "[1]", 4, 8)), 8, "tensor `w` twice"),
            (two(entry("v", "[2]", 0, 8), entry("w", "[1]", 4, 8)), 8, "should at 8"),
            ("[]".to_owned(), 0, "not the JSON"),
            (r#"{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,0]}}"#.to_owned(), 0, "JSON"),
            (r#"{"w":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#.to_owned(), 8, "as I64"),
        ] {
            let message = refusal(&header, n_bytes);
            assert!(message.contains(expected), "{header}: {message}");
        }
        let long = read(&u64::MAX.to_le_bytes()).unwrap_err().to_string();
        assert!(long.contains("the header takes 18446744073709551615 bytes"), "{long}");
    }
}
