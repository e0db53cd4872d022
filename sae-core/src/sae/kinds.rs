//! Tests of every kind of SAE, by hand and against one another.

use burn::tensor::{Device, Tensor, TensorData};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Magnitude, Sae, SaeError, SaeWeights};
use crate::activation::Activation;
use crate::config::SaeConfig;
use crate::normalization::Normalization;

const PURSUIT: Activation = Activation::MatchingPursuit {
    residual_threshold: 0.5,
    max_iterations: None,
    stop_on_duplicate_support: true,
};
const D_IN: usize = 6;
const D_SAE: usize = 12;

fn kinds() -> [Activation; 8] {
    let rescale_by_decoder_norm = true;
    [
        Activation::Relu,
        Activation::JumpRelu,
        Activation::TopK { k: 3, rescale_by_decoder_norm: false },
        Activation::TopK { k: 3, rescale_by_decoder_norm },
        Activation::AbsTopK { k: 3, rescale_by_decoder_norm },
        Activation::GroupMax { k: 4 },
        Activation::Gated,
        PURSUIT,
    ]
}

fn floats<const D: usize>(values: impl Into<TensorData>) -> Tensor<D> {
    Tensor::from_data(values, &Device::flex())
}

/// Random weights that fit.
fn random(config: SaeConfig, seed: u64) -> Sae {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let (d_in, d_sae, d_out) = (config.d_in, config.d_sae, config.d_out());
    let mut weights = SaeWeights::new(
        noise([d_in, d_sae], &mut random),
        noise([d_sae], &mut random),
        noise([d_sae, d_out], &mut random),
        noise([d_out], &mut random),
    );
    match config.activation {
        Activation::JumpRelu => weights.threshold = Some(noise([d_sae], &mut random).abs()),
        Activation::Gated => {
            let (r_mag, b_mag) = (noise([d_sae], &mut random), noise([d_sae], &mut random));
            weights.magnitude = Some(Magnitude { r_mag, b_mag });
        }
        Activation::MatchingPursuit { .. } => {
            // Decoder rows of norm 1, without which a pursuit does not converge.
            let norms = weights.w_dec.clone().square().sum_dim(1).sqrt();
            weights = SaeWeights::tied(weights.w_dec / norms, weights.b_dec);
        }
        _ => {}
    }
    Sae::new(config, weights).expect("valid")
}

fn noise<const D: usize>(shape: [usize; D], random: &mut ChaCha8Rng) -> Tensor<D> {
    let n = shape.iter().product();
    let values: Vec<f32> = (0..n).map(|_| random.random_range(-1.0..1.0)).collect();
    floats(TensorData::new(values, shape))
}

fn x() -> Tensor<2> {
    noise([5, D_IN], &mut ChaCha8Rng::seed_from_u64(9)).mul_scalar(2.0)
}

fn assert_close<const D: usize>(what: &str, actual: Tensor<D>, expected: impl Into<TensorData>) {
    let (actual, expected) = (actual.into_data(), expected.into());
    assert_eq!(actual.shape(), expected.shape(), "{what}");
    let values = |data: TensorData| data.try_into_vec_as::<f32>().expect("floats");
    let (actual, expected) = (values(actual), values(expected));
    for (a, e) in actual.iter().zip(&expected) {
        assert!((a - e).abs() <= 1e-4 + 1e-4 * e.abs(), "{what}: {actual:?} for {expected:?}");
    }
}

/// Three latents that each read the sum of two inputs and write to both.
fn of_ones(activation: Activation) -> (SaeConfig, SaeWeights) {
    let weights = SaeWeights::new(
        floats([[1.0; 3]; 2]),
        floats([0.0; 3]),
        floats([[1.0; 2]; 3]),
        floats([0.0; 2]),
    );
    (SaeConfig::new(2, 3, activation), weights)
}

#[test]
fn gates_and_magnitudes_by_hand() {
    let (config, weights) = of_ones(Activation::Gated);
    let magnitude = Magnitude { r_mag: floats([1.0, 2.0, 3.0]), b_mag: floats([1.0; 3]) };
    let b_enc = floats([-2.0, 0.0, 1.0]);
    let weights = SaeWeights { b_enc, magnitude: Some(magnitude), ..weights };
    let sae = Sae::new(config, weights).expect("valid");
    // The gates are −1.4, .6 and 1.6; .6 e^r + 1 is 2.6310, 5.4334 and 13.0513.
    let (latents, decoded) = sae.run(floats([[0.3, 0.3]]));
    assert_close("latents", latents.to_dense(), [[0.0, 5.4334, 13.0513]]);
    assert_close("decoded", decoded, [[18.4848, 18.4848]]);
}

#[test]
fn thresholds_by_hand() {
    let (config, weights) = of_ones(Activation::JumpRelu);
    let weights = SaeWeights { threshold: Some(floats([1.0, 0.5, 0.25])), ..weights };
    let sae = Sae::new(config, weights).expect("valid");
    let (latents, decoded) = sae.run(floats([[0.3, 0.3]]));
    assert_close("latents", latents.to_dense(), [[0.0, 0.6, 0.6]]);
    assert_close("decoded", decoded, [[1.2, 1.2]]);
}

#[test]
fn largest_of_groups_by_hand() {
    let weights = SaeWeights::new(
        floats([[1.0, -1.0, 0.5, 2.0]]),
        floats([0.0, 0.0, 0.0, -4.0]),
        floats([[1.0], [2.0], [3.0], [4.0]]),
        floats([0.0]),
    );
    let config = SaeConfig::new(1, 4, Activation::GroupMax { k: 2 });
    let sae = Sae::new(config, weights).expect("valid");
    // Pre-activations (2, −2 | 1, 0), (−2, 2 | −1, −8) and (6, −6 | 3, 8).
    let latents = sae.encode(floats([[2.0], [-2.0], [6.0]]));
    let expected = [[2.0, 0.0, 1.0, 0.0], [0.0, 2.0, 0.0, 0.0], [6.0, 0.0, 0.0, 8.0]];
    assert_close("latents", latents.to_dense(), expected);
    assert_close("decoded", sae.decode(&latents), [[5.0], [4.0], [38.0]]);
}

#[test]
fn folded_norms_leave_the_function() {
    for activation in kinds() {
        let sae = random(SaeConfig::new(D_IN, D_SAE, activation), 1);
        let decoded = sae.run(x()).1.into_data();
        let ranks = match activation {
            Activation::TopK { rescale_by_decoder_norm, .. } => !rescale_by_decoder_norm,
            Activation::GroupMax { .. } | Activation::MatchingPursuit { .. } => true,
            _ => false,
        };
        match sae.fold_decoder_norms() {
            Ok(folded) => {
                assert!(!ranks, "{activation:?} chooses without norms");
                assert_close("norms", folded.decoder_norms(), [1.0; D_SAE]);
                assert_close(&format!("{activation:?}"), folded.run(x()).1, decoded);
            }
            Err(error) => {
                assert!(ranks, "{activation:?}");
                assert_eq!(error, SaeError::RanksWithoutNorms);
            }
        }
    }
}

#[test]
fn a_folded_input_scale_takes_raw_activations() {
    for activation in kinds() {
        let sae = random(SaeConfig::new(D_IN, D_SAE, activation), 2);
        let scaled = sae.run(x().mul_scalar(4.0)).1.into_data();
        let raw = sae.fold_input_scale(4.0).run(x()).1;
        assert_close(&format!("{activation:?}"), raw.mul_scalar(4.0), scaled);
    }
}

#[test]
fn parts_add_up_whatever_the_normalisation() {
    let normalizations =
        [Normalization::None, Normalization::ConstantNormRescale, Normalization::LayerNorm];
    for (activation, normalization) in
        kinds().into_iter().flat_map(|activation| normalizations.map(|n| (activation, n)))
    {
        let config = SaeConfig { normalization, ..SaeConfig::new(D_IN, D_SAE, activation) };
        let sae = random(config, 3);
        let parts = sae.decompose(x());
        let decoded = sae.decode_for(&parts.latents, x()).into_data();
        let what = format!("{activation:?} {normalization:?}");
        assert_close(&what, parts.reconstruction.clone(), decoded);
        assert_close(&what, parts.reconstruction + parts.error, x().into_data());
    }
}

/// A transcoder from six inputs to three.
fn transcoder(normalization: Normalization) -> Sae {
    let config = SaeConfig {
        transcodes_to: Some(3),
        apply_b_dec_to_input: false,
        normalization,
        ..SaeConfig::new(D_IN, D_SAE, Activation::Relu)
    };
    random(config, 4)
}

#[test]
fn a_transcoder_decodes_without_the_scale_of_its_input() {
    let sae = transcoder(Normalization::LayerNorm);
    let decoded = sae.run(x()).1;
    assert_eq!(decoded.dims(), [5, 3]);
    // Every row has the same normalised form at three times its size.
    assert_close("scaled", sae.run(x().mul_scalar(3.0)).1, decoded.clone().into_data());
    assert_close("decode", sae.decode(&sae.encode(x())), decoded.into_data());
}

#[test]
fn a_skip_reads_the_input_as_it_came() {
    let plain = transcoder(Normalization::ConstantNormRescale);
    let w_skip = noise([3, D_IN], &mut ChaCha8Rng::seed_from_u64(5));
    let weights = SaeWeights { w_skip: Some(w_skip.clone()), ..plain.weights().clone() };
    let sae = Sae::new(plain.config().clone(), weights).expect("valid");
    let expected = plain.run(x()).1 + x().matmul(w_skip.transpose());
    assert_close("skip", sae.run(x()).1, expected.into_data());
}

#[test]
#[should_panic(expected = "threshold does not fit")]
fn a_jump_needs_its_threshold() {
    let (config, weights) = of_ones(Activation::JumpRelu);
    let _ = Sae::new(config, weights);
}

#[test]
#[should_panic(expected = "r_mag and b_mag do not fit")]
fn magnitudes_belong_to_gates() {
    let (config, weights) = of_ones(Activation::Relu);
    let magnitude = Magnitude { r_mag: floats([1.0; 3]), b_mag: floats([1.0; 3]) };
    let _ = Sae::new(config, SaeWeights { magnitude: Some(magnitude), ..weights });
}

#[test]
#[should_panic(expected = "a transcoder writes at another point")]
fn a_transcoder_has_no_directions_where_it_reads() {
    let _ = transcoder(Normalization::None).directions();
}

#[test]
#[should_panic(expected = "a transcoder does not decompose its input")]
fn a_transcoder_has_no_error() {
    transcoder(Normalization::None).decompose(x());
}
