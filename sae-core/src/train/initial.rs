//! Where training starts.

use burn::tensor::{Device, Tensor, TensorData};
use rand::{Rng, RngExt};
use rand_distr::StandardNormal;

use super::activation_matrix::ActivationMatrix;
use super::config::{Centre, InputScale, TrainConfig, Transcoder};
use super::error::TrainError;
use super::objective::Kind;
use super::parameters::{ParameterName, Parameters};
use super::row_order::random_stream;
use super::state::TrainState;

/// Activations that the scale and the centre are taken over, at most.
const SAMPLE: usize = 1 << 14;

impl TrainState {
    /// Before the first step: decoder rows of the norm asked for in random directions, the encoder
    /// their transpose, `b_dec` in the centre of the activations.
    ///
    /// A transcoder needs a sample of its target too: `b_dec` lies in the centre of that, and where
    /// it is of another width than the activations, the encoder has random rows of its own.
    ///
    /// # Errors
    /// If an option is out of its range, the target is missing, not wanted or of another width than
    /// the configuration says, or the activations cannot be scaled.
    pub fn initial(
        config: &TrainConfig,
        activations: &ActivationMatrix,
        target: Option<&ActivationMatrix>,
        device: &Device,
    ) -> Result<Self, TrainError> {
        config.validate(activations.d_in())?;
        let target = match (config.transcoder, target) {
            (None, None) => activations,
            (Some(Transcoder { d_out, .. }), Some(target)) if d_out == target.d_in() => target,
            (Some(Transcoder { d_out: expected, .. }), Some(target)) => {
                return Err(TrainError::Width { expected, actual: target.d_in() });
            }
            (Some(_), None) => {
                let (option, with) = ("transcoder", "activations without a target");
                return Err(TrainError::Conflict { option, with });
            }
            (None, Some(_)) => {
                let (option, with) = ("a target", "an SAE that reconstructs its input");
                return Err(TrainError::Conflict { option, with });
            }
        };
        begin(config, activations, target, device)
    }
}

fn begin(
    config: &TrainConfig,
    activations: &ActivationMatrix,
    target: &ActivationMatrix,
    device: &Device,
) -> Result<TrainState, TrainError> {
    let (d_in, d_out) = (activations.d_in(), target.d_in());
    let sample = sample(activations);
    let mean_norm = sample.iter().map(|row| norm(row)).sum::<f64>() / sample.len() as f64;
    if !(mean_norm.is_finite() && mean_norm > 0.0) {
        return Err(TrainError::MeanNorm { mean_norm });
    }
    let input_scale = match config.input_scale {
        InputScale::AverageNorm => (d_in as f64).sqrt() / mean_norm,
        InputScale::Raw | InputScale::ConstantNorm | InputScale::LayerNorm => 1.0,
    };
    let sample = self::sample(target);
    let normalized = match config.transcoder {
        None => config.input_scale.normalization().normalize(rows(&sample, device)).0,
        // What a transcoder writes is not normalised.
        Some(_) => rows(&sample, device),
    };
    let values: Vec<f32> = normalized.into_data().try_into_vec_as().expect("floats");
    let sample: Vec<&[f32]> = values.chunks(d_out).collect();
    let centre = match config.centre {
        Centre::Zero => vec![0.0; d_out],
        Centre::Mean => mean(&sample),
        Centre::GeometricMedian => geometric_median(&sample),
    };
    let b_dec: Vec<f32> = centre.iter().map(|x| (x * input_scale) as f32).collect();
    let b_dec = Tensor::from_data(TensorData::new(b_dec, [d_out]), device);
    let mut random = random_stream(config.seed, 0);
    let w_dec = random_rows(config, d_out, &mut random);
    let w_enc = match d_in == d_out {
        true => w_dec.clone(),
        false => random_rows(config, d_in, &mut random),
    };
    let mut parameters = Parameters::tied(Tensor::from_data(w_dec, device), b_dec);
    let row = |value: f64| Tensor::zeros([1, config.d_sae], device) + value;
    if !matches!(config.objective.kind, Kind::MatchingPursuit(_)) {
        parameters.insert(ParameterName::WEnc, Tensor::from_data(w_enc, device));
        parameters.insert(ParameterName::BEnc, row(0.0));
    }
    if matches!(config.objective.kind, Kind::Gated(_)) {
        parameters.insert(ParameterName::RMag, row(0.0));
        parameters.insert(ParameterName::BMag, row(0.0));
    }
    if let Some(kind) = config.jump_relu() {
        parameters.insert(kind.threshold.name(), row(kind.start()));
    }
    if config.transcoder.is_some_and(|transcoder| transcoder.skip) {
        parameters.insert(ParameterName::WSkip, Tensor::zeros([d_out, d_in], device));
    }
    Ok(TrainState::new(parameters, input_scale, &config.optimizer))
}

/// Rows in random directions, all of the norm asked for.
fn random_rows(config: &TrainConfig, width: usize, random: &mut impl Rng) -> TensorData {
    let mut rows = Vec::with_capacity(config.d_sae * width);
    for _ in 0..config.d_sae {
        let row: Vec<f32> = (0..width).map(|_| random.sample(StandardNormal)).collect();
        let scale = config.decoder_norm / norm(&row);
        rows.extend(row.iter().map(|x| (f64::from(*x) * scale) as f32));
    }
    TensorData::new(rows, [config.d_sae, width])
}

/// Rows spread evenly over all of them.
fn sample<'a>(activations: &ActivationMatrix<'a>) -> Vec<&'a [f32]> {
    let n = activations.n_rows();
    let n_sampled = n.min(SAMPLE);
    (0..n_sampled).map(|i| activations.row(i * n / n_sampled)).collect()
}

fn rows(sample: &[&[f32]], device: &Device) -> Tensor<2> {
    let shape = [sample.len(), sample[0].len()];
    Tensor::from_data(TensorData::new(sample.concat(), shape), device)
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
    use crate::train::{
        Gated, GatedAuxiliary, JumpRelu, MatchingPursuit, Objective, Sparsity, ThresholdParameter,
    };

    fn top_k() -> TrainConfig {
        TrainConfig::new(6, Objective::top_k(2))
    }

    #[test]
    fn every_kind_starts_with_its_parameters() {
        let values = [3.0, 4.0, 0.0, 6.0, 9.0, 1.0f32];
        let (narrow, wide) = (
            ActivationMatrix::new(&values, 2).expect("whole rows"),
            ActivationMatrix::new(&values, 3).expect("whole rows"),
        );
        let names = |config: TrainConfig, target| {
            let target = config.transcoder.and(Some(target));
            let state = TrainState::initial(&config, &narrow, target, &Device::flex());
            let parameters = state.expect("valid").parameters;
            let shapes = parameters.named().map(|(name, tensor)| (name.as_str(), tensor.dims()));
            shapes.collect::<Vec<_>>()
        };
        let with = |kind| TrainConfig::new(6, Objective::new(kind));
        let shared = [("w_enc", [6, 2]), ("b_enc", [1, 6]), ("w_dec", [6, 2]), ("b_dec", [1, 2])];
        assert_eq!(names(top_k(), &narrow), shared);
        let (sparsity, auxiliary) = (Sparsity::new(1.0), GatedAuxiliary::DetachedDecoder);
        let gated = names(with(Kind::Gated(Gated { sparsity, auxiliary })), &narrow);
        assert_eq!(gated[4..], [("r_mag", [1, 6]), ("b_mag", [1, 6])]);
        let jump_relu = JumpRelu::new(1.0);
        assert_eq!(names(with(Kind::JumpRelu(jump_relu)), &narrow)[4..], [("threshold", [1, 6])]);
        let by_log = JumpRelu { threshold: ThresholdParameter::Logarithm, ..jump_relu };
        assert_eq!(names(with(Kind::JumpRelu(by_log)), &narrow)[4..], [("log_threshold", [1, 6])]);
        let pursuit = Kind::MatchingPursuit(MatchingPursuit {
            residual_threshold: 0.1,
            max_iterations: None,
            stop_on_duplicate_support: true,
        });
        assert_eq!(names(with(pursuit), &narrow), shared[2..]);
        let objective = Objective { apply_b_dec_to_input: false, ..Objective::top_k(2) };
        let transcoder = TrainConfig::new(6, objective)
            .with_transcoder(Some(Transcoder { d_out: 3, skip: true }));
        let shapes = names(transcoder.clone(), &wide);
        let initial = |target| {
            TrainState::initial(&transcoder, &narrow, target, &Device::flex()).unwrap_err()
        };
        assert!(matches!(initial(None), TrainError::Conflict { option: "transcoder", .. }));
        assert_eq!(initial(Some(&narrow)), TrainError::Width { expected: 3, actual: 2 });
        assert_eq!(shapes[2..], [("w_dec", [6, 3]), ("b_dec", [1, 3]), ("w_skip", [3, 2])]);
    }

    #[test]
    fn inputs_get_the_root_of_their_width_as_norm() {
        let values = [3.0, 4.0, 0.0, 0.0, 0.0, 0.0, 6.0, 9.0f32];
        let activations = ActivationMatrix::new(&values, 4).expect("whole rows");
        let state =
            TrainState::initial(&top_k(), &activations, None, &Device::flex()).expect("valid");
        // Norms 5 and √117; √4 over their mean.
        let scale = 2.0 / ((5.0 + 117f64.sqrt()) / 2.0);
        assert!((state.input_scale - scale).abs() < 1e-12);
        let b_dec = state.parameters.vector(ParameterName::BDec);
        let b_dec: Vec<f32> = b_dec.into_data().try_into_vec_as().expect("f32");
        let centre = [1.5, 2.0, 3.0, 4.5f64].map(|x| (x * scale) as f32);
        assert_eq!(b_dec, centre);
        let norms = crate::sae::row_norms(state.parameters.w_dec());
        let norms: Vec<f32> = norms.into_data().try_into_vec_as().expect("f32");
        assert!(norms.iter().all(|norm| (norm - 0.1).abs() < 1e-6));
    }

    #[test]
    fn the_centre_is_that_of_scaled_rows() {
        let values = [3.0, 4.0, -5.0, 12.0f32];
        let activations = ActivationMatrix::new(&values, 2).expect("whole rows");
        let centre = |input_scale| {
            let config = top_k().with_input_scale(input_scale);
            let state = TrainState::initial(&config, &activations, None, &Device::flex());
            let state = state.expect("valid");
            let b_dec = state.parameters.vector(ParameterName::BDec).into_data();
            let b_dec: Vec<f32> = b_dec.try_into_vec_as().expect("f32");
            (state.input_scale, b_dec)
        };
        assert_eq!(centre(InputScale::Raw), (1.0, vec![-1.0, 8.0]));
        // (.6, .8) and (−5/13, 12/13), times √2.
        let (scale, b_dec) = centre(InputScale::ConstantNorm);
        let expected = [0.6 - 5.0 / 13.0, 0.8 + 12.0 / 13.0f32].map(|x| x / 2f32.sqrt());
        let close = b_dec.iter().zip(expected).all(|(b, e)| (b - e).abs() < 1e-6);
        assert!(scale == 1.0 && close, "{b_dec:?} for {expected:?}");
        // Both rows rise: (−1, 1) / √2.
        let (_, b_dec) = centre(InputScale::LayerNorm);
        let half = 0.5f32.sqrt();
        assert!((b_dec[0] + half).abs() < 1e-4 && (b_dec[1] - half).abs() < 1e-4, "{b_dec:?}");
    }

    #[test]
    fn zeros_cannot_be_scaled() {
        let activations = ActivationMatrix::new(&[0.0; 8], 4).expect("whole rows");
        let error = TrainState::initial(&top_k(), &activations, None, &Device::flex()).unwrap_err();
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
