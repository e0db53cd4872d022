//! How the values of a tensor are encoded, and how they become f32.

mod k_quants;

use std::io::{self, Read};

use half::{bf16, f16};
use k_quants::SUPER_BLOCK;

/// An encoding of values: plain numbers, ggml's blocks of 32 small integers with a scale, or its
/// super-blocks of 256 (`K`).
#[expect(non_camel_case_types, reason = "the names that ggml gives them")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    F64,
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
}

/// Values of one quantised block (`QK4_0` and its kin in ggml).
const BLOCK: usize = 32;

/// How much of a file is held in memory beside the values that come of it.
const CHUNK_BYTES: usize = 1 << 16;

impl Element {
    /// Values that are encoded together.
    pub const fn block_len(self) -> usize {
        match self {
            Self::F64 | Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => BLOCK,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K => SUPER_BLOCK,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q4_0 => 2 + BLOCK / 2,
            Self::Q4_1 => 4 + BLOCK / 2,
            Self::Q5_0 => 6 + BLOCK / 2,
            Self::Q5_1 => 8 + BLOCK / 2,
            Self::Q8_0 => 2 + BLOCK,
            Self::Q2_K => 4 + 16 + SUPER_BLOCK / 4,
            Self::Q3_K => 2 + 12 + SUPER_BLOCK * 3 / 8,
            Self::Q4_K => 4 + 12 + SUPER_BLOCK / 2,
            Self::Q5_K => 4 + 12 + SUPER_BLOCK * 5 / 8,
            Self::Q6_K => 2 + 16 + SUPER_BLOCK * 6 / 8,
        }
    }

    /// The bytes of a tensor, if it can be encoded so: rows are whole blocks, and the size fits
    /// in memory.
    pub fn n_bytes(self, shape: &[usize]) -> Option<u64> {
        let row = shape.last().copied().unwrap_or(1);
        let n_values = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size))?;
        let n_blocks = n_values / self.block_len();
        // The values take more memory than their encoding, save for f64.
        let fits = n_values.checked_mul(8).is_some_and(|n_bytes| isize::try_from(n_bytes).is_ok());
        (fits && row.is_multiple_of(self.block_len()))
            .then(|| n_blocks as u64 * self.block_bytes() as u64)
    }

    /// Reads `n_values`, which are whole blocks and known to be in the file.
    pub fn read(self, reader: &mut impl Read, n_values: usize) -> io::Result<Vec<f32>> {
        let blocks_per_chunk = CHUNK_BYTES / self.block_bytes();
        let mut chunk = vec![0; blocks_per_chunk * self.block_bytes()];
        let mut values = vec![0.0; n_values];
        for values in values.chunks_mut(blocks_per_chunk * self.block_len()) {
            let n_bytes = values.len() / self.block_len() * self.block_bytes();
            let bytes = &mut chunk[..n_bytes];
            reader.read_exact(bytes)?;
            self.decode(bytes, values);
        }
        Ok(values)
    }

    fn decode(self, bytes: &[u8], values: &mut [f32]) {
        match self {
            Self::F64 => decode_plain(bytes, values, |b| f64::from_le_bytes(b) as f32),
            Self::F32 => decode_plain(bytes, values, f32::from_le_bytes),
            Self::F16 => decode_plain(bytes, values, |b| f16::from_le_bytes(b).to_f32()),
            Self::Bf16 => decode_plain(bytes, values, |b| bf16::from_le_bytes(b).to_f32()),
            Self::Q4_0 => decode_blocks(bytes, values, decode_q4_0),
            Self::Q4_1 => decode_blocks(bytes, values, decode_q4_1),
            Self::Q5_0 => decode_blocks(bytes, values, decode_q5_0),
            Self::Q5_1 => decode_blocks(bytes, values, decode_q5_1),
            Self::Q8_0 => decode_blocks(bytes, values, decode_q8_0),
            Self::Q2_K => decode_blocks(bytes, values, k_quants::decode_q2_k),
            Self::Q3_K => decode_blocks(bytes, values, k_quants::decode_q3_k),
            Self::Q4_K => decode_blocks(bytes, values, k_quants::decode_q4_k),
            Self::Q5_K => decode_blocks(bytes, values, k_quants::decode_q5_k),
            Self::Q6_K => decode_blocks(bytes, values, k_quants::decode_q6_k),
        }
    }
}

fn decode_plain<const N: usize>(bytes: &[u8], values: &mut [f32], decode: impl Fn([u8; N]) -> f32) {
    let (encoded, _) = bytes.as_chunks::<N>();
    for (value, &encoded) in values.iter_mut().zip(encoded) {
        *value = decode(encoded);
    }
}

fn decode_blocks<const N_BYTES: usize, const LEN: usize>(
    bytes: &[u8],
    values: &mut [f32],
    decode: impl Fn(&[u8; N_BYTES], &mut [f32; LEN]),
) {
    let (encoded, _) = bytes.as_chunks::<N_BYTES>();
    let (values, _) = values.as_chunks_mut::<LEN>();
    for (values, encoded) in values.iter_mut().zip(encoded) {
        decode(encoded, values);
    }
}

/// A block is `scale`, 16 bytes of low and high nibbles: value = scale · (nibble − 8).
fn decode_q4_0(&[s0, s1, ref nibbles @ ..]: &[u8; 18], values: &mut [f32; BLOCK]) {
    let scale = half([s0, s1]);
    for (value_idx, &byte) in nibbles.iter().enumerate() {
        values[value_idx] = scale * ((byte & 0xf) as f32 - 8.0);
        values[value_idx + 16] = scale * ((byte >> 4) as f32 - 8.0);
    }
}

/// A block is `scale`, `min`, nibbles: value = scale · nibble + min.
fn decode_q4_1(&[s0, s1, m0, m1, ref nibbles @ ..]: &[u8; 20], values: &mut [f32; BLOCK]) {
    let (scale, min) = (half([s0, s1]), half([m0, m1]));
    for (value_idx, &byte) in nibbles.iter().enumerate() {
        values[value_idx] = scale * (byte & 0xf) as f32 + min;
        values[value_idx + 16] = scale * (byte >> 4) as f32 + min;
    }
}

/// A block is `scale`, 32 fifth bits, nibbles: value = scale · (five bits − 16).
fn decode_q5_0(&[s0, s1, h0, h1, h2, h3, ref nibbles @ ..]: &[u8; 22], values: &mut [f32; BLOCK]) {
    let scale = half([s0, s1]);
    let high = u32::from_le_bytes([h0, h1, h2, h3]);
    for (value_idx, &byte) in nibbles.iter().enumerate() {
        let (low, top) = five_bits(byte, high, value_idx);
        values[value_idx] = scale * (low - 16.0);
        values[value_idx + 16] = scale * (top - 16.0);
    }
}

/// A block is `scale`, `min`, 32 fifth bits, nibbles: value = scale · five bits + min.
fn decode_q5_1(
    &[s0, s1, m0, m1, h0, h1, h2, h3, ref nibbles @ ..]: &[u8; 24],
    values: &mut [f32; BLOCK],
) {
    let (scale, min) = (half([s0, s1]), half([m0, m1]));
    let high = u32::from_le_bytes([h0, h1, h2, h3]);
    for (value_idx, &byte) in nibbles.iter().enumerate() {
        let (low, top) = five_bits(byte, high, value_idx);
        values[value_idx] = scale * low + min;
        values[value_idx + 16] = scale * top + min;
    }
}

/// A block is `scale`, 32 signed bytes: value = scale · byte.
fn decode_q8_0(&[s0, s1, ref bytes @ ..]: &[u8; 34], values: &mut [f32; BLOCK]) {
    let scale = half([s0, s1]);
    for (value, &byte) in values.iter_mut().zip(bytes) {
        *value = scale * byte.cast_signed() as f32;
    }
}

/// The values `value_idx` and `value_idx + 16` of a five-bit block.
fn five_bits(nibbles: u8, high: u32, value_idx: usize) -> (f32, f32) {
    let fifth = |value_idx: usize| (((high >> value_idx) & 1) << 4) as u8;
    let low = (nibbles & 0xf) | fifth(value_idx);
    let top = (nibbles >> 4) | fifth(value_idx + 16);
    (low as f32, top as f32)
}

fn half(bytes: [u8; 2]) -> f32 {
    f16::from_le_bytes(bytes).to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decodes one block of `head` followed by bytes that count `0x10, 0x21, 0x32 … 0xff`: low
    /// nibbles 0..16, high nibbles 1..16 and then 15.
    fn block(element: Element, head: &[u8]) -> Vec<f32> {
        let mut bytes = head.to_vec();
        bytes.extend((0..15u8).map(|n| n | (n + 1) << 4));
        bytes.push(0xff);
        assert_eq!(bytes.len(), element.block_bytes());
        element.read(&mut bytes.as_slice(), BLOCK).unwrap()
    }

    // 0.5 is 0x3800 as f16, and 2.0 is 0x4000.
    const SCALE: [u8; 2] = [0x00, 0x38];
    const MIN: [u8; 2] = [0x00, 0x40];

    #[test]
    fn four_bits() {
        let values = block(Element::Q4_0, &SCALE);
        assert_eq!(values[..3], [-4.0, -3.5, -3.0]);
        assert_eq!(values[15..18], [3.5, -3.5, -3.0]);
        assert_eq!(values[31], 3.5);

        let values = block(Element::Q4_1, &[SCALE, MIN].concat());
        assert_eq!(values[..3], [2.0, 2.5, 3.0]);
        assert_eq!(values[15..18], [9.5, 2.5, 3.0]);
    }

    #[test]
    fn five_bits() {
        // The fifth bits of values 0, 2 and 16 are set.
        let high = 0b1_0000_0000_0000_0101_u32.to_le_bytes();
        let values = block(Element::Q5_0, &[&SCALE[..], &high].concat());
        assert_eq!(values[..3], [0.0, -7.5, 1.0]);
        assert_eq!(values[15..18], [-0.5, 0.5, -7.0]);

        let values = block(Element::Q5_1, &[&SCALE[..], &MIN, &high].concat());
        assert_eq!(values[..3], [10.0, 2.5, 11.0]);
        assert_eq!(values[15..18], [9.5, 10.5, 3.0]);
    }

    #[test]
    fn eight_bits() {
        let mut bytes = SCALE.to_vec();
        bytes.extend((-16..16i8).map(i8::cast_unsigned));
        let values = Element::Q8_0.read(&mut bytes.as_slice(), BLOCK).unwrap();
        assert_eq!((values[0], values[16], values[31]), (-8.0, 0.0, 7.5));
    }

    #[test]
    fn plain_numbers() {
        let read = |element: Element, bytes: &[u8]| element.read(&mut &*bytes, 1).unwrap()[0];
        assert_eq!(read(Element::F64, &(-1.25f64).to_le_bytes()), -1.25);
        assert_eq!(read(Element::F32, &0.1f32.to_le_bytes()), 0.1);
        assert_eq!(read(Element::F16, &[0x00, 0xbc]), -1.0);
        assert_eq!(read(Element::Bf16, &[0x80, 0x3f]), 1.0);
    }

    #[test]
    fn a_tensor_of_many_chunks_is_one_tensor() {
        let n_values = 3 * CHUNK_BYTES;
        let bytes: Vec<u8> = (0..n_values).flat_map(|n| (n as f32).to_le_bytes()).collect();
        let values = Element::F32.read(&mut bytes.as_slice(), n_values).unwrap();
        assert!(values.iter().enumerate().all(|(n, &value)| value == n as f32));
        assert!(Element::F32.read(&mut &bytes[1..], n_values).is_err());
    }

    #[test]
    fn only_whole_blocks_that_fit_have_a_size() {
        assert_eq!(Element::Q4_1.n_bytes(&[3, 64]), Some(120));
        assert_eq!(Element::Q4_1.n_bytes(&[64, 3]), None);
        assert_eq!(Element::F32.n_bytes(&[]), Some(4));
        assert_eq!(Element::F16.n_bytes(&[0, 5]), Some(0));
        assert_eq!(Element::F32.n_bytes(&[usize::MAX, 2]), None);
        assert_eq!(Element::F32.n_bytes(&[usize::MAX / 4]), None);
    }
}
