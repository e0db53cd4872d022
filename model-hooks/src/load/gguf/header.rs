//! Reads the header of a GGUF file: metadata, then where each tensor lies.

use std::collections::BTreeMap;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use super::TensorInfo;
use super::metadata::{Metadata, MetadataValue};
use crate::load::LoadError;
use crate::load::element::Element;

/// The longest metadata there is are the vocabulary and its merges, under two million values; a
/// value of one byte takes 24 in memory, so that a file could ask for more than it is worth.
const MAX_VALUES: u64 = 1 << 23;
/// llama.cpp writes no arrays of arrays at all.
const MAX_ARRAY_DEPTH: usize = 4;
/// ggml's own limit (`GGML_MAX_DIMS`).
const MAX_RANK: u32 = 4;
/// The alignment of a file that does not state one.
const DEFAULT_ALIGNMENT: u64 = 32;

pub(super) fn read(
    reader: &mut (impl Read + Seek),
    path: &Path,
) -> Result<(Metadata, BTreeMap<String, TensorInfo>), LoadError> {
    let mut header = Header::new(reader, path)?;
    let magic = header.array("the magic number")?;
    if &magic != b"GGUF" {
        return Err(LoadError::NotGguf { path: path.into(), actual: magic });
    }
    let version = header.u32("the version")?;
    if !matches!(version, 2 | 3) {
        return Err(LoadError::GgufVersion { path: path.into(), actual: version });
    }
    let n_tensors = header.u64("the number of tensors")?;
    let n_pairs = header.u64("the number of metadata pairs")?;
    // Empty names, one byte of value, one dimension.
    header.expect(n_pairs, 8 + 4 + 1, "the metadata")?;
    header.expect(n_tensors, 8 + 4 + 8 + 4 + 8, "the list of tensors")?;

    let mut metadata = Metadata::default();
    for _ in 0..n_pairs {
        let key = header.string("a metadata key")?;
        let tag = header.u32(&key)?;
        let value = header.value(tag, &key, 0)?;
        if !metadata.insert(key.clone(), value) {
            return Err(LoadError::DuplicateKey { path: path.into(), key });
        }
    }
    let tensors = header.tensors(n_tensors, alignment(&metadata, path)?)?;
    Ok((metadata, tensors))
}

fn alignment(metadata: &Metadata, path: &Path) -> Result<u64, LoadError> {
    let stated = metadata
        .optional("general.alignment", Metadata::u32)
        .map_err(|source| LoadError::Config { path: path.into(), source: source.into() })?;
    match stated.map_or(DEFAULT_ALIGNMENT, u64::from) {
        alignment if alignment.is_power_of_two() => Ok(alignment),
        actual => Err(LoadError::Alignment { path: path.into(), actual }),
    }
}

/// A reader that knows how much of its file is left.
struct Header<'a, R> {
    reader: BufReader<&'a mut R>,
    path: &'a Path,
    position: u64,
    len: u64,
    /// Metadata values that may still be read.
    values_left: u64,
}

impl<'a, R: Read + Seek> Header<'a, R> {
    fn new(reader: &'a mut R, path: &'a Path) -> Result<Self, LoadError> {
        let io = |source| LoadError::Io { path: path.into(), source };
        let len = reader.seek(SeekFrom::End(0)).map_err(io)?;
        reader.rewind().map_err(io)?;
        let reader = BufReader::new(reader);
        Ok(Self { reader, path, position: 0, len, values_left: MAX_VALUES })
    }

    /// Checks that `count` things of at least `size` bytes each can still follow.
    fn expect(&self, count: u64, size: u64, what: &str) -> Result<(), LoadError> {
        let (expected, actual) = (count.saturating_mul(size), self.len - self.position);
        match expected <= actual {
            true => Ok(()),
            false => {
                let (path, what) = (self.path.into(), what.to_owned());
                Err(LoadError::Truncated { path, what, expected, actual })
            }
        }
    }

    fn fill(&mut self, bytes: &mut [u8], what: &str) -> Result<(), LoadError> {
        self.expect(bytes.len() as u64, 1, what)?;
        let io = |source| LoadError::Io { path: self.path.into(), source };
        self.reader.read_exact(bytes).map_err(io)?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], LoadError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32, LoadError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, LoadError> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn string(&mut self, what: &str) -> Result<String, LoadError> {
        let len = self.u64(what)?;
        self.expect(len, 1, what)?;
        let mut bytes = vec![0; len as usize];
        self.fill(&mut bytes, what)?;
        String::from_utf8(bytes).map_err(|error| LoadError::NotUtf8 {
            path: self.path.into(),
            what: what.to_owned(),
            source: error.utf8_error(),
        })
    }

    fn value(&mut self, tag: u32, key: &str, depth: usize) -> Result<MetadataValue, LoadError> {
        let path = self.path;
        let encoding = |what, actual| {
            let (path, key) = (path.into(), key.to_owned());
            LoadError::MetadataEncoding { path, key, what, actual }
        };
        Ok(match tag {
            0 => MetadataValue::U8(u8::from_le_bytes(self.array(key)?)),
            1 => MetadataValue::I8(i8::from_le_bytes(self.array(key)?)),
            2 => MetadataValue::U16(u16::from_le_bytes(self.array(key)?)),
            3 => MetadataValue::I16(i16::from_le_bytes(self.array(key)?)),
            4 => MetadataValue::U32(self.u32(key)?),
            5 => MetadataValue::I32(i32::from_le_bytes(self.array(key)?)),
            6 => MetadataValue::F32(f32::from_le_bytes(self.array(key)?)),
            7 => match self.array(key)? {
                [0] => MetadataValue::Bool(false),
                [1] => MetadataValue::Bool(true),
                [other] => return Err(encoding("boolean", other.into())),
            },
            8 => MetadataValue::String(self.string(key)?),
            9 if depth < MAX_ARRAY_DEPTH => MetadataValue::Array(self.values(key, depth + 1)?),
            9 => return Err(encoding("depth of arrays", depth as u32 + 1)),
            10 => MetadataValue::U64(self.u64(key)?),
            11 => MetadataValue::I64(i64::from_le_bytes(self.array(key)?)),
            12 => MetadataValue::F64(f64::from_le_bytes(self.array(key)?)),
            other => return Err(encoding("type", other)),
        })
    }

    fn values(&mut self, key: &str, depth: usize) -> Result<Vec<MetadataValue>, LoadError> {
        let tag = self.u32(key)?;
        let len = self.u64(key)?;
        let size = match tag {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            // An empty array of an unknown type is refused as well.
            _ => 12,
        };
        self.expect(len, size, key)?;
        if len > self.values_left {
            let (path, what) = (self.path.into(), format!("metadata `{key}`"));
            return Err(LoadError::TooLarge { path, what, limit: self.values_left, actual: len });
        }
        self.values_left -= len;
        // With the capacity known, since what grows by doubling takes three times its size.
        let mut values = Vec::with_capacity(len as usize);
        for _ in 0..len {
            values.push(self.value(tag, key, depth)?);
        }
        Ok(values)
    }

    fn tensors(
        &mut self,
        n_tensors: u64,
        alignment: u64,
    ) -> Result<BTreeMap<String, TensorInfo>, LoadError> {
        let mut infos = Vec::new();
        for _ in 0..n_tensors {
            infos.push(self.tensor(alignment)?);
        }
        // Offsets are counted from the first aligned byte after the header.
        let data_start = self.position.next_multiple_of(alignment);
        infos.sort_by_key(|(_, info)| info.offset);
        let mut end = data_start;
        let mut tensors = BTreeMap::new();
        for (name, mut info) in infos {
            let path = || self.path.into();
            info.offset = info.offset.saturating_add(data_start);
            if info.offset < end {
                let expected = format!("{end} or later, after the one before it");
                return Err(LoadError::TensorOffset {
                    path: path(),
                    name,
                    expected,
                    actual: info.offset,
                });
            }
            let expected = info.element.n_bytes(&info.shape).unwrap_or(u64::MAX);
            end = info.offset.saturating_add(expected);
            if end > self.len {
                let (what, actual) =
                    (format!("tensor `{name}`"), self.len.saturating_sub(info.offset));
                return Err(LoadError::Truncated { path: path(), what, expected, actual });
            }
            if tensors.insert(name.clone(), info).is_some() {
                return Err(LoadError::DuplicateTensor { path: path(), name });
            }
        }
        Ok(tensors)
    }

    fn tensor(&mut self, alignment: u64) -> Result<(String, TensorInfo), LoadError> {
        let name = self.string("the name of a tensor")?;
        let rank = self.u32(&name)?;
        if !(1..=MAX_RANK).contains(&rank) {
            let path = self.path.into();
            return Err(LoadError::TensorRank { path, name, limit: MAX_RANK, actual: rank });
        }
        let mut sizes = Vec::new();
        for _ in 0..rank {
            sizes.push(self.u64(&name)?);
        }
        // ggml counts dimensions from the innermost.
        sizes.reverse();
        let ggml_type = self.u32(&name)?;
        let offset = self.u64(&name)?;

        let path = || self.path.into();
        let element = element(ggml_type).map_err(|actual| LoadError::TensorEncoding {
            path: path(),
            name: name.clone(),
            supported: "F64, F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q2_K to Q6_K",
            actual,
        })?;
        let shape: Result<Vec<usize>, _> = sizes.iter().map(|&size| size.try_into()).collect();
        let shape = shape.ok().filter(|shape| element.n_bytes(shape).is_some());
        let Some(shape) = shape else {
            let expected = format!("rows of whole blocks of {}", element.block_len());
            return Err(LoadError::TensorShape { path: path(), name, expected, actual: sizes });
        };
        if !offset.is_multiple_of(alignment) {
            let expected = format!("a multiple of {alignment}");
            return Err(LoadError::TensorOffset { path: path(), name, expected, actual: offset });
        }
        Ok((name, TensorInfo { shape, element, offset }))
    }
}

/// The encoding of a `ggml_type`, or the name of one that is not read here.
fn element(ggml_type: u32) -> Result<Element, String> {
    Ok(match ggml_type {
        0 => Element::F32,
        1 => Element::F16,
        2 => Element::Q4_0,
        3 => Element::Q4_1,
        6 => Element::Q5_0,
        7 => Element::Q5_1,
        8 => Element::Q8_0,
        10 => Element::Q2_K,
        11 => Element::Q3_K,
        12 => Element::Q4_K,
        13 => Element::Q5_K,
        14 => Element::Q6_K,
        28 => Element::F64,
        30 => Element::Bf16,
        15 => return Err("Q8_K".into()),
        20 => return Err("IQ4_NL".into()),
        23 => return Err("IQ4_XS".into()),
        39 => return Err("MXFP4".into()),
        other => return Err(format!("ggml type {other}")),
    })
}
