//! NumPy's archives of arrays (`.npz`): a zip of `.npy` files. Arrays of objects, which are pickles,
//! are refused.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use super::archive::Archive;
use super::error::FormatError;
use super::tensors::{Element, Stored, Tensors, row_major};

const MAGIC: &[u8] = b"\x93NUMPY";

/// The arrays of the file at `path`, under the names that `rename` gives them.
pub(super) fn read<'a>(
    path: &'a Path,
    bytes: &'a [u8],
    rename: impl Fn(&str) -> String,
) -> Result<Tensors<'a>, FormatError> {
    let mut archive = Archive::new(path, bytes)?;
    let mut arrays = BTreeMap::new();
    for entry in archive.names()? {
        let refuse = |expected| {
            let (path, entry) = (path.to_owned(), entry.clone());
            FormatError::Npy { path, entry, expected }
        };
        let name = entry.strip_suffix(".npy").ok_or_else(|| refuse("a name that ends in .npy"))?;
        let array = array(&archive.read(&entry)?).map_err(refuse)?;
        if arrays.insert(rename(name), array).is_some() {
            return Err(refuse("another name"));
        }
    }
    Ok(Tensors::new(path, arrays))
}

/// An array, or what should have come.
fn array(file: &[u8]) -> Result<Stored<'static>, &'static str> {
    let rest = file.strip_prefix(MAGIC).ok_or("NumPy's magic bytes")?;
    let (version, rest) = rest.split_at_checked(2).ok_or("a version")?;
    let n_length = match version[0] {
        1 => 2,
        2 | 3 => 4,
        _ => return Err("version 1, 2 or 3"),
    };
    let (length, rest) = rest.split_at_checked(n_length).ok_or("the length of a header")?;
    let length = length.iter().rev().fold(0, |length, &byte| length << 8 | usize::from(byte));
    let (header, data) = rest.split_at_checked(length).ok_or("a whole header")?;
    let header = std::str::from_utf8(header).map_err(|_| "a header in UTF-8")?;
    let Header { element, is_column_major, shape } = Literal { rest: header }.header()?;
    let Some(size) = element.size() else {
        // Refused by whoever asks for it, by its name and type.
        return Ok(Stored { element, shape, bytes: Cow::Borrowed(&[]) });
    };
    let n = shape.iter().try_fold(1usize, |n, &axis| n.checked_mul(axis));
    if n.and_then(|n| n.checked_mul(size)) != Some(data.len()) {
        return Err("as many bytes as its shape says");
    }
    let bytes = match is_column_major {
        false => data.to_vec(),
        true => {
            let strides = shape.iter().scan(1, |stride, &axis| {
                let this = *stride;
                *stride *= axis;
                Some(this)
            });
            let strides: Vec<usize> = strides.collect();
            row_major(data, size, 0, &shape, &strides).ok_or("as many bytes as its shape says")?
        }
    };
    Ok(Stored { element, shape, bytes: bytes.into() })
}

struct Header {
    element: Element,
    is_column_major: bool,
    shape: Vec<usize>,
}

/// A Python dictionary, as NumPy writes it.
struct Literal<'a> {
    rest: &'a str,
}

impl Literal<'_> {
    fn header(mut self) -> Result<Header, &'static str> {
        let (mut element, mut is_column_major, mut shape) = (None, None, None);
        self.expect("{").ok_or("a dictionary")?;
        while self.expect("}").is_none() {
            let key = self.string().ok_or("a key")?;
            self.expect(":").ok_or("a colon")?;
            match key.as_str() {
                "descr" => element = Some(element_of(self.string().ok_or("a type of numbers")?)),
                "fortran_order" => is_column_major = Some(self.boolean().ok_or("True or False")?),
                "shape" => shape = Some(self.tuple().ok_or("a shape")?),
                _ => return Err("descr, fortran_order or shape"),
            }
            if self.expect(",").is_none() {
                self.expect("}").ok_or("a comma")?;
                break;
            }
        }
        if !self.rest.trim().is_empty() {
            return Err("nothing behind the dictionary");
        }
        Ok(Header {
            element: element.ok_or("descr")?,
            is_column_major: is_column_major.ok_or("fortran_order")?,
            shape: shape.ok_or("shape")?,
        })
    }

    fn expect(&mut self, token: &str) -> Option<()> {
        self.rest = self.rest.trim_start().strip_prefix(token)?;
        Some(())
    }

    fn string(&mut self) -> Option<String> {
        self.rest = self.rest.trim_start();
        let quote = self.rest.chars().next().filter(|c| "'\"".contains(*c))?;
        let (string, rest) = self.rest[1..].split_once(quote)?;
        self.rest = rest;
        Some(string.to_owned())
    }

    fn boolean(&mut self) -> Option<bool> {
        self.expect("True").map(|()| true).or_else(|| self.expect("False").map(|()| false))
    }

    fn tuple(&mut self) -> Option<Vec<usize>> {
        self.expect("(")?;
        let (numbers, rest) = self.rest.split_once(')')?;
        self.rest = rest;
        let numbers = numbers.trim();
        let numbers = numbers.strip_suffix(',').unwrap_or(numbers);
        if numbers.is_empty() {
            return Some(Vec::new());
        }
        numbers.split(',').map(|number| number.trim().parse().ok()).collect()
    }
}

fn element_of(descr: String) -> Element {
    match descr.as_str() {
        "<f8" => Element::F64,
        "<f4" => Element::F32,
        "<f2" => Element::F16,
        "<i8" => Element::I64,
        "<i4" => Element::I32,
        _ => Element::Other(descr),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn npy(header: &str, data: &[u8]) -> Vec<u8> {
        let mut file = [MAGIC, &[1, 0], &(header.len() as u16).to_le_bytes()].concat();
        file.extend_from_slice(header.as_bytes());
        file.extend_from_slice(data);
        file
    }

    #[test]
    fn arrays_are_read_in_either_order() {
        let data = [0u8, 1, 2, 3, 4, 5].map(|i| f32::from(i).to_le_bytes()).concat();
        let rows = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }     \n";
        let stored = array(&npy(rows, &data)).expect("valid");
        assert_eq!((stored.element, &stored.shape[..]), (Element::F32, &[2, 3][..]));
        assert_eq!(stored.bytes, data);
        let columns = "{'descr': '<f4', 'fortran_order': True, 'shape': (3, 2)}";
        let stored = array(&npy(columns, &data)).expect("valid");
        let expected = [0u8, 3, 1, 4, 2, 5].map(|i| f32::from(i).to_le_bytes()).concat();
        assert_eq!(stored.bytes, expected);
        let line = "{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }";
        assert_eq!(array(&npy(line, &[0; 8])).expect("valid").shape, [1]);
        let number = "{'descr': '<f8', 'fortran_order': False, 'shape': (), }";
        assert!(array(&npy(number, &[0; 8])).expect("valid").shape.is_empty());
    }

    #[test]
    fn headers_that_mean_something_else_are_refused() {
        let refused = |header: &str| array(&npy(header, &[0; 8])).err().expect("refused");
        for (header, expected) in [
            ("", "a dictionary"),
            ("{}", "descr"),
            ("{'descr': [('a', '<f4')], ", "a type of numbers"),
            ("{'descr': '<f4', 'fortran_order': 1", "True or False"),
            ("{'descr': '<f4', 'fortran_order': True, 'shape': (-2,)}", "a shape"),
            ("{'descr': '<f4', 'fortran_order': True, 'shape': (2", "a shape"),
            ("{'descr': '<f4' 'fortran_order': True}", "a comma"),
            ("{'other': 1}", "descr, fortran_order or shape"),
            (
                "{'descr': '<f4', 'fortran_order': True, 'shape': (2,)} or",
                "nothing behind the dictionary",
            ),
            (
                "{'descr': '<f4', 'fortran_order': True, 'shape': (3,)}",
                "as many bytes as its shape says",
            ),
            (
                "{'descr': '<f4', 'fortran_order': True, 'shape': (4611686018427387904, 4)}",
                "as many bytes as its shape says",
            ),
        ] {
            assert_eq!(refused(header), expected, "{header}");
        }
        let objects = "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}";
        let stored = array(&npy(objects, b"a pickle")).expect("an array that nobody asks for");
        assert_eq!(stored.element, Element::Other("|O".to_owned()));
    }

    #[test]
    fn every_cut_is_refused() {
        let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }";
        let whole = npy(header, &[0; 8]);
        array(&whole).expect("valid");
        for length in 0..whole.len() {
            array(&whole[..length]).err().unwrap_or_else(|| panic!("{length} bytes are read"));
        }
    }
}
