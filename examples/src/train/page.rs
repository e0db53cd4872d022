//! The page.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use minijinja::{AutoEscape, Environment, UndefinedBehavior, context};
use sae_core::metrics::DensityHistogram;
use serde_json::Value;

use super::options::Plan;
use super::outcome::Results;
use super::plot::{Chart, Histogram, Line, Scale, css_colour};

/// Points of a learning curve: of more steps, each is a mean.
const N_POINTS: usize = 150;

/// How an SAE learnt.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Curve {
    /// Steps and losses.
    losses: Vec<(f64, f64)>,
    /// Steps and FVUs on the held-out text.
    fvus: Vec<(f64, f64)>,
}

/// Reads what a run left, for each SAE.
pub(super) fn read_curves(path: &Path, plan: &Plan) -> Result<Vec<Curve>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let mut curves = vec![Curve::default(); plan.saes.len()];
    for line in text.lines() {
        let event: Value =
            serde_json::from_str(line).with_context(|| path.display().to_string())?;
        let curve = event["run_idx"].as_u64().and_then(|idx| curves.get_mut(idx as usize));
        let (Some(curve), Some(step)) = (curve, event["step"].as_f64()) else {
            continue;
        };
        if let (Some("step"), Some(loss)) = (event["event"].as_str(), event["loss"].as_f64()) {
            curve.losses.push((step, loss));
        }
        if let (Some("evaluation"), Some(fvu)) = (event["event"].as_str(), event["fvu"].as_f64()) {
            curve.fvus.push((step, fvu));
        }
    }
    Ok(curves)
}

/// The page: one file of HTML that needs no other, no script and no network.
pub(super) fn render(results: &Results, curves: &[Curve]) -> Result<String> {
    let saes = results.saes.iter().enumerate().map(|(idx, sae)| {
        context! { colour => css_colour(idx), ..minijinja::Value::from_serialize(sae) }
    });
    let saes: Vec<_> = saes.collect();
    let page = context! {
        results,
        saes,
        of_rewards => results.saes.iter().any(|sae| sae.evaluation.rewards.is_some()),
        plots => plots(results, curves)?,
    };
    let mut env = Environment::new();
    env.set_auto_escape_callback(|_| AutoEscape::Html);
    env.set_undefined_behavior(UndefinedBehavior::Strict);
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.add_filter("thousands", thousands);
    env.add_filter("percent", |share: Option<f64>| {
        share.map_or("–".to_owned(), |share| format!("{:.1}\u{a0}%", 100.0 * share))
    });
    env.add_filter("number", |value: Option<f64>, digits: usize| {
        value
            .filter(|value| value.is_finite())
            .map_or("–".to_owned(), |v| format!("{v:.digits$}"))
    });
    env.add_template("page.html", include_str!("page.html.jinja"))?;
    Ok(env.get_template("page.html")?.render(page)?)
}

/// Figures with their captions.
fn plots(results: &Results, curves: &[Curve]) -> Result<Vec<minijinja::Value>> {
    let saes = || results.saes.iter().enumerate();
    let mut plots = Vec::new();
    let mut push = |svg: Option<String>, caption: &str| {
        if let Some(svg) = svg {
            plots.push(context! { svg, caption });
        }
    };
    let line =
        |(sae_idx, points): (usize, Vec<(f64, f64)>)| Line { sae_idx: Some(sae_idx), points };
    let losses = curves.iter().zip(&results.saes).map(|(curve, sae)| {
        let share = |(step, loss): (f64, f64)| (step, loss / sae.d_in as f64);
        thinned(&curve.losses).into_iter().map(share).collect()
    });
    let loss = Chart {
        title: "Training loss by step",
        x_name: "step",
        y_name: "loss / width",
        x_scale: Scale::Linear,
        y_scale: Scale::Logarithmic,
        from_zero: false,
        lines: losses.enumerate().map(line).collect(),
    };
    push(
        loss.svg()?,
        "Training loss, penalties included, divided by the width of the activation: an SAE that \
         says nothing would have about 1.",
    );
    let fvu = Chart {
        title: "Fraction of variance unexplained by step",
        x_name: "step",
        y_name: "FVU, held out",
        x_scale: Scale::Linear,
        y_scale: Scale::Linear,
        from_zero: true,
        lines: curves.iter().map(|curve| curve.fvus.clone()).enumerate().map(line).collect(),
    };
    let but = match results.max_norm {
        Some(times) => format!(", but for activations longer than {times} times the median"),
        None => String::new(),
    };
    push(
        fvu.svg()?,
        &format!("Fraction of variance unexplained on text that was not trained on{but}."),
    );
    let densities = Histogram {
        title: "Latents by density",
        lowest: DensityHistogram::LOWEST,
        bin_width: DensityHistogram::BIN_WIDTH,
        saes: saes()
            .map(|(_, sae)| {
                let densities = &sae.evaluation.reconstruction.densities;
                (densities.n_latents.clone(), densities.n_dead)
            })
            .collect(),
    };
    push(
        Some(densities.svg()?),
        "How often latents are active on the held-out text. Dead ones never were; on more text, \
         some would be.",
    );
    let mut lines = Vec::new();
    for (sae_idx, sae) in saes() {
        let Some(figures) = &sae.evaluation.next_tokens else { continue };
        // The middle of the range, of positions counted from 1.
        let at = |from: usize, to: usize| (((from + 1) * to) as f64).sqrt();
        let ranges = &figures.by_position;
        let of = |value: fn(&sae_core::evaluate::PositionRange) -> f64| {
            ranges.iter().map(|range| (at(range.from, range.to), value(range))).collect()
        };
        if lines.is_empty() {
            lines.push(Line { sae_idx: None, points: of(|range| range.ce_clean) });
        }
        lines.push(Line { sae_idx: Some(sae_idx), points: of(|range| range.ce_spliced) });
    }
    let by_position = Chart {
        title: "Cross-entropy by position",
        x_name: "position, from 1",
        y_name: "cross-entropy",
        x_scale: Scale::Logarithmic,
        y_scale: Scale::Linear,
        from_zero: false,
        lines,
    };
    push(
        by_position.svg()?,
        "Cross-entropy of the next token by the position of the one before it, in nats: with the \
         SAE spliced in (solid), and of the model as it is (dashed).",
    );
    Ok(plots)
}

/// At most so many points, each the mean of some.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mean = |points: &[(f64, f64)]| {
        let (x, y) = points.iter().fold((0.0, 0.0), |(x, y), point| (x + point.0, y + point.1));
        (x / points.len() as f64, y / points.len() as f64)
    };
    points.chunks(points.len().div_ceil(N_POINTS).max(1)).map(mean).collect()
}

/// A number with its thousands apart.
fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let groups: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(|group| std::str::from_utf8(group).expect("digits are text"))
        .collect();
    groups.join("\u{202f}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_curves_are_thinned_to_means() {
        let points: Vec<(f64, f64)> = (0..300).map(|i| (f64::from(i), 1.0)).collect();
        let thinned = thinned(&points);
        assert_eq!((thinned.len(), thinned[0]), (150, (0.5, 1.0)));
        assert_eq!((super::thinned(&points[..3]).len(), super::thinned(&[]).len()), (3, 0));
    }
}
