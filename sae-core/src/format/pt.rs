//! Checkpoints of PyTorch (`torch.save`), read without executing anything.
//!
//! They are zip archives of raw storages, and of a pickle that says which tensors lie where. The
//! pickle is run by a machine that knows tensors, dictionaries and plain values, and refuses
//! everything else.

mod pickle;

use std::collections::BTreeMap;
use std::path::Path;

use super::archive::Archive;
use super::error::FormatError;
use super::tensors::{Element, Stored, Tensors, row_major};
use pickle::{Machine, Storage, Value};

/// The longest pickle that is run, which takes some fifty times as much memory: a state of a
/// thousand tensors has a fifth of it.
const LONGEST_PICKLE: usize = 1 << 20;

/// What a checkpoint holds under the names of its dictionary.
pub(super) struct Checkpoint<'a> {
    path: &'a Path,
    pub(super) tensors: BTreeMap<String, Stored<'a>>,
    /// Entries that are no tensors; those of dictionaries under `outer.inner`.
    pub(super) values: BTreeMap<String, Plain>,
}

/// A value that is no tensor.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Plain {
    Integer(i64),
    Text(String),
    /// Another: nothing that says what an SAE is.
    Other,
}

impl<'a> Checkpoint<'a> {
    /// From the bytes of the file at `path`.
    pub(super) fn read(path: &'a Path, bytes: &'a [u8]) -> Result<Self, FormatError> {
        let mut archive = Archive::new(path, bytes)?;
        let names = archive.names()?;
        let refuse = |entry: &str, expected, found: &str| FormatError::Pickle {
            path: path.to_owned(),
            entry: entry.to_owned(),
            offset: 0,
            expected,
            found: found.to_owned(),
        };
        let pickle = names.iter().find(|name| {
            name.strip_suffix("/data.pkl").is_some_and(|folder| !folder.contains('/'))
        });
        let Some(pickle) = pickle else {
            return Err(refuse("data.pkl", "a pickle in the archive's folder", "none"));
        };
        let folder = pickle.trim_end_matches("data.pkl");
        let order = format!("{folder}byteorder");
        if names.contains(&order) {
            let order = archive.read(&order)?;
            if order != b"little" {
                let found = String::from_utf8_lossy(&order).into_owned();
                return Err(refuse("byteorder", "little", &found));
            }
        }
        let program = archive.read(pickle)?;
        if program.len() > LONGEST_PICKLE {
            return Err(refuse(pickle, "at most 1 MiB", &format!("{} bytes", program.len())));
        }
        let mut machine = Machine::new(&program);
        let root = machine.run().map_err(|stop| FormatError::Pickle {
            path: path.to_owned(),
            entry: pickle.clone(),
            offset: stop.offset,
            expected: stop.expected,
            found: stop.found,
        })?;
        let Value::Dict(root) = root else {
            return Err(refuse(pickle, "a dictionary", "another value"));
        };
        let mut checkpoint = Self { path, tensors: BTreeMap::new(), values: BTreeMap::new() };
        // A storage may be shared; what is made of all of them stays within the archive's size.
        let mut budget = bytes.len().saturating_mul(2);
        for (name, value) in machine.entries(root) {
            match value {
                Value::Tensor(tensor) => {
                    let tensor = machine.tensor(*tensor);
                    let Storage { key, element, n } = machine.storage(tensor.storage);
                    let entry = format!("{folder}data/{key}");
                    let size = element.size().expect("storages are of types that are read");
                    let data = archive.read(&entry)?;
                    if n.checked_mul(size) != Some(data.len()) {
                        let found = format!("{} bytes", data.len());
                        return Err(refuse(&entry, "as many elements as the pickle says", &found));
                    }
                    let bytes =
                        row_major(&data, size, tensor.offset, &tensor.shape, &tensor.strides);
                    let bytes = bytes.filter(|bytes| bytes.len() <= budget).ok_or_else(|| {
                        let found = format!("{:?} of {n} elements", tensor.shape);
                        refuse(&entry, "a tensor within its storage", &found)
                    })?;
                    budget -= bytes.len();
                    let (element, shape) = (element.clone(), tensor.shape.clone());
                    let stored = Stored { element, shape, bytes: bytes.into() };
                    checkpoint.tensors.insert(name.to_owned(), stored);
                }
                Value::Dict(inner) => {
                    for (key, value) in machine.entries(*inner) {
                        let plain = plain(&machine, value);
                        checkpoint.values.insert(format!("{name}.{key}"), plain);
                    }
                }
                value => {
                    checkpoint.values.insert(name.to_owned(), plain(&machine, value));
                }
            }
        }
        Ok(checkpoint)
    }

    /// The tensors of a checkpoint that holds nothing else.
    pub(super) fn tensors(self) -> Result<Tensors<'a>, FormatError> {
        match self.values.into_keys().next() {
            None => Ok(Tensors::new(self.path, self.tensors)),
            Some(tensor) => {
                Err(FormatError::UnexpectedTensor { path: self.path.to_owned(), tensor })
            }
        }
    }
}

fn plain(machine: &Machine, value: &Value) -> Plain {
    match value {
        Value::Integer(integer) => Plain::Integer(*integer),
        Value::Text(text) => Plain::Text(machine.text(*text).to_owned()),
        _ => Plain::Other,
    }
}

/// The type that a storage class of PyTorch's has.
fn element_of(class: &str) -> Option<Element> {
    match class {
        "DoubleStorage" => Some(Element::F64),
        "FloatStorage" => Some(Element::F32),
        "HalfStorage" => Some(Element::F16),
        "BFloat16Storage" => Some(Element::BF16),
        "LongStorage" => Some(Element::I64),
        "IntStorage" => Some(Element::I32),
        _ => None,
    }
}

#[cfg(test)]
pub(super) mod tests;
