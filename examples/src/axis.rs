//! Axes of plots.

use std::ops::Range;

use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};

/// An axis with chosen ticks; Plotters would choose its own, and crowd a logarithmic one.
pub(crate) struct Axis {
    pub(crate) range: Range<f64>,
    pub(crate) ticks: Vec<f64>,
}

impl Ranged for Axis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (start, end): (i32, i32)) -> i32 {
        let share = (value - self.range.start) / (self.range.end - self.range.start);
        start + (share * f64::from(end - start)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

/// Logarithms of round ratios between two of them, fewer to the decade as the decades grow.
pub(crate) fn decade_ticks(low: f64, high: f64) -> Vec<f64> {
    let steps: &[f64] = match high - low {
        ..0.5 => &[1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0],
        0.5..1.0 => &[1.0, 1.5, 2.0, 3.0, 5.0, 7.0],
        1.0..2.5 => &[1.0, 2.0, 5.0],
        _ => &[1.0],
    };
    let stride = ((high - low) / 6.0).ceil().max(1.0) as i32;
    (low.floor() as i32..=high.ceil() as i32)
        .filter(|decade| decade.rem_euclid(stride) == 0)
        .flat_map(|decade| steps.iter().map(move |step| f64::from(decade) + step.log10()))
        .filter(|log| (low..=high).contains(log))
        .collect()
}

/// Round numbers between two others, some five of them.
pub(crate) fn round_ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 5.0;
    let decade = 10f64.powf(rough.log10().floor());
    let steps = [1.0, 2.0, 2.5, 5.0, 10.0].map(|step| step * decade);
    let step = steps.into_iter().find(|step| *step >= rough).unwrap_or(decade);
    let ticks = (low / step).ceil() as i64..=(high / step).floor() as i64;
    ticks.map(|tick| tick as f64 * step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_thin_out_as_the_axis_grows() {
        let ratios = |low: f64, high: f64| -> Vec<f64> {
            decade_ticks(low.log10(), high.log10())
                .into_iter()
                .map(|log| 10f64.powf(log).round())
                .collect()
        };
        assert_eq!(decade_ticks(0.0, 2f64.log10()), [1.0f64, 1.2, 1.5, 2.0].map(f64::log10));
        assert_eq!(ratios(0.9, 60.0), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]);
        assert_eq!(ratios(1.0, 2e4), [1.0, 10.0, 100.0, 1e3, 1e4]);
        assert_eq!(ratios(1.0, 1e8), [1.0, 100.0, 1e4, 1e6, 1e8]);
    }

    #[test]
    fn round_numbers_lie_between() {
        let near = |ticks: Vec<f64>| ticks.iter().map(|t| (t * 100.0).round() / 100.0).collect();
        let ticks: Vec<f64> = near(round_ticks(0.13, 0.97));
        assert_eq!(ticks, [0.2, 0.4, 0.6, 0.8]);
        assert_eq!(round_ticks(0.0, 1000.0), [0.0, 200.0, 400.0, 600.0, 800.0, 1000.0]);
    }
}
