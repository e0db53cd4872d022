//! The plain default of top-k, on the host: Burn's own sort reads a tensor back there too, and leaves
//! equal entries in any order.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata, get_or_init_device_settings};
use burn::tensor::{TensorData, read_sync};

use crate::ops::dims;

pub(crate) fn plain_top_k<B: Backend>(
    x: FloatTensor<B>,
    k: usize,
) -> (FloatTensor<B>, IntTensor<B>) {
    let [n, m] = dims(&x);
    let (device, float) = (x.device(), x.dtype());
    let int = get_or_init_device_settings::<B>(&device).int_dtype;
    let data = read_sync(B::float_into_data(x)).expect("a tensor that was computed");
    let x: Vec<f32> = data.iter().collect();
    let (mut values, mut columns) = (Vec::with_capacity(n * k), Vec::with_capacity(n * k));
    for row in x.chunks(m) {
        // −0 and NaN would break ties or comparisons.
        let key = |column: i32| match row[column as usize] {
            x if x.is_nan() => f32::NEG_INFINITY,
            x => x + 0.0,
        };
        let order = |a: &i32, b: &i32| key(*b).total_cmp(&key(*a)).then(a.cmp(b));
        let mut largest: Vec<i32> = (0..m as i32).collect();
        largest.select_nth_unstable_by(k - 1, order);
        largest.truncate(k);
        largest.sort_unstable_by(order);
        values.extend(largest.iter().map(|&column| row[column as usize]));
        columns.extend(largest);
    }
    let values = TensorData::new(values, [n, k]).convert_dtype(float);
    let columns = TensorData::new(columns, [n, k]).convert_dtype(int.into());
    (B::float_from_data(values, &device), B::int_from_data(columns, &device))
}
