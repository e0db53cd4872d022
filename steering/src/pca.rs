//! Directions of greatest variance.

use burn::tensor::{Tensor, TensorData};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use crate::rows::{Rows, dot, norm};

/// Of what the principal component is taken, for pairs of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pca {
    /// The differences of the pairs, as they are (steering-vectors).
    Differences,
    /// The differences less their mean (repeng's `pca_diff`).
    CentredDifferences,
    /// Both activations of each pair less the pair's mean, and less the mean of all (repeng's
    /// `pca_center`).
    Pairs,
}

/// The unit direction along which pairs of activations differ most. Its sign is such that most
/// pairs have more of it in `towards`, or, where they are even, their mean has.
///
/// # Shapes
/// Both `[n, d_model]`, pair by pair; result: `[d_model]`.
///
/// # Panics
/// If there are no pairs, the shapes differ, or nothing varies.
pub fn principal_direction(towards: &Tensor<2>, away: &Tensor<2>, pca: Pca) -> Tensor<1> {
    assert_eq!(towards.dims(), away.dims(), "pairs of activations");
    let device = towards.device();
    let (towards, away) = (Rows::new(towards), Rows::new(away));
    let differences = towards.minus(&away);
    let rows = match pca {
        Pca::Differences => differences.clone(),
        Pca::CentredDifferences => differences.clone().centred(),
        Pca::Pairs => {
            // A pair less its mean is plus and minus half of its difference.
            let halves = differences.iter().flat_map(|row| {
                [0.5, -0.5].map(|half| row.iter().map(|x| half * x).collect::<Vec<f64>>())
            });
            Rows::from_iter(halves).centred()
        }
    };
    let mut direction = principal_component(&rows);
    let along: Vec<f64> = differences.iter().map(|row| dot(row, &direction)).collect();
    let majority: f64 = along.iter().map(|x| if *x == 0.0 { 0.0 } else { x.signum() }).sum();
    let sign = if majority == 0.0 { along.iter().sum() } else { majority };
    if sign < 0.0 {
        direction.iter_mut().for_each(|x| *x = -*x);
    }
    let values: Vec<f32> = direction.into_iter().map(|x| x as f32).collect();
    let shape = [values.len()];
    Tensor::from_data(TensorData::new(values, shape), &device)
}

/// Steps before a Krylov space is begun anew.
const KRYLOV: usize = 32;
/// Of the eigenvalue: a residual below this is the end.
const TOLERANCE: f64 = 1e-12;
const MAX_RESTARTS: usize = 200;

/// The unit eigenvector of `AᵀA` with the largest eigenvalue, by Lanczos with reorthogonalisation,
/// begun anew from the best vector found.
fn principal_component(rows: &Rows) -> Vec<f64> {
    let d = rows.width();
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut best: Vec<f64> = (0..d).map(|_| StandardNormal.sample(&mut rng)).collect();
    assert!(rows.iter().flatten().any(|&x| x != 0.0), "nothing varies");
    for _ in 0..MAX_RESTARTS {
        let mut basis = vec![unit(best)];
        let mut images: Vec<Vec<f64>> = Vec::new();
        while images.len() < KRYLOV.min(d) {
            let image = rows.gram(basis.last().expect("not empty"));
            let mut next = image.clone();
            images.push(image);
            // Twice: once is not enough in floating point.
            for _ in 0..2 {
                for vector in &basis {
                    let along = dot(&next, vector);
                    next.iter_mut().zip(vector).for_each(|(x, v)| *x -= along * v);
                }
            }
            let left = norm(&next);
            if left <= TOLERANCE * norm(images.last().expect("just pushed")) {
                break;
            }
            if images.len() < KRYLOV.min(d) {
                basis.push(unit(next));
            }
        }
        let projected: Vec<Vec<f64>> =
            basis.iter().map(|a| images.iter().map(|b| dot(a, b)).collect()).collect();
        let (value, weights) = top_of_symmetric(projected);
        let combine = |vectors: &[Vec<f64>]| -> Vec<f64> {
            (0..d).map(|i| vectors.iter().zip(&weights).map(|(v, w)| w * v[i]).sum()).collect()
        };
        let (vector, image) = (combine(&basis), combine(&images));
        let residual: Vec<f64> = image.iter().zip(&vector).map(|(a, v)| a - value * v).collect();
        best = vector;
        if norm(&residual) <= TOLERANCE * value {
            break;
        }
    }
    unit(best)
}

fn unit(mut vector: Vec<f64>) -> Vec<f64> {
    let length = norm(&vector);
    vector.iter_mut().for_each(|x| *x /= length);
    vector
}

/// The largest eigenvalue of a small symmetric matrix and its unit eigenvector, by Jacobi's
/// rotations.
fn top_of_symmetric(mut a: Vec<Vec<f64>>) -> (f64, Vec<f64>) {
    let n = a.len();
    let mut vectors: Vec<Vec<f64>> =
        (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    for _ in 0..50 {
        let off: f64 =
            (0..n).flat_map(|i| (0..i).map(move |j| (i, j))).map(|(i, j)| a[i][j].abs()).sum();
        let diagonal: f64 = (0..n).map(|i| a[i][i].abs()).sum();
        if off <= f64::EPSILON * diagonal {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                if a[p][q] == 0.0 {
                    continue;
                }
                let theta = (a[q][q] - a[p][p]) / (2.0 * a[p][q]);
                let t = theta.signum() / (theta.abs() + theta.hypot(1.0));
                let c = 1.0 / t.hypot(1.0);
                let s = t * c;
                for row in &mut a {
                    (row[p], row[q]) = (c * row[p] - s * row[q], s * row[p] + c * row[q]);
                }
                let (above, below) = a.split_at_mut(q);
                for (x, y) in above[p].iter_mut().zip(&mut below[0]) {
                    (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
                }
                for row in &mut vectors {
                    (row[p], row[q]) = (c * row[p] - s * row[q], s * row[p] + c * row[q]);
                }
            }
        }
    }
    let top = (0..n).max_by(|&i, &j| a[i][i].total_cmp(&a[j][j])).expect("not empty");
    (a[top][top], vectors.iter().map(|row| row[top]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    fn matrix(rows: &[[f32; 2]]) -> Tensor<2> {
        let values = rows.concat();
        Tensor::from_data(TensorData::new(values, [rows.len(), 2]), &Device::flex())
    }

    fn direction(towards: &[[f32; 2]], pca: Pca) -> Vec<f32> {
        let away = vec![[0.0; 2]; towards.len()];
        let direction = principal_direction(&matrix(towards), &matrix(&away), pca);
        direction.into_data().try_to_vec().unwrap()
    }

    fn close(actual: &[f32], expected: [f32; 2]) -> bool {
        actual.iter().zip(expected).all(|(a, e)| (a - e).abs() < 1e-6)
    }

    /// Differences (4, 1), (4, −1), (4, 0): the mean lies along x, around it they vary along y.
    #[test]
    fn the_mean_counts_or_does_not() {
        let towards = [[4.0, 1.0], [4.0, -1.0], [4.0, 0.0]];
        assert!(close(&direction(&towards, Pca::Differences), [1.0, 0.0]));
        let across = direction(&towards, Pca::CentredDifferences);
        assert!(close(&across.into_iter().map(f32::abs).collect::<Vec<_>>(), [0.0, 1.0]));
        assert!(close(&direction(&towards, Pca::Pairs), [1.0, 0.0]));
    }

    #[test]
    fn most_pairs_have_more_of_it() {
        let towards = [[-4.0, 0.0], [-3.0, 0.0], [1.0, 0.0]];
        assert!(close(&direction(&towards, Pca::Differences), [-1.0, 0.0]));
    }

    /// `diag(3, 2)` turned by 45°, and a matrix whose eigenvalues are close together.
    #[test]
    fn jacobi_finds_the_largest() {
        let (value, vector) = top_of_symmetric(vec![vec![2.5, 0.5], vec![0.5, 2.5]]);
        assert!((value - 3.0).abs() < 1e-12);
        assert!((vector[0] - vector[1]).abs() < 1e-12);
        let n = 6;
        // I + 1e-3 · 1 1ᵀ: the largest is 1 + 6e-3, along the ones.
        let near: Vec<Vec<f64>> =
            (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j)) + 1e-3).collect()).collect();
        let (value, vector) = top_of_symmetric(near);
        assert!((value - 1.006).abs() < 1e-12);
        assert!(vector.iter().all(|x| (x.abs() - 6f64.sqrt().recip()).abs() < 1e-9));
    }
}
