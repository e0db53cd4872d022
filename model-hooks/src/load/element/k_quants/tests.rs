//! The decoders against values worked out by hand, against gguf-py, and against a second reading
//! of the format that goes by bytes where the first goes by values.

use proptest::prelude::*;

use super::*;
use crate::load::element::Element;

// As f16: 0.5, and 2.
const HALF: [u8; 2] = [0x00, 0x38];
const TWO: [u8; 2] = [0x00, 0x40];

fn decode(element: Element, block: &[u8]) -> Vec<f32> {
    element.read(&mut &*block, SUPER_BLOCK).unwrap()
}

/// A block of zeros but for the given bytes.
fn block<const N: usize>(places: &[(usize, &[u8])]) -> [u8; N] {
    let mut block = [0; N];
    for (place, bytes) in places {
        block[*place..place + bytes.len()].copy_from_slice(bytes);
    }
    block
}

#[test]
fn two_bits_by_hand() {
    // Sub-block 0 has scale 3 and minimum 1, sub-block 15 scale 1 and minimum 15.
    let head: [(usize, &[u8]); 4] = [(0, &[0x13]), (15, &[0xf1]), (80, &HALF), (82, &TWO)];
    // Values 0, 32, 64 and 96 are 1, 2, 3 and 0; values 159, 191, 223 and 255 are 0, 0, 0 and 3.
    let pairs: [(usize, &[u8]); 2] = [(16, &[0b00_11_10_01]), (79, &[0b11_00_00_00])];
    let values = decode(Element::Q2_K, &block::<84>(&[&head[..], &pairs].concat()));
    // 0.5 · 3 · 1 − 2 · 1, and with zeros.
    assert_eq!(values[..2], [-0.5, -2.0]);
    // Sub-blocks 2, 4 and 6 have scale and minimum 0.
    assert_eq!([values[32], values[64], values[96]], [0.0; 3]);
    // 0.5 · 1 · 3 − 2 · 15.
    assert_eq!(values[254..], [-30.0, -28.5]);
}

#[test]
fn three_bits_by_hand() {
    // Sub-block 0: low nibble 5, upper bits 2, so 37 − 32 = 5. Sub-block 15: 15 + 3 · 16 − 32 = 31.
    let scales: [(usize, &[u8]); 4] =
        [(96, &[0x05]), (103, &[0xf0]), (104, &[0b0000_0010]), (107, &[0b1100_0000])];
    // Value 0 has its third bit and the pair 2; value 255 the third bit and the pair 3.
    let bits: [(usize, &[u8]); 5] =
        [(0, &[0x01]), (31, &[0x80]), (32, &[2]), (95, &[0b1100_0000]), (108, &HALF)];
    let values = decode(Element::Q3_K, &block::<110>(&[&scales[..], &bits].concat()));
    // 0.5 · 5 · (6 − 4), and (0 − 4).
    assert_eq!(values[..2], [5.0, -10.0]);
    // Sub-block 1 has a scale of 0 − 32.
    assert_eq!(values[16], 64.0);
    // 0.5 · 31 · (0 − 4), and (7 − 4).
    assert_eq!(values[254..], [-62.0, 46.5]);
}

/// Sub-block 1 has scale 5 and minimum 2; sub-block 6 scale 63 and minimum 33.
const SCALES: [(usize, &[u8]); 7] = [
    (0, &HALF),
    (2, &TWO),
    (5, &[5]),
    (9, &[2]),
    // 63 is 3 · 16 + 15, and 33 is 2 · 16 + 1.
    (6, &[0b1100_0000]),
    (10, &[0b1000_0000]),
    (14, &[0x1f]),
];

#[test]
fn four_bits_by_hand() {
    // Values 32 and 192 are 7 and 9.
    let nibbles: [(usize, &[u8]); 2] = [(16, &[0x70]), (16 + 96, &[0x09])];
    let values = decode(Element::Q4_K, &block::<144>(&[&SCALES[..], &nibbles].concat()));
    // 0.5 · 5 · 7 − 2 · 2.
    assert_eq!(values[31..34], [0.0, 13.5, -4.0]);
    // 0.5 · 63 · 9 − 2 · 33.
    assert_eq!(values[192..194], [217.5, -66.0]);
    assert_eq!(values[224], 0.0);
}

#[test]
fn five_bits_by_hand() {
    // Values 32 and 192 are 7 + 16 and 9 + 16.
    let bits: [(usize, &[u8]); 3] = [(16, &[0b0100_0010]), (48, &[0x70]), (48 + 96, &[0x09])];
    let values = decode(Element::Q5_K, &block::<176>(&[&SCALES[..], &bits].concat()));
    // 0.5 · 5 · 23 − 2 · 2.
    assert_eq!(values[31..34], [0.0, 53.5, -4.0]);
    // 0.5 · 63 · 25 − 2 · 33.
    assert_eq!(values[192..194], [721.5, -66.0]);
}

#[test]
fn six_bits_by_hand() {
    // Scales of sub-blocks 0, 4 and 15 are −1, 2 and 127.
    let scales: [(usize, &[u8]); 4] = [(192, &[0xff]), (196, &[2]), (207, &[127]), (208, &HALF)];
    // Values 0 and 64 share a byte of nibbles, 3 and 4, and one of upper bits, 1 and 3.
    let bits: [(usize, &[u8]); 4] =
        [(0, &[0x43]), (128, &[0b00_11_00_01]), (127, &[0xf0]), (191, &[0b1100_0000])];
    let values = decode(Element::Q6_K, &block::<210>(&[&scales[..], &bits].concat()));
    // 0.5 · −1 · (19 − 32), and (0 − 32).
    assert_eq!(values[..2], [6.5, 16.0]);
    // 0.5 · 2 · (52 − 32).
    assert_eq!(values[64], 20.0);
    // 0.5 · 127 · (63 − 32).
    assert_eq!(values[255], 1968.5);
}

/// Bytes 11, 48, 85 … with a scale of 0x2e66 (0.1) and a minimum of 0x3b33 (0.9), decoded by
/// `gguf.quants.dequantize` of gguf-py 0.19.
#[test]
fn gguf_py_agrees() {
    const SCALE: [u8; 2] = [0x66, 0x2e];
    const MIN: [u8; 2] = [0x33, 0x3b];
    type Case = (Element, usize, Option<usize>, [f32; 6]);
    let cases: [Case; 5] = [
        (
            Element::Q2_K,
            80,
            Some(82),
            [3.2991943, -2.999878, -3.6002197, -2.3997803, -9.39917, -2.0998535],
        ),
        (Element::Q3_K, 108, None, [8.098022, 1.0997314, 0.0, -0.19995117, 2.4993896, 4.1989746]),
        (
            Element::Q4_K,
            0,
            Some(2),
            [-11.803345, -20.39795, -5.7060547, 39.888794, -0.6019287, -24.898193],
        ),
        (
            Element::Q5_K,
            0,
            Some(2),
            [37.784546, -16.398926, 59.87793, 39.888794, -0.6019287, -18.899658],
        ),
        (
            Element::Q6_K,
            208,
            None,
            [-143.06506, 58.785645, 132.96753, 3.8990479, 108.87341, -5.998535],
        ),
    ];
    for (element, scale_at, min_at, expected) in cases {
        let mut block: Vec<u8> = (0..element.block_bytes()).map(|n| (37 * n + 11) as u8).collect();
        block[scale_at..scale_at + 2].copy_from_slice(&SCALE);
        if let Some(min_at) = min_at {
            block[min_at..min_at + 2].copy_from_slice(&MIN);
        }
        let values = decode(element, &block);
        let actual = [0, 45, 77, 138, 200, 255].map(|value_idx| values[value_idx]);
        assert_eq!(actual, expected, "{element:?}");
    }
}

/// The integers of a block, by what each byte adds to which value.
struct Naive {
    /// What is multiplied by the scale of the sub-block.
    quants: [i32; SUPER_BLOCK],
    /// The scale and minimum of each sub-block of 16.
    scales: [(f64, f64); 16],
}

impl Naive {
    fn values(&self) -> Vec<f64> {
        let value = |(value_idx, &quant): (usize, &i32)| {
            let (scale, min) = self.scales[value_idx / 16];
            scale * quant as f64 - min
        };
        self.quants.iter().enumerate().map(value).collect()
    }

    fn new(offset: i32) -> Self {
        Self { quants: [offset; SUPER_BLOCK], scales: [(0.0, 0.0); 16] }
    }

    /// Two bits of four values, 32 apart, in each byte.
    fn add_pairs(&mut self, bytes: &[u8], weight: i32) {
        for (byte_idx, &byte) in bytes.iter().enumerate() {
            let first = match byte_idx < 32 {
                true => byte_idx,
                false => 128 + byte_idx - 32,
            };
            for nth in 0..4 {
                self.quants[first + 32 * nth] += weight * ((byte >> (2 * nth)) & 3) as i32;
            }
        }
    }

    /// Four bits of two values in each byte, `apart` values apart.
    fn add_nibbles(&mut self, bytes: &[u8], apart: usize) {
        for (chunk_idx, chunk) in bytes.chunks(apart).enumerate() {
            for (byte_idx, &byte) in chunk.iter().enumerate() {
                let first = chunk_idx * 2 * apart + byte_idx;
                self.quants[first] += (byte % 16) as i32;
                self.quants[first + apart] += (byte / 16) as i32;
            }
        }
    }

    /// One bit of eight values, 32 apart, in each byte.
    fn add_bits(&mut self, bytes: &[u8], weight: i32) {
        for (byte_idx, &byte) in bytes.iter().enumerate() {
            for nth in 0..8 {
                self.quants[byte_idx + 32 * nth] += weight * ((byte >> nth) & 1) as i32;
            }
        }
    }

    /// Eight scales and eight minima, in the bits that ggml's `get_scale_min_k4` has them in.
    fn set_packed(&mut self, packed: &[u8], scale: f64, min: f64) {
        for sub_idx in 0..8 {
            let (six, six_min) = if sub_idx < 4 {
                (packed[sub_idx] % 64, packed[sub_idx + 4] % 64)
            } else {
                let low = packed[sub_idx + 4];
                let (top, top_min) = (packed[sub_idx - 4] / 64, packed[sub_idx] / 64);
                (low % 16 + 16 * top, low / 16 + 16 * top_min)
            };
            let both = (scale * six as f64, min * six_min as f64);
            self.scales[2 * sub_idx] = both;
            self.scales[2 * sub_idx + 1] = both;
        }
    }
}

fn naive(element: Element, block: &[u8]) -> Vec<f64> {
    let at = |place: usize| half([block[place], block[place + 1]]) as f64;
    let mut naive = Naive::new(match element {
        Element::Q3_K => -4,
        Element::Q6_K => -32,
        _ => 0,
    });
    match element {
        Element::Q2_K => {
            for (both, &byte) in naive.scales.iter_mut().zip(&block[..16]) {
                *both = (at(80) * (byte % 16) as f64, at(82) * (byte / 16) as f64);
            }
            naive.add_pairs(&block[16..80], 1);
        }
        Element::Q3_K => {
            naive.add_bits(&block[..32], 4);
            naive.add_pairs(&block[32..96], 1);
            let packed = &block[96..108];
            for sub_idx in 0..16 {
                let low = match sub_idx < 8 {
                    true => packed[sub_idx] % 16,
                    false => packed[sub_idx - 8] / 16,
                };
                let top = packed[8 + sub_idx % 4] >> (2 * (sub_idx / 4)) & 3;
                naive.scales[sub_idx].0 = at(108) * ((low + 16 * top) as f64 - 32.0);
            }
        }
        Element::Q4_K => {
            naive.set_packed(&block[4..16], at(0), at(2));
            naive.add_nibbles(&block[16..], 32);
        }
        Element::Q5_K => {
            naive.set_packed(&block[4..16], at(0), at(2));
            naive.add_bits(&block[16..48], 16);
            naive.add_nibbles(&block[48..], 32);
        }
        Element::Q6_K => {
            naive.add_nibbles(&block[..128], 64);
            naive.add_pairs(&block[128..192], 16);
            for (both, &byte) in naive.scales.iter_mut().zip(&block[192..208]) {
                both.0 = at(208) * byte.cast_signed() as f64;
            }
        }
        other => unreachable!("{other:?} is no K-quant"),
    }
    naive.values()
}

proptest! {
    #[test]
    fn agrees_with_a_naive_decoder(
        element in prop::sample::select(vec![
            Element::Q2_K, Element::Q3_K, Element::Q4_K, Element::Q5_K, Element::Q6_K,
        ]),
        bytes in prop::collection::vec(any::<u8>(), 2 * 210),
    ) {
        let bytes = &bytes[..2 * element.block_bytes()];
        let actual = element.read(&mut &*bytes, 2 * SUPER_BLOCK).unwrap();
        let expected = bytes.chunks(element.block_bytes()).flat_map(|block| naive(element, block));
        for (actual, expected) in actual.into_iter().zip(expected) {
            // Products of 11, 6 and 6 bits are exact in f32; only their difference is rounded.
            prop_assert!(
                actual == expected as f32 || actual.is_nan() && expected.is_nan(),
                "{actual} {expected}"
            );
        }
    }
}
