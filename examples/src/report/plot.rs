//! The figures: unsafe refusal against what it costs, as SVG.

use std::array;

use anyhow::Result;
use plotters::prelude::*;
use steering::Rate;

use super::front::front;
use crate::axis::{Axis, decade_ticks, round_ticks};
use crate::results::{Capability, Condition, Method, Row, Treatment};

/// Pixels. Small, so that the lettering is still readable where the page is narrow.
const SIZE: (u32, u32) = (460, 430);
const INK: RGBColor = RGBColor(55, 60, 68);
const FAINT: RGBColor = RGBColor(226, 229, 233);
const CONTROL: RGBColor = RGBColor(150, 156, 164);

type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<Axis, Axis>>;
type Guide = DashedLineSeries<array::IntoIter<(f64, f64), 2>, i32>;

/// From 0 to 100 %, with room for a marker at either end.
fn shares() -> Axis {
    Axis { range: -0.03..1.03, ticks: vec![0.0, 0.25, 0.5, 0.75, 1.0] }
}

/// A row as a point, both axes in the chart's own units.
struct Mark {
    at: (f64, f64),
    x_interval: Option<(f64, f64)>,
    y_interval: (f64, f64),
    treatment: Treatment,
    is_front: bool,
}

impl Mark {
    fn new(row: &Row, x: f64, x_interval: Option<(f64, f64)>) -> Self {
        let Row { treatment, unsafe_rate, .. } = row;
        let at = (x, unsafe_rate.rate);
        let y_interval = interval(*unsafe_rate);
        Self { at, x_interval, y_interval, treatment: *treatment, is_front: false }
    }

    fn is_control(&self) -> bool {
        self.treatment.method.is_control()
    }

    /// What is written beside it: of the controls, only the one that is talked about.
    fn label(&self) -> Option<String> {
        let Treatment { method, strength, .. } = self.treatment;
        let name = match method {
            Method::UnrelatedLatent => return Some("unrelated".into()),
            _ if !self.is_front => return None,
            Method::Base => return None,
            Method::Latent => "latent",
            Method::Bundle => "bundle",
            Method::MeanDifference => "mean diff.",
            Method::SaeTargeted => "targeted",
            Method::LatentAblated => "turned down",
            Method::DirectionAblated => "ablated",
            Method::SpliceOnly | Method::RandomLatent | Method::RandomDirection => return None,
        };
        Some(format!("{name} {strength}×"))
    }
}

/// Refusal of unsafe prompts against refusal of safe ones.
pub(super) fn trade_off(rows: &[&Row]) -> Result<String> {
    let mark = |row: &&Row| Mark::new(row, row.safe_rate.rate, Some(interval(row.safe_rate)));
    let alike = DashedLineSeries::new([(0.0, 0.0), (1.0, 1.0)], 4, 4, INK.mix(0.4).into());
    let marks = rows.iter().map(mark).collect();
    draw(shares(), "safe prompts refused", &|share| percent(*share), marks, Some(alike))
}

/// Refusal of unsafe prompts against questions no longer answered right, in points; `None` where
/// nobody asked, or the model left alone was not asked.
pub(super) fn capability(rows: &[&Row]) -> Result<Option<String>> {
    let accuracy = |row: &Row| row.capability.as_ref().and_then(mean_accuracy);
    let base = rows.iter().find(|row| row.treatment.method == Method::Base);
    let Some(base) = base.and_then(|row| accuracy(row)) else { return Ok(None) };
    let lost = |row: &&&Row| accuracy(row).map(|accuracy| 100.0 * (base - accuracy));
    let marks: Vec<Mark> =
        rows.iter().filter_map(|row| Some(Mark::new(row, lost(&row)?, None))).collect();
    if marks.len() < 2 {
        return Ok(None);
    }
    // A chart in which nothing costs anything still shows what a few points would be.
    let (low, high) = range(&marks, (-1.0, 4.0));
    let margin = 0.06 * (high - low);
    let axis = Axis { range: low - margin..high + margin, ticks: round_ticks(low, high) };
    draw(axis, "multiple choice, points lost", &|lost| points(*lost), marks, None).map(Some)
}

/// The mean over sets: a large one counts no more than a small one.
pub(super) fn mean_accuracy(capability: &Capability) -> Option<f64> {
    let sets = &capability.multiple_choice;
    let sum: f64 = sets.iter().map(|set| set.accuracy.rate).sum();
    (!sets.is_empty()).then(|| sum / sets.len() as f64)
}

/// Refusal of unsafe prompts against the perplexity ratio, on a logarithmic axis.
pub(super) fn cost(rows: &[&Row]) -> Result<String> {
    let mark = |row: &&Row| Mark::new(row, row.perplexity_ratio.log10(), None);
    let marks: Vec<Mark> = rows.iter().map(mark).collect();
    // A chart in which nothing costs anything still shows the way from 1 to 2.
    let (low, high) = range(&marks, (0.0, 2f64.log10()));
    let margin = 0.06 * (high - low);
    let axis = Axis { range: low - margin..high + margin, ticks: decade_ticks(low, high) };
    draw(axis, "perplexity ratio", &|log| tick(10f64.powf(*log)), marks, None)
}

fn range(marks: &[Mark], (low, high): (f64, f64)) -> (f64, f64) {
    let xs = || marks.iter().map(|mark| mark.at.0);
    (xs().fold(low, f64::min), xs().fold(high, f64::max))
}

/// The marker that stands for a method, for a legend.
pub(super) fn method_swatch(method: Method) -> Result<String> {
    swatch(|root| {
        root.draw(&marker(Shape::of(method, Condition::Always), colour(method), (8, 8), 6))?;
        Ok(())
    })
}

/// The marker that stands for a condition, and the line that joins its front.
pub(super) fn condition_swatch(condition: Condition) -> Result<String> {
    let dashes: &[[i32; 2]] = match condition {
        Condition::Always => &[[0, 4], [12, 16]],
        Condition::Probe => &[[0, 16]],
    };
    swatch(|root| {
        for [from, to] in dashes {
            root.draw(&PathElement::new([(*from, 8), (*to, 8)], INK.stroke_width(2)))?;
        }
        root.draw(&marker(Shape::of(Method::Latent, condition), INK, (8, 8), 4))?;
        Ok(())
    })
}

type Pixels<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn swatch(draw: impl FnOnce(&Pixels<'_>) -> Result<()>) -> Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (16, 16)).into_drawing_area();
        draw(&root)?;
        root.present()?;
    }
    Ok(svg.replacen("<svg ", "<svg aria-hidden=\"true\" ", 1))
}

fn draw(
    x_axis: Axis,
    x_name: &str,
    x_label: &dyn Fn(&f64) -> String,
    mut marks: Vec<Mark>,
    guide: Option<Guide>,
) -> Result<String> {
    let fronts = Condition::ALL.map(|condition| (condition, find_front(&mut marks, condition)));
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let mut chart = ChartBuilder::on(&root)
            .margin(8)
            .margin_right(18)
            .x_label_area_size(50)
            .y_label_area_size(68)
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
        draw_fronts(&mut chart, &fronts)?;
        draw_marks(&mut chart, &marks)?;
        draw_labels(&mut chart, &marks, &fronts)?;
        root.present()?;
    }
    let title =
        format!("<svg role=\"img\" aria-label=\"Unsafe prompts refused against {x_name}\" ");
    Ok(svg.replacen("<svg ", &title, 1))
}

/// Where the front of a condition runs: among what is steered under it and the model left alone.
fn find_front(marks: &mut [Mark], condition: Condition) -> Vec<(f64, f64)> {
    let may_be = |mark: &Mark| {
        let Treatment { method, condition: own, .. } = mark.treatment;
        !mark.is_control() && (own == condition || method == Method::Base)
    };
    let among: Vec<usize> = (0..marks.len()).filter(|&index| may_be(&marks[index])).collect();
    let points: Vec<(f64, f64)> = among.iter().map(|&index| marks[index].at).collect();
    let front = front(&points);
    for &place in &front {
        marks[among[place]].is_front = true;
    }
    front.into_iter().map(|place| points[place]).collect()
}

fn draw_fronts(chart: &mut Chart, fronts: &[(Condition, Vec<(f64, f64)>)]) -> Result<()> {
    for (condition, front) in fronts {
        let style = INK.mix(0.55).stroke_width(2);
        match condition {
            Condition::Always => {
                chart.draw_series(DashedLineSeries::new(front.iter().copied(), 6, 4, style))?;
            }
            Condition::Probe => {
                chart.draw_series(LineSeries::new(front.iter().copied(), style))?;
            }
        }
    }
    Ok(())
}

/// Controls below, fronts on top; intervals of the fronts alone, where they would not hide the rest.
fn draw_marks(chart: &mut Chart, marks: &[Mark]) -> Result<()> {
    for Mark { at: (x, y), x_interval, y_interval, treatment, .. } in
        marks.iter().filter(|mark| mark.is_front)
    {
        let across = x_interval.map(|(low, high)| vec![(low, *y), (high, *y)]);
        let up = vec![(*x, y_interval.0), (*x, y_interval.1)];
        let bars = across.into_iter().chain([up]);
        let colour = colour(treatment.method).mix(0.45);
        chart.draw_series(bars.map(|bar| PathElement::new(bar, colour)))?;
    }
    let mut order: Vec<&Mark> = marks.iter().collect();
    let is_base = |mark: &Mark| mark.treatment.method == Method::Base;
    order.sort_by_key(|mark| (!mark.is_control(), mark.is_front, is_base(mark)));
    for mark in order {
        let Treatment { method, condition, .. } = mark.treatment;
        let (colour, reach) = match mark.is_front || mark.is_control() {
            true => (colour(method).mix(1.0), if mark.is_control() { 4 } else { 6 }),
            false => (colour(method).mix(0.5), 4),
        };
        let shape = marker(Shape::of(method, condition), colour, (0, 0), reach);
        chart.draw_series([EmptyElement::at(mark.at) + shape])?;
    }
    Ok(())
}

/// Writes names and strengths beside marks where there is room, rather off the lines than on one.
/// The table has them all.
fn draw_labels(
    chart: &mut Chart,
    marks: &[Mark],
    fronts: &[(Condition, Vec<(f64, f64)>)],
) -> Result<()> {
    let pixel = |at: &(f64, f64)| chart.backend_coord(at);
    let mut taken: Vec<Area> = marks.iter().map(|mark| Area::around(pixel(&mark.at), 4)).collect();
    let lines: Vec<Area> = fronts
        .iter()
        .flat_map(|(_, front)| front.windows(2))
        .flat_map(|ends| along(pixel(&ends[0]), pixel(&ends[1])))
        .collect();
    let plot = {
        let (x, y) = chart.plotting_area().get_pixel_range();
        Area { left: x.start, top: y.start, right: x.end, bottom: y.end }
    };
    // Those that refuse most first: they are what the page is about.
    let mut order: Vec<&Mark> = marks.iter().collect();
    order.sort_by(|a, b| a.is_control().cmp(&b.is_control()).then(b.at.1.total_cmp(&a.at.1)));
    for mark in order {
        let Some(label) = mark.label() else { continue };
        let (x, y) = chart.backend_coord(&mark.at);
        let (width, height) = (8 * label.chars().count() as i32, 14);
        let offsets = [
            (9, -18),
            (9, 4),
            (-9 - width, -18),
            (-9 - width, 4),
            (-width / 2, -24),
            (-width / 2, 10),
            (11, -7),
            (-11 - width, -7),
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
        let colour = match mark.is_control() {
            true => INK,
            false => colour(mark.treatment.method),
        };
        let style = ("sans-serif", 16).into_font().color(&colour);
        chart.draw_series([EmptyElement::at(mark.at) + Text::new(label, offset, style)])?;
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

/// What a mark looks like, whatever its colour: which prompts were steered.
#[derive(Clone, Copy)]
enum Shape {
    Cross,
    Disc,
    Diamond,
}

impl Shape {
    fn of(method: Method, condition: Condition) -> Self {
        match (method, condition) {
            (Method::Base, _) => Self::Cross,
            (_, Condition::Always) => Self::Disc,
            (_, Condition::Probe) => Self::Diamond,
        }
    }
}

/// A filled shape around a pixel.
fn marker(
    shape: Shape,
    colour: impl Into<ShapeStyle>,
    (x, y): (i32, i32),
    reach: i32,
) -> Polygon<(i32, i32)> {
    let r = f64::from(reach);
    let corners: Vec<(f64, f64)> = match shape {
        Shape::Cross => {
            let arm = r / 3.0;
            let quarter = [(-arm, -r), (arm, -r), (arm, -arm)];
            let turned = |n: usize| {
                move |(dx, dy): (f64, f64)| match n {
                    0 => (dx, dy),
                    1 => (-dy, dx),
                    2 => (-dx, -dy),
                    _ => (dy, -dx),
                }
            };
            (0..4).flat_map(|n| quarter.map(turned(n))).collect()
        }
        Shape::Disc => {
            let angles = (0..16).map(|n| f64::from(n) * std::f64::consts::TAU / 16.0);
            angles.map(|angle| (r * angle.cos(), r * angle.sin())).collect()
        }
        Shape::Diamond => {
            let r = 1.3 * r;
            vec![(0.0, -r), (r, 0.0), (0.0, r), (-r, 0.0)]
        }
    };
    let pixel = |(dx, dy): (f64, f64)| (x + dx.round() as i32, y + dy.round() as i32);
    Polygon::new(corners.into_iter().map(pixel).collect::<Vec<_>>(), colour)
}

/// Okabe and Ito's palette, which readers with any colour vision can tell apart; darkened where
/// its own would be faint as lettering on white.
const fn colour(method: Method) -> RGBColor {
    match method {
        Method::Base => RGBColor(30, 30, 30),
        Method::Latent => RGBColor(0, 114, 178),
        Method::Bundle => RGBColor(0, 135, 100),
        Method::MeanDifference => RGBColor(213, 94, 0),
        Method::SaeTargeted => RGBColor(176, 82, 138),
        Method::LatentAblated => RGBColor(178, 120, 0),
        Method::DirectionAblated => RGBColor(96, 66, 150),
        Method::SpliceOnly
        | Method::UnrelatedLatent
        | Method::RandomLatent
        | Method::RandomDirection => CONTROL,
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

/// Points of a per cent, without a negative zero.
fn points(points: f64) -> String {
    format!("{}", (10.0 * points).round() / 10.0 + 0.0)
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
        assert_eq!([-1.0, -0.001, 2.5].map(points), ["-1", "0", "2.5"]);
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
