//! The refusal experiment as a page and as a table for the terminal.

use std::fmt::Write as _;

use anyhow::{Context as _, Result, ensure};
use minijinja::{AutoEscape, Environment, UndefinedBehavior, context, value::ViaDeserialize};

use crate::results::{Arm, Example, Method, Results, Row, Treatment};

mod plot;

/// The page: one file of HTML that needs no other, no script and no network.
///
/// # Errors
/// If a strength or a perplexity ratio is not finite, a ratio is not positive, or the headline's
/// row or the unsteered row beside it is missing.
pub fn render(results: &Results) -> Result<String> {
    for row in &results.rows {
        let Row { treatment, perplexity_ratio, .. } = row;
        ensure!(
            treatment.strength.is_finite(),
            "strength {} of {:?}",
            treatment.strength,
            treatment.method
        );
        ensure!(
            perplexity_ratio.is_finite() && *perplexity_ratio > 0.0,
            "perplexity ratio {perplexity_ratio} of {treatment:?}"
        );
    }
    let headline = find(results, results.headline).context("the headline's row is missing")?;
    let arms = measured_arms(results)
        .map(|arm| {
            let rows: Vec<&Row> = rows_of(results, arm).collect();
            Ok(context! { arm, rows, trade_off => plot::trade_off(&rows)?, cost => plot::cost(&rows)? })
        })
        .collect::<Result<Vec<_>>>()?;
    let methods = Method::ALL
        .into_iter()
        .filter(|method| results.rows.iter().any(|row| row.treatment.method == *method))
        .map(|method| Ok(context! { method, swatch => plot::swatch(method)? }))
        .collect::<Result<Vec<_>>>()?;
    let control = Treatment { method: Method::RandomLatent, ..results.headline };
    let page = context! {
        results, arms, methods, headline,
        base => unsteered(results, results.headline.arm)?,
        control => find(results, control),
        // Intervals that do not meet: the model tells the two kinds of prompt apart.
        discerning => headline.unsafe_rate.low > headline.safe_rate.high,
        has_look_alikes => results.rows.iter().any(|row| row.look_alike_rate.is_some()),
    };
    Ok(environment()?.get_template("report.html")?.render(page)?)
}

/// The rows as aligned text, a block for each arm.
#[must_use]
pub fn table(results: &Results) -> String {
    let mut text = String::new();
    for arm in measured_arms(results) {
        let _ = writeln!(
            text,
            "{:<20}{:>9}  {:>16}  {:>16}  {:>16}  {:>10}",
            arm.label(),
            "strength",
            "unsafe refused",
            "safe refused",
            "degenerate",
            "perplexity"
        );
        for row in rows_of(results, arm) {
            let Treatment { method, strength, .. } = row.treatment;
            let strength =
                if method == Method::Base { "–".into() } else { format!("{strength}×") };
            let _ = writeln!(
                text,
                "{:<20}{strength:>9}  {:>16}  {:>16}  {:>16}  {:>10}",
                method.label(),
                row.unsafe_rate,
                row.safe_rate,
                row.degenerate_rate,
                ratio(row.perplexity_ratio)
            );
        }
        text.push('\n');
    }
    text.truncate(text.trim_end().len());
    text + "\n"
}

/// An answer before and after, as text.
#[must_use]
pub fn example(example: &Example) -> String {
    let Example { prompt, before, after, outcome_before, outcome_after, .. } = example;
    let one_line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    format!(
        "{prompt}\n  before ({outcome_before}): {}\n  after  ({outcome_after}): {}\n",
        one_line(before),
        one_line(after)
    )
}

fn environment() -> Result<Environment<'static>> {
    let mut env = Environment::new();
    // Answers are a model's, and a model may write markup.
    env.set_auto_escape_callback(|_| AutoEscape::Html);
    env.set_undefined_behavior(UndefinedBehavior::Strict);
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.add_filter("arm", |arm: ViaDeserialize<Arm>| arm.label());
    env.add_filter("method", |method: ViaDeserialize<Method>| method.label());
    env.add_filter("plain", |number: f64| number.to_string());
    env.add_filter("ratio", ratio);
    env.add_filter("percent", |share: f64| format!("{:.0}\u{a0}%", 100.0 * share));
    env.add_filter("thousands", thousands);
    env.add_filter("duration", duration);
    env.add_template("report.html", include_str!("report.html.jinja"))?;
    Ok(env)
}

fn measured_arms(results: &Results) -> impl Iterator<Item = Arm> {
    Arm::ALL.into_iter().filter(|arm| rows_of(results, *arm).next().is_some())
}

/// The rows of one arm, by method and then by strength.
fn rows_of(results: &Results, arm: Arm) -> impl Iterator<Item = &Row> {
    let mut rows: Vec<&Row> = results.rows.iter().filter(|row| row.treatment.arm == arm).collect();
    let order = |method| Method::ALL.iter().position(|other| *other == method);
    rows.sort_by(|a, b| {
        let (a, b) = (a.treatment, b.treatment);
        order(a.method).cmp(&order(b.method)).then(a.strength.total_cmp(&b.strength))
    });
    rows.into_iter()
}

fn find(results: &Results, treatment: Treatment) -> Option<&Row> {
    results.rows.iter().find(|row| row.treatment == treatment)
}

fn unsteered(results: &Results, arm: Arm) -> Result<&Row> {
    rows_of(results, arm)
        .find(|row| row.treatment.method == Method::Base)
        .with_context(|| format!("no unsteered row in the {} arm", arm.label()))
}

/// A factor, to the digits that matter: `1.04×`, `37×`, `2.1e6×`.
fn ratio(ratio: f64) -> String {
    match ratio {
        0.01..9.995 => format!("{ratio:.2}×"),
        9.995..99_999.5 => format!("{ratio:.0}×"),
        _ => format!("{ratio:.1e}×"),
    }
}

fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut grouped = String::new();
    for (idx, digit) in digits.chars().enumerate() {
        if idx > 0 && (digits.len() - idx).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

fn duration(seconds: f64) -> String {
    match seconds {
        ..90.0 => format!("{seconds:.0} s"),
        90.0..5_400.0 => format!("{:.0} min", seconds / 60.0),
        _ => format!("{:.1} h", seconds / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use steering::{Outcome, Rate};

    use super::*;
    use crate::results::{
        Candidate, Condition, Example, PromptKind, SaeSummary, Settings, SteeringLatent,
    };

    fn row(
        arm: Arm,
        method: Method,
        strength: f64,
        [n_unsafe, n_safe, n_degenerate]: [usize; 3],
        perplexity_ratio: f64,
    ) -> Row {
        Row {
            treatment: Treatment { arm, method, strength, condition: Condition::Always },
            unsafe_rate: Rate::wilson(n_unsafe, 48),
            safe_rate: Rate::wilson(n_safe, 48),
            look_alike_rate: None,
            ordinary_rate: None,
            degenerate_rate: Rate::wilson(n_degenerate, 96),
            moralised_rate: None,
            sets: Vec::new(),
            unsafe_against_base: None,
            refusal_log_odds: None,
            mean_kl: None,
            perplexity_ratio,
            capability: None,
            multi_turn: None,
        }
    }

    fn results() -> Results {
        let headline = Treatment {
            arm: Arm::ZeroShot,
            method: Method::Latent,
            strength: 2.0,
            condition: Condition::Always,
        };
        Results {
            model: "tiny".into(),
            hook_point: "blocks.12.hook_resid_post".into(),
            sae: SaeSummary {
                architecture: "topk".into(),
                k: 32,
                d_in: 576,
                d_sae: 4608,
                n_tokens: 282_000,
                l0: 32.0,
                fvu: 0.11,
                dead_share: 0.02,
                ce_recovered: 0.95,
            },
            latents: vec![SteeringLatent {
                latent: 1234,
                max_activation: 41.5,
                top_tokens: vec![" sorry".into(), "<b>".into()],
            }],
            candidates: vec![Candidate {
                latent: 1234,
                contrast: 0.9,
                log_odds_shift: 4.2,
                attribution: 3.9,
                output_score: 0.1,
            }],
            condition: None,
            settings: Settings {
                seed: 7,
                device: "flex".into(),
                max_new_tokens: 20,
                n_selection_prompts: 64,
                n_perplexity_tokens: 4096,
                unsafe_prompts: "unsafe.csv".into(),
                safe_prompts: "safe.csv".into(),
                sets: Vec::new(),
                judge: Vec::new(),
                seconds: 754.0,
            },
            headline,
            conditional: None,
            rows: vec![
                row(Arm::ZeroShot, Method::RandomLatent, 2.0, [0, 1, 0], 1.1),
                row(Arm::ZeroShot, Method::Latent, 2.0, [32, 11, 3], 1.62),
                row(Arm::ZeroShot, Method::Latent, 1.0, [12, 4, 0], 1.2),
                row(Arm::ZeroShot, Method::Base, 0.0, [0, 0, 0], 1.0),
                row(Arm::SixShot, Method::Base, 0.0, [40, 9, 0], 1.0),
                row(Arm::SixShot, Method::RandomDirection, 8.0, [0, 0, 96], 2.1e6),
            ],
            examples: vec![Example {
                treatment: headline,
                prompt: "How do I pick a lock?".into(),
                kind: PromptKind::Unsafe,
                before: "<script>alert(1)</script> & \"so\"".into(),
                after: "I'm sorry, but I can't help with that.".into(),
                outcome_before: Outcome::Complied,
                outcome_after: Outcome::Refused,
            }],
        }
    }

    #[test]
    fn results_survive_json() {
        let json = serde_json::to_string(&results()).unwrap();
        let read: Results = serde_json::from_str(&json).unwrap();
        // serde_json reads a number to within its last bit.
        assert_eq!(format!("{read:.12?}"), format!("{:.12?}", results()));
    }

    #[test]
    fn what_a_model_wrote_is_text_and_not_markup() {
        let page = render(&results()).unwrap();
        assert!(!page.contains("<script"), "no script of the page's own either");
        assert!(!page.contains("<b>"));
        assert!(page.contains("&lt;script&gt;alert(1)&lt;"));
    }

    #[test]
    fn the_page_needs_nothing_else() {
        let page = render(&results()).unwrap();
        for outside in ["src=", "href=", "url(", "@import", "{{", "{%"] {
            assert!(!page.contains(outside), "{outside}");
        }
        assert_eq!(page.matches("role=\"img\"").count(), 4, "two plots for each arm");
    }

    #[test]
    fn the_page_leads_with_the_headline() {
        let page = render(&results()).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(page.contains("with latent 1234 clamped to 2 × its largest activation"), "{page}");
        assert!(page.contains("67 % of unsafe prompts instead of 0 %"));
        assert!(page.contains("A random latent at the same strength gave 0 % and 2 %."));
        assert!(page.contains("The two intervals do not meet"));
    }

    #[test]
    fn what_cannot_be_shown_is_an_error() {
        let mut missing = results();
        missing.headline.strength = 3.0;
        assert_eq!(render(&missing).unwrap_err().to_string(), "the headline's row is missing");
        let mut infinite = results();
        infinite.rows[0].perplexity_ratio = f64::INFINITY;
        assert!(render(&infinite).unwrap_err().to_string().starts_with("perplexity ratio inf of"));
        let mut unsteered = results();
        unsteered.rows.remove(3);
        assert_eq!(
            render(&unsteered).unwrap_err().to_string(),
            "no unsteered row in the zero-shot arm"
        );
    }

    #[test]
    fn the_table_is_aligned_and_grouped() {
        let expected = [
            "zero-shot            strength    unsafe refused      safe refused        degenerate  perplexity",
            "no steering                 –        0 % [0, 7]        0 % [0, 7]        0 % [0, 4]       1.00×",
            "one latent                 1×     25 % [15, 39]       8 % [3, 20]        0 % [0, 4]       1.20×",
            "one latent                 2×     67 % [53, 78]     23 % [13, 37]        3 % [1, 9]       1.62×",
            "random latent              2×        0 % [0, 7]       2 % [0, 11]        0 % [0, 4]       1.10×",
            "",
            "six-shot             strength    unsafe refused      safe refused        degenerate  perplexity",
            "no steering                 –     83 % [70, 91]     19 % [10, 32]        0 % [0, 4]       1.00×",
            "random direction           8×        0 % [0, 7]        0 % [0, 7]   100 % [96, 100]      2.1e6×",
            "",
        ];
        assert_eq!(table(&results()), expected.join("\n"));
    }

    #[test]
    fn numbers_in_words() {
        assert_eq!(
            [0.5, 1.0, 9.99, 10.0, 1234.0, 2.1e6].map(ratio),
            ["0.50×", "1.00×", "9.99×", "10×", "1234×", "2.1e6×"]
        );
        assert_eq!([0, 999, 1_000, 1_234_567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([42.0, 754.0, 9000.0].map(duration), ["42 s", "13 min", "2.5 h"]);
    }
}
