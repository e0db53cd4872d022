//! ggml's K-quants: super-blocks of 256 values, whose sub-blocks have small scales of their own.
//!
//! Layouts and order of operations are those of `block_q2_K` to `block_q6_K` and their
//! `dequantize_row` in ggml, so that the values are the same to the last bit.

use super::half;

/// Values of one super-block (`QK_K` in ggml).
pub(super) const SUPER_BLOCK: usize = 256;

type Values = [f32; SUPER_BLOCK];

/// A block is 16 scales of four bits, with minima of four bits above them, 256 pairs of bits,
/// `scale`, `min`: value = scale · its scale · bits − min · its minimum, for sub-blocks of 16.
pub(super) fn decode_q2_k(block: &[u8; 84], values: &mut Values) {
    let (scales, pairs) = (&block[..16], &block[16..80]);
    let (scale, min) = (half([block[80], block[81]]), half([block[82], block[83]]));
    fill(values, |sub_idx| {
        let both = scales[sub_idx];
        let (scale, min) = (scale * (both & 0xf) as f32, min * (both >> 4) as f32);
        move |value_idx| scale * bits::<2, 32>(pairs, value_idx) as f32 - min
    });
}

/// A block is 256 third bits, 256 pairs of bits, 16 packed scales of six bits, `scale`:
/// value = scale · (its scale − 32) · (three bits − 4), for sub-blocks of 16.
pub(super) fn decode_q3_k(block: &[u8; 110], values: &mut Values) {
    let (thirds, pairs, scales) = (&block[..32], &block[32..96], &block[96..108]);
    let scale = half([block[108], block[109]]);
    fill(values, |sub_idx| {
        // Four low bits of all sixteen, as nibbles of eight bytes; then the upper two.
        let low = bits::<4, 8>(&scales[..8], sub_idx);
        let six = low | bits::<2, 4>(&scales[8..], sub_idx) << 4;
        let scale = scale * (six as f32 - 32.0);
        move |value_idx| {
            let three = bits::<2, 32>(pairs, value_idx) | bits::<1, 32>(thirds, value_idx) << 2;
            scale * (three as f32 - 4.0)
        }
    });
}

/// A block is `scale`, `min`, eight packed scales and minima of six bits, 256 nibbles:
/// value = scale · its scale · nibble − min · its minimum, for sub-blocks of 32.
pub(super) fn decode_q4_k(block: &[u8; 144], values: &mut Values) {
    let nibbles = &block[16..];
    fill(values, |sub_idx| {
        let (scale, min) = scale_and_min(block, sub_idx / 2);
        move |value_idx| scale * bits::<4, 32>(nibbles, value_idx) as f32 - min
    });
}

/// As [`decode_q4_k`], with 256 fifth bits before the nibbles.
pub(super) fn decode_q5_k(block: &[u8; 176], values: &mut Values) {
    let (fifths, nibbles) = (&block[16..48], &block[48..]);
    fill(values, |sub_idx| {
        let (scale, min) = scale_and_min(block, sub_idx / 2);
        move |value_idx| {
            let five = bits::<4, 32>(nibbles, value_idx) | bits::<1, 32>(fifths, value_idx) << 4;
            scale * five as f32 - min
        }
    });
}

/// A block is 256 nibbles, 256 upper pairs of bits, 16 signed scales, `scale`:
/// value = scale · its scale · (six bits − 32), for sub-blocks of 16.
pub(super) fn decode_q6_k(block: &[u8; 210], values: &mut Values) {
    let (nibbles, pairs, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let scale = half([block[208], block[209]]);
    fill(values, |sub_idx| {
        let scale = scale * scales[sub_idx].cast_signed() as f32;
        move |value_idx| {
            let six = bits::<4, 64>(nibbles, value_idx) | bits::<2, 32>(pairs, value_idx) << 4;
            scale * (six as f32 - 32.0)
        }
    });
}

/// Fills sub-blocks of 16: `of_sub_block` works out a sub-block's scales, and gives what makes its
/// values by their index in the block.
fn fill<F: Fn(usize) -> f32>(values: &mut Values, of_sub_block: impl Fn(usize) -> F) {
    for (sub_idx, sub_block) in values.chunks_exact_mut(16).enumerate() {
        let value_at = of_sub_block(sub_idx);
        for (value, value_idx) in sub_block.iter_mut().zip(16 * sub_idx..) {
            *value = value_at(value_idx);
        }
    }
}

/// The `BITS` bits of a number. Numbers lie `GROUP` bytes apart: the lowest bits of `GROUP` bytes
/// are the first `GROUP` numbers, the bits above them the next, and then come the next bytes.
fn bits<const BITS: usize, const GROUP: usize>(bytes: &[u8], idx: usize) -> u8 {
    let per_group = GROUP * 8 / BITS;
    let byte = bytes[idx / per_group * GROUP + idx % GROUP];
    byte >> (idx % per_group / GROUP * BITS) & ((1 << BITS) - 1)
}

/// The scale and minimum of a sub-block of 32, from the head that Q4_K and Q5_K share.
///
/// Of twelve bytes, the first eight hold the scales and then the minima of sub-blocks 0 to 3 in
/// their low six bits. Sub-blocks 4 to 7 have their low nibbles in the last four bytes, scale
/// below minimum, and the upper two bits of each at the top of the first eight.
fn scale_and_min(block: &[u8], sub_idx: usize) -> (f32, f32) {
    let packed = &block[4..16];
    let (scale, min) = match sub_idx.checked_sub(4) {
        None => (packed[sub_idx] & 63, packed[sub_idx + 4] & 63),
        Some(idx) => {
            let low = packed[idx + 8];
            (low & 0xf | packed[idx] >> 6 << 4, low >> 4 | packed[idx + 4] >> 6 << 4)
        }
    };
    (half([block[0], block[1]]) * scale as f32, half([block[2], block[3]]) * min as f32)
}

#[cfg(test)]
mod tests;
