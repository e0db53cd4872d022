//! What to train.

use burn::config::Config;

use super::decoder_norm::DecoderNorm;
use super::error::TrainError;
use super::moments::Optimizer;
use super::objective::{ErrorMeasure, JumpRelu, Kind, Objective, Selecting, Selection};
use super::parameters::ParameterName;
use super::resampling::Resampling;
use super::schedule::Schedule;
use crate::config::SaeConfig;
use crate::normalization::Normalization;

/// A training run.
#[derive(Config, Debug, PartialEq)]
pub struct TrainConfig {
    /// Number of latents.
    pub d_sae: usize,
    /// The kind of SAE, and its loss.
    pub objective: Objective,
    /// What else than its input the SAE is to reconstruct.
    #[config(default = "None")]
    pub transcoder: Option<Transcoder>,
    /// Activations per step.
    #[config(default = 4096)]
    pub batch: usize,
    /// Times that every activation is seen, but for those that do not fill the last batch.
    #[config(default = 1)]
    pub n_passes: usize,
    /// What is done to activations before the SAE reads them.
    #[config(default = "InputScale::AverageNorm")]
    pub input_scale: InputScale,
    /// Learning rate, sparsity and what is annealed over the run.
    #[config(default = "Schedule::new()")]
    pub schedule: Schedule,
    /// How the weights follow their gradients.
    #[config(default = "Optimizer::default()")]
    pub optimizer: Optimizer,
    /// Gradients of a larger total norm are scaled down to this one.
    #[config(default = "None")]
    pub clip_norm: Option<f64>,
    /// Whether decoder rows are held at a norm.
    #[config(default = "DecoderNorm::Free")]
    pub decoder: DecoderNorm,
    /// Norm of the decoder rows at the start; the encoder starts as the decoder's transpose.
    #[config(default = 0.1)]
    pub decoder_norm: f64,
    /// Where `b_dec` starts.
    #[config(default = "Centre::Mean")]
    pub centre: Centre,
    /// A latent is dead when it has not been active on this many activations in a row.
    #[config(default = 1_000_000)]
    pub dead_after: u64,
    /// Whether dead latents get new weights from time to time.
    #[config(default = "None")]
    pub resampling: Option<Resampling>,
    /// Decides the initial weights, the order of the activations, and what is resampled.
    #[config(default = 0)]
    pub seed: u64,
}

/// An SAE that reconstructs another activation than it reads.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub struct Transcoder {
    /// Width of what is reconstructed.
    pub d_out: usize,
    /// Whether a matrix `w_skip` of its own carries the input past the latents.
    pub skip: bool,
}

/// How activations are scaled before the SAE reads them; SAELens' name in brackets.
///
/// Losses are those of the scaled activations, which the SAE reconstructs. The target of a
/// transcoder is scaled by the one factor, if there is one, and not by row.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum InputScale {
    /// Not at all (`none`).
    Raw,
    /// By one factor, that brings their mean norm to `√d_in` (`expected_average_only_in`). It is
    /// folded into the weights of the SAE in the end.
    AverageNorm,
    /// Each row to norm `√d_in` (`constant_norm_rescale`).
    ConstantNorm,
    /// Each row to mean 0 and standard deviation 1 (`layer_norm`).
    LayerNorm,
}

impl InputScale {
    /// What the SAE does to each row by itself.
    pub fn normalization(self) -> Normalization {
        match self {
            Self::Raw | Self::AverageNorm => Normalization::None,
            Self::ConstantNorm => Normalization::ConstantNormRescale,
            Self::LayerNorm => Normalization::LayerNorm,
        }
    }
}

/// A centre of the activations, taken over a sample of them.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum Centre {
    /// The origin.
    Zero,
    /// Their mean.
    Mean,
    /// The point of least summed distance to them, which a few huge activations do not move.
    GeometricMedian,
}

impl TrainConfig {
    /// The SAE in training, on activations of this width.
    pub fn sae(&self, d_in: usize) -> SaeConfig {
        SaeConfig {
            apply_b_dec_to_input: self.objective.apply_b_dec_to_input,
            transcodes_to: self.transcoder.map(|transcoder| transcoder.d_out),
            normalization: self.input_scale.normalization(),
            ..SaeConfig::new(d_in, self.d_sae, self.objective.activation())
        }
    }

    /// The parameters that such a run has.
    pub(super) fn parameters(&self) -> Vec<ParameterName> {
        let mut names = vec![ParameterName::WDec, ParameterName::BDec];
        if !matches!(self.objective.kind, Kind::MatchingPursuit(_)) {
            names.extend([ParameterName::WEnc, ParameterName::BEnc]);
        }
        if matches!(self.objective.kind, Kind::Gated(_)) {
            names.extend([ParameterName::RMag, ParameterName::BMag]);
        }
        names.extend(self.jump_relu().map(|kind| kind.threshold.name()));
        if self.transcoder.is_some_and(|transcoder| transcoder.skip) {
            names.push(ParameterName::WSkip);
        }
        names.sort_unstable();
        names
    }

    /// The objective of a step, counted from 0, out of `n_steps`.
    pub fn objective_at(&self, step: usize, n_steps: usize) -> Objective {
        let objective = self.objective.clone();
        let scaled = objective.with_sparsity_scaled(self.schedule.sparsity_at(step, n_steps));
        match scaled.annealed() {
            Some(to) => scaled.with_annealed(self.schedule.annealed_at(step, n_steps, to)),
            None => scaled,
        }
    }

    /// Checks that such a run can be made on activations of this width.
    ///
    /// # Errors
    /// If an option is out of its range, or does not go with another one.
    pub fn validate(&self, d_in: usize) -> Result<(), TrainError> {
        self.sae(d_in).validate()?;
        self.objective.validate(self.d_sae)?;
        self.schedule.validate()?;
        self.optimizer.validate()?;
        if let Some(resampling) = self.resampling {
            resampling.validate()?;
        }
        let clip_norm = self.clip_norm.unwrap_or(1.0);
        let d_out = self.transcoder.map_or(d_in, |transcoder| transcoder.d_out);
        for (option, actual) in [
            ("batch", self.batch as f64),
            ("n_passes", self.n_passes as f64),
            ("clip_norm", clip_norm),
            ("decoder_norm", self.decoder_norm),
            ("transcoder.d_out", d_out as f64),
            ("dead_after", self.dead_after as f64),
        ] {
            if !(actual.is_finite() && actual > 0.0) {
                let expected = "a number above zero";
                return Err(TrainError::Option { option, expected, actual });
            }
        }
        self.check_combinations()
    }

    /// What would silently do nothing, or has no meaning.
    fn check_combinations(&self) -> Result<(), TrainError> {
        let conflict = |option, with| Err(TrainError::Conflict { option, with });
        let kind = &self.objective.kind;
        if let Some(anneal) = self.schedule.anneal {
            let Some(_) = self.objective.annealed() else {
                return conflict("schedule.anneal", "an objective without k or p");
            };
            if let Kind::Selecting(Selecting { selection, .. }) = kind {
                if matches!(selection, Selection::GroupMax { .. }) {
                    return conflict("schedule.anneal", "groups, which have to be of one size");
                }
                self.objective.clone().with_annealed(anneal.from).validate(self.d_sae)?;
            }
        }
        let has_coefficient = self.objective.clone().with_sparsity_scaled(2.0) != self.objective;
        if self.schedule.sparsity_warmup != 0.0 && !has_coefficient {
            return conflict("schedule.sparsity_warmup", "an objective without sparsity's weight");
        }
        if self.transcoder.is_some() && matches!(kind, Kind::MatchingPursuit(_)) {
            return conflict("transcoder", "matching pursuit, which writes what it reads");
        }
        if self.batch == 1 && self.objective.error == ErrorMeasure::Fvu {
            return conflict("batch 1", "a loss that is a share of the batch's variance");
        }
        if self.decoder == DecoderNorm::Unit && self.decoder_norm != 1.0 {
            return conflict("decoder_norm", "decoder rows held at norm 1");
        }
        Ok(())
    }

    /// Where thresholds start, if they are trained.
    pub(super) fn jump_relu(&self) -> Option<&JumpRelu> {
        match &self.objective.kind {
            Kind::JumpRelu(kind) => Some(kind),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use kernels::Search;

    use super::super::objective::*;
    use super::super::schedule::Anneal;
    use super::*;
    use crate::config::ConfigError;

    fn top_k(k: usize) -> TrainConfig {
        TrainConfig::new(8, Objective::top_k(k))
    }

    fn standard(coefficient: f64) -> TrainConfig {
        let sparsity = Sparsity::new(coefficient);
        TrainConfig::new(8, Objective::new(Kind::Standard(Standard { sparsity })))
    }

    #[test]
    fn options_out_of_range_are_named() {
        let config = top_k(2);
        assert_eq!(config.validate(4), Ok(()));
        let refused = |config: TrainConfig| match config.validate(4).unwrap_err() {
            TrainError::Option { option, .. } | TrainError::Conflict { option, .. } => option,
            error => panic!("{error}"),
        };
        assert_eq!(refused(config.clone().with_batch(0)), "batch");
        assert_eq!(refused(config.clone().with_n_passes(0)), "n_passes");
        assert_eq!(refused(config.clone().with_dead_after(0)), "dead_after");
        assert_eq!(refused(config.clone().with_clip_norm(Some(f64::NAN))), "clip_norm");
        assert_eq!(refused(config.clone().with_decoder_norm(-0.1)), "decoder_norm");
        assert_eq!(refused(config.clone().with_decoder(DecoderNorm::Unit)), "decoder_norm");
        assert_eq!(refused(standard(-1.0)), "sparsity.coefficient");
        let batch_top_k = |k| TrainConfig::new(8, Objective::batch_top_k(k));
        assert_eq!(batch_top_k(2.5).validate(4), Ok(()));
        assert_eq!(refused(batch_top_k(0.0)), "k");
        assert_eq!(refused(batch_top_k(8.5)), "k");
        let error = top_k(9).validate(4).unwrap_err();
        assert_eq!(error, TrainError::Sae(ConfigError::K { k: 9, d_sae: 8 }));
        let selecting = Selecting::new(Selection::BatchTopK { k: 2.0 });
        let forgetful = TrainConfig::new(8, Objective::new(Kind::Selecting(selecting)));
        assert_eq!(forgetful.validate(4), Err(TrainError::NoThreshold));
    }

    #[test]
    fn what_would_do_nothing_is_refused() {
        let refused = |config: TrainConfig| match config.validate(4).unwrap_err() {
            TrainError::Conflict { option, .. } => option,
            error => panic!("{error}"),
        };
        let warm = Schedule::new().with_sparsity_warmup(0.1);
        assert_eq!(standard(1.0).with_schedule(warm.clone()).validate(4), Ok(()));
        assert_eq!(refused(top_k(2).with_schedule(warm)), "schedule.sparsity_warmup");
        let anneal =
            |from| Schedule::new().with_anneal(Some(Anneal { from, begin: 0.0, end: 1.0 }));
        assert_eq!(top_k(2).with_schedule(anneal(8.0)).validate(4), Ok(()));
        let jump_relu = Objective::new(Kind::JumpRelu(JumpRelu::new(1.0)));
        let config = TrainConfig::new(8, jump_relu).with_schedule(anneal(8.0));
        assert_eq!(refused(config), "schedule.anneal");
        assert!(top_k(2).with_schedule(anneal(9.0)).validate(4).is_err());
        let groups = |rescale_by_decoder_norm| {
            let selecting = Selecting::new(Selection::GroupMax { k: 2 });
            let selecting = Selecting { rescale_by_decoder_norm, ..selecting };
            TrainConfig::new(8, Objective::new(Kind::Selecting(selecting)))
        };
        assert_eq!(groups(false).validate(4), Ok(()));
        assert_eq!(refused(groups(false).with_schedule(anneal(4.0))), "schedule.anneal");
        assert_eq!(refused(groups(true)), "rescale_by_decoder_norm");
        let share = Objective { error: ErrorMeasure::Fvu, ..Objective::top_k(2) };
        assert_eq!(refused(TrainConfig::new(8, share).with_batch(1)), "batch 1");
        let proposed = |selection| {
            let threshold = Some(RunningThreshold::SaeLens { rate: 0.1 });
            let search = Search::Proposed;
            let selecting = Selecting { threshold, search, ..Selecting::new(selection) };
            TrainConfig::new(8, Objective::new(Kind::Selecting(selecting)))
        };
        assert_eq!(proposed(Selection::AbsTopK { k: 2 }).validate(4), Ok(()));
        assert_eq!(proposed(Selection::BatchTopK { k: 2.0 }).validate(4), Ok(()));
        assert_eq!(refused(proposed(Selection::GroupMax { k: 2 })), "search");
    }

    #[test]
    fn k_and_p_are_annealed_and_sparsity_warms_up() {
        let schedule = Schedule::new()
            .with_anneal(Some(Anneal { from: 7.0, begin: 0.0, end: 1.0 }))
            .with_sparsity_warmup(0.5);
        let config = top_k(2).with_schedule(schedule.clone());
        let ks: Vec<_> = (0..5).map(|step| config.objective_at(step, 4)).collect();
        // 7, 5.75, 4.5, 3.25, 2.
        assert_eq!(ks, [7, 6, 5, 3, 2].map(Objective::top_k));
        let config = standard(8.0).with_schedule(schedule);
        let Kind::Standard(Standard { sparsity }) = config.objective_at(1, 4).kind else {
            panic!("another kind");
        };
        assert_eq!((sparsity.coefficient, sparsity.norm), (4.0, SparsityNorm::Lp { p: 5.5 }));
    }

    #[test]
    fn a_configuration_survives_json() {
        let groups = vec![Group { width: 3, weight: 0.5 }, Group { width: 8, weight: 1.0 }];
        let aux_k_target = AuxKTarget::OwnResidual;
        let matryoshka = Selection::Matryoshka { k: 2.5, groups, aux_k_target };
        let kinds = [
            Kind::Standard(Standard { sparsity: Sparsity::new(0.5) }),
            Kind::Gated(Gated {
                sparsity: Sparsity::new(0.5),
                auxiliary: GatedAuxiliary::DetachedDecoder,
            }),
            Kind::Selecting(Selecting { aux_k: Some(AuxK::new()), ..Selecting::new(matryoshka) }),
            Kind::JumpRelu(JumpRelu { l0: L0Loss::Tanh { scale: 4.0 }, ..JumpRelu::new(0.1) }),
            Kind::MatchingPursuit(MatchingPursuit {
                residual_threshold: 0.1,
                max_iterations: None,
                stop_on_duplicate_support: true,
            }),
        ];
        for kind in kinds {
            let config = TrainConfig::new(8, Objective::new(kind))
                .with_centre(Centre::GeometricMedian)
                .with_transcoder(Some(Transcoder { d_out: 5, skip: true }))
                .with_resampling(Some(Resampling::new(100)))
                .with_optimizer(Optimizer::Signum(super::super::moments::Momentum::new()));
            let parsed = serde_json::from_str(&config.to_string()).expect("our own JSON");
            assert_eq!(config, parsed);
        }
        // Without a word of it, the search is as it was before there was a choice.
        let json = serde_json::to_string(&top_k(2)).expect("plain data");
        let older = json.replace(",\"search\":\"proposed\"", "");
        let parsed: TrainConfig = serde_json::from_str(&older).expect("without a search");
        let full = json.replace("proposed", "full");
        assert_eq!(serde_json::to_string(&parsed).expect("plain data"), full);
        assert!(older != json && full != json);
    }
}
