use zip::CompressionMethod;

use super::*;
use crate::format::tests::zip;

const PATH: &str = "hostile.pt";

/// A pickle, put together opcode by opcode.
#[derive(Clone)]
pub(in crate::format) struct Program(Vec<u8>);

impl Program {
    pub(in crate::format) fn new() -> Self {
        Self(vec![0x80, 2])
    }

    pub(in crate::format) fn then(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(in crate::format) fn text(self, text: &str) -> Self {
        let length = (text.len() as u32).to_le_bytes();
        self.then(b"X").then(&length).then(text.as_bytes())
    }

    pub(in crate::format) fn integer(self, integer: i32) -> Self {
        self.then(b"J").then(&integer.to_le_bytes())
    }

    pub(in crate::format) fn integers(self, integers: &[i32]) -> Self {
        let marked = self.then(b"(");
        integers.iter().fold(marked, |program, i| program.integer(*i)).then(b"t")
    }

    /// The tensor of these strides in the storage of `n` numbers under `key`.
    pub(in crate::format) fn tensor(
        self,
        key: &str,
        n: i32,
        offset: i32,
        shape: &[i32],
        strides: &[i32],
    ) -> Self {
        self.then(b"ctorch._utils\n_rebuild_tensor_v2\n((")
            .text("storage")
            .then(b"ctorch\nFloatStorage\n")
            .text(key)
            .text("cpu")
            .integer(n)
            .then(b"tQ")
            .integer(offset)
            .integers(shape)
            .integers(strides)
            .then(b"\x89ccollections\nOrderedDict\n)RtR")
    }
}

/// An archive with a pickle and storages of floats.
pub(in crate::format) fn archive(program: &Program, storages: &[(&str, &[f32])]) -> Vec<u8> {
    let mut entries = vec![
        ("ae/data.pkl".to_owned(), program.0.clone()),
        ("ae/byteorder".to_owned(), b"little".to_vec()),
    ];
    for (key, values) in storages {
        let bytes = values.iter().copied().flat_map(f32::to_le_bytes).collect();
        entries.push((format!("ae/data/{key}"), bytes));
    }
    zip(&entries, CompressionMethod::Stored)
}

/// A tensor's name, shape and bytes.
type Read = (String, Vec<usize>, Vec<u8>);

fn read(program: &Program) -> Result<Vec<Read>, FormatError> {
    let bytes = archive(program, &[("0", &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])]);
    let path = Path::new(PATH);
    let checkpoint = Checkpoint::read(path, &bytes)?;
    let tensors = checkpoint.tensors.into_iter();
    Ok(tensors.map(|(name, t)| (name, t.shape, t.bytes.into_owned())).collect())
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect()
}

fn one(tensor: impl Fn(Program) -> Program) -> Program {
    tensor(Program::new().then(b"}").text("w")).then(b"s.")
}

#[test]
fn tensors_are_read_along_their_strides() {
    let tensors = read(&one(|p| p.tensor("0", 6, 0, &[3, 2], &[1, 3]))).expect("valid");
    let [(name, shape, bytes)] = &tensors[..] else {
        panic!("{tensors:?}");
    };
    assert_eq!((name.as_str(), &shape[..]), ("w", &[3, 2][..]));
    assert_eq!(floats(bytes), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    let tensors = read(&one(|p| p.tensor("0", 6, 5, &[], &[]))).expect("valid");
    assert_eq!(floats(&tensors[0].2), [6.0]);
}

#[test]
fn plain_values_are_kept_apart() {
    let program = Program::new().then(b"}(").text("activation").text("TopK").text("state");
    let program = program.then(b"}").text("k").integer(7).then(b"s").text("rate");
    let program = program.then(b"G\0\0\0\0\0\0\0\0u.");
    let bytes = archive(&program, &[]);
    let checkpoint = Checkpoint::read(Path::new(PATH), &bytes).expect("valid");
    assert_eq!(checkpoint.values["activation"], Plain::Text("TopK".to_owned()));
    assert_eq!(checkpoint.values["state.k"], Plain::Integer(7));
    assert_eq!(checkpoint.values["rate"], Plain::Other);
    let error = checkpoint.tensors().err().expect("more than tensors");
    assert!(
        matches!(error, FormatError::UnexpectedTensor { tensor, .. } if tensor == "activation")
    );
}

/// What the machine refuses, by what it says of it.
#[test]
fn nothing_is_executed() {
    let call = |module: &str, name: &str| {
        let global = format!("c{module}\n{name}\n");
        Program::new().then(global.as_bytes()).then(b"(").text("true").then(b"tR.")
    };
    for (program, found) in [
        (call("os", "system"), "os.system"),
        (call("builtins", "eval"), "builtins.eval"),
        (call("torch", "load"), "torch.load"),
        (call("torch._utils", "_rebuild_tensor"), "torch._utils._rebuild_tensor"),
        (call("torch", "QInt8Storage"), "torch.QInt8Storage"),
        (call("collections", "OrderedDict"), "another"),
        // INST, OBJ, NEWOBJ, EXT1, PERSID, REDUCE of nothing
        (Program::new().then(b"(ios\nsystem\n."), "0x69"),
        (Program::new().then(b"(o."), "0x6f"),
        (Program::new().then(b"))\x81."), "0x81"),
        (Program::new().then(b"\x82\x01."), "0x82"),
        (Program::new().then(b"P0\n."), "0x50"),
        (Program::new().then(b"))R."), "another"),
        (Program::new().text("os").text("system").then(b"\x93."), "os.system"),
        (Program::new().text("no reference").then(b"Q."), "no tuple"),
        (Program::new().then(b")Q."), "another tuple"),
        (Program::new().then(b"h\0."), "0"),
        (Program::new().then(b"}r\xff\xff\xff\x7f."), "2147483647"),
        (Program::new().then(b"X\xff\xff\xff\xffa."), "the end"),
        (Program::new().then(b"X\x01\0\0\0\xff."), "other bytes"),
        (Program::new().then(b"}K\x01K\x02s."), "others"),
        (Program::new().then(b"\x8a\x09\0\0\0\0\0\0\0\0\x01."), "a longer one"),
        (Program::new().then(b"}b."), "another value"),
        (Program::new().then(b"t."), "none"),
        (Program::new().then(b"}(\x85."), "none"),
        (Program::new().then(b"}(."), "none"),
        (Program::new().then(b"}.N"), "more bytes"),
        (Program(vec![0x80, 9, b'.']), "9"),
        (Program::new().then(b"N."), "another value"),
    ] {
        let error = read(&program).expect_err(found);
        assert!(error.to_string().contains(PATH), "{error}");
        assert!(matches!(&error, FormatError::Pickle { found: f, .. } if f == found), "{error}");
    }
}

#[test]
fn tensors_stay_within_their_storages() {
    for (n, offset, shape, strides) in [
        (6, 0, &[3, 3][..], &[3, 1][..]),
        (6, 1, &[6], &[1]),
        (6, 0, &[7], &[0]),
        (6, 0, &[i32::MAX, i32::MAX, i32::MAX], &[0, 0, 0]),
        (6, 0, &[2], &[1, 1]),
        (6, -1, &[2], &[1]),
        (6, 0, &[-2], &[1]),
        (6, 0, &[2], &[-1]),
        (7, 0, &[6], &[1]),
        (-6, 0, &[6], &[1]),
    ] {
        let error = read(&one(|p| p.tensor("0", n, offset, shape, strides))).unwrap_err();
        assert!(matches!(error, FormatError::Pickle { .. }), "{error:?}");
    }
    let elsewhere = read(&one(|p| p.tensor("1", 6, 0, &[6], &[1]))).unwrap_err();
    assert!(matches!(elsewhere, FormatError::Zip { .. }));
    let above = read(&one(|p| p.tensor("../../data.pkl", 6, 0, &[6], &[1]))).unwrap_err();
    assert!(matches!(above, FormatError::Zip { .. }));
}

#[test]
fn a_storage_is_not_unpacked_without_end() {
    let mut program = Program::new().then(b"}(");
    for i in 0..4096 {
        program = program.text(&i.to_string()).tensor("0", 6, 0, &[6], &[1]);
    }
    // Each takes a few dozen bytes of pickle for as many of memory: that is no bomb.
    read(&program.clone().then(b"u.")).expect("valid");
    let big = vec![0.0; 1 << 20];
    let mut program = Program::new().then(b"}(");
    for i in 0..64 {
        program = program.text(&i.to_string()).tensor("0", 1 << 20, 0, &[1 << 20], &[1]);
    }
    let bytes = archive(&program.then(b"u."), &[("0", &big)]);
    let error = Checkpoint::read(Path::new(PATH), &bytes).err().expect("a bomb");
    assert!(matches!(error, FormatError::Pickle { .. } | FormatError::ZipEntry { .. }));
}

#[test]
fn dictionaries_in_themselves_end() {
    let program = Program::new().then(b"}q\0").text("w").then(b"h\0s.");
    assert!(read(&program).expect("no tensors").is_empty());
    let program = Program::new().then(b"}").text("w").then(b"N");
    let deep = (0..100_000).fold(program, |program, _| program.then(b"\x85"));
    assert!(read(&deep.then(b"s.")).expect("no tensors").is_empty());
}

#[test]
fn every_cut_and_every_flipped_bit_is_survived() {
    let program = one(|p| p.tensor("0", 6, 0, &[3, 2], &[1, 3]));
    let whole = archive(&program, &[("0", &[1.0; 6])]);
    let path = Path::new(PATH);
    for length in 0..whole.len() {
        let error = Checkpoint::read(path, &whole[..length]).err();
        let error = error.unwrap_or_else(|| panic!("{length} bytes are read"));
        assert!(error.to_string().contains(PATH), "{error}");
    }
    for bit in 0..8 * whole.len() {
        let mut damaged = whole.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let _ = Checkpoint::read(path, &damaged);
    }
    for length in 0..program.0.len() {
        read(&Program(program.0[..length].to_vec())).expect_err("cut");
    }
}
