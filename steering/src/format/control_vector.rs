//! Control vectors, as llama.cpp and repeng keep them: GGUF files with a direction for each block.
//!
//! `direction.N` is added to the output of block `N`, counted from 0: to `blocks.N.hook_resid_post`.
//! Block 0 cannot have one. That is what llama.cpp does with it, and what repeng means: its layer `N`
//! is `hidden_states[N + 1]` of transformers. Off-by-one faults are common in the wild, so files
//! written here say so themselves, under `controlvector.applies_to`.

use std::collections::BTreeMap;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};

use burn::tensor::{Tensor, TensorData};
use model_hooks::load::{Gguf, LoadError, MetadataError};
use model_hooks::{HookPoint, LanguageModel};

use crate::error::SteeringError;
use crate::intervention::Intervention;
use crate::region::Region;
use crate::steering::{Steering, Steerings};

/// What files written here say of themselves.
const APPLIES_TO: &str = "direction.N is added to the output of block N, counted from 0";

/// A direction for each of some blocks.
#[derive(Debug, Clone, PartialEq)]
pub struct ControlVector {
    /// The architecture that it is for, as the file names it.
    pub model_hint: String,
    /// What is added to the output of a block, by its number, which is not 0. All of one width.
    pub directions: BTreeMap<usize, Vec<f32>>,
}

/// Why a control vector cannot be read, written or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlVectorError {
    /// The file cannot be read, or is not GGUF.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The file's metadata are not those of a control vector.
    #[error("`{}` is no control vector", path.display())]
    Metadata {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: MetadataError,
    },
    /// The file holds something else.
    #[error("`{}` holds {actual:?}, expected \"controlvector\"", path.display())]
    Architecture {
        /// The file.
        path: PathBuf,
        /// Its `general.architecture`.
        actual: String,
    },
    /// A tensor that is no direction.
    #[error("tensor {name:?}: expected direction.N, N a number from 1 without leading zeros")]
    Name {
        /// Its name.
        name: String,
    },
    /// A direction that is not one row of numbers, as wide as the others.
    #[error("direction.{layer} has shape {actual:?}, expected {expected:?}")]
    Shape {
        /// Its block.
        layer: usize,
        /// The shape that it should have.
        expected: Vec<usize>,
        /// The shape that it has.
        actual: Vec<usize>,
    },
    /// A direction with a value that is not finite.
    #[error("direction.{layer} holds a value that is not finite")]
    NotFinite {
        /// Its block.
        layer: usize,
    },
    /// No directions.
    #[error("the control vector has no directions")]
    Empty,
    /// A block that the model does not have, or block 0.
    #[error("direction.{layer}: the model's blocks with a direction are 1 to {last}")]
    NoSuchLayer {
        /// The block asked for.
        layer: usize,
        /// The last one of the model.
        last: usize,
    },
    /// A direction that cannot steer.
    #[error("direction.{layer}")]
    Steering {
        /// Its block.
        layer: usize,
        /// What is wrong.
        source: SteeringError,
    },
}

impl ControlVector {
    /// Reads a file.
    ///
    /// # Errors
    /// If it cannot be read, is damaged, or is no control vector.
    pub fn open(path: &Path) -> Result<Self, ControlVectorError> {
        Self::read(Gguf::open(path)?)
    }

    /// Reads what a GGUF file holds.
    ///
    /// # Errors
    /// If it is damaged, or is no control vector.
    pub fn read<R: Read + Seek>(mut gguf: Gguf<R>) -> Result<Self, ControlVectorError> {
        let path = gguf.path().to_path_buf();
        let metadata = gguf.metadata();
        let wrong = |source| ControlVectorError::Metadata { path: path.clone(), source };
        let architecture = metadata.string("general.architecture").map_err(wrong)?;
        if architecture != "controlvector" {
            let actual = architecture.to_owned();
            return Err(ControlVectorError::Architecture { path, actual });
        }
        let model_hint = metadata.string("controlvector.model_hint").map_err(wrong)?.to_owned();
        // Writers do not agree on what it counts: blocks, or directions.
        metadata.optional("controlvector.layer_count", |m, key| m.usize(key)).map_err(wrong)?;

        let names: Vec<String> = gguf.names().map(str::to_owned).collect();
        let mut directions = BTreeMap::new();
        for name in names {
            let layer =
                layer(&name).ok_or_else(|| ControlVectorError::Name { name: name.clone() })?;
            let tensor = gguf.tensor(&name)?;
            if tensor.shape.len() != 1 {
                let expected = vec![tensor.values.len()];
                let actual = tensor.shape;
                return Err(ControlVectorError::Shape { layer, expected, actual });
            }
            directions.insert(layer, tensor.values);
        }
        let vector = Self { model_hint, directions };
        vector.validate()?;
        Ok(vector)
    }

    /// The file: GGUF version 3, directions in f32.
    ///
    /// # Errors
    /// If there are no directions, one belongs to block 0, they differ in width, or a value is not
    /// finite.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ControlVectorError> {
        self.validate()?;
        let mut writer = Writer::default();
        writer.bytes.extend(b"GGUF");
        writer.u32(3);
        writer.u64(self.directions.len() as u64);
        writer.u64(4);
        writer.text("general.architecture", "controlvector");
        writer.text("controlvector.model_hint", &self.model_hint);
        writer.string("controlvector.layer_count");
        writer.u32(Writer::U32);
        writer.u32(self.directions.len() as u32);
        writer.text("controlvector.applies_to", APPLIES_TO);
        let mut offset = 0;
        for (layer, values) in &self.directions {
            writer.string(&format!("direction.{layer}"));
            writer.u32(1);
            writer.u64(values.len() as u64);
            writer.u32(Writer::F32_TENSOR);
            writer.u64(offset as u64);
            offset = (offset + 4 * values.len()).next_multiple_of(Writer::ALIGNMENT);
        }
        for values in self.directions.values() {
            writer.align();
            writer.bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        }
        writer.align();
        Ok(writer.bytes)
    }

    /// Adds `scale` times each direction where it belongs.
    ///
    /// # Errors
    /// If the model does not have a block, a direction is empty, or its product with the scale is
    /// not finite. Directions of another width than the model's are an error of the pass.
    pub fn steer(
        &self,
        model: &LanguageModel,
        scale: f64,
        region: &Region,
    ) -> Result<Steerings<'static>, ControlVectorError> {
        self.validate()?;
        let last = model.config().n_layers - 1;
        let steps = self.directions.iter().map(|(&layer, values)| {
            if layer > last {
                return Err(ControlVectorError::NoSuchLayer { layer, last });
            }
            let values = TensorData::new(values.clone(), [values.len()]);
            let direction = Tensor::<1>::from_data(values, model.device()).mul_scalar(scale);
            let point = HookPoint::resid_post(layer);
            Steering::new([point], Intervention::Add { direction }, region.clone())
                .map_err(|source| ControlVectorError::Steering { layer, source })
        });
        Ok(Steerings { steps: steps.collect::<Result<_, _>>()? })
    }

    fn validate(&self) -> Result<(), ControlVectorError> {
        let first = self.directions.values().next().ok_or(ControlVectorError::Empty)?;
        for (&layer, values) in &self.directions {
            if layer == 0 {
                return Err(ControlVectorError::Name { name: "direction.0".into() });
            }
            if values.is_empty() || values.len() != first.len() {
                let (expected, actual) = (vec![first.len().max(1)], vec![values.len()]);
                return Err(ControlVectorError::Shape { layer, expected, actual });
            }
            if values.iter().any(|value| !value.is_finite()) {
                return Err(ControlVectorError::NotFinite { layer });
            }
        }
        Ok(())
    }
}

fn layer(name: &str) -> Option<usize> {
    let number = name.strip_prefix("direction.")?;
    let is_canonical = number.starts_with(|c: char| c.is_ascii_digit() && c != '0');
    number.parse().ok().filter(|_| is_canonical)
}

/// GGUF's primitives.
#[derive(Debug, Default)]
struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    const U32: u32 = 4;
    const STRING: u32 = 8;
    const F32_TENSOR: u32 = 0;
    const ALIGNMENT: usize = 32;

    fn u32(&mut self, value: u32) {
        self.bytes.extend(value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.bytes.extend(value.to_le_bytes());
    }

    fn string(&mut self, text: &str) {
        self.u64(text.len() as u64);
        self.bytes.extend(text.as_bytes());
    }

    fn text(&mut self, key: &str, value: &str) {
        self.string(key);
        self.u32(Self::STRING);
        self.string(value);
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(Self::ALIGNMENT), 0);
    }
}
