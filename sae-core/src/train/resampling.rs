//! Dead latents begin again where the SAE is worst.

use burn::config::Config;
use burn::tensor::{Tensor, TensorData};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::error::TrainError;
use super::objective::{Batch, Objective};
use super::parameters::{ParameterName, Parameters};

/// Share of the norm of living encoder rows that a new one gets.
const ENCODER_SHARE: f64 = 0.2;

/// Every so often, dead latents are set to read and write activations of the batch, drawn by how
/// badly they are reconstructed. The optimiser forgets these latents.
#[derive(Config, Debug, Copy, PartialEq)]
pub struct Resampling {
    /// Steps from one time to the next.
    pub every: usize,
    /// Whose rule it is.
    #[config(default = "ResamplingRule::Anthropic")]
    pub rule: ResamplingRule,
}

/// How activations are drawn, and how long the new rows of the encoder are.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum ResamplingRule {
    /// By the square of the loss; a fifth of the mean norm of living rows (Bricken et al., 2023).
    Anthropic,
    /// By the norm of the error; that times the norm of the activation (dictionary_learning).
    DictionaryLearning,
}

impl Resampling {
    pub(super) fn validate(&self) -> Result<(), TrainError> {
        match self.every {
            0 => {
                let (option, expected) = ("resampling.every", "a number above zero");
                Err(TrainError::Option { option, expected, actual: 0.0 })
            }
            _ => Ok(()),
        }
    }

    /// Whether it is time, after so many steps.
    pub(super) fn is_due(&self, step: usize) -> bool {
        step.is_multiple_of(self.every)
    }

    /// Gives dead latents new weights, as far as the batch has activations; gives these latents.
    /// The new rows of encoder and decoder are activations as the encoder reads them and the
    /// decoder writes them: less `b_dec`, if that is subtracted.
    pub(super) fn resample(
        &self,
        parameters: &mut Parameters,
        batch: &Batch,
        objective: &Objective,
        row_errors: &Tensor<1>,
        dead: &[u32],
        mut random: ChaCha8Rng,
    ) -> Vec<u32> {
        let errors = row_errors.to_data();
        let weights = errors.iter::<f32>().map(f64::from).map(|square| match self.rule {
            ResamplingRule::Anthropic => square * square,
            ResamplingRule::DictionaryLearning => square.sqrt(),
        });
        let rows = draw(weights, dead.len(), &mut random);
        let revived = &dead[..rows.len()];
        if revived.is_empty() {
            return Vec::new();
        }
        let b_dec = parameters.matrix(ParameterName::BDec);
        let target = batch.target.as_ref().unwrap_or(&batch.x);
        let written = gather(&(target.clone() - b_dec.clone()), &rows);
        let read = match objective.apply_b_dec_to_input {
            true => gather(&(batch.x.clone() - b_dec), &rows),
            false => gather(&batch.x, &rows),
        };
        let lengths =
            |name| parameters.get(name).map_or(0.0, |rows| mean_norm_but(rows.clone(), dead));
        let (encoder, decoder) = (lengths(ParameterName::WEnc), lengths(ParameterName::WDec));
        let place = |latent: u32| revived.binary_search(&latent).expect("one of them");
        parameters.map_latents(revived, |latent, name, values| {
            let (read, written) = (&read[place(latent)], &written[place(latent)]);
            match name {
                ParameterName::WEnc => {
                    let length = match self.rule {
                        ResamplingRule::Anthropic => 1.0 / norm(read),
                        ResamplingRule::DictionaryLearning => 1.0,
                    };
                    scale_into(values, read, ENCODER_SHARE * encoder * length);
                }
                ParameterName::WDec => scale_into(values, written, decoder / norm(written)),
                ParameterName::BEnc | ParameterName::RMag | ParameterName::BMag => values.fill(0.0),
                // A threshold that outgrew its latent would keep it dead.
                ParameterName::Threshold | ParameterName::LogThreshold => {
                    values.fill(objective.threshold_start().unwrap_or(0.0) as f32);
                }
                ParameterName::BDec | ParameterName::WSkip => {}
            }
        });
        revived.to_vec()
    }
}

/// Up to `n` distinct rows, each with a chance that grows with its weight (Efraimidis & Spirakis,
/// 2006): those of the largest `u^(1/weight)`.
fn draw(weights: impl Iterator<Item = f64>, n: usize, random: &mut impl rand::Rng) -> Vec<usize> {
    let keys = weights.map(|weight| random.random_range(f64::MIN_POSITIVE..1.0).ln() / weight);
    let mut keys: Vec<(f64, usize)> = keys.zip(0..).filter(|(key, _)| key.is_finite()).collect();
    keys.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    keys.into_iter().map(|(_, row)| row).take(n).collect()
}

fn gather(rows: &Tensor<2>, which: &[usize]) -> Vec<Vec<f32>> {
    let indices: Vec<i32> = which.iter().map(|&row| row as i32).collect();
    let indices = TensorData::new(indices, [which.len()]);
    let rows = rows.clone().select(0, Tensor::from_data(indices, &rows.device()));
    let [_, width] = rows.dims();
    let values: Vec<f32> = rows.into_data().try_into_vec_as().expect("floats convert to f32");
    values.chunks(width).map(<[f32]>::to_vec).collect()
}

/// The mean norm of all rows but these; 1 if there are no others.
fn mean_norm_but(rows: Tensor<2>, dead: &[u32]) -> f64 {
    let norms = crate::sae::row_norms(rows).into_data();
    let alive = (0u32..).zip(norms.iter::<f32>());
    let alive = alive.filter(|(latent, _)| dead.binary_search(latent).is_err());
    let (n, sum) = alive.fold((0, 0.0), |(n, sum), (_, norm)| (n + 1, sum + f64::from(norm)));
    if n == 0 { 1.0 } else { sum / f64::from(n) }
}

fn norm(row: &[f32]) -> f64 {
    row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt().max(f64::MIN_POSITIVE)
}

fn scale_into(values: &mut [f32], row: &[f32], scale: f64) {
    for (value, x) in values.iter_mut().zip(row) {
        *value = (f64::from(*x) * scale) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::{JumpRelu, Kind, ThresholdParameter};
    use burn::tensor::Device;
    use rand::SeedableRng;

    fn vector(parameters: &Parameters, name: ParameterName) -> Vec<f32> {
        parameters.matrix(name).into_data().try_into_vec_as().expect("f32")
    }

    /// Three latents in two dimensions, the last two dead; only the second row is badly off.
    fn resampled(rule: ResamplingRule) -> (Parameters, Vec<u32>) {
        let device = Device::flex();
        let mut parameters = Parameters::tied(
            Tensor::from_data([[0.0, 2.0], [9.0, 9.0], [1.0, 1.0]], &device),
            Tensor::from_data([1.0, 1.0], &device),
        );
        let w_enc = Tensor::from_data([[3.0, 4.0], [9.0, 9.0], [1.0, 1.0]], &device);
        parameters.insert(ParameterName::WEnc, w_enc);
        let b_enc = Tensor::from_data([[5.0, 6.0, 7.0]], &device);
        parameters.insert(ParameterName::BEnc, b_enc);
        let batch = Batch::from(Tensor::from_data([[5.0, 5.0], [4.0, 5.0]], &device));
        let errors = Tensor::from_data([0.0, 3.0], &device);
        let resampling = Resampling::new(10).with_rule(rule);
        let random = ChaCha8Rng::seed_from_u64(0);
        let revived = resampling.resample(
            &mut parameters,
            &batch,
            &Objective::top_k(1),
            &errors,
            &[1, 2],
            random,
        );
        (parameters, revived)
    }

    #[test]
    fn the_worst_activation_is_read_and_written() {
        // (4, 5) − b_dec = (3, 4), of norm 5; a fifth of the living encoder row's 5; the living
        // decoder row has norm 2. A row without an error is never drawn.
        let (parameters, revived) = resampled(ResamplingRule::Anthropic);
        assert_eq!(revived, [1]);
        assert_eq!(vector(&parameters, ParameterName::WEnc), [3.0, 4.0, 0.6, 0.8, 1.0, 1.0]);
        assert_eq!(vector(&parameters, ParameterName::WDec), [0.0, 2.0, 1.2, 1.6, 1.0, 1.0]);
        assert_eq!(vector(&parameters, ParameterName::BEnc), [5.0, 0.0, 7.0]);
        let (parameters, _) = resampled(ResamplingRule::DictionaryLearning);
        assert_eq!(vector(&parameters, ParameterName::WEnc)[2..4], [3.0, 4.0]);
    }

    #[test]
    fn a_threshold_starts_again() {
        let device = Device::flex();
        let mut parameters =
            Parameters::tied(Tensor::ones([2, 1], &device), Tensor::zeros([1], &device));
        parameters.insert(ParameterName::LogThreshold, Tensor::from_data([[5.0, 6.0]], &device));
        let batch = Batch::from(Tensor::from_data([[3.0]], &device));
        let errors = Tensor::from_data([1.0], &device);
        let kind = JumpRelu {
            threshold: ThresholdParameter::Logarithm,
            initial_threshold: 1.0,
            ..JumpRelu::new(0.1)
        };
        let random = ChaCha8Rng::seed_from_u64(0);
        let resampling = Resampling::new(1);
        let objective = Objective::new(Kind::JumpRelu(kind));
        resampling.resample(&mut parameters, &batch, &objective, &errors, &[1], random);
        assert_eq!(vector(&parameters, ParameterName::LogThreshold), [5.0, 0.0]);
    }

    #[test]
    fn rows_are_drawn_once_and_by_their_weight() {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let mut counts = [0; 3];
        for _ in 0..4000 {
            let rows = draw([1.0, 0.0, 3.0].into_iter(), 1, &mut random);
            counts[rows[0]] += 1;
        }
        assert_eq!(counts[1], 0);
        assert!((2850..3150).contains(&counts[2]), "{counts:?}");
        let mut rows = draw([1.0, 0.0, 3.0].into_iter(), 3, &mut random);
        rows.sort_unstable();
        assert_eq!(rows, [0, 2]);
    }

    #[test]
    fn it_is_due_every_so_often() {
        let due: Vec<usize> = (1..10).filter(|&step| Resampling::new(4).is_due(step)).collect();
        assert_eq!(due, [4, 8]);
        assert!(Resampling::new(0).validate().is_err());
    }
}
