//! The plots of the page, as SVG.

use anyhow::Result;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::axis::{Axis, decade_ticks, round_ticks};

/// Pixels. Small, so that the lettering is still readable where the page is narrow.
const SIZE: (u32, u32) = (520, 360);
const INK: RGBColor = RGBColor(55, 60, 68);
const FAINT: RGBColor = RGBColor(226, 229, 233);

/// Okabe and Ito's palette, darkened where its own would be faint on white.
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 135, 100),
    RGBColor(176, 82, 138),
    RGBColor(178, 120, 0),
    RGBColor(120, 126, 134),
];

/// The colour that stands for an SAE, as CSS has it.
pub(super) fn css_colour(sae_idx: usize) -> String {
    let RGBColor(red, green, blue) = colour(sae_idx);
    format!("#{red:02x}{green:02x}{blue:02x}")
}

fn colour(sae_idx: usize) -> RGBColor {
    COLOURS[sae_idx % COLOURS.len()]
}

/// Points in order, joined by a line.
pub(super) struct Line {
    /// Of which SAE; a line of the model itself is dashed.
    pub(super) sae_idx: Option<usize>,
    pub(super) points: Vec<(f64, f64)>,
}

/// How the numbers of an axis lie on it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Scale {
    Linear,
    /// By their logarithms.
    Logarithmic,
}

/// A chart of lines.
pub(super) struct Chart<'a> {
    /// What it shows, for those who do not see it.
    pub(super) title: &'a str,
    pub(super) x_name: &'a str,
    pub(super) y_name: &'a str,
    pub(super) x_scale: Scale,
    pub(super) y_scale: Scale,
    /// Whether the vertical axis begins at 0.
    pub(super) from_zero: bool,
    pub(super) lines: Vec<Line>,
}

impl Chart<'_> {
    /// As SVG; nothing if there is no point that can be shown.
    pub(super) fn svg(mut self) -> Result<Option<String>> {
        let (x_scale, y_scale) = (self.x_scale, self.y_scale);
        for line in &mut self.lines {
            let on_axes = |&(x, y): &(f64, f64)| (x_scale.of(x), y_scale.of(y));
            line.points = line.points.iter().map(on_axes).collect();
            line.points.retain(|(x, y)| x.is_finite() && y.is_finite());
        }
        let points = || self.lines.iter().flat_map(|line| &line.points);
        if points().next().is_none() {
            return Ok(None);
        }
        let x_axis = x_scale.axis(points().map(|point| point.0), 0.0);
        let zero = self.from_zero.then_some(0.0);
        let y_axis = y_scale.axis(points().map(|point| point.1).chain(zero), 0.05);
        let mut svg = String::new();
        {
            let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
            let mut chart = ChartBuilder::on(&root)
                .margin(10)
                .margin_right(22)
                .x_label_area_size(48)
                .y_label_area_size(70)
                .build_cartesian_2d(x_axis, y_axis)?;
            chart
                .configure_mesh()
                .light_line_style(TRANSPARENT)
                .bold_line_style(FAINT)
                .axis_style(INK.mix(0.5))
                .label_style(("sans-serif", 16).into_font().color(&INK))
                .axis_desc_style(("sans-serif", 17).into_font().color(&INK))
                .x_desc(self.x_name)
                .y_desc(self.y_name)
                .x_label_formatter(&|x| x_scale.label(*x))
                .y_label_formatter(&|y| y_scale.label(*y))
                .draw()?;
            for Line { sae_idx, points } in self.lines {
                let Some(colour) = sae_idx.map(colour) else {
                    chart.draw_series(DashedLineSeries::new(points, 5, 4, INK.stroke_width(2)))?;
                    continue;
                };
                let marks = if points.len() <= 24 { &points[..] } else { &[] };
                let mark = |&point: &(f64, f64)| Circle::new(point, 3, colour.filled());
                chart.draw_series(marks.iter().map(mark))?;
                chart.draw_series(LineSeries::new(points, colour.stroke_width(2)))?;
            }
            root.present()?;
        }
        let title = format!("<svg role=\"img\" aria-label=\"{}\" ", self.title);
        Ok(Some(svg.replacen("<svg ", &title, 1)))
    }
}

impl Scale {
    fn of(self, value: f64) -> f64 {
        match self {
            Self::Linear => value,
            Self::Logarithmic => value.log10(),
        }
    }

    /// Around these places, with a share of the range to spare.
    fn axis(self, places: impl Iterator<Item = f64> + Clone, margin: f64) -> Axis {
        let low = places.clone().fold(f64::INFINITY, f64::min);
        let high = places.fold(f64::NEG_INFINITY, f64::max);
        let spread = if high > low { high - low } else { low.abs().max(1.0) * 0.1 };
        let (low, high) = match high > low {
            // Where an axis begins at 0, so does the chart.
            true if low == 0.0 => (0.0, high + margin * spread),
            true => (low - margin * spread, high + margin * spread),
            false => (low - spread, high + spread),
        };
        let ticks = match self {
            Self::Logarithmic if high - low > 0.3 => decade_ticks(low, high),
            Self::Logarithmic => {
                let round = round_ticks(10f64.powf(low), 10f64.powf(high));
                round.into_iter().map(f64::log10).collect()
            }
            Self::Linear => round_ticks(low, high),
        };
        Axis { range: low..high, ticks }
    }

    fn label(self, place: f64) -> String {
        match self {
            Self::Linear => short(place),
            Self::Logarithmic => short(10f64.powf(place)),
        }
    }
}

/// A number without the digits that rounding left.
fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size >= 1e6 => format!("{value:.0e}"),
        size if size >= 1e-4 => {
            let digits = (2 - size.log10().floor() as i32).max(0) as usize;
            let text = format!("{value:.digits$}");
            match text.contains('.') {
                true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
                false => text,
            }
        }
        _ => format!("{value:.0e}"),
    }
}

/// Latents by their density: bars for each SAE side by side, the dead ones by themselves at the
/// left.
pub(super) struct Histogram<'a> {
    pub(super) title: &'a str,
    /// `log₁₀` of the density where the first bin begins, and decades that a bin is wide.
    pub(super) lowest: f64,
    pub(super) bin_width: f64,
    /// Latents in each bin, and dead ones, of each SAE.
    pub(super) saes: Vec<(Vec<usize>, usize)>,
}

impl Histogram<'_> {
    pub(super) fn svg(self) -> Result<String> {
        let Self { title, lowest, bin_width, saes } = self;
        let edge = |bin: usize| lowest + bin as f64 * bin_width;
        let n_bins = saes.iter().map(|(bins, _)| bins.len()).max().unwrap_or(0);
        let is_used = |bin: &usize| saes.iter().any(|(bins, _)| bins[*bin] > 0);
        let first = (0..n_bins).find(is_used).unwrap_or(n_bins.saturating_sub(4));
        let low = edge(first).floor();
        // Room for the dead between the axis and the rarest.
        let dead_from = low - 4.0 * bin_width;
        let top = saes.iter().flat_map(|(bins, dead)| bins.iter().chain([dead])).max();
        let top = 1.08 * (*top.unwrap_or(&1)).max(1) as f64;
        let ticks = (low as i32..=0).map(f64::from).collect();
        let x_axis = Axis { range: dead_from..0.0, ticks };
        let y_axis = Axis { range: 0.0..top, ticks: round_ticks(0.0, top) };
        let mut svg = String::new();
        {
            let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
            let mut chart = ChartBuilder::on(&root)
                .margin(10)
                .margin_right(22)
                .x_label_area_size(48)
                .y_label_area_size(70)
                .build_cartesian_2d(x_axis, y_axis)?;
            let share = |place: &f64| match -place.round() as i32 {
                0 => "1".to_owned(),
                n => format!("10⁻{}", superscript(n)),
            };
            chart
                .configure_mesh()
                .light_line_style(TRANSPARENT)
                .bold_line_style(FAINT)
                .axis_style(INK.mix(0.5))
                .label_style(("sans-serif", 16).into_font().color(&INK))
                .axis_desc_style(("sans-serif", 17).into_font().color(&INK))
                .x_desc("share of tokens that a latent is active on")
                .y_desc("latents")
                .x_label_formatter(&share)
                .y_label_formatter(&|y| short(*y))
                .draw()?;
            let n_saes = saes.len() as f64;
            for (sae_idx, (bins, dead)) in saes.iter().enumerate() {
                let colour = colour(sae_idx);
                let bar = |from: f64, n: usize| {
                    let width = bin_width * 0.86 / n_saes;
                    let left = from + 0.07 * bin_width + sae_idx as f64 * width;
                    Rectangle::new([(left, 0.0), (left + width, n as f64)], colour.filled())
                };
                let bars = bins.iter().enumerate().filter(|(_, n)| **n > 0);
                chart.draw_series(bars.map(|(bin, &n)| bar(edge(bin), n)))?;
                if *dead > 0 {
                    chart.draw_series([bar(dead_from + 1.5 * bin_width, *dead)])?;
                }
            }
            let at = chart.backend_coord(&(dead_from + 2.0 * bin_width, 0.0));
            let centred = Pos::new(HPos::Center, VPos::Top);
            let style = ("sans-serif", 16).into_font().color(&INK).pos(centred);
            root.draw(&Text::new("dead", (at.0, at.1 + 7), style))?;
            root.present()?;
        }
        let title = format!("<svg role=\"img\" aria-label=\"{title}\" ");
        Ok(svg.replacen("<svg ", &title, 1))
    }
}

fn superscript(n: i32) -> String {
    let digit = |c: char| ['⁰', '¹', '²', '³', '⁴', '⁵', '⁶', '⁷', '⁸', '⁹'][c as usize - 48];
    n.to_string().chars().map(digit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_short() {
        let cases = [(0.0, "0"), (0.25, "0.25"), (1e3, "1000"), (1.0 / 3.0, "0.333"), (2e7, "2e7")];
        for (value, expected) in cases {
            assert_eq!(short(value), expected);
        }
        assert_eq!((short(1e-5), superscript(12)), ("1e-5".to_owned(), "¹²".to_owned()));
    }

    #[test]
    fn what_has_no_place_is_left_out() {
        let chart = |points: Vec<(f64, f64)>| Chart {
            title: "t",
            x_name: "x",
            y_name: "y",
            x_scale: Scale::Linear,
            y_scale: Scale::Logarithmic,
            from_zero: false,
            lines: vec![Line { sae_idx: Some(0), points }],
        };
        assert!(chart(vec![(1.0, f64::NAN), (2.0, 0.0)]).svg().expect("draws").is_none());
        let one = chart(vec![(1.0, 3.0), (2.0, 0.0)]).svg().expect("draws").expect("a point");
        assert_eq!(one.matches("<circle").count(), 1);
    }
}
