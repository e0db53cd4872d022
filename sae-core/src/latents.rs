//! Latents in sparse form.

use burn::tensor::{Int, Tensor, TensorData};

/// The latents of `n` activations, `k` entries each: latent `indices[i, j]` has `values[i, j]`.
///
/// Within a row the indices of what is not zero are distinct. A latent that is not listed is zero,
/// and a listed one may be: rows with fewer latents than others are filled up with zeros.
#[derive(Debug, Clone)]
pub struct SparseLatents {
    /// Which latents, `[n, k]`.
    pub indices: Tensor<2, Int>,
    /// Their values, `[n, k]`.
    pub values: Tensor<2>,
    /// How many latents there are.
    pub d_sae: usize,
}

/// A latent that is active somewhere.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Entry {
    /// The activation it is active on.
    pub row: usize,
    /// Which latent.
    pub latent_idx: usize,
    /// Its value, not zero.
    pub value: f32,
}

impl SparseLatents {
    /// From indices and values.
    ///
    /// # Shapes
    /// Both `[n, k]`.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn new(indices: Tensor<2, Int>, values: Tensor<2>, d_sae: usize) -> Self {
        assert_eq!(indices.dims(), values.dims(), "latents: indices and values differ in shape");
        Self { indices, values, d_sae }
    }

    /// The number of activations.
    pub fn n_rows(&self) -> usize {
        self.values.dims()[0]
    }

    /// All latents of all rows, zeros included. Carries gradients.
    ///
    /// # Shapes
    /// `[n, d_sae]`.
    pub fn to_dense(&self) -> Tensor<2> {
        let zeros = Tensor::zeros([self.n_rows(), self.d_sae], &self.values.device());
        let add = burn::tensor::IndexingUpdateOp::Add;
        zeros.scatter(1, self.indices.clone(), self.values.clone(), add)
    }

    /// One latent on every row, zero where it is not active. Carries gradients.
    ///
    /// # Shapes
    /// `[n]`.
    ///
    /// # Panics
    /// If there is no such latent.
    pub fn latent(&self, latent_idx: usize) -> Tensor<1> {
        let d_sae = self.d_sae;
        assert!(latent_idx < d_sae, "latent {latent_idx} is not among {d_sae}");
        let others = self.indices.clone().not_equal_elem(latent_idx as i64);
        self.values.clone().mask_fill(others, 0.0).sum_dim(1).squeeze_dim(1)
    }

    /// The same latents outside any graph.
    pub fn detached(&self) -> Self {
        let values = match self.values.is_autodiff() {
            true => self.values.clone().inner(),
            false => self.values.clone(),
        };
        Self { indices: self.indices.clone(), values, d_sae: self.d_sae }
    }

    /// Reads the active latents back to the host, row by row.
    pub fn entries(&self) -> impl Iterator<Item = Entry> + use<> {
        let [_, k] = self.values.dims();
        let indices = host::<i64>(self.indices.to_data());
        let values = host::<f32>(self.values.to_data());
        let entries = indices.into_iter().zip(values).enumerate();
        entries.filter(|(_, (_, value))| *value != 0.0).map(move |(at, (latent, value))| Entry {
            row: at / k,
            latent_idx: latent as usize,
            value,
        })
    }
}

fn host<E: burn::tensor::Element>(data: TensorData) -> Vec<E> {
    data.try_into_vec_as().expect("numbers convert to numbers")
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    /// Rows {1: 2, 3: 0} and {0: 4, 1: 5} of five latents.
    fn example() -> SparseLatents {
        let device = Device::flex();
        SparseLatents::new(
            Tensor::from_data([[1, 3], [0, 1]], &device),
            Tensor::from_data([[2.0, 0.0], [4.0, 5.0]], &device),
            5,
        )
    }

    #[test]
    fn dense_puts_values_in_their_columns() {
        let expected = TensorData::from([[0.0f32, 2.0, 0.0, 0.0, 0.0], [4.0, 5.0, 0.0, 0.0, 0.0]]);
        example().to_dense().into_data().assert_eq(&expected, true);
    }

    #[test]
    fn a_latent_is_a_dense_column() {
        let latents = example();
        for latent_idx in 0..5 {
            let column = latents.to_dense().narrow(1, latent_idx, 1).squeeze_dim::<1>(1);
            latents.latent(latent_idx).into_data().assert_eq(&column.into_data(), true);
        }
    }

    #[test]
    #[should_panic(expected = "latent 5 is not among 5")]
    fn a_latent_that_is_not_there_panics() {
        example().latent(5);
    }

    #[test]
    fn entries_leave_zeros_out() {
        let entries: Vec<_> = example().entries().collect();
        let entry = |row, latent_idx, value| Entry { row, latent_idx, value };
        assert_eq!(entries, [entry(0, 1, 2.0), entry(1, 0, 4.0), entry(1, 1, 5.0)]);
    }

    #[test]
    fn gradients_reach_the_values_of_one_latent() {
        let mut latents = example();
        let values = latents.values.autodiff().require_grad();
        latents.values = values.clone();
        let grads = latents.latent(1).sum().backward();
        let expected = TensorData::from([[1.0f32, 0.0], [0.0, 1.0]]);
        values.grad(&grads).expect("in the graph").into_data().assert_eq(&expected, true);
    }
}
