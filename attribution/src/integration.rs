//! Where the gradient is taken on the way from the clean run to the baseline.

use std::f64::consts::PI;

/// Points of the way from the clean run (0) to the baseline (1), with weights that add up to 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Integration {
    rule: Rule,
    n_steps: usize,
}

/// How an integral over `[0, 1]` is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// `α = s/S` for `s = 0 … S−1`, as in Marks et al., 2024.
    Left,
    /// `α = (s + ½)/S`.
    Midpoint,
    /// The zeros of the Legendre polynomial of degree `S`: exact for polynomials up to degree
    /// `2S − 1`.
    GaussLegendre,
}

impl Integration {
    /// The gradient at the clean run alone: the first step of [`Rule::Left`].
    pub const GRADIENT_TIMES_ACTIVATION: Self = Self { rule: Rule::Left, n_steps: 1 };

    /// Integrated gradients (Sundararajan et al., 2017) in so many steps.
    ///
    /// # Panics
    /// If there are none.
    pub fn new(rule: Rule, n_steps: usize) -> Self {
        assert!(n_steps > 0, "an integral of no steps");
        Self { rule, n_steps }
    }

    /// Whether the gradient is taken at the clean run alone.
    pub(crate) fn is_at_clean_run(self) -> bool {
        self == Self::GRADIENT_TIMES_ACTIVATION
    }

    /// The points and their weights.
    pub fn nodes(self) -> Vec<(f64, f64)> {
        let n = self.n_steps as f64;
        let steps = (0..self.n_steps).map(|step| step as f64);
        match self.rule {
            Rule::Left => steps.map(|step| (step / n, 1.0 / n)).collect(),
            Rule::Midpoint => steps.map(|step| ((step + 0.5) / n, 1.0 / n)).collect(),
            Rule::GaussLegendre => steps.map(|step| gauss_legendre(self.n_steps, step)).collect(),
        }
    }
}

/// The zero of the Legendre polynomial of degree `n` that counts `step`, by Newton's method from
/// Tricomi's estimate, and its weight; both brought from `[−1, 1]` to `[0, 1]`.
fn gauss_legendre(n: usize, step: f64) -> (f64, f64) {
    let mut x = -(PI * (step + 0.75) / (n as f64 + 0.5)).cos();
    let mut slope = 0.0;
    for _ in 0..50 {
        let (value, before) = legendre(n, x);
        slope = n as f64 * (x * value - before) / (x * x - 1.0);
        let correction = value / slope;
        x -= correction;
        if correction.abs() < 1e-15 {
            break;
        }
    }
    ((x + 1.0) / 2.0, 1.0 / ((1.0 - x * x) * slope * slope))
}

/// `P_n(x)` and `P_{n−1}(x)`.
fn legendre(n: usize, x: f64) -> (f64, f64) {
    (1..=n).fold((1.0, 0.0), |(value, before), degree| {
        let degree = degree as f64;
        (((2.0 * degree - 1.0) * x * value - (degree - 1.0) * before) / degree, value)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn integral(rule: Rule, n_steps: usize, f: impl Fn(f64) -> f64) -> f64 {
        Integration::new(rule, n_steps).nodes().iter().map(|&(x, weight)| weight * f(x)).sum()
    }

    #[test]
    fn one_left_step_is_the_clean_run() {
        assert_eq!(Integration::new(Rule::Left, 1).nodes(), [(0.0, 1.0)]);
        assert!(Integration::new(Rule::Left, 1).is_at_clean_run());
        assert!(!Integration::new(Rule::Midpoint, 1).is_at_clean_run());
    }

    #[test]
    fn rules_by_hand() {
        // x² at 0 and ½, at ¼ and ¾.
        assert_eq!(integral(Rule::Left, 2, |x| x * x), 0.125);
        assert_eq!(integral(Rule::Midpoint, 2, |x| x * x), (0.0625 + 0.5625) / 2.0);
    }

    #[test]
    fn gauss_is_exact_up_to_its_degree() {
        for n in 1..=12 {
            for degree in 0..2 * n {
                let found = integral(Rule::GaussLegendre, n, |x| x.powi(degree as i32));
                let expected = 1.0 / (degree as f64 + 1.0);
                assert!((found - expected).abs() < 1e-13, "{n} {degree}: {found} {expected}");
            }
            let over = integral(Rule::GaussLegendre, n, |x| x.powi(2 * n as i32));
            assert!(over < 1.0 / (2.0 * n as f64 + 1.0), "{n}: {over}");
        }
    }
}
