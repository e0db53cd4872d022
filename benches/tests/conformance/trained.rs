//! A few steps of training, of every kind of SAE.

use std::ops::ControlFlow;

use burn::tensor::{Device, Tensor, TensorData};
use sae_core::train::*;

use crate::beside::{DEEP, Found, agree, numbers};

const D_IN: usize = 24;
const D_SAE: usize = 64;
const BATCH: usize = 32;
const N_STEPS: usize = 6;

fn kinds() -> Vec<(&'static str, Kind)> {
    let sparsity = Sparsity::new(0.3);
    let selecting = |selection| Selecting {
        aux_k: Some(AuxK::new()),
        threshold: Some(RunningThreshold::SaeLens { rate: 0.05 }),
        ..Selecting::new(selection)
    };
    let groups = vec![Group { width: 16, weight: 1.0 }, Group { width: D_SAE, weight: 1.0 }];
    let matryoshka =
        Selection::Matryoshka { k: 3.0, groups, aux_k_target: AuxKTarget::OwnResidual };
    let jump_relu = JumpRelu { bandwidth: 0.5, initial_threshold: 0.1, ..JumpRelu::new(0.3) };
    vec![
        ("standard", Kind::Standard(Standard { sparsity })),
        ("gated", Kind::Gated(Gated { sparsity, auxiliary: GatedAuxiliary::UndetachedDecoder })),
        ("top_k", Kind::Selecting(selecting(Selection::TopK { k: 5 }))),
        ("multi_top_k", Kind::Selecting(selecting(Selection::MultiTopK { k: 5 }))),
        ("abs_top_k", Kind::Selecting(selecting(Selection::AbsTopK { k: 5 }))),
        ("group_max", Kind::Selecting(selecting(Selection::GroupMax { k: 8 }))),
        ("batch_top_k", Kind::Selecting(selecting(Selection::BatchTopK { k: 5.0 }))),
        ("matryoshka", Kind::Selecting(selecting(matryoshka))),
        ("jump_relu", Kind::JumpRelu(jump_relu)),
    ]
}

fn train(kind: Kind, decoder: DecoderNorm, device: &Device, found: &mut Found) {
    let values = numbers(BATCH * N_STEPS * D_IN, 1);
    let matrix = ActivationMatrix::new(&values, D_IN).unwrap();
    let config = TrainConfig::new(D_SAE, Objective::new(kind))
        .with_batch(BATCH)
        .with_n_passes(1)
        .with_schedule(Schedule::new().with_learning_rate(1e-3))
        .with_decoder(decoder)
        .with_decoder_norm(1.0)
        // Some latents are dead before the end, so that what is done about them is done.
        .with_dead_after((2 * BATCH) as u64);
    let mut trainer = Trainer::new(config, &matrix, device).unwrap();
    trainer.run(&matrix, |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(trainer.state().step, N_STEPS);
    found.put("decoder", trainer.state().parameters.w_dec());
    let x = TensorData::new(values[..BATCH * D_IN].to_vec(), [BATCH, D_IN]);
    let (_, reconstruction) = trainer.sae().run(Tensor::from_data(x, device));
    found.put("reconstruction", reconstruction);
}

#[test]
fn every_kind_takes_the_same_steps() {
    for (name, kind) in kinds() {
        for decoder in [DecoderNorm::Free, DecoderNorm::Unit] {
            agree(DEEP, |device, found| {
                found.about(format!("{name}, {decoder:?}"));
                train(kind.clone(), decoder, device, found);
            });
        }
    }
}
