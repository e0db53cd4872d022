//! Whether two treatments of the same prompts differ.

use serde::{Deserialize, Serialize};

/// McNemar's exact test of paired outcomes: under the null hypothesis, a pair whose outcomes differ
/// is as likely to differ one way as the other.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct McNemar {
    /// Pairs of which only the first succeeded.
    pub only_first: usize,
    /// Pairs of which only the second succeeded.
    pub only_second: usize,
    /// The two-sided p-value, `min(1, 2 P(X ≤ min(b, c)))` with `X` binomial of `b + c` halves; 1
    /// where no pair differs.
    pub p_value: f64,
}

impl McNemar {
    /// Of pairs of outcomes.
    pub fn of(pairs: impl IntoIterator<Item = (bool, bool)>) -> Self {
        let (mut only_first, mut only_second) = (0, 0);
        for (first, second) in pairs {
            only_first += usize::from(first && !second);
            only_second += usize::from(second && !first);
        }
        let n = only_first + only_second;
        // Logarithms: 2^-n is zero in f64 from n = 1075 on.
        let mut log_term = -(n as f64) * std::f64::consts::LN_2;
        let mut tail = 0.0;
        for k in 0..=only_first.min(only_second) {
            tail += log_term.exp();
            log_term += ((n - k) as f64).ln() - ((k + 1) as f64).ln();
        }
        Self { only_first, only_second, p_value: (2.0 * tail).min(1.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn p_value(only_first: usize, only_second: usize) -> f64 {
        let pairs = std::iter::repeat_n((true, false), only_first);
        let pairs = pairs.chain(std::iter::repeat_n((false, true), only_second));
        McNemar::of(pairs.chain([(true, true), (false, false)])).p_value
    }

    /// 2 (1 + 10) / 2^10, 2 / 2^8, and no difference.
    #[test]
    fn small_numbers_by_hand() {
        assert!((p_value(1, 9) - 22.0 / 1024.0).abs() < 1e-12);
        assert!((p_value(8, 0) - 2.0 / 256.0).abs() < 1e-12);
        assert_eq!((p_value(0, 0), p_value(3, 3)), (1.0, 1.0));
        assert!((p_value(4, 5) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn large_numbers_do_not_underflow() {
        // About two deviations of √(3000) / 2 from the half.
        let p = p_value(1445, 1555);
        assert!((0.04..0.05).contains(&p), "{p}");
        assert!(p_value(0, 3000) < 1e-300);
    }
}
