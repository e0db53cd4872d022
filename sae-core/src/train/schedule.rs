//! What changes over a run: learning rate, sparsity, and `k` or `p`.

use std::f64::consts::PI;

use burn::config::Config;

use super::error::TrainError;

/// A linear rise of the learning rate, a plateau, and a fall towards zero; a linear rise of the
/// sparsity's coefficient; and a number that is annealed.
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
    /// How it falls.
    #[config(default = "DecayShape::Linear")]
    pub decay_shape: DecayShape,
    /// Share of the steps over which the coefficient of the sparsity rises from zero.
    #[config(default = 0.0)]
    pub sparsity_warmup: f64,
    /// What `k` or `p` starts from.
    #[config(default = "None")]
    pub anneal: Option<Anneal>,
}

/// How the learning rate falls.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum DecayShape {
    /// In a straight line.
    Linear,
    /// Along half a cosine. With a decay over all steps behind the warm-up, there is no plateau.
    Cosine,
}

/// A number of the objective that moves in a straight line to where the objective has it: `k` of a
/// selection (from many latents to few), or `p` of a penalty (from L1 towards L0).
#[derive(Config, Debug, Copy, PartialEq)]
pub struct Anneal {
    /// Where it starts.
    pub from: f64,
    /// Share of the steps before it moves.
    pub begin: f64,
    /// Share of the steps after which it has arrived.
    pub end: f64,
}

impl Schedule {
    /// The learning rate of a step, counted from 0, out of `n_steps`. Never zero.
    pub fn at(&self, step: usize, n_steps: usize) -> f64 {
        let n = n_steps as f64;
        let rise = ramp(step + 1, self.warmup * n);
        let fall = ramp(n_steps.saturating_sub(step), self.decay * n);
        let fall = match self.decay_shape {
            DecayShape::Linear => fall,
            DecayShape::Cosine => (1.0 - (PI * fall).cos()) / 2.0,
        };
        self.learning_rate * rise.min(fall)
    }

    /// What the coefficient of the sparsity is multiplied by in a step: zero in the first, if it
    /// rises at all.
    pub fn sparsity_at(&self, step: usize, n_steps: usize) -> f64 {
        match self.sparsity_warmup * n_steps as f64 {
            0.0 => 1.0,
            rise => ramp(step, rise),
        }
    }

    /// The annealed number in a step, on its way to `to`.
    pub fn annealed_at(&self, step: usize, n_steps: usize, to: f64) -> f64 {
        let Some(Anneal { from, begin, end }) = self.anneal else {
            return to;
        };
        let n = n_steps as f64;
        let since = (step as f64 - begin * n).max(0.0);
        let share = (since / ((end - begin) * n)).min(1.0);
        from + (to - from) * share
    }

    pub(super) fn validate(&self) -> Result<(), TrainError> {
        let Self { learning_rate, warmup, decay, sparsity_warmup, .. } = *self;
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
        check("warmup + decay", "a share of the steps", both, share(both))?;
        check("sparsity_warmup", "a share of the steps", sparsity_warmup, share(sparsity_warmup))?;
        if let Some(Anneal { from, begin, end }) = self.anneal {
            let positive = from.is_finite() && from > 0.0;
            check("anneal.from", "a number above zero", from, positive)?;
            check("anneal.begin", "a share of the steps", begin, share(begin))?;
            check("anneal.end", "a share above anneal.begin", end, share(end) && end > begin)?;
        }
        Ok(())
    }
}

/// `steps / over`, at most 1; a ramp over less than a step is over at once.
fn ramp(steps: usize, over: f64) -> f64 {
    (steps as f64 / over.max(1.0)).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(learning_rate: f64, warmup: f64, decay: f64) -> Schedule {
        Schedule { learning_rate, warmup, decay, ..Schedule::new() }
    }

    #[test]
    fn rises_stays_and_falls() {
        let schedule = plain(8.0, 0.2, 0.4);
        let rates: Vec<f64> = (0..10).map(|step| schedule.at(step, 10)).collect();
        assert_eq!(rates, [4.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 6.0, 4.0, 2.0]);
    }

    #[test]
    fn a_cosine_is_half_way_down_in_the_middle() {
        let schedule = plain(8.0, 0.0, 1.0).with_decay_shape(DecayShape::Cosine);
        let rate = |step| schedule.at(step, 6);
        // 4 (1 + cos(π · step / 6)).
        let root = 3f64.sqrt();
        let expected = [8.0, 4.0 + 2.0 * root, 6.0, 4.0, 2.0, 4.0 - 2.0 * root];
        for (step, expected) in expected.into_iter().enumerate() {
            assert!((rate(step) - expected).abs() < 1e-12, "{step}: {}", rate(step));
        }
    }

    #[test]
    fn without_ramps_it_is_constant() {
        let schedule = plain(3.0, 0.0, 0.0);
        assert!((0..5).all(|step| schedule.at(step, 5) == 3.0));
        assert!((0..5).all(|step| schedule.sparsity_at(step, 5) == 1.0));
        assert!((0..5).all(|step| schedule.annealed_at(step, 5, 7.0) == 7.0));
    }

    #[test]
    fn sparsity_rises_from_nothing() {
        let schedule = Schedule::new().with_sparsity_warmup(0.5);
        let factors: Vec<f64> = (0..8).map(|step| schedule.sparsity_at(step, 8)).collect();
        assert_eq!(factors, [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]);
    }

    #[test]
    fn what_is_annealed_waits_moves_and_stays() {
        let schedule =
            Schedule::new().with_anneal(Some(Anneal { from: 10.0, begin: 0.2, end: 0.6 }));
        let expected = [10.0, 10.0, 10.0, 8.0, 6.0, 4.0, 2.0, 2.0, 2.0, 2.0];
        for (step, expected) in expected.into_iter().enumerate() {
            assert!((schedule.annealed_at(step, 10, 2.0) - expected).abs() < 1e-12);
        }
    }

    #[test]
    fn shares_must_be_shares() {
        let refused = |schedule: Schedule| match schedule.validate().unwrap_err() {
            TrainError::Option { option, .. } => option,
            error => panic!("{error}"),
        };
        let anneal =
            |from, begin, end| Schedule::new().with_anneal(Some(Anneal { from, begin, end }));
        assert_eq!(Schedule::new().validate(), Ok(()));
        assert_eq!(anneal(4.0, 0.0, 1.0).validate(), Ok(()));
        assert_eq!(refused(Schedule::new().with_learning_rate(0.0)), "learning_rate");
        assert_eq!(refused(Schedule::new().with_warmup(-0.1)), "warmup");
        assert_eq!(refused(Schedule::new().with_decay(f64::NAN)), "decay");
        assert_eq!(refused(Schedule::new().with_warmup(0.9)), "warmup + decay");
        assert_eq!(refused(Schedule::new().with_sparsity_warmup(2.0)), "sparsity_warmup");
        assert_eq!(refused(anneal(0.0, 0.0, 1.0)), "anneal.from");
        assert_eq!(refused(anneal(1.0, -1.0, 1.0)), "anneal.begin");
        assert_eq!(refused(anneal(1.0, 0.5, 0.5)), "anneal.end");
    }
}
