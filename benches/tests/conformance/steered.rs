//! Every intervention, on a prompt and on what is generated after it.

use burn::tensor::Device;
use model_hooks::{HookPoint, Site};
use sae_core::{Activation, Magnitude, Sae, SaeConfig, SaeWeights};
use steering::{
    Amount, Intervention, LatentChange, LatentEdit, LatentEdits, Reading, Region, Remainder,
    Steering,
};

use crate::beside::{DEEP, agree, noise};
use crate::forward::{model, tokens};

const D_MODEL: usize = 48;
const D_SAE: usize = 96;
const POINT: HookPoint = HookPoint::Block { layer: 1, site: Site::ResidPost };

pub fn sae(activation: Activation, device: &Device) -> Sae {
    let w_dec = noise([D_SAE, D_MODEL], 50, device) * 0.3;
    let (b_enc, b_dec) = (noise([D_SAE], 51, device) * 0.2, noise([D_MODEL], 52, device) * 0.1);
    let mut weights = SaeWeights::new(w_dec.clone().transpose(), b_enc, w_dec, b_dec);
    if activation == Activation::JumpRelu {
        weights.threshold = Some(noise([D_SAE], 53, device).abs() * 0.2);
    }
    if activation == Activation::Gated {
        let of = |seed| noise([D_SAE], seed, device) * 0.2;
        weights.magnitude = Some(Magnitude { r_mag: of(54), b_mag: of(55) });
    }
    Sae::new(SaeConfig::new(D_MODEL, D_SAE, activation), weights).unwrap()
}

#[test]
fn every_intervention() {
    let top_k = Activation::TopK { k: 8, rescale_by_decoder_norm: true };
    for activation in [top_k, Activation::Relu, Activation::JumpRelu, Activation::Gated] {
        agree(DEEP, |device, found| {
            let (model, sae) = (model("llama_gqa_theta_tied", device), sae(activation, device));
            let edits = vec![
                LatentEdit { latent: 80, change: LatentChange::AtLeast(Amount::Value(4.0)) },
                LatentEdit { latent: 7, change: LatentChange::Scale(-3.0) },
            ];
            let latents = |remainder| {
                let edits = edits.clone();
                let reading = Reading::Exact;
                Intervention::Latents(LatentEdits { sae: &sae, edits, remainder, reading })
            };
            let direction = noise([D_MODEL], 56, device);
            let mean = noise([D_MODEL], 57, device);
            let interventions = [
                ("clamp", Intervention::clamp(&sae, [(3, 4.0), (80, 6.0)])),
                ("edits", latents(Remainder::Keep)),
                ("edits without the remainder", latents(Remainder::Drop)),
                ("add", Intervention::Add { direction: direction.clone() }),
                ("ablate", Intervention::Ablate { direction: direction.clone() }),
                ("affine", Intervention::Affine { direction, mean, strength: 1.5 }),
            ];
            for (name, intervention) in interventions {
                let region = Region::from_position(1);
                let mut steering = Steering::new([POINT], intervention, region).unwrap();
                let logits = model.last_logits(&tokens(&model), &mut steering).unwrap();
                found.put(&format!("{activation:?}, {name}"), logits);
            }
        });
    }
}
