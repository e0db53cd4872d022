//! Matrices in f64, for what is found once and exactly.

use burn::tensor::Tensor;

/// Rows of one width.
#[derive(Debug, Clone)]
pub(crate) struct Rows {
    width: usize,
    values: Vec<f64>,
}

impl Rows {
    /// # Panics
    /// If there are no rows, or they have no width.
    pub(crate) fn new(rows: &Tensor<2>) -> Self {
        let [n, width] = rows.dims();
        assert!(n > 0 && width > 0, "no activations");
        let values = rows.to_data().try_to_vec::<f32>().expect("activations are f32");
        Self { width, values: values.into_iter().map(f64::from).collect() }
    }

    pub(crate) fn width(&self) -> usize {
        self.width
    }

    pub(crate) fn len(&self) -> usize {
        self.values.len() / self.width
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &[f64]> {
        self.values.chunks_exact(self.width)
    }

    pub(crate) fn minus(&self, other: &Self) -> Self {
        assert_eq!((self.width, self.len()), (other.width, other.len()), "rows in pairs");
        let values = self.values.iter().zip(&other.values).map(|(a, b)| a - b).collect();
        Self { width: self.width, values }
    }

    pub(crate) fn mean(&self) -> Vec<f64> {
        let mut mean = vec![0.0; self.width];
        for row in self.iter() {
            mean.iter_mut().zip(row).for_each(|(mean, x)| *mean += x);
        }
        mean.iter_mut().for_each(|mean| *mean /= self.len() as f64);
        mean
    }

    /// Less their mean.
    pub(crate) fn centred(mut self) -> Self {
        let mean = self.mean();
        for row in self.values.chunks_exact_mut(self.width) {
            row.iter_mut().zip(&mean).for_each(|(x, mean)| *x -= mean);
        }
        self
    }

    /// `Aᵀ A v`.
    pub(crate) fn gram(&self, v: &[f64]) -> Vec<f64> {
        let mut sum = vec![0.0; self.width];
        for row in self.iter() {
            let along = dot(row, v);
            sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += along * x);
        }
        sum
    }
}

impl FromIterator<Vec<f64>> for Rows {
    fn from_iter<T: IntoIterator<Item = Vec<f64>>>(rows: T) -> Self {
        let rows: Vec<Vec<f64>> = rows.into_iter().collect();
        let width = rows.first().map_or(0, Vec::len);
        assert!(width > 0 && rows.iter().all(|row| row.len() == width), "rows of one width");
        Self { width, values: rows.concat() }
    }
}

/// Sums that a processor can add at once; one after another, each waits for the one before.
const LANES: usize = 8;

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f64 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    let mut sums = [0.0; LANES];
    for (a, b) in a.zip(b) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
    }
    sums.iter().sum::<f64>() + rest
}

pub(crate) fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}
