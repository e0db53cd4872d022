//! The device under test, the one beside it, and whether they agree.

use burn::tensor::{Device, Int, Tensor, TensorData};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How far numbers may be apart, in units of the largest of them: sums are taken in other orders.
pub const F32: f32 = 1e-4;
/// The same of what many operations follow on.
pub const DEEP: f32 = 1e-3;
/// The same where weights or activations are bf16, of 8 bits.
pub const BF16: f32 = 1e-2;

fn name() -> String {
    std::env::var("BURN_DEVICE").unwrap_or_else(|_| "flex".into())
}

/// The device under test.
pub fn device() -> Device {
    examples::device::device(&name()).unwrap_or_else(|error| panic!("{error:#}"))
}

fn reference() -> Device {
    let other = if name() == "flex" { "ndarray" } else { "flex" };
    examples::device::device(other).unwrap_or_else(|error| panic!("{error:#}"))
}

/// What was found on a device, by name.
#[derive(Default)]
pub struct Found {
    about: String,
    values: Vec<(String, Vec<f32>)>,
}

impl Found {
    /// What the rest is about, for the message of a failure.
    pub fn about(&mut self, about: impl Into<String>) {
        self.about = about.into();
    }

    pub fn put<const D: usize>(&mut self, what: &str, tensor: Tensor<D>) {
        let values = tensor.into_data().convert::<f32>();
        self.put_values(what, values.try_to_vec().expect("floats"));
    }

    pub fn put_ints<const D: usize>(&mut self, what: &str, tensor: Tensor<D, Int>) {
        let values = tensor.into_data().iter::<i64>().map(|value| value as f32).collect();
        self.put_values(what, values);
    }

    pub fn put_values(&mut self, what: &str, values: Vec<f32>) {
        self.values.push((format!("{} {what}", self.about), values));
    }
}

/// Runs the same on both devices, and fails if what is found differs by more than `tolerance`.
pub fn agree(tolerance: f32, run: impl Fn(&Device, &mut Found)) {
    let [mut actual, mut expected] = <[Found; 2]>::default();
    run(&device(), &mut actual);
    run(&reference(), &mut expected);
    assert!(!expected.values.is_empty(), "nothing was compared");
    assert_eq!(actual.values.len(), expected.values.len(), "what was found");
    for ((what, actual), (_, expected)) in actual.values.iter().zip(&expected.values) {
        assert_near(what, actual, expected, tolerance);
    }
}

/// Fails if a value is further off than `tolerance` times the largest.
pub fn assert_near(what: &str, actual: &[f32], expected: &[f32], tolerance: f32) {
    let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    assert!(largest > 0.0 && largest.is_finite(), "{what}: nothing to compare with");
    goldens::assert_close(what, actual, expected, tolerance * largest);
}

/// Numbers in [−1, 1) that depend on the seed alone.
pub fn noise<const D: usize>(shape: [usize; D], seed: u64, device: &Device) -> Tensor<D> {
    let values = numbers(shape.iter().product(), seed);
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// The same as a list.
pub fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// `[n, k]` indices below `m`, distinct within a row.
pub fn indices([n, k]: [usize; 2], m: usize, seed: u64, device: &Device) -> Tensor<2, Int> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let row = |_| rand::seq::index::sample(&mut rng, m, k).into_vec();
    let picked: Vec<i64> = (0..n).flat_map(row).map(|index| index as i64).collect();
    Tensor::from_data(TensorData::new(picked, [n, k]), device)
}

/// Sparse rows written out, `[n, m]`: where entries come in any order.
pub fn dense(values: Tensor<2>, indices: Tensor<2, Int>, m: usize) -> Vec<f32> {
    let [n, k] = values.dims();
    let values: Vec<f32> = values.into_data().try_to_vec().expect("floats");
    let mut dense = vec![0f32; n * m];
    for (at, column) in indices.into_data().iter::<i64>().enumerate() {
        dense[at / k * m + column as usize] += values[at];
    }
    dense
}
