//! Where training starts.

use burn::tensor::{Device, Tensor, TensorData};
use rand::RngExt;
use rand_distr::StandardNormal;

use super::activation_matrix::ActivationMatrix;
use super::config::{Centre, TrainConfig};
use super::error::TrainError;
use super::parameters::Parameters;
use super::row_order::random_stream;
use super::state::TrainState;

/// Activations that the scale and the centre are taken over, at most.
const SAMPLE: usize = 1 << 14;

/// Random decoder rows, the encoder their transpose, `b_dec` in the centre of the activations.
pub(super) fn state(
    config: &TrainConfig,
    activations: &ActivationMatrix,
    device: &Device,
) -> Result<TrainState, TrainError> {
    let (d_in, d_sae) = (activations.d_in(), config.d_sae);
    let sample = sample(activations);
    let mean_norm = sample.iter().map(|row| norm(row)).sum::<f64>() / sample.len() as f64;
    if !(mean_norm.is_finite() && mean_norm > 0.0) {
        return Err(TrainError::MeanNorm { mean_norm });
    }
    let input_scale = (d_in as f64).sqrt() / mean_norm;
    let centre = match config.centre {
        Centre::Mean => mean(&sample),
        Centre::GeometricMedian => geometric_median(&sample),
    };
    let b_dec: Vec<f32> = centre.iter().map(|x| (x * input_scale) as f32).collect();
    let rows = TensorData::new(decoder_rows(config, d_in), [d_sae, d_in]);
    let parameters = Parameters {
        w_enc: Tensor::from_data(rows.clone(), device),
        b_enc: Tensor::zeros([d_sae], device),
        w_dec: Tensor::from_data(rows, device),
        b_dec: Tensor::from_data(TensorData::new(b_dec, [d_in]), device),
    };
    Ok(TrainState::new(parameters, input_scale))
}

/// Rows in random directions, all of the norm asked for.
fn decoder_rows(config: &TrainConfig, d_in: usize) -> Vec<f32> {
    let mut random = random_stream(config.seed, 0);
    let mut rows = Vec::with_capacity(config.d_sae * d_in);
    for _ in 0..config.d_sae {
        let row: Vec<f32> = (0..d_in).map(|_| random.sample(StandardNormal)).collect();
        let scale = config.decoder_norm / norm(&row);
        rows.extend(row.iter().map(|x| (f64::from(*x) * scale) as f32));
    }
    rows
}

/// Rows spread evenly over all of them.
fn sample<'a>(activations: &ActivationMatrix<'a>) -> Vec<&'a [f32]> {
    let n = activations.n_rows();
    let n_sampled = n.min(SAMPLE);
    (0..n_sampled).map(|i| activations.row(i * n / n_sampled)).collect()
}

fn norm(row: &[f32]) -> f64 {
    row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}

fn mean(rows: &[&[f32]]) -> Vec<f64> {
    weighted_mean(rows, |_| 1.0)
}

fn weighted_mean(rows: &[&[f32]], weight: impl Fn(&[f32]) -> f64) -> Vec<f64> {
    let (mut sum, mut weights) = (vec![0.0; rows[0].len()], 0.0);
    for row in rows {
        let weight = weight(row);
        weights += weight;
        for (sum, &x) in sum.iter_mut().zip(*row) {
            *sum += weight * f64::from(x);
        }
    }
    sum.iter().map(|sum| sum / weights).collect()
}

/// The point of least summed distance, by Weiszfeld's iteration from the mean.
fn geometric_median(rows: &[&[f32]]) -> Vec<f64> {
    const ITERATIONS: usize = 100;
    const TOLERANCE: f64 = 1e-6;
    let mut centre = mean(rows);
    for _ in 0..ITERATIONS {
        let distance = |row: &[f32]| {
            let offsets = row.iter().zip(&centre).map(|(&x, c)| f64::from(x) - c);
            offsets.map(|offset| offset * offset).sum::<f64>().sqrt()
        };
        let scale = rows.iter().map(|row| distance(row)).sum::<f64>() / rows.len() as f64;
        if scale == 0.0 {
            break;
        }
        // A row at the centre itself must not outweigh all others without bound.
        let next = weighted_mean(rows, |row| 1.0 / distance(row).max(TOLERANCE * scale));
        let moved = next.iter().zip(&centre).map(|(a, b)| (a - b).powi(2));
        let moved = moved.sum::<f64>().sqrt();
        centre = next;
        if moved < TOLERANCE * scale {
            break;
        }
    }
    centre
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_get_the_root_of_their_width_as_norm() {
        let values = [3.0, 4.0, 0.0, 0.0, 0.0, 0.0, 6.0, 9.0f32];
        let activations = ActivationMatrix::new(&values, 4).expect("whole rows");
        let state = state(&TrainConfig::new(6, 2), &activations, &Device::flex()).expect("valid");
        // Norms 5 and √117; √4 over their mean.
        let scale = 2.0 / ((5.0 + 117f64.sqrt()) / 2.0);
        assert!((state.input_scale - scale).abs() < 1e-12);
        let b_dec: Vec<f32> = state.parameters.b_dec.into_data().try_into_vec_as().expect("f32");
        let centre = [1.5, 2.0, 3.0, 4.5f64].map(|x| (x * scale) as f32);
        assert_eq!(b_dec, centre);
        let norms = crate::sae::row_norms(state.parameters.w_dec);
        let norms: Vec<f32> = norms.into_data().try_into_vec_as().expect("f32");
        assert!(norms.iter().all(|norm| (norm - 0.1).abs() < 1e-6));
    }

    #[test]
    fn zeros_cannot_be_scaled() {
        let activations = ActivationMatrix::new(&[0.0; 8], 4).expect("whole rows");
        let error = state(&TrainConfig::new(6, 2), &activations, &Device::flex()).unwrap_err();
        assert_eq!(error, TrainError::MeanNorm { mean_norm: 0.0 });
    }

    #[test]
    fn the_geometric_median_stays_with_the_majority() {
        // Fermat's point of an equilateral triangle is its centre; an outlier on the axis of
        // three collinear points leaves the median on the middle one.
        let height = 3f32.sqrt();
        let triangle: [&[f32]; 3] = [&[-1.0, 0.0], &[1.0, 0.0], &[0.0, height]];
        let median = geometric_median(&triangle);
        assert!(median[0].abs() < 1e-5 && (median[1] - 1.0 / 3f64.sqrt()).abs() < 1e-5);
        let line: [&[f32]; 3] = [&[0.0], &[1.0], &[1e4]];
        assert!((geometric_median(&line)[0] - 1.0).abs() < 1e-2);
    }
}
