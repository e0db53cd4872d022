//! Matching pursuit: latents one after the other, each from what the ones before left over.

use burn::tensor::activation::relu;
use burn::tensor::{Bool, IndexingUpdateOp, Int, Tensor};
use kernels::{Select, sparse_encode};

use crate::latents::SparseLatents;

/// When a pursuit ends, as [`Activation::MatchingPursuit`](crate::Activation) has it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) residual_threshold: f64,
    pub(crate) max_iterations: Option<usize>,
    pub(crate) stop_on_duplicate_support: bool,
}

/// The latents of rows `x`, as SAELens picks them: the one that explains most of what is left, at
/// the value `relu(⟨left, w_dec[i]⟩)`, which is then taken off. All rows go on together; one that
/// has ended picks zeros until the last one has.
///
/// The picks have no gradient; the values have one for `x` and `w_dec`. `w_enc` only ranks.
///
/// # Shapes
/// `x`: `[n, d_in]`, `w_enc`: `[d_in, d_sae]`, `w_dec`: `[d_sae, d_in]`, which is `w_enc`
/// transposed; latents: `[n, k]`, with `k` the iterations of the row that took most.
pub(crate) fn pursue(
    x: Tensor<2>,
    w_enc: Tensor<2>,
    w_dec: Tensor<2>,
    limits: Limits,
) -> SparseLatents {
    let ([n, d_in], [d_sae, _]) = (x.dims(), w_dec.dims());
    let w_enc = constant(w_enc);
    let mut support = Support::new(n, limits);
    let (mut residual, mut columns) = (x, Vec::new());
    for _ in 0..limits.max_iterations.unwrap_or(d_in) {
        let picked = best(constant(residual.clone()), w_enc.clone());
        let rows = w_dec.clone().select(0, picked.clone().squeeze_dim(1));
        let value = relu((residual.clone() * rows.clone()).sum_dim(1));
        let value = match &support.done {
            Some(done) => value.mask_fill(done.clone(), 0.0),
            None => value,
        };
        residual = residual - value.clone() * rows;
        support.add(picked, constant(value.clone()), constant(residual.clone()));
        columns.push(value);
        if support.all_done() {
            break;
        }
    }
    let Support { picks, slots, .. } = support;
    let (indices, slots) = (Tensor::cat(picks, 1), Tensor::cat(slots, 1));
    // What was picked again is added where it was picked first.
    let values = Tensor::cat(columns, 1);
    let values = values.zeros_like().scatter(1, slots, values, IndexingUpdateOp::Add);
    SparseLatents::new(indices, values, d_sae)
}

/// The column of `w` with the largest product with each row, `[n, 1]`.
fn best(residual: Tensor<2>, w: Tensor<2>) -> Tensor<2, Int> {
    let zeros = Tensor::zeros([w.dims()[1]], &w.device());
    sparse_encode(residual, w, zeros.clone(), zeros.ones_like(), Select::TopK(1)).1
}

/// The same numbers outside any graph.
fn constant(tensor: Tensor<2>) -> Tensor<2> {
    match tensor.is_autodiff() {
        true => tensor.inner(),
        false => tensor,
    }
}

/// What was picked so far.
struct Support {
    limits: Limits,
    n_rows: usize,
    /// Each iteration's latents, `[n, 1]`.
    picks: Vec<Tensor<2, Int>>,
    /// The iteration in which each pick was made for the first time, `[n, 1]`.
    slots: Vec<Tensor<2, Int>>,
    /// `[n, iterations]`: the latents that were not zero and had not been picked, −1 elsewhere.
    new: Option<Tensor<2, Int>>,
    /// `[n, 1]`: which rows have ended.
    done: Option<Tensor<2, Bool>>,
}

impl Support {
    fn new(n_rows: usize, limits: Limits) -> Self {
        Self { limits, n_rows, picks: Vec::new(), slots: Vec::new(), new: None, done: None }
    }

    fn add(&mut self, picked: Tensor<2, Int>, value: Tensor<2>, residual: Tensor<2>) {
        let step = self.picks.len();
        let none = picked.clone().mul_scalar(0).add_scalar(-1);
        let is_zero = value.greater_elem(0.0).bool_not();
        let (slot, new) = match &self.new {
            None => (none.clone().add_scalar(1), picked.clone()),
            Some(support) => {
                let same = support.clone().equal(picked.clone().expand([self.n_rows, step]));
                let places = Tensor::arange(1..step as i64 + 1, &picked.device());
                // A latent is new once, so the sum has one term, or none.
                let place = (same.int() * places.unsqueeze::<2>()).sum_dim(1);
                let is_first = place.clone().equal_elem(0);
                let slot = place.sub_scalar(1).mask_fill(is_first.clone(), step as i64);
                (slot, none.clone().mask_where(is_first, picked.clone()))
            }
        };
        let new = new.mask_where(is_zero, none);
        self.mark_done(new.clone(), residual);
        self.new = Some(match self.new.take() {
            Some(support) => Tensor::cat(vec![support, new], 1),
            None => new,
        });
        self.picks.push(picked);
        self.slots.push(slot);
    }

    fn mark_done(&mut self, new: Tensor<2, Int>, residual: Tensor<2>) {
        let Limits { residual_threshold, stop_on_duplicate_support, .. } = self.limits;
        let stays = stop_on_duplicate_support.then(|| new.lower_elem(0));
        let is_small = (residual_threshold > 0.0).then(|| {
            let norm = residual.square().sum_dim(1).sqrt();
            norm.lower_elem(residual_threshold)
        });
        let reasons = [self.done.take(), stays, is_small];
        self.done = reasons.into_iter().flatten().reduce(Tensor::bool_or);
    }

    fn all_done(&self) -> bool {
        self.done.clone().is_some_and(|done| done.all().into_scalar::<bool>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData, Tolerance};
    use proptest::prelude::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    const LIMITS: Limits =
        Limits { residual_threshold: 0.0, max_iterations: None, stop_on_duplicate_support: false };

    /// Latents (1, 0), (0, 1) and (.6, .8).
    fn w_dec() -> Tensor<2> {
        Tensor::from_data([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], &Device::flex())
    }

    fn run(x: Tensor<2>, limits: Limits) -> SparseLatents {
        pursue(x, w_dec().transpose(), w_dec(), limits)
    }

    fn assert_close<const D: usize>(actual: Tensor<D>, expected: impl Into<TensorData>) {
        let tolerance = Tolerance::<f32>::absolute(1e-5);
        actual.into_data().assert_approx_eq(&expected.into(), tolerance);
    }

    fn x() -> Tensor<2> {
        // Row 0 is all latent 2. Row 1: products 2, 1, 2, so latent 0 takes 2 and leaves (0, 1);
        // then latent 1 takes 1. Row 2 has no product above zero.
        Tensor::from_data([[3.0, 4.0], [2.0, 1.0], [-1.0, -1.0]], &Device::flex())
    }

    #[test]
    fn what_explains_most_is_picked_again_and_again() {
        let latents = run(x(), LIMITS);
        assert_close(latents.to_dense(), [[0.0, 0.0, 5.0], [2.0, 1.0, 0.0], [0.0, 0.0, 0.0]]);
    }

    #[test]
    fn a_latent_that_is_picked_twice_is_listed_once() {
        // Half of (1, 0) takes a quarter of what is left each time.
        let w_dec = Tensor::<2>::from_data([[0.5, 0.0], [0.0, 0.1]], &Device::flex());
        let x = Tensor::from_data([[1.0, 0.0]], &Device::flex());
        let limits = Limits { max_iterations: Some(3), ..LIMITS };
        let latents = pursue(x, w_dec.clone().transpose(), w_dec, limits);
        // .5, then .5 · .75, then .5 · .75².
        assert_close(latents.to_dense(), [[0.5 + 0.375 + 0.28125, 0.0]]);
        assert_eq!(latents.entries().count(), 1);
    }

    #[test]
    fn a_duplicate_ends_its_row_after_it_is_added() {
        let w_dec = Tensor::<2>::from_data([[0.5, 0.0], [0.0, 0.1]], &Device::flex());
        let x = Tensor::from_data([[1.0, 0.0], [1.0, 3.0]], &Device::flex());
        let limits = Limits { stop_on_duplicate_support: true, max_iterations: Some(10), ..LIMITS };
        let latents = pursue(x, w_dec.clone().transpose(), w_dec, limits);
        // Row 1: products .5 and .3, then .375 and .3: latent 0 twice.
        assert_close(latents.to_dense(), [[0.875, 0.0], [0.875, 0.0]]);
        assert_eq!(latents.values.dims(), [2, 2]);
    }

    #[test]
    fn a_small_residual_ends_its_row() {
        let limits = Limits { residual_threshold: 1.5, ..LIMITS };
        // Row 1 leaves (0, 1) after its first pick, row 2 is small before it.
        let expected = [[0.0, 0.0, 5.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]];
        assert_close(run(x(), limits).to_dense(), expected);
        assert_eq!(run(x(), limits).values.dims(), [3, 1]);
    }

    /// One row, latent by latent, all products written out.
    fn plain(row: &[f32], w_dec: &[Vec<f32>], limits: Limits) -> Vec<f32> {
        let mut residual = row.to_vec();
        let mut latents = vec![0.0; w_dec.len()];
        for _ in 0..limits.max_iterations.unwrap_or(row.len()) {
            let product = |latent: &Vec<f32>| -> f32 {
                latent.iter().zip(&residual).map(|(w, r)| w * r).sum()
            };
            let products: Vec<f32> = w_dec.iter().map(product).collect();
            let best = (0..products.len())
                .rev()
                .max_by(|a, b| products[*a].total_cmp(&products[*b]))
                .expect("a latent");
            let value = products[best].max(0.0);
            let is_new = latents[best] == 0.0 && value > 0.0;
            latents[best] += value;
            for (r, w) in residual.iter_mut().zip(&w_dec[best]) {
                *r -= value * w;
            }
            let norm = residual.iter().map(|r| r * r).sum::<f32>().sqrt();
            let is_small = f64::from(norm) < limits.residual_threshold;
            if is_small || limits.stop_on_duplicate_support && !is_new {
                break;
            }
        }
        latents
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn rows_together_are_rows_alone(
            (n, d_in, d_sae) in (1..9usize, 1..9usize, 1..20usize),
            residual_threshold in prop_oneof![Just(0.0), 0.05..1.0],
            max_iterations in prop_oneof![Just(None), (1..12usize).prop_map(Some)],
            stop_on_duplicate_support: bool,
            seed: u64,
        ) {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            let mut rows = |n: usize| -> Vec<Vec<f32>> {
                let row = |_| (0..d_in).map(|_| random.random_range(-1.0..1.0)).collect();
                (0..n).map(row).collect()
            };
            let (x, mut w_dec) = (rows(n), rows(d_sae));
            // Of other norms than 1 a pursuit need not converge.
            for row in &mut w_dec {
                let norm = row.iter().map(|w| w * w).sum::<f32>().sqrt();
                row.iter_mut().for_each(|w| *w /= norm);
            }
            let tensor = |rows: &[Vec<f32>]| {
                let data = TensorData::new(rows.concat(), [rows.len(), d_in]);
                Tensor::<2>::from_data(data, &Device::flex())
            };
            let limits = Limits { residual_threshold, max_iterations, stop_on_duplicate_support };
            let rows_of = tensor(&w_dec);
            let latents = pursue(tensor(&x), rows_of.clone().transpose(), rows_of, limits);
            let expected: Vec<f32> =
                x.iter().flat_map(|row| plain(row, &w_dec, limits)).collect();
            let dense = latents.to_dense();
            assert_close(dense, TensorData::new(expected, [n, d_sae]));
            let mut seen = std::collections::HashSet::new();
            prop_assert!(latents.entries().all(|entry| seen.insert((entry.row, entry.latent_idx))));
        }
    }

    #[test]
    fn gradients_pass_through_values_and_rows() {
        let x = x().narrow(0, 1, 1).autodiff().require_grad();
        let w_dec = w_dec().autodiff().require_grad();
        let latents = pursue(x.clone(), w_dec.clone().transpose(), w_dec.clone(), LIMITS);
        // The sum of v₀ = ⟨x, w₀⟩ and v₁ = ⟨x − v₀ w₀, w₁⟩ = ⟨x, w₁⟩ − ⟨x, w₀⟩⟨w₀, w₁⟩.
        let gradients = latents.values.sum().backward();
        assert_close(x.grad(&gradients).expect("in the graph"), [[1.0, 1.0]]);
        // By w₀: x − ⟨x, w₀⟩ w₁ = (2, −1); by w₁: x − ⟨x, w₀⟩ w₀ = (0, 1).
        let expected = [[2.0, -1.0], [0.0, 1.0], [0.0, 0.0]];
        assert_close(w_dec.grad(&gradients).expect("in the graph"), expected);
    }
}
