//! The part of Python's pickle machine that a dictionary of tensors needs.
//!
//! Nothing is called: where a pickle asks for a call, one of three known ones is understood, and any
//! other name is refused when it is named. Values lie in flat tables and refer to each other by
//! number, so that nothing recurses, and each byte of the pickle makes at most a few words.

use crate::format::tensors::Element;

/// A value on the stack; what is more than a word is a place in a table.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Value {
    None,
    Bool,
    Integer(i64),
    Float,
    Text(usize),
    Tuple(usize),
    List,
    Dict(usize),
    Global(Global),
    StorageClass(usize),
    Storage(usize),
    Tensor(usize),
}

/// What may be called.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
}

/// A run of numbers in a file of the archive.
pub(super) struct Storage {
    /// The file's name.
    pub(super) key: String,
    pub(super) element: Element,
    /// How many there are.
    pub(super) n: usize,
}

/// Some of the numbers of a storage.
pub(super) struct Tensor {
    pub(super) storage: usize,
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
}

/// Why a pickle was not run to its end.
pub(super) struct Stop {
    pub(super) offset: usize,
    pub(super) expected: &'static str,
    pub(super) found: String,
}

/// The machine, and what it has made.
pub(super) struct Machine<'a> {
    program: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: Vec<Option<Value>>,
    texts: Vec<&'a str>,
    tuples: Vec<Vec<Value>>,
    dicts: Vec<Vec<(usize, Value)>>,
    classes: Vec<Element>,
    storages: Vec<Storage>,
    tensors: Vec<Tensor>,
}

type Result<T> = std::result::Result<T, Stop>;

impl<'a> Machine<'a> {
    pub(super) fn new(program: &'a [u8]) -> Self {
        Self {
            program,
            at: 0,
            stack: Vec::new(),
            marks: Vec::new(),
            memo: Vec::new(),
            texts: Vec::new(),
            tuples: Vec::new(),
            dicts: Vec::new(),
            classes: Vec::new(),
            storages: Vec::new(),
            tensors: Vec::new(),
        }
    }

    /// The entries of a dictionary as they were put in; where a key comes twice, the last counts.
    pub(super) fn entries(&self, dict: usize) -> impl Iterator<Item = (&'a str, &Value)> {
        self.dicts[dict].iter().map(|(key, value)| (self.texts[*key], value))
    }

    pub(super) fn text(&self, text: usize) -> &'a str {
        self.texts[text]
    }

    pub(super) fn tensor(&self, tensor: usize) -> &Tensor {
        &self.tensors[tensor]
    }

    pub(super) fn storage(&self, storage: usize) -> &Storage {
        &self.storages[storage]
    }

    /// What the pickle makes.
    pub(super) fn run(&mut self) -> Result<Value> {
        loop {
            let start = self.at;
            if self.byte()? == b'.' {
                let root = self.pop()?;
                return match self.at == self.program.len() {
                    true => Ok(root),
                    false => self.stop("the end", "more bytes"),
                };
            }
            self.at = start;
            self.step()?;
        }
    }

    fn step(&mut self) -> Result<()> {
        let start = self.at;
        match self.byte()? {
            // PROTO, FRAME
            0x80 => match self.byte()? {
                2..=5 => Ok(()),
                version => self.stop("protocol 2 to 5", &version.to_string()),
            },
            0x95 => self.take(8).map(|_| ()),
            b'N' => self.push(Value::None),
            0x88 | 0x89 => self.push(Value::Bool),
            b'J' => {
                let integer = i32::from_le_bytes(self.array()?);
                self.push(Value::Integer(integer.into()))
            }
            b'K' => {
                let integer = self.byte()?;
                self.push(Value::Integer(integer.into()))
            }
            b'M' => {
                let integer = u16::from_le_bytes(self.array()?);
                self.push(Value::Integer(integer.into()))
            }
            // LONG1
            0x8a => {
                let length = usize::from(self.byte()?);
                let bytes = self.take(length)?;
                if length > 8 {
                    return self.stop("an integer of 64 bits", "a longer one");
                }
                let sign = if bytes.last().is_some_and(|b| *b >= 0x80) { 0xff } else { 0 };
                let mut whole = [sign; 8];
                whole[..length].copy_from_slice(bytes);
                self.push(Value::Integer(i64::from_le_bytes(whole)))
            }
            b'G' => {
                self.take(8)?;
                self.push(Value::Float)
            }
            // BINUNICODE, SHORT_BINUNICODE
            b'X' => {
                let length = u32::from_le_bytes(self.array()?);
                self.push_text(length as usize)
            }
            0x8c => {
                let length = self.byte()?;
                self.push_text(length.into())
            }
            b'(' => {
                self.marks.push(self.stack.len());
                Ok(())
            }
            b')' => self.push_tuple(Vec::new()),
            b't' => {
                let values = self.pop_marked()?;
                self.push_tuple(values)
            }
            n @ 0x85..=0x87 => {
                let n = usize::from(n - 0x84);
                let from = self.stack.len().checked_sub(n).filter(|from| *from >= self.floor());
                let Some(from) = from else {
                    return self.stop("a value on the stack", "none");
                };
                let values = self.stack.split_off(from);
                self.push_tuple(values)
            }
            // Lists are looked at by nobody.
            b']' => self.push(Value::List),
            b'a' => {
                self.pop()?;
                self.top_is(|value| matches!(value, Value::List), "a list")
            }
            b'e' => {
                self.pop_marked()?;
                self.top_is(|value| matches!(value, Value::List), "a list")
            }
            b'}' => self.push_dict(),
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.insert(vec![key, value])
            }
            b'u' => {
                let values = self.pop_marked()?;
                self.insert(values)
            }
            // BINPUT, LONG_BINPUT, MEMOIZE
            b'q' => {
                let place = self.byte()?;
                self.put(place.into())
            }
            b'r' => {
                let place = u32::from_le_bytes(self.array()?);
                self.put(place as usize)
            }
            0x94 => self.put(self.memo.len()),
            b'h' => {
                let place = self.byte()?;
                self.get(place.into())
            }
            b'j' => {
                let place = u32::from_le_bytes(self.array()?);
                self.get(place as usize)
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push_global(module, name)
            }
            // STACK_GLOBAL
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (module, name) {
                    (Value::Text(module), Value::Text(name)) => {
                        self.push_global(self.texts[module], self.texts[name])
                    }
                    _ => self.stop("the name of a class", "another value"),
                }
            }
            b'Q' => self.load_storage(),
            b'R' => self.call(),
            // BUILD: attributes, such as OrderedDict's `_metadata`, are nobody's business here.
            b'b' => {
                self.pop()?;
                self.top_is(|value| matches!(value, Value::Dict(_)), "a dictionary")
            }
            opcode => {
                self.at = start;
                self.stop("an instruction that only makes values", &format!("{opcode:#04x}"))
            }
        }
    }

    /// `('storage', class, key, location, n)`, as a reference out of the pickle.
    fn load_storage(&mut self) -> Result<()> {
        const EXPECTED: &str = "a reference to a storage of floats or integers";
        let Value::Tuple(tuple) = self.pop()? else {
            return self.stop(EXPECTED, "no tuple");
        };
        let storage = match self.tuples[tuple][..] {
            [
                Value::Text(kind),
                Value::StorageClass(class),
                Value::Text(key),
                Value::Text(_),
                Value::Integer(n),
            ] if self.texts[kind] == "storage" => usize::try_from(n).ok().map(|n| Storage {
                key: self.texts[key].to_owned(),
                element: self.classes[class].clone(),
                n,
            }),
            _ => None,
        };
        let Some(storage) = storage else {
            return self.stop(EXPECTED, "another tuple");
        };
        self.storages.push(storage);
        self.push(Value::Storage(self.storages.len() - 1))
    }

    fn call(&mut self) -> Result<()> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let Value::Tuple(tuple) = arguments else {
            return self.stop("arguments", "no tuple");
        };
        let arguments = &self.tuples[tuple];
        match (function, &arguments[..]) {
            (Value::Global(Global::OrderedDict), []) => self.push_dict(),
            (Value::Global(Global::RebuildParameter), [tensor @ Value::Tensor(_), ..]) => {
                let tensor = *tensor;
                self.push(tensor)
            }
            (
                Value::Global(Global::RebuildTensor),
                [Value::Storage(storage), Value::Integer(offset), shape, strides, ..],
            ) => {
                let tensor = (|| {
                    Some(Tensor {
                        storage: *storage,
                        offset: usize::try_from(*offset).ok()?,
                        shape: self.sizes(*shape)?,
                        strides: self.sizes(*strides)?,
                    })
                })();
                let Some(tensor) = tensor else {
                    return self.stop("a tensor's place, shape and strides", "other arguments");
                };
                self.tensors.push(tensor);
                self.push(Value::Tensor(self.tensors.len() - 1))
            }
            _ => self.stop("a call that makes a tensor or an empty dictionary", "another"),
        }
    }

    fn sizes(&self, value: Value) -> Option<Vec<usize>> {
        let Value::Tuple(tuple) = value else {
            return None;
        };
        let size = |value: &Value| match value {
            Value::Integer(size) => usize::try_from(*size).ok(),
            _ => None,
        };
        self.tuples[tuple].iter().map(size).collect()
    }

    fn push_global(&mut self, module: &str, name: &str) -> Result<()> {
        match (module, name) {
            ("collections", "OrderedDict") => self.push(Value::Global(Global::OrderedDict)),
            ("torch._utils", "_rebuild_tensor_v2") => {
                self.push(Value::Global(Global::RebuildTensor))
            }
            ("torch._utils", "_rebuild_parameter") => {
                self.push(Value::Global(Global::RebuildParameter))
            }
            ("torch", class) if super::element_of(class).is_some() => {
                self.classes.extend(super::element_of(class));
                self.push(Value::StorageClass(self.classes.len() - 1))
            }
            _ => self.stop("a tensor's class or a dictionary's", &format!("{module}.{name}")),
        }
    }

    fn insert(&mut self, values: Vec<Value>) -> Result<()> {
        let Some(Value::Dict(dict)) = self.stack.last().copied() else {
            return self.stop("a dictionary", "another value");
        };
        for pair in values.chunks(2) {
            match *pair {
                [Value::Text(key), value] => self.dicts[dict].push((key, value)),
                _ => return self.stop("keys that are text, each with a value", "others"),
            }
        }
        Ok(())
    }

    fn put(&mut self, place: usize) -> Result<()> {
        let Some(value) = self.stack.last().copied() else {
            return self.stop("a value on the stack", "none");
        };
        // Pickles number what they keep in order, so that this grows no faster than they do.
        if place > self.memo.len() {
            return self.stop("the next place of the memo", &place.to_string());
        }
        match self.memo.get_mut(place) {
            Some(kept) => *kept = Some(value),
            None => self.memo.push(Some(value)),
        }
        Ok(())
    }

    fn get(&mut self, place: usize) -> Result<()> {
        match self.memo.get(place).copied().flatten() {
            Some(value) => self.push(value),
            None => self.stop("a place of the memo", &place.to_string()),
        }
    }

    fn push(&mut self, value: Value) -> Result<()> {
        self.stack.push(value);
        Ok(())
    }

    fn push_dict(&mut self) -> Result<()> {
        self.dicts.push(Vec::new());
        self.push(Value::Dict(self.dicts.len() - 1))
    }

    fn push_tuple(&mut self, values: Vec<Value>) -> Result<()> {
        self.tuples.push(values);
        self.push(Value::Tuple(self.tuples.len() - 1))
    }

    fn push_text(&mut self, length: usize) -> Result<()> {
        let bytes = self.take(length)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => {
                self.texts.push(text);
                self.push(Value::Text(self.texts.len() - 1))
            }
            Err(_) => self.stop("text in UTF-8", "other bytes"),
        }
    }

    /// The place below which the innermost mark does not reach.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> Result<Value> {
        match self.stack.len() > self.floor() {
            true => Ok(self.stack.pop().expect("above the mark")),
            false => self.stop("a value on the stack", "none"),
        }
    }

    fn pop_marked(&mut self) -> Result<Vec<Value>> {
        match self.marks.pop() {
            Some(mark) => Ok(self.stack.split_off(mark)),
            None => self.stop("a mark", "none"),
        }
    }

    fn top_is(&self, is: impl Fn(&Value) -> bool, expected: &'static str) -> Result<()> {
        match self.stack.last().is_some_and(is) {
            true => Ok(()),
            false => self.stop(expected, "another value"),
        }
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("as many as asked for"))
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let rest = &self.program[self.at..];
        match rest.get(..n) {
            Some(bytes) => {
                self.at += n;
                Ok(bytes)
            }
            None => self.stop("more bytes", "the end"),
        }
    }

    fn line(&mut self) -> Result<&'a str> {
        let rest = &self.program[self.at..];
        let Some(length) = rest.iter().position(|byte| *byte == b'\n') else {
            return self.stop("a line", "the end");
        };
        self.at += length + 1;
        match std::str::from_utf8(&rest[..length]) {
            Ok(line) => Ok(line),
            Err(_) => self.stop("text in UTF-8", "other bytes"),
        }
    }

    fn stop<T>(&self, expected: &'static str, found: &str) -> Result<T> {
        // What a hostile file calls itself is shown, but not at any length.
        let found = found.chars().take(80).collect();
        Err(Stop { offset: self.at, expected, found })
    }
}
