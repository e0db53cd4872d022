//! Latents, read and changed.

use goldens::assert_close;
use sae_core::{Activation, Normalization};
use steering::{
    Amount, Intervention, LatentChange, LatentEdit, LatentEdits, LatentReader, Reading, Region,
    Remainder, Steering, running_threshold,
};

use super::*;

/// Every kind that has a reading of its own, and one of those that have not.
const KINDS: [(Activation, bool); 6] = [
    (Activation::Relu, true),
    (Activation::JumpRelu, true),
    (Activation::Gated, true),
    (TOP_K, false),
    (RESCALED_TOP_K, false),
    (Activation::GroupMax { k: 8 }, false),
];

/// The activations of the first row.
fn activations(model: &LanguageModel) -> Vec<f32> {
    run(model, &ROWS[..1], &mut ()).1
}

#[test]
fn a_few_latents_are_read_as_the_whole_encoder_has_them() {
    let x = activations(&model());
    let latents: Vec<usize> = (0..D_SAE).rev().step_by(3).collect();
    for (kind, by_column) in KINDS {
        for normalization in [Normalization::None, Normalization::LayerNorm] {
            let sae = sae_of(kind, normalization);
            let reader = LatentReader::new(&sae, &latents, Reading::Exact).unwrap();
            let is_plain = normalization == Normalization::None;
            assert_eq!(reader.is_by_column(), by_column && is_plain, "{kind:?}");
            let expected = sae.encode(matrix(x.clone(), D_MODEL)).to_dense();
            let expected: Vec<_> =
                latents.iter().map(|&latent| expected.clone().narrow(1, latent, 1)).collect();
            let expected = floats(Tensor::cat(expected, 1));
            assert!(expected.iter().any(|&z| z != 0.0), "{kind:?}: nothing is active");
            let actual = floats(reader.read(matrix(x.clone(), D_MODEL)));
            assert_close(&format!("{kind:?}"), &actual, &expected, 1e-5);
        }
    }
}

#[test]
fn a_threshold_stands_for_the_selection() {
    let x = || matrix(activations(&model()), D_MODEL);
    for kind in [TOP_K, RESCALED_TOP_K] {
        let sae = sae_of(kind, Normalization::None);
        // Between the least that is kept and the largest that is not, on one row, both are one.
        let row = x().narrow(0, 3, 1);
        let mut kept: Vec<f32> = sae.encode(row.clone()).entries().map(|e| e.value).collect();
        kept.sort_by(f32::total_cmp);
        assert_eq!(running_threshold(&sae, row.clone()), Ok(kept[0]));
        let all: Vec<usize> = (0..D_SAE).collect();
        let just_below = Reading::Threshold(kept[0] * 0.9999);
        let reader = LatentReader::new(&sae, &all, just_below).unwrap();
        assert!(reader.is_by_column());
        let expected = floats(sae.encode(row.clone()).to_dense());
        assert_close("by threshold", &floats(reader.read(row)), &expected, 1e-5);
    }
    // Over several rows, the mean.
    let sae = sae();
    let least = |i| f64::from(running_threshold(&sae, x().narrow(0, i, 1)).unwrap());
    let mean = (0..7).map(least).sum::<f64>() / 7.0;
    assert!((f64::from(running_threshold(&sae, x()).unwrap()) - mean).abs() < 1e-6);
}

/// `x'` of an edit, against the definition.
#[test]
fn edits_decode_to_what_they_say() {
    let model = model();
    let before = activations(&model);
    for (kind, _) in KINDS {
        for normalization in [Normalization::None, Normalization::ConstantNormRescale] {
            let sae = sae_of(kind, normalization);
            let x = || matrix(before.clone(), D_MODEL);
            let parts = sae.decompose(x());
            let active: Vec<usize> = parts.latents.entries().map(|e| e.latent_idx).collect();
            let [a, b] = [active[0], *active.iter().find(|&&i| i != active[0]).unwrap()];
            let [c, d] =
                [a + 1, b + 1].map(|i| (i..).find(|i| *i != a && *i != b).unwrap() % D_SAE);
            let d = if d == c { (0..).find(|i| ![a, b, c].contains(i)).unwrap() } else { d };
            let change = [
                (a, LatentChange::Clamp(Amount::OfMaximum { multiple: 0.5, maximum: 3.0 })),
                (b, LatentChange::Scale(2.0)),
                (c, LatentChange::AtLeast(Amount::Value(0.75))),
                (d, LatentChange::ClampActive(Amount::Value(-1.0))),
            ];
            let mut z = floats(parts.latents.to_dense());
            for row in z.chunks_mut(D_SAE) {
                row[a] = 1.5;
                row[b] *= 2.0;
                row[c] = row[c].max(0.75);
                row[d] = if row[d] == 0.0 { 0.0 } else { -1.0 };
            }
            let n = z.len() / D_SAE;
            let indices = (0..n).flat_map(|_| 0..D_SAE as i64).collect::<Vec<_>>();
            let indices = TensorData::new(indices, [n, D_SAE]);
            let z = sae_core::SparseLatents::new(
                Tensor::from_data(indices, &Device::flex()),
                matrix(z, D_SAE),
                D_SAE,
            );
            let decoded = sae.decode_for(&z, x());
            let edits: Vec<_> =
                change.map(|(latent, change)| LatentEdit { latent, change }).to_vec();
            for (remainder, expected) in [
                (Remainder::Keep, decoded.clone() + parts.error.clone()),
                (Remainder::Drop, decoded.clone()),
            ] {
                let edits = LatentEdits {
                    sae: &sae,
                    edits: edits.clone(),
                    remainder,
                    reading: Reading::Exact,
                };
                let edit = Intervention::Latents(edits);
                let mut steering = Steering::new([POINT], edit, Region::default()).unwrap();
                let after = run(&model, &ROWS[..1], &mut steering).1;
                let name = format!("{kind:?}, {normalization:?}, {remainder:?}");
                assert_close(&name, &after, &floats(expected), 1e-4);
            }
        }
    }
}

#[test]
fn clamping_to_its_own_value_changes_nothing() {
    let model = model();
    // One position, so that one value is the latent's own.
    let row: &[&[u32]] = &[&[77]];
    let (logits, x) = run(&model, row, &mut ());
    for (kind, _) in KINDS {
        let sae = sae_of(kind, Normalization::None);
        let active = sae.encode(matrix(x.clone(), D_MODEL)).entries().next().unwrap();
        let own = Intervention::clamp(&sae, [(active.latent_idx, f64::from(active.value))]);
        let mut steering = Steering::new([POINT], own, Region::default()).unwrap();
        assert_close("own value", &run(&model, row, &mut steering).0, &logits, 1e-5);
    }
}
