//! How the time of a step grows with the SAE, the batch, the latents kept and the threads.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use plotters::prelude::*;
use rayon::ThreadPoolBuilder;
use sae_core::train::Search;
use serde::Serialize;
use serde_json::json;

use crate::limits::memory_bandwidth;
use crate::sae_step::{Case, Line};

/// Steps measured for each point.
const STEPS: usize = 5;
/// Weights, moments and gradient of encoder and decoder, and one more of each for what is being made.
const COPIES: usize = 5;
const SIZE: (u32, u32) = (900, 640);

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Where the picture goes.
    #[arg(long, default_value = "docs/growth.svg", value_name = "FILE")]
    out: PathBuf,
    /// Memory that a step may take; larger SAEs are left out, aloud.
    #[arg(long, default_value_t = 16.0, value_name = "GB")]
    memory: f64,
    /// The backend that computes.
    #[arg(long, env = "BURN_DEVICE", default_value = "flex")]
    device: String,
}

/// What grows, and how it is named on its axis.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Grows {
    DSae,
    Batch,
    K,
    Threads,
}

#[derive(Serialize)]
struct Point {
    grows: Grows,
    to: usize,
    #[serde(flatten)]
    line: Line,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let device = examples::device::device(&options.device)?;
    let memory = memory_bandwidth(&device) / 1e9;
    examples::allocator::keep_pages();
    let n_threads = rayon::current_num_threads();
    let case = Case::top_k;
    let mut cases: Vec<(Grows, usize, Case)> = Vec::new();
    for power in 12..=20 {
        cases.push((Grows::DSae, 1 << power, Case { d_sae: 1 << power, ..case() }));
    }
    for power in 8..=15 {
        cases.push((Grows::Batch, 1 << power, Case { batch: 1 << power, ..case() }));
    }
    for power in 2..=8 {
        cases.push((Grows::K, 1 << power, Case { k: 1 << power, ..case() }));
    }
    for threads in 1..=n_threads {
        cases.push((Grows::Threads, threads, case()));
    }
    let mut points = Vec::new();
    for (grows, to, case) in cases {
        let bytes = (2 * COPIES * size_of::<f32>() * case.d_sae * case.d_in) as f64;
        if bytes > options.memory * 1e9 {
            let line = json!({ "grows": grows, "to": to, "left_out_gb": bytes / 1e9 });
            println!("{line}");
            continue;
        }
        let threads = if grows == Grows::Threads { to } else { n_threads };
        let pool = ThreadPoolBuilder::new().num_threads(threads).build()?;
        let measured = pool.install(|| case.measure(&[Search::Proposed], STEPS, memory, &device));
        let line = measured?.pop().context("one search, one line")?;
        let point = Point { grows, to, line };
        println!("{}", serde_json::to_string(&point)?);
        points.push(point);
    }
    let svg = plot(&points)?;
    fs::write(&options.out, svg).with_context(|| format!("{}", options.out.display()))?;
    Ok(())
}

/// A step and the product of its encoder, each against what grows, on logarithmic axes.
fn plot(points: &[Point]) -> Result<String> {
    let panels = [
        (Grows::DSae, "latents"),
        (Grows::Batch, "activations in a step"),
        (Grows::K, "latents kept of 4,608"),
        (Grows::Threads, "threads"),
    ];
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        for ((grows, name), area) in panels.into_iter().zip(root.split_evenly((2, 2))) {
            let own = points.iter().filter(|point| point.grows == grows);
            let step = own.clone().map(|point| (point.to as f64, 1e3 * point.line.step_s));
            let encoder = own.map(|point| (point.to as f64, 1e3 * point.line.encoder_gemm_s));
            panel(&area, name, &step.collect::<Vec<_>>(), &encoder.collect::<Vec<_>>())?;
        }
        root.present()?;
    }
    Ok(svg)
}

fn panel(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    name: &str,
    step: &[(f64, f64)],
    encoder: &[(f64, f64)],
) -> Result<()> {
    let of = |pick: fn(&(f64, f64)) -> f64| {
        let values = || step.iter().chain(encoder).map(pick);
        let (low, high) = (values().fold(f64::MAX, f64::min), values().fold(0.0, f64::max));
        (low * 0.8..high * 1.25).log_scale()
    };
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .margin_right(24)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(of(|at| at.0), of(|at| at.1))?;
    let round = |value: &f64| match *value {
        value if value >= 1e6 => format!("{} M", value / 1e6),
        value if value >= 1e3 => format!("{} k", value / 1e3),
        value => format!("{value}"),
    };
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .label_style(("sans-serif", 15))
        .axis_desc_style(("sans-serif", 16))
        .x_desc(name)
        .y_desc("milliseconds")
        .x_label_formatter(&round)
        .y_label_formatter(&round)
        .draw()?;
    let encoder_colour = RGBColor(150, 156, 164);
    for (colour, points, label) in
        [(encoder_colour, encoder, "encoder's product"), (RGBColor(31, 98, 178), step, "a step")]
    {
        chart
            .draw_series(
                LineSeries::new(points.iter().copied(), colour.stroke_width(2)).point_size(3),
            )?
            .label(label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font(("sans-serif", 15))
        .border_style(TRANSPARENT)
        .draw()?;
    Ok(())
}
