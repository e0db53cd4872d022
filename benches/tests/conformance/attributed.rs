//! Effects of latents: estimated, and measured by ablation.

use attribution::{
    AttributionConfig, Baseline, Cut, Integration, NextToken, Rule, SaeSite, Study, Target,
};
use model_hooks::HookPoint;
use sae_core::Activation;

use crate::beside::{DEEP, agree};
use crate::forward::{ROWS, model};
use crate::steered::sae;

#[test]
fn effects_of_latents() {
    agree(DEEP, |device, found| {
        let model = model("llama_gqa_theta_tied", device);
        let sae = sae(Activation::TopK { k: 6, rescale_by_decoder_norm: true }, device);
        let targets = vec![Target::Difference { wanted: 7, other: 30 }; ROWS.len()];
        let metric = NextToken::new(&model, targets);
        let site = SaeSite::new(&sae, HookPoint::resid_post(1));
        let study = Study::new(&metric, &ROWS).unwrap().start_at(site.point).unwrap();
        for (name, config) in [
            ("gradient × activation", AttributionConfig::GRADIENT_TIMES_ACTIVATION),
            ("integrated", AttributionConfig::integrated(Integration::new(Rule::Midpoint, 4))),
        ] {
            let effects = study.attribute(&[site], Baseline::Zero, config).unwrap().remove(0);
            let by_latent = effects.by_conversation();
            let cuts: Vec<Cut> = by_latent
                .iter()
                .enumerate()
                .flat_map(|(row, of)| of.keys().map(move |&latent| Cut::latent(row, latent)))
                .collect();
            let estimated = by_latent.iter().flat_map(|of| of.values());
            let estimated = estimated.map(|effect| effect.change() as f32).collect();
            found.put_values(name, estimated);
            let measured = study.measure_cuts(&site, Baseline::Zero, &cuts).unwrap();
            let measured = measured.into_iter().map(|effect| effect.change() as f32).collect();
            found.put_values("measured", measured);
        }
    });
}
