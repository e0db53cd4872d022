//! The learning rate over a run.

use burn::config::Config;

use super::error::TrainError;

/// A linear rise, a plateau, and a linear fall towards zero.
#[derive(Config, Debug, PartialEq)]
pub struct Schedule {
    /// Learning rate of the plateau.
    #[config(default = 4e-4)]
    pub learning_rate: f64,
    /// Share of the steps that the rise takes.
    #[config(default = 0.05)]
    pub warmup: f64,
    /// Share of the steps that the fall takes.
    #[config(default = 0.2)]
    pub decay: f64,
}

impl Schedule {
    /// The learning rate of a step, counted from 0, out of `n_steps`. Never zero.
    pub fn at(&self, step: usize, n_steps: usize) -> f64 {
        let n = n_steps as f64;
        let ramp = |steps: usize, share: f64| (steps as f64 / (share * n).max(1.0)).min(1.0);
        let rise = ramp(step + 1, self.warmup);
        let fall = ramp(n_steps.saturating_sub(step), self.decay);
        self.learning_rate * rise.min(fall)
    }

    pub(super) fn validate(&self) -> Result<(), TrainError> {
        let Self { learning_rate, warmup, decay } = *self;
        let check = |option, expected, actual, holds| match holds {
            true => Ok(()),
            false => Err(TrainError::Option { option, expected, actual }),
        };
        let positive = learning_rate.is_finite() && learning_rate > 0.0;
        check("learning_rate", "a number above zero", learning_rate, positive)?;
        let share = |share: f64| (0.0..=1.0).contains(&share);
        check("warmup", "a share of the steps", warmup, share(warmup))?;
        check("decay", "a share of the steps", decay, share(decay))?;
        let both = warmup + decay;
        check("warmup + decay", "a share of the steps", both, share(both))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_stays_and_falls() {
        let schedule = Schedule { learning_rate: 8.0, warmup: 0.2, decay: 0.4 };
        let rates: Vec<f64> = (0..10).map(|step| schedule.at(step, 10)).collect();
        assert_eq!(rates, [4.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 6.0, 4.0, 2.0]);
    }

    #[test]
    fn without_ramps_it_is_constant() {
        let schedule = Schedule { learning_rate: 3.0, warmup: 0.0, decay: 0.0 };
        assert!((0..5).all(|step| schedule.at(step, 5) == 3.0));
    }

    #[test]
    fn shares_must_be_shares() {
        let refused = |schedule: Schedule| match schedule.validate().unwrap_err() {
            TrainError::Option { option, .. } => option,
            error => panic!("{error}"),
        };
        assert_eq!(Schedule::new().validate(), Ok(()));
        assert_eq!(refused(Schedule::new().with_learning_rate(0.0)), "learning_rate");
        assert_eq!(refused(Schedule::new().with_warmup(-0.1)), "warmup");
        assert_eq!(refused(Schedule::new().with_decay(f64::NAN)), "decay");
        assert_eq!(refused(Schedule::new().with_warmup(0.9)), "warmup + decay");
    }
}
