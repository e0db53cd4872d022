//! The encoder, and some of the products that it goes through.

use burn::backend::Flex;
use rayon::prelude::*;

use super::encode::{for_each_tile, sparse_encode};
use super::top_k::{Picked, pick_magnitudes, pick_values};
use super::{Float, Int, floats, ints, new_floats, packed, packed_ints, widened};
use crate::ops::{Search, Select, dims};
use crate::plain_training::products_of;

pub(super) fn sparse_encode_with(
    x: Float,
    w: Float,
    bias: Float,
    by: Float,
    select: Select,
    among: Int,
) -> (Float, Int, Float) {
    let ([n, _], [_, m]) = (dims::<2>(&x), dims::<2>(&w));
    let w = widened(w);
    let among = packed_ints(among);
    let columns = ints(&among);
    if let Some(bad) = columns.iter().find(|&&column| column < 0 || column as usize >= m) {
        panic!("column {bad} is out of range for {m} columns");
    }
    let (k, by_magnitude) = match select {
        Select::TopK(k) | Select::TopKSigned(k) if !columns.is_empty() => (k, false),
        Select::TopKMagnitude(k) if !columns.is_empty() => (k, true),
        _ => {
            let products = products_of::<Flex>(x.clone(), w.clone(), among);
            let (values, indices) = sparse_encode(x, w, bias, by, select, Search::Full);
            return (values, indices, products);
        }
    };
    let (bias, by) = (packed(bias), packed(by));
    let (bias, by) = (floats(&bias), floats(&by));
    let mut picked = Picked::new(n, k);
    let mut products = vec![0f32; n * columns.len()];
    let mut rest = &mut products[..];
    for_each_tile(x, w, |tile, m| {
        match by_magnitude {
            false => picked.scan(tile, m, |row, room| pick_values(row, bias, by, k, room)),
            true => picked.scan(tile, m, |row, room| pick_magnitudes(row, bias, by, k, room)),
        }
        let (part, behind) = std::mem::take(&mut rest).split_at_mut(tile.len() / m * columns.len());
        rest = behind;
        part.par_chunks_mut(columns.len()).zip(tile.par_chunks(m)).for_each(|(out, row)| {
            for (out, &column) in out.iter_mut().zip(columns) {
                *out = row[column as usize];
            }
        });
    });
    if let Select::TopK(_) = select {
        picked.rectify();
    }
    let (values, indices) = picked.into_tensors(n, k);
    (values, indices, new_floats(products, [n, columns.len()]))
}
