//! A rate of yes-or-no outcomes, with the interval that its sample size allows.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The 97.5th percentile of the normal distribution: 95 % lies within ± this.
const Z: f64 = 1.959_963_984_540_054;

/// The share of `n` trials that succeeded, with its 95 % Wilson score interval.
///
/// ```text
/// centre = (p + z²/2n) / (1 + z²/n)
/// half   = z √(p(1−p)/n + z²/4n²) / (1 + z²/n)
/// ```
///
/// Wilson's interval and not the textbook `p ± z √(p(1−p)/n)`, which has no width at 0 of 24 and
/// leaves [0, 1] near the ends: just where refusal rates lie.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// Successes over trials, in [0, 1]; 0 where there were no trials.
    pub rate: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
    /// Number of trials.
    pub n: usize,
}

impl Rate {
    /// The rate of `successes` in `n` trials.
    ///
    /// No trials say nothing: the interval is all of [0, 1]. The rate is then 0 rather than NaN,
    /// which JSON cannot hold; `n` tells the two apart, and `Display` writes `n/a`.
    ///
    /// # Panics
    /// If there are more successes than trials.
    #[must_use]
    pub fn wilson(successes: usize, n: usize) -> Self {
        assert!(successes <= n, "{successes} successes in {n} trials");
        if n == 0 {
            return Self { rate: 0.0, low: 0.0, high: 1.0, n };
        }
        let trials = n as f64;
        let rate = successes as f64 / trials;
        let shrink = 1.0 + Z * Z / trials;
        let centre = (rate + Z * Z / (2.0 * trials)) / shrink;
        let half =
            Z * (rate * (1.0 - rate) / trials + (Z / (2.0 * trials)).powi(2)).sqrt() / shrink;
        // At no successes and at nothing but, an end is the rate itself up to rounding.
        Self {
            rate,
            low: (centre - half).clamp(0.0, rate),
            high: (centre + half).clamp(rate, 1.0),
            n,
        }
    }
}

/// Whole per cents: `67 % [53, 78]`. A width pads it.
impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        if self.n == 0 {
            return f.pad("n/a");
        }
        let [rate, low, high] = [self.rate, self.low, self.high].map(|share| 100.0 * share);
        f.pad(&format!("{rate:.0} % [{low:.0}, {high:.0}]"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-6
    }

    /// With no successes both terms of the formula fold into `z² / (n + z²)`.
    #[test]
    fn none_of_ten_reaches_up_to_z_squared_over_n_plus_z_squared() {
        let rate = Rate::wilson(0, 10);
        assert_eq!((rate.rate, rate.low, rate.n), (0.0, 0.0, 10));
        assert!(close(rate.high, 3.841_458_8 / 13.841_458_8), "{rate:?}");
    }

    #[test]
    fn all_of_ten_mirrors_none_of_ten() {
        let (all, none) = (Rate::wilson(10, 10), Rate::wilson(0, 10));
        assert_eq!((all.rate, all.high), (1.0, 1.0));
        assert!(close(all.low, 1.0 - none.high));
    }

    /// At one half: centre 1/2, half width `z / (2 √(n + z²))` = 1.959964 / (2 · 3.720411).
    #[test]
    fn half_of_ten() {
        let rate = Rate::wilson(5, 10);
        assert!(close(rate.low, 0.236_593) && close(rate.high, 0.763_407), "{rate:?}");
    }

    /// p = 2/3, z² = 3.841459, n = 24: centre (0.6666667 + 0.0800304) / 1.1600608 = 0.6436706,
    /// half 1.959964 √(0.0092593 + 0.0016673) / 1.1600608 = 0.1766075.
    #[test]
    fn sixteen_of_twenty_four() {
        let rate = Rate::wilson(16, 24);
        assert!(close(rate.low, 0.467_063) && close(rate.high, 0.820_278), "{rate:?}");
        assert_eq!(rate.to_string(), "67 % [47, 82]");
    }

    #[test]
    fn no_trials_say_nothing_and_survive_json() {
        let rate = Rate::wilson(0, 0);
        assert_eq!(rate, Rate { rate: 0.0, low: 0.0, high: 1.0, n: 0 });
        assert_eq!(rate.to_string(), "n/a");
        let json = serde_json::to_string(&rate).unwrap();
        assert_eq!(json, r#"{"rate":0.0,"low":0.0,"high":1.0,"n":0}"#);
        assert_eq!(serde_json::from_str::<Rate>(&json).unwrap(), rate);
    }

    #[test]
    fn display_pads() {
        assert_eq!(format!("{:>16}", Rate::wilson(16, 24)), "   67 % [47, 82]");
    }

    #[test]
    #[should_panic(expected = "3 successes in 2 trials")]
    fn more_successes_than_trials() {
        let _ = Rate::wilson(3, 2);
    }
}
