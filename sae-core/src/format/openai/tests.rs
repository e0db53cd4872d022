use std::fs;

use burn::tensor::{Tensor, Tolerance};

use super::*;
use crate::format::pt::tests::{Program, archive};

/// Two inputs, three latents.
fn program(activation: impl Fn(Program) -> Program) -> Program {
    let program = Program::new().then(b"}(");
    let program = program.text("encoder.weight").tensor("0", 6, 0, &[3, 2], &[2, 1]);
    let program = program.text("latent_bias").tensor("1", 3, 0, &[3], &[1]);
    // As `encoder.weight.T` is saved: the same storage in other strides.
    let program = program.text("decoder.weight").tensor("0", 6, 0, &[2, 3], &[1, 2]);
    let program = program.text("pre_bias").tensor("2", 2, 0, &[2], &[1]);
    activation(program).then(b"u.")
}

fn run(program: &Program) -> Result<Sae, FormatError> {
    let storages: [(&str, &[f32]); 3] =
        [("0", &[1.0, 0.0, 0.0, 1.0, 1.0, 1.0]), ("1", &[0.0, 0.5, 0.0]), ("2", &[0.0, 0.0])];
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("autoencoder.pt");
    fs::write(&path, archive(program, &storages)).expect("written");
    crate::format::read(&path, &Device::flex())
}

fn top_k(program: Program, k: i32, after: &str) -> Program {
    let program = program.text("activation").text("TopK").text("activation_state_dict");
    program.then(b"}(").text("k").integer(k).text("postact_fn").text(after).then(b"u")
}

#[test]
fn the_largest_of_normalised_rows_by_hand() {
    let sae = run(&program(|p| top_k(p, 1, "ReLU"))).expect("valid");
    assert_eq!(sae.config().normalization, Normalization::LayerNorm);
    // (1, 3) has mean 2 and deviation √2: (−√½, √½), whose second latent is √½ + ½.
    let (latents, decoded) = sae.run(Tensor::from_data([[1.0, 3.0]], &Device::flex()));
    let value = 0.5f32.sqrt() + 0.5;
    let tolerance = Tolerance::<f32>::absolute(1e-4);
    let expected = [[0.0, value, 0.0]].into();
    latents.to_dense().into_data().assert_approx_eq(&expected, tolerance);
    let expected = [[2.0, 2.0 + 2f32.sqrt() * value]].into();
    decoded.into_data().assert_approx_eq(&expected, tolerance);
}

#[test]
fn without_an_activation_it_is_relu() {
    let sae = run(&program(|p| p)).expect("valid");
    assert_eq!(sae.config().activation, Activation::Relu);
    assert_eq!(sae.config().normalization, Normalization::None);
}

#[test]
fn other_activations_are_refused_by_name() {
    let refused = |activation: &dyn Fn(Program) -> Program| {
        let error = run(&program(activation)).unwrap_err();
        match error {
            FormatError::UnsupportedOption { key, actual, .. } => (key, actual),
            error => panic!("{error:?}"),
        }
    };
    let key = "activation_state_dict.postact_fn";
    assert_eq!(refused(&|p| top_k(p, 1, "Identity")), (key, "Identity".to_owned()));
    let jump = |p: Program| p.text("activation").text("JumpReLU");
    assert_eq!(refused(&jump), ("activation", "JumpReLU".to_owned()));
    let error = run(&program(|p| top_k(p, 4, "ReLU"))).unwrap_err();
    assert!(matches!(error, FormatError::Config { .. }));
    let error = run(&program(|p| p.text("more").integer(1))).unwrap_err();
    assert!(matches!(error, FormatError::UnexpectedTensor { tensor, .. } if tensor == "more"));
}
