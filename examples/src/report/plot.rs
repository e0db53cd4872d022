//! The figures: unsafe refusal against what it costs, as SVG.

use std::array;

use anyhow::Result;
use plotters::prelude::*;
use steering::Rate;

use crate::axis::{Axis, decade_ticks};
use crate::results::{Method, Row};

/// Pixels. Small, so that the lettering is still readable where the page is narrow.
const SIZE: (u32, u32) = (520, 430);
const INK: RGBColor = RGBColor(55, 60, 68);
const FAINT: RGBColor = RGBColor(226, 229, 233);

type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<Axis, Axis>>;

/// From 0 to 100 %, with room for a marker at either end.
fn shares() -> Axis {
    Axis { range: -0.03..1.03, ticks: vec![0.0, 0.25, 0.5, 0.75, 1.0] }
}

/// A row as a point, both axes in the chart's own units.
struct Mark {
    at: (f64, f64),
    x_interval: Option<(f64, f64)>,
    y_interval: (f64, f64),
    strength: f64,
}

/// Refusal of unsafe prompts against refusal of safe ones.
pub(super) fn trade_off(rows: &[&Row]) -> Result<String> {
    let mark = |row: &Row| Mark {
        at: (row.safe_rate.rate, row.unsafe_rate.rate),
        x_interval: Some(interval(row.safe_rate)),
        y_interval: interval(row.unsafe_rate),
        strength: row.treatment.strength,
    };
    let alike = DashedLineSeries::new([(0.0, 0.0), (1.0, 1.0)], 4, 4, INK.mix(0.4).into());
    draw(shares(), "safe prompts refused", &|share| percent(*share), rows, mark, Some(alike))
}

/// Refusal of unsafe prompts against the perplexity ratio, on a logarithmic axis.
pub(super) fn cost(rows: &[&Row]) -> Result<String> {
    let mark = |row: &Row| Mark {
        at: (row.perplexity_ratio.log10(), row.unsafe_rate.rate),
        x_interval: None,
        y_interval: interval(row.unsafe_rate),
        strength: row.treatment.strength,
    };
    let logs = || rows.iter().map(|row| row.perplexity_ratio.log10());
    // A chart in which nothing costs anything still shows the way from 1 to 2.
    let (low, high) = (logs().fold(0.0, f64::min), logs().fold(2f64.log10(), f64::max));
    let margin = 0.06 * (high - low);
    let axis = Axis { range: low - margin..high + margin, ticks: decade_ticks(low, high) };
    draw(axis, "perplexity ratio", &|log| tick(10f64.powf(*log)), rows, mark, None)
}

/// The marker that stands for a method, for a legend.
pub(super) fn swatch(method: Method) -> Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (16, 16)).into_drawing_area();
        root.draw(&marker(method, (8, 8)))?;
        root.present()?;
    }
    Ok(svg.replacen("<svg ", "<svg aria-hidden=\"true\" ", 1))
}

fn draw(
    x_axis: Axis,
    x_name: &str,
    x_label: &dyn Fn(&f64) -> String,
    rows: &[&Row],
    mark: impl Fn(&Row) -> Mark,
    guide: Option<DashedLineSeries<array::IntoIter<(f64, f64), 2>, i32>>,
) -> Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let mut chart = ChartBuilder::on(&root)
            .margin(8)
            .margin_right(16)
            .x_label_area_size(48)
            .y_label_area_size(64)
            .build_cartesian_2d(x_axis, shares())?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(FAINT)
            .axis_style(INK.mix(0.5))
            .label_style(("sans-serif", 17).into_font().color(&INK))
            .axis_desc_style(("sans-serif", 18).into_font().color(&INK))
            .x_desc(x_name)
            .y_desc("unsafe prompts refused")
            .x_label_formatter(x_label)
            .y_label_formatter(&|share| percent(*share))
            .draw()?;
        if let Some(guide) = guide {
            chart.draw_series(guide)?;
        }
        let series: Vec<(Method, Vec<Mark>)> = Method::ALL
            .map(|method| {
                let mut marks: Vec<Mark> = rows
                    .iter()
                    .filter(|row| row.treatment.method == method)
                    .map(|row| mark(row))
                    .collect();
                marks.sort_by(|a, b| a.strength.total_cmp(&b.strength));
                (method, marks)
            })
            .into();
        draw_marks(&mut chart, &series)?;
        draw_strengths(&mut chart, &series)?;
        root.present()?;
    }
    let title =
        format!("<svg role=\"img\" aria-label=\"Unsafe prompts refused against {x_name}\" ");
    Ok(svg.replacen("<svg ", &title, 1))
}

fn draw_marks(chart: &mut Chart, series: &[(Method, Vec<Mark>)]) -> Result<()> {
    for (method, marks) in series {
        let colour = colour(*method);
        for Mark { at: (x, y), x_interval, y_interval, .. } in marks {
            let across = x_interval.map(|(low, high)| vec![(low, *y), (high, *y)]);
            let up = vec![(*x, y_interval.0), (*x, y_interval.1)];
            chart.draw_series(
                across.into_iter().chain([up]).map(|bar| PathElement::new(bar, colour.mix(0.4))),
            )?;
        }
        chart.draw_series(LineSeries::new(
            marks.iter().map(|mark| mark.at),
            colour.mix(0.8).stroke_width(2),
        ))?;
    }
    // Above every line, those that the page is about on top.
    for (method, marks) in series.iter().rev() {
        chart.draw_series(
            marks.iter().map(|mark| EmptyElement::at(mark.at) + marker(*method, (0, 0))),
        )?;
    }
    Ok(())
}

/// Writes strengths beside their marks where there is room, rather off the lines than on one: of
/// the controls only the strongest, as most of them share a corner. The table has them all.
fn draw_strengths(chart: &mut Chart, series: &[(Method, Vec<Mark>)]) -> Result<()> {
    let mut taken = Vec::new();
    let mut lines = Vec::new();
    for (_, marks) in series {
        let pixels: Vec<_> = marks.iter().map(|mark| chart.backend_coord(&mark.at)).collect();
        taken.extend(pixels.iter().map(|at| Area::around(*at, 4)));
        lines.extend(pixels.windows(2).flat_map(|ends| along(ends[0], ends[1])));
    }
    let plot = {
        let (x, y) = chart.plotting_area().get_pixel_range();
        Area { left: x.start, top: y.start, right: x.end, bottom: y.end }
    };
    for (method, marks) in series {
        let labelled = match method {
            Method::Base => &[],
            Method::Latent | Method::Bundle | Method::MeanDifference => &marks[..],
            _ => &marks[marks.len().saturating_sub(1)..],
        };
        for mark in labelled {
            let label = format!("{}×", mark.strength);
            let (x, y) = chart.backend_coord(&mark.at);
            let (width, height) = (8 * label.chars().count() as i32, 13);
            let offsets = [
                (7, -16),
                (7, 3),
                (-7 - width, -16),
                (-7 - width, 3),
                (-width / 2, -21),
                (-width / 2, 7),
            ];
            let area = |(dx, dy)| Area {
                left: x + dx,
                top: y + dy,
                right: x + dx + width,
                bottom: y + dy + height,
            };
            let free = |offset: &(i32, i32)| {
                plot.holds(&area(*offset)) && !taken.iter().any(|other| area(*offset).meets(other))
            };
            let clear = |offset: &(i32, i32)| !lines.iter().any(|other| area(*offset).meets(other));
            let places = || offsets.into_iter().filter(free);
            let Some(offset) = places().find(clear).or_else(|| places().next()) else {
                continue;
            };
            taken.push(area(offset));
            let style = ("sans-serif", 16).into_font().color(&colour(*method));
            chart.draw_series([EmptyElement::at(mark.at) + Text::new(label, offset, style)])?;
        }
    }
    Ok(())
}

/// A rectangle of pixels.
struct Area {
    left: i32,
    top: i32,
    right: i32,
    bottom: i32,
}

impl Area {
    fn around((x, y): (i32, i32), reach: i32) -> Self {
        Self { left: x - reach, top: y - reach, right: x + reach, bottom: y + reach }
    }

    fn meets(&self, other: &Self) -> bool {
        self.left <= other.right
            && other.left <= self.right
            && self.top <= other.bottom
            && other.top <= self.bottom
    }

    fn holds(&self, other: &Self) -> bool {
        self.left <= other.left
            && other.right <= self.right
            && self.top <= other.top
            && other.bottom <= self.bottom
    }
}

/// Small areas that cover the line between two pixels.
fn along((x0, y0): (i32, i32), (x1, y1): (i32, i32)) -> impl Iterator<Item = Area> {
    let n_steps = ((x1 - x0).abs().max((y1 - y0).abs()) / 3).max(1);
    (0..=n_steps).map(move |step| {
        Area::around((x0 + (x1 - x0) * step / n_steps, y0 + (y1 - y0) * step / n_steps), 1)
    })
}

/// A filled shape around a pixel, one for each method: colour alone would leave some readers out.
fn marker(method: Method, (x, y): (i32, i32)) -> Polygon<(i32, i32)> {
    let shape: &[(i32, i32)] = match method {
        Method::Base => &[
            (-2, -6),
            (2, -6),
            (2, -2),
            (6, -2),
            (6, 2),
            (2, 2),
            (2, 6),
            (-2, 6),
            (-2, 2),
            (-6, 2),
            (-6, -2),
            (-2, -2),
        ],
        Method::Latent => &[(-2, -5), (2, -5), (5, -2), (5, 2), (2, 5), (-2, 5), (-5, 2), (-5, -2)],
        Method::Bundle => &[(-5, -5), (5, -5), (5, 5), (-5, 5)],
        Method::MeanDifference => &[(0, -6), (6, 0), (0, 6), (-6, 0)],
        Method::SaeTargeted => &[(0, -6), (6, 0), (0, 2), (-6, 0)],
        Method::LatentAblated => &[(-5, -5), (5, -5), (0, 5)],
        Method::DirectionAblated => &[(-6, 0), (0, -2), (6, 0), (0, 6)],
        Method::SpliceOnly => &[(-5, -2), (5, -2), (5, 2), (-5, 2)],
        Method::UnrelatedLatent => &[(0, -5), (5, 4), (-5, 4)],
        Method::RandomLatent => &[(0, 5), (5, -4), (-5, -4)],
        Method::RandomDirection => &[
            (-5, -3),
            (-3, -5),
            (0, -2),
            (3, -5),
            (5, -3),
            (2, 0),
            (5, 3),
            (3, 5),
            (0, 2),
            (-3, 5),
            (-5, 3),
            (-2, 0),
        ],
    };
    let points: Vec<_> = shape.iter().map(|(dx, dy)| (x + dx, y + dy)).collect();
    Polygon::new(points, colour(method))
}

/// Okabe and Ito's palette, which readers with any colour vision can tell apart; darkened where
/// its own would be faint as lettering on white.
const fn colour(method: Method) -> RGBColor {
    match method {
        Method::Base => RGBColor(30, 30, 30),
        Method::Latent => RGBColor(0, 114, 178),
        Method::Bundle => RGBColor(0, 135, 100),
        Method::MeanDifference => RGBColor(213, 94, 0),
        Method::SaeTargeted => RGBColor(148, 103, 20),
        Method::LatentAblated => RGBColor(60, 60, 160),
        Method::DirectionAblated => RGBColor(160, 50, 30),
        Method::SpliceOnly => RGBColor(90, 110, 90),
        Method::UnrelatedLatent => RGBColor(176, 82, 138),
        Method::RandomLatent => RGBColor(178, 120, 0),
        Method::RandomDirection => RGBColor(120, 126, 134),
    }
}

/// A round ratio without the digits that rounding left: `1.5×`, `1e6×`.
fn tick(ratio: f64) -> String {
    if (0.01..99_999.5).contains(&ratio) {
        format!("{}×", (100.0 * ratio).round() / 100.0)
    } else {
        format!("{ratio:.0e}×")
    }
}

fn interval(rate: Rate) -> (f64, f64) {
    (rate.low, rate.high)
}

fn percent(share: f64) -> String {
    format!("{:.0} %", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_written_short() {
        assert_eq!(
            [0.5, 1.0, 1.4999999, 20.0, 1e4, 1e6].map(tick),
            ["0.5×", "1×", "1.5×", "20×", "10000×", "1e6×"]
        );
    }

    #[test]
    fn a_line_is_covered_from_end_to_end() {
        let areas: Vec<Area> = along((0, 0), (30, 9)).collect();
        for at in [(0, 0), (15, 4), (30, 9)] {
            assert!(areas.iter().any(|area| area.meets(&Area::around(at, 0))), "{at:?}");
        }
        assert!(!areas.iter().any(|area| area.meets(&Area::around((0, 9), 2))));
    }
}
