//! What to train.

use burn::config::Config;

use super::error::TrainError;
use super::schedule::Schedule;
use crate::activation::Activation;
use crate::config::SaeConfig;

/// A training run of a TopK SAE.
#[derive(Config, Debug, PartialEq)]
pub struct TrainConfig {
    /// Number of latents.
    pub d_sae: usize,
    /// Latents kept per activation.
    pub k: usize,
    /// Activations per step.
    #[config(default = 4096)]
    pub batch: usize,
    /// Times that every activation is seen, but for those that do not fill the last batch.
    #[config(default = 1)]
    pub n_passes: usize,
    /// Learning rate over the run.
    #[config(default = "Schedule::new()")]
    pub schedule: Schedule,
    /// Gradients of a larger total norm are scaled down to this one.
    #[config(default = "None")]
    pub clip_norm: Option<f64>,
    /// Norm of the decoder rows at the start; the encoder starts as the decoder's transpose.
    #[config(default = 0.1)]
    pub decoder_norm: f64,
    /// Where `b_dec` starts.
    #[config(default = "Centre::Mean")]
    pub centre: Centre,
    /// A latent is dead when it has not been active on this many activations in a row.
    #[config(default = 1_000_000)]
    pub dead_after: u64,
    /// Decides the initial weights and the order of the activations.
    #[config(default = 0)]
    pub seed: u64,
}

/// A centre of the activations, taken over a sample of them.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum Centre {
    /// Their mean.
    Mean,
    /// The point of least summed distance to them, which a few huge activations do not move.
    GeometricMedian,
}

impl TrainConfig {
    /// The SAE in training, on activations of this width.
    pub fn sae(&self, d_in: usize) -> SaeConfig {
        let activation = Activation::TopK { k: self.k, rescale_by_decoder_norm: true };
        SaeConfig::new(d_in, self.d_sae, activation)
    }

    /// Checks that such a run can be made on activations of this width.
    ///
    /// # Errors
    /// If an option is out of its range.
    pub fn validate(&self, d_in: usize) -> Result<(), TrainError> {
        self.sae(d_in).validate()?;
        self.schedule.validate()?;
        let clip_norm = self.clip_norm.unwrap_or(1.0);
        for (option, actual) in [
            ("batch", self.batch as f64),
            ("n_passes", self.n_passes as f64),
            ("clip_norm", clip_norm),
            ("decoder_norm", self.decoder_norm),
        ] {
            if !(actual.is_finite() && actual > 0.0) {
                let expected = "a number above zero";
                return Err(TrainError::Option { option, expected, actual });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConfigError;

    #[test]
    fn options_out_of_range_are_named() {
        let config = TrainConfig::new(8, 2);
        assert_eq!(config.validate(4), Ok(()));
        let refused = |config: TrainConfig| match config.validate(4).unwrap_err() {
            TrainError::Option { option, .. } => option,
            error => panic!("{error}"),
        };
        assert_eq!(refused(config.clone().with_batch(0)), "batch");
        assert_eq!(refused(config.clone().with_n_passes(0)), "n_passes");
        assert_eq!(refused(config.clone().with_clip_norm(Some(f64::NAN))), "clip_norm");
        assert_eq!(refused(config.clone().with_decoder_norm(-0.1)), "decoder_norm");
        let error = TrainConfig::new(8, 9).validate(4).unwrap_err();
        assert_eq!(error, TrainError::Sae(ConfigError::K { k: 9, d_sae: 8 }));
    }

    #[test]
    fn a_configuration_survives_json() {
        let config = TrainConfig::new(8, 2).with_centre(Centre::GeometricMedian);
        let parsed = serde_json::from_str(&config.to_string()).expect("our own JSON");
        assert_eq!(config, parsed);
    }
}
