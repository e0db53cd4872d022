//! Which autoencoder it is, whatever file it came from.

use std::fmt::Write;

use burn::tensor::Tensor;
use sae_core::{Activation, Normalization, Sae, SaeWeights};
use sha2::{Digest, Sha256};

/// The SHA-256, in hex, of an autoencoder's equation and weights.
///
/// The same after it was written in another format, as long as that keeps all bits; metadata do not
/// count.
pub fn fingerprint(sae: &Sae) -> String {
    let config = sae.config();
    let mut hash = Sha256::new();
    hash.update(format!(
        "{} {} {:?} {} {} {}\n",
        config.d_in,
        config.d_sae,
        config.transcodes_to,
        activation(config.activation),
        normalization(config.normalization),
        config.apply_b_dec_to_input,
    ));
    let SaeWeights { w_enc, b_enc, w_dec, b_dec, threshold, magnitude, w_skip } = sae.weights();
    hash_tensor(&mut hash, "w_enc", Some(w_enc));
    hash_tensor(&mut hash, "b_enc", Some(b_enc));
    hash_tensor(&mut hash, "w_dec", Some(w_dec));
    hash_tensor(&mut hash, "b_dec", Some(b_dec));
    hash_tensor(&mut hash, "threshold", threshold.as_ref());
    hash_tensor(&mut hash, "r_mag", magnitude.as_ref().map(|magnitude| &magnitude.r_mag));
    hash_tensor(&mut hash, "b_mag", magnitude.as_ref().map(|magnitude| &magnitude.b_mag));
    hash_tensor(&mut hash, "w_skip", w_skip.as_ref());
    hash.finalize().iter().fold(String::with_capacity(64), |mut hex, byte| {
        write!(hex, "{byte:02x}").expect("a string takes all");
        hex
    })
}

/// Spelt out here, because what is hashed must not change with how a type prints.
fn activation(activation: Activation) -> String {
    match activation {
        Activation::Relu => "relu".into(),
        Activation::JumpRelu => "jumprelu".into(),
        Activation::TopK { k, rescale_by_decoder_norm } => {
            format!("topk {k} {rescale_by_decoder_norm}")
        }
        Activation::AbsTopK { k, rescale_by_decoder_norm } => {
            format!("abstopk {k} {rescale_by_decoder_norm}")
        }
        Activation::GroupMax { k } => format!("groupmax {k}"),
        Activation::Gated => "gated".into(),
        // A new kind prints as it does until it is spelt out here.
        other => format!("{other:?}"),
    }
}

fn normalization(normalization: Normalization) -> String {
    match normalization {
        Normalization::None => "none".into(),
        Normalization::ConstantNormRescale => "constant_norm_rescale".into(),
        Normalization::LayerNorm => "layer_norm".into(),
        other => format!("{other:?}"),
    }
}

fn hash_tensor<const D: usize>(hash: &mut Sha256, name: &str, tensor: Option<&Tensor<D>>) {
    let Some(tensor) = tensor else { return };
    hash.update(format!("{name} {:?}\n", tensor.dims()));
    let data = tensor.to_data();
    let values = data.as_slice::<f32>().expect("weights are f32");
    let mut bytes = Vec::with_capacity(1 << 16);
    for chunk in values.chunks(1 << 14) {
        bytes.clear();
        bytes.extend(chunk.iter().flat_map(|value| value.to_le_bytes()));
        hash.update(&bytes);
    }
}
