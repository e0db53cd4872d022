//! What SAELens, sparsify and dictionary_learning compute in a training step, on the same weights.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use goldens::for_each_case;
use sae_core::train::*;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// Where a parameter is in a file, and whether it lies transposed there.
type Place = (ParameterName, &'static str, bool);

/// Tensors of a file, with their shapes.
struct File(BTreeMap<String, (Vec<usize>, Vec<f64>)>);

impl File {
    fn open(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let file = SafeTensors::deserialize(&bytes).expect("a well-formed file");
        let tensors = file.tensors().into_iter().map(|(name, view)| {
            let bytes = view.data();
            let values = match view.dtype() {
                Dtype::F64 => bytes.chunks(8).map(|b| f64::from_le_bytes(array(b))).collect(),
                Dtype::F32 => {
                    bytes.chunks(4).map(|b| f32::from_le_bytes(array(b)).into()).collect()
                }
                Dtype::I64 => {
                    bytes.chunks(8).map(|b| i64::from_le_bytes(array(b)) as f64).collect()
                }
                Dtype::I32 => {
                    bytes.chunks(4).map(|b| i32::from_le_bytes(array(b)).into()).collect()
                }
                Dtype::U8 => bytes.iter().map(|&byte| byte.into()).collect(),
                other => panic!("{name} is {other:?}"),
            };
            (name, (view.shape().to_vec(), values))
        });
        Self(tensors.collect())
    }

    fn values(&self, name: &str) -> Option<Vec<f32>> {
        self.0.get(name).map(|(_, values)| values.iter().map(|&value| value as f32).collect())
    }

    fn scalar(&self, name: &str) -> Option<f64> {
        self.0.get(name).map(|(_, values)| values[0])
    }

    /// A matrix; a vector is one row.
    fn matrix(&self, name: &str) -> Option<Tensor<2>> {
        let (shape, _) = self.0.get(name)?;
        let shape = match shape[..] {
            [m] => [1, m],
            [n, m] => [n, m],
            _ => panic!("{name} has shape {shape:?}"),
        };
        let data = TensorData::new(self.values(name)?, shape);
        Some(Tensor::from_data(data, &Device::flex()))
    }

    fn parameters(&self, places: &[Place]) -> Parameters {
        let read = |&(name, file_name, transposed): &Place| {
            let tensor = self.matrix(file_name)?;
            Some((name, if transposed { packed(tensor.transpose()) } else { tensor }))
        };
        places.iter().filter_map(read).collect()
    }

    fn dead(&self) -> Vec<u32> {
        let mask = self.values("dead_mask").unwrap_or_default();
        (0u32..).zip(mask).filter(|(_, dead)| *dead != 0.0).map(|(latent, _)| latent).collect()
    }
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("chunks of the right size")
}

fn packed(tensor: Tensor<2>) -> Tensor<2> {
    let shape = tensor.dims();
    (tensor + 0.0).reshape(shape)
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec_as().expect("floats")
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn count(value: &Value) -> usize {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no count")) as usize
}

fn assert_relative(what: &str, actual: f64, expected: f64) {
    let off = (actual - expected).abs();
    assert!(off <= 1e-5 * expected.abs().max(1e-3), "{what}: {actual} for {expected}");
}

/// Parameters against the tensors of a file under `prefix`.
fn assert_parameters_close(golden: &File, prefix: &str, places: &[Place], actual: &Parameters) {
    let mut n_compared = 0;
    for &(name, file_name, transposed) in places {
        let full_name = format!("{prefix}.{file_name}");
        let Some(expected) = golden.values(&full_name) else { continue };
        let actual = actual.get(name).unwrap_or_else(|| panic!("no {full_name}")).clone();
        let actual = if transposed { packed(actual.transpose()) } else { actual };
        goldens::assert_close(&full_name, &floats(actual), &expected, 1e-4);
        n_compared += 1;
    }
    assert_eq!(n_compared, actual.named().count(), "{prefix}: a parameter without a reference");
}

fn assert_term(found: &Differentiated, term: Term, expected: f64) {
    let actual = found.terms.iter().find(|(other, _)| *other == term).map(|(_, value)| *value);
    assert_relative(&format!("{term:?}"), actual.unwrap_or(0.0), expected);
}

fn with(kind: Kind) -> Objective {
    Objective::new(kind)
}

/// A step of Adam at 1e-2 in the middle of a run, without clipping.
fn step(
    parameters: Parameters,
    objective: &Objective,
    batch: &Batch,
    dead: &[u32],
    threshold: Option<f64>,
    at: usize,
) -> TrainState {
    let schedule = Schedule::new().with_learning_rate(1e-2).with_warmup(0.0).with_decay(0.0);
    let config = TrainConfig::new(parameters.d_sae(), objective.clone()).with_schedule(schedule);
    let [n, _] = batch.x.dims();
    let mut ages = vec![0; parameters.d_sae()];
    dead.iter().for_each(|&latent| ages[latent as usize] = config.dead_after);
    let mut state = TrainState::new(parameters, 1.0, &config.optimizer);
    (state.ages, state.threshold) = (Ages::from_rows(ages), threshold);
    // Moments are corrected by the steps taken: those up to here are none of them.
    (state.step, state.n_skipped) = (at, at);
    let StepOutcome::Taken(report) = state.step(batch.clone(), &config, 1 << 20) else {
        panic!("skipped");
    };
    assert!(report.l0 * n as f64 >= 1.0);
    state
}

const SAE_LENS: [Place; 8] = [
    (ParameterName::WEnc, "W_enc", true),
    (ParameterName::BEnc, "b_enc", false),
    (ParameterName::BEnc, "b_gate", false),
    (ParameterName::WDec, "W_dec", false),
    (ParameterName::BDec, "b_dec", false),
    (ParameterName::Threshold, "threshold", false),
    (ParameterName::RMag, "r_mag", false),
    (ParameterName::BMag, "b_mag", false),
];

/// The objective of a configuration of SAELens.
fn sae_lens(config: &Value, coefficients: &Value) -> Objective {
    let selecting = |selection| {
        let rate = config["topk_threshold_lr"].as_f64();
        with(Kind::Selecting(Selecting {
            rescale_by_decoder_norm: config["rescale_acts_by_decoder_norm"] == true,
            aux_k: Some(AuxK {
                coefficient: number(&config["aux_loss_coefficient"]),
                ..AuxK::new()
            }),
            threshold: rate.map(|rate| RunningThreshold::SaeLens { rate }),
            ..Selecting::new(selection)
        }))
    };
    let sparsity = || Sparsity::new(number(&coefficients["l1"]));
    match config["architecture"].as_str().expect("a name") {
        "standard" => {
            let norm = SparsityNorm::Lp { p: number(&config["lp_norm"]) };
            with(Kind::Standard(Standard { sparsity: Sparsity { norm, ..sparsity() } }))
        }
        "gated" => with(Kind::Gated(Gated {
            sparsity: sparsity(),
            auxiliary: GatedAuxiliary::UndetachedDecoder,
        })),
        "topk" => selecting(Selection::TopK { k: count(&config["k"]) }),
        "abstopk" => selecting(Selection::AbsTopK { k: count(&config["k"]) }),
        "batchtopk" => selecting(Selection::BatchTopK { k: number(&config["k"]) }),
        "matryoshka_batchtopk" => {
            let widths = config["matryoshka_widths"].as_array().expect("widths").iter();
            selecting(Selection::Matryoshka {
                k: number(&config["k"]),
                groups: widths.map(|width| Group { width: count(width), weight: 1.0 }).collect(),
                aux_k_target: match config["use_matryoshka_aux_loss"] == true {
                    true => AuxKTarget::OwnResidual,
                    false => AuxKTarget::Residual,
                },
            })
        }
        "jumprelu" => with(Kind::JumpRelu(JumpRelu {
            bandwidth: number(&config["jumprelu_bandwidth"]),
            l0: match config["jumprelu_sparsity_loss_mode"].as_str() {
                Some("step") => L0Loss::Step,
                Some("tanh") => L0Loss::Tanh { scale: number(&config["jumprelu_tanh_scale"]) },
                Some("quadratic") => L0Loss::Quadratic { target: number(&config["target_l0"]) },
                other => panic!("{other:?}"),
            },
            straight_through: match config["jumprelu_ste_to_input"] == true {
                true => StraightThrough::ThresholdAndInput,
                false => StraightThrough::Threshold,
            },
            pre_activation: config["pre_act_loss_coefficient"].as_f64(),
            ..JumpRelu::new(number(&coefficients["l0"]))
        })),
        "matching_pursuit" => with(Kind::MatchingPursuit(MatchingPursuit {
            residual_threshold: number(&config["residual_threshold"]),
            max_iterations: config["max_iterations"].as_u64().map(|n| n as usize),
            stop_on_duplicate_support: config["stop_on_duplicate_support"] == true,
        })),
        other => panic!("SAELens' {other}"),
    }
}

#[test]
fn golden_training_saelens() {
    for_each_case("sae_lens_train", |case| {
        let (config, json) = (case.json("cfg.json"), case.json("golden.json"));
        let golden = File::open(&case.folder().join("golden.safetensors"));
        let weights = File::open(&case.folder().join("sae_weights.safetensors"));
        let parameters = weights.parameters(&SAE_LENS);
        let objective = sae_lens(&config, &json["coefficients"]);
        let batch = Batch::from(golden.matrix("x").expect("activations"));
        let dead = golden.dead();
        let found = objective.differentiate(&parameters, &batch, &dead);

        assert_relative("loss", found.loss, number(&json["loss"]));
        for (name, value) in json["losses"].as_object().expect("terms") {
            let term = match name.as_str() {
                "mse_loss" => Term::Reconstruction,
                "l1_loss" | "l0_loss" => Term::Sparsity,
                "pre_act_loss" => Term::PreActivation,
                "auxiliary_reconstruction_loss" => match objective.kind {
                    Kind::Gated(_) => Term::Gates,
                    _ => Term::AuxK,
                },
                inner => {
                    let width = inner.strip_prefix("inner_mse_loss_").expect("a known term");
                    Term::Inner { width: width.parse().expect("a width") }
                }
            };
            assert_term(&found, term, number(value));
        }
        let latents = found.latents.to_dense();
        let latents = match config["rescale_acts_by_decoder_norm"] == true {
            true => latents * parameters.w_dec().square().sum_dim(1).sqrt().transpose(),
            false => latents,
        };
        let expected = golden.values("feature_acts").expect("latents");
        goldens::assert_close("feature_acts", &floats(latents), &expected, 1e-4);
        assert_parameters_close(&golden, "grad", &SAE_LENS, &found.gradient);
        assert_relative("norm", found.gradient.norm(), number(&json["grad_total_norm"]));

        let threshold = weights.scalar("topk_threshold");
        let state = step(parameters, &objective, &batch, &dead, threshold, 0);
        assert_parameters_close(&golden, "after_adam", &SAE_LENS, &state.parameters);
        if let Some(after) = json["topk_threshold_after"].as_f64() {
            assert_relative("threshold", state.threshold.expect("it runs"), after);
        }
        Ok(())
    });
}

const SPARSIFY: [Place; 5] = [
    (ParameterName::WEnc, "encoder.weight", false),
    (ParameterName::BEnc, "encoder.bias", false),
    (ParameterName::WDec, "W_dec", false),
    (ParameterName::BDec, "b_dec", false),
    (ParameterName::WSkip, "W_skip", false),
];

#[test]
fn golden_training_sparsify() {
    for_each_case("sparsify", |case| {
        let (config, json) = (case.json("cfg.json"), case.json("golden.json"));
        let golden = File::open(&case.folder().join("golden.safetensors"));
        let parameters = File::open(&case.folder().join("sae.safetensors")).parameters(&SPARSIFY);
        let k = count(&config["k"]);
        let selection = match (config["activation"].as_str(), config["multi_topk"] == true) {
            (Some("topk"), false) => Selection::TopK { k },
            (Some("topk"), true) => Selection::MultiTopK { k },
            (Some("groupmax"), false) => Selection::GroupMax { k },
            other => panic!("sparsify's {other:?}"),
        };
        let aux_k = AuxK { coefficient: 1.0 / 32.0, k: None, rule: AuxKRule::Sparsify };
        let objective = |selection, aux_k| Objective {
            error: ErrorMeasure::Fvu,
            apply_b_dec_to_input: config["transcode"] != true,
            ..Objective::new(Kind::Selecting(Selecting {
                rescale_by_decoder_norm: false,
                aux_k,
                ..Selecting::new(selection)
            }))
        };
        let (x, target) = (golden.matrix("x").expect("activations"), golden.matrix("y"));
        let batch = Batch { x, target };
        let found = objective(selection.clone(), Some(aux_k));
        let found = found.differentiate(&parameters, &batch, &golden.dead());
        assert_relative("loss", found.loss, number(&json["loss"]));
        assert_term(&found, Term::Reconstruction, number(&json["fvu"]));
        assert_term(&found, Term::AuxK, number(&json["auxk_loss"]) / 32.0);
        assert_term(&found, Term::MultiTopK, number(&json["multi_topk_fvu"]) / 8.0);
        let mut gradient = found.gradient;
        if let Selection::MultiTopK { .. } = selection {
            // sparsify's encoder learns from the first term alone: its backward pass drops what
            // comes from AuxK and the larger selection. (That ours has it is for finite
            // differences to say.)
            let main = objective(Selection::TopK { k }, None);
            let main = main.differentiate(&parameters, &batch, &[]).gradient;
            without_later_encoder_gradients(&mut gradient, &main, &parameters);
        }
        // It also projects in place: where it does, what the case calls the gradient is projected.
        if let Some(expected) = golden.values("grad_projected.W_dec") {
            gradient = DecoderNorm::Unit.project(&parameters, gradient);
            let actual = floats(gradient.w_dec());
            goldens::assert_close("grad_projected.W_dec", &actual, &expected, 1e-4);
        }
        assert_parameters_close(&golden, "grad", &SPARSIFY, &gradient);
        Ok(())
    });
}

/// Puts the encoder's gradient of another objective in place of that which there is, and takes what
/// `b_dec` got through the encoder along.
fn without_later_encoder_gradients(
    gradient: &mut Parameters,
    main: &Parameters,
    parameters: &Parameters,
) {
    let get = |of: &Parameters, name| of.get(name).expect("a parameter of every SAE").clone();
    let (w_enc, b_enc) = (ParameterName::WEnc, ParameterName::BEnc);
    let later = get(gradient, b_enc) - get(main, b_enc);
    let b_dec = get(gradient, ParameterName::BDec) + later.matmul(get(parameters, w_enc));
    gradient.insert(ParameterName::BDec, b_dec);
    gradient.insert(w_enc, get(main, w_enc));
    gradient.insert(b_enc, get(main, b_enc));
}

/// Each dictionary of dictionary_learning has names of its own.
const DICTIONARY_LEARNING: [Place; 14] = [
    (ParameterName::WEnc, "encoder.weight", false),
    (ParameterName::WEnc, "W_enc", true),
    (ParameterName::BEnc, "encoder.bias", false),
    (ParameterName::BEnc, "gate_bias", false),
    (ParameterName::BEnc, "b_enc", false),
    (ParameterName::WDec, "decoder.weight", true),
    (ParameterName::WDec, "W_dec", false),
    (ParameterName::BDec, "bias", false),
    (ParameterName::BDec, "b_dec", false),
    (ParameterName::BDec, "decoder_bias", false),
    (ParameterName::RMag, "r_mag", false),
    (ParameterName::BMag, "mag_bias", false),
    (ParameterName::Threshold, "threshold", false),
    (ParameterName::LogThreshold, "log_threshold", false),
];

/// The objective of a trainer of dictionary_learning.
fn dictionary_learning(config: &Value) -> Objective {
    let sparsity = |weighted_by_decoder_norms| Sparsity {
        weighted_by_decoder_norms,
        ..Sparsity::new(number(&config["l1_penalty"]))
    };
    let selecting = |selection, by_row| {
        let beta = number(&config["threshold_beta"]);
        let start_step = count(&config["threshold_start_step"]);
        with(Kind::Selecting(Selecting {
            rescale_by_decoder_norm: false,
            aux_k: Some(AuxK {
                coefficient: number(&config["auxk_alpha"]),
                k: config["top_k_aux"].as_u64().map(|k| k as usize),
                rule: AuxKRule::OpenAi,
            }),
            threshold: Some(match by_row {
                true => RunningThreshold::DictionaryLearningByRow { beta, start_step },
                false => RunningThreshold::DictionaryLearning { beta, start_step },
            }),
            ..Selecting::new(selection)
        }))
    };
    match config["trainer_class"].as_str().expect("a name") {
        "StandardTrainer" => with(Kind::Standard(Standard { sparsity: sparsity(false) })),
        "StandardTrainerAprilUpdate" => with(Kind::Standard(Standard { sparsity: sparsity(true) })),
        "GatedSAETrainer" => with(Kind::Gated(Gated {
            sparsity: sparsity(false),
            auxiliary: GatedAuxiliary::DetachedDecoder,
        })),
        "TopKTrainer" => selecting(Selection::TopK { k: count(&config["k"]) }, true),
        "BatchTopKTrainer" => selecting(Selection::BatchTopK { k: number(&config["k"]) }, false),
        "MatryoshkaBatchTopKTrainer" => {
            let array = |key: &str| config[key].as_array().expect("an array").clone();
            let (sizes, weights) = (array("group_sizes"), array("group_weights"));
            let n = sizes.len() as f64;
            let mut width = 0;
            let groups = sizes.iter().zip(&weights).map(|(size, weight)| {
                width += count(size);
                Group { width, weight: number(weight) / n }
            });
            let groups = groups.collect();
            let aux_k_target = AuxKTarget::Residual;
            let k = number(&config["k"]);
            selecting(Selection::Matryoshka { k, groups, aux_k_target }, false)
        }
        "JumpReluTrainer" => Objective {
            apply_b_dec_to_input: false,
            ..with(Kind::JumpRelu(JumpRelu {
                bandwidth: number(&config["bandwidth"]),
                l0: L0Loss::BatchQuadratic { target: number(&config["target_l0"]) },
                ..JumpRelu::new(number(&config["sparsity_penalty"]))
            }))
        },
        other => panic!("dictionary_learning's {other}"),
    }
}

#[test]
fn golden_training_dictionary_learning() {
    for_each_case("dictionary_learning", |case| {
        let (config, json) = (case.json("config.json"), case.json("golden.json"));
        let golden = File::open(&case.folder().join("golden.safetensors"));
        let mut weights = File::open(&case.folder().join("ae.safetensors"));
        // A number for the whole dictionary is no parameter, but the running threshold.
        let threshold = match weights.0.get("threshold") {
            Some((shape, _)) if shape.is_empty() => {
                weights.0.remove("threshold").map(|(_, values)| values[0])
            }
            _ => None,
        };
        let parameters = weights.parameters(&DICTIONARY_LEARNING);
        let objective = dictionary_learning(&config["trainer"]);
        let batch = Batch::from(golden.matrix("train_x").expect("activations"));
        let found = objective.differentiate(&parameters, &batch, &[]);
        assert_relative("loss", found.loss, number(&json["loss"]));
        assert_parameters_close(&golden, "grad", &DICTIONARY_LEARNING, &found.gradient);
        if let Some(after) = json["threshold_after_loss"].as_f64() {
            let threshold = threshold.filter(|threshold| *threshold >= 0.0);
            let at = count(&json["step"]);
            let state = step(parameters, &objective, &batch, &[], threshold, at);
            assert_relative("threshold", state.threshold.expect("it runs"), after);
        }
        Ok(())
    });
}
