//! The refusal experiment as a page and as a table for the terminal.

use std::fmt::Write as _;

use anyhow::{Context as _, Result, ensure};
use minijinja::{AutoEscape, Environment, UndefinedBehavior, context, value::ViaDeserialize};
use serde::Serialize;
use steering::Rate;

use crate::results::{Arm, Condition, Example, Method, Results, Row, Treatment};

mod front;
mod paper;
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
    let conditional = match results.conditional {
        None => None,
        Some(it) => Some(find(results, it).context("the row under the condition is missing")?),
    };
    let arms = measured_arms(results)
        .map(|arm| {
            let rows: Vec<&Row> = rows_of(results, arm).collect();
            Ok(context! {
                arm,
                trade_off => plot::trade_off(&rows)?,
                capability => plot::capability(&rows)?,
                cost => plot::cost(&rows)?,
                layout => paper::layout(&rows),
                rows,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let has = |method: Method| results.rows.iter().any(|row| row.treatment.method == method);
    let legend = Method::ALL
        .into_iter()
        .filter(|&method| has(method) && !method.is_control())
        .map(|method| Ok(context! { method, swatch => plot::method_swatch(method)? }))
        .collect::<Result<Vec<_>>>()?;
    let conditions = Condition::ALL
        .into_iter()
        .filter(|&it| results.rows.iter().any(|row| row.treatment.condition == it))
        .map(|condition| Ok(context! { condition, swatch => plot::condition_swatch(condition)? }))
        .collect::<Result<Vec<_>>>()?;
    let base = unsteered(results, results.headline.arm)?;
    let any = |measured: &dyn Fn(&Row) -> bool| results.rows.iter().any(measured);
    let page = context! {
        results, arms, legend, conditions, headline, conditional, base,
        has_controls => results.rows.iter().any(|row| row.treatment.method.is_control()),
        control_swatch => plot::method_swatch(Method::UnrelatedLatent)?,
        unrelated => control(results, Method::UnrelatedLatent),
        random => control(results, Method::RandomLatent),
        points_lost => PointsLost::of(results, base, headline),
        example_groups => ExampleGroup::of(&results.examples),
        led => results.rows.iter().filter(|row| row.multi_turn.is_some()).collect::<Vec<_>>(),
        topics => topics(results),
        has_dialogues => any(&|row| dialogues(row).is_some()),
        // Intervals that do not meet: the model tells the two kinds of prompt apart.
        discerning => headline.unsafe_rate.low > headline.safe_rate.high,
        has_look_alikes => any(&|row| row.look_alike_rate.is_some()),
        has_ordinary => any(&|row| row.ordinary_rate.is_some()),
        has_moralised => any(&|row| row.moralised_rate.is_some()),
        has_log_odds => any(&|row| row.refusal_log_odds.is_some()),
        has_kl => any(&|row| row.mean_kl.is_some()),
        has_tests => any(&|row| row.unsafe_against_base.is_some()),
    };
    Ok(environment()?.get_template("report.html")?.render(page)?)
}

/// The topics of the conversations, in the order in which they were met.
fn topics(results: &Results) -> Vec<&str> {
    let mut topics: Vec<&str> = Vec::new();
    for it in results.rows.iter().filter_map(|row| row.multi_turn.as_ref()) {
        for topic in it.topics.iter().map(|it| it.topic.as_str()) {
            if !topics.contains(&topic) {
                topics.push(topic);
            }
        }
    }
    topics
}

fn dialogues(row: &Row) -> Option<Rate> {
    row.multi_turn.as_ref()?.dialogues_refused
}

/// What is no longer answered right of the multiple-choice questions, in points: with the headline's
/// latents, and with a latent that has nothing to do with refusing.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct PointsLost {
    headline: f64,
    unrelated: f64,
}

impl PointsLost {
    fn of(results: &Results, base: &Row, headline: &Row) -> Option<Self> {
        let accuracy = |row: &Row| row.capability.as_ref().and_then(plot::mean_accuracy);
        let base = accuracy(base)?;
        let lost = |row: &Row| Some(100.0 * (base - accuracy(row)?));
        let unrelated = lost(control(results, Method::UnrelatedLatent)?)?;
        Some(Self { headline: lost(headline)?, unrelated })
    }
}

/// The answers to one prompt: without steering, and with each that was kept.
#[derive(Serialize)]
struct ExampleGroup<'a> {
    first: &'a Example,
    after: Vec<&'a Example>,
}

impl<'a> ExampleGroup<'a> {
    fn of(examples: &'a [Example]) -> Vec<Self> {
        let mut groups: Vec<Self> = Vec::new();
        for example in examples {
            let is_alike = |group: &&mut Self| {
                let Self { first, .. } = group;
                first.prompt == example.prompt && first.treatment.arm == example.treatment.arm
            };
            match groups.iter_mut().find(is_alike) {
                Some(group) => group.after.push(example),
                None => groups.push(Self { first: example, after: vec![example] }),
            }
        }
        groups
    }
}

/// The rows as aligned text, a block for each arm.
#[must_use]
pub fn table(results: &Results) -> String {
    let mut text = String::new();
    let is_split = results.rows.iter().any(|row| row.ordinary_rate.is_some());
    let or_not = |rate: Option<Rate>| rate.map_or("–".to_owned(), |rate| rate.to_string());
    for arm in measured_arms(results) {
        let (safe, more) =
            if is_split { ("ordinary", "look-alikes") } else { ("safe refused", "") };
        let _ = write!(text, "{:<28}{:>9}  {:>16}", arm.label(), "strength", "unsafe refused");
        let _ = write!(text, "  {safe:>16}");
        if is_split {
            let _ = write!(text, "  {more:>16}");
        }
        let _ = writeln!(text, "  {:>16}  {:>10}", "degenerate", "perplexity");
        for row in rows_of(results, arm) {
            let Treatment { method, strength, condition, .. } = row.treatment;
            let strength =
                if method == Method::Base { "–".into() } else { format!("{strength}×") };
            let name = match condition {
                Condition::Always => method.label().to_owned(),
                Condition::Probe => format!("{}, if unsafe", method.label()),
            };
            let _ = write!(text, "{name:<28}{strength:>9}  {:>16}", row.unsafe_rate);
            let _ = match is_split {
                true => write!(
                    text,
                    "  {:>16}  {:>16}",
                    or_not(row.ordinary_rate),
                    or_not(row.look_alike_rate)
                ),
                false => write!(text, "  {:>16}", row.safe_rate),
            };
            let _ = writeln!(
                text,
                "  {:>16}  {:>10}",
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
    env.add_filter("condition", |it: ViaDeserialize<Condition>| it.label());
    env.add_filter("plain", |number: f64| number.to_string());
    env.add_filter("points", |number: f64| format!("{number:.1}"));
    env.add_filter("p_value", p_value);
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
        let condition = |it| Condition::ALL.iter().position(|other| *other == it);
        order(a.method)
            .cmp(&order(b.method))
            .then(condition(a.condition).cmp(&condition(b.condition)))
            .then(a.strength.total_cmp(&b.strength))
    });
    rows.into_iter()
}

fn find(results: &Results, treatment: Treatment) -> Option<&Row> {
    results.rows.iter().find(|row| row.treatment == treatment)
}

/// A control beside the headline: at its strength, or the nearest that there is.
fn control(results: &Results, method: Method) -> Option<&Row> {
    let Treatment { arm, strength, condition, .. } = results.headline;
    let is_beside = |row: &&Row| {
        let it = row.treatment;
        (it.arm, it.method, it.condition) == (arm, method, condition)
    };
    let distance = |row: &&Row| (row.treatment.strength - strength).abs();
    let beside = results.rows.iter().filter(is_beside);
    beside.min_by(|a, b| distance(a).total_cmp(&distance(b)))
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

/// A p-value, to the digits that anybody reads.
fn p_value(p: f64) -> String {
    match p {
        ..0.001 => "< 0.001".into(),
        0.001..0.1 => format!("{p:.3}"),
        _ => format!("{p:.2}"),
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
    use steering::{McNemar, Outcome};

    use super::*;
    use crate::results::{
        Arithmetic, Candidate, Capability, MultiTurn, MultipleChoice, PromptKind, SaeSummary,
        Settings, SteeringLatent, Topic,
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
            perplexity_interval: None,
            safe_against_base: None,
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
                steps: vec![("Generating answers".into(), 700.0)],
                n_reused: 12,
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
            "zero-shot                    strength    unsafe refused      safe refused        degenerate  perplexity",
            "no steering                         –        0 % [0, 7]        0 % [0, 7]        0 % [0, 4]       1.00×",
            "one latent                         1×     25 % [15, 39]       8 % [3, 20]        0 % [0, 4]       1.20×",
            "one latent                         2×     67 % [53, 78]     23 % [13, 37]        3 % [1, 9]       1.62×",
            "random latent                      2×        0 % [0, 7]       2 % [0, 11]        0 % [0, 4]       1.10×",
            "",
            "six-shot                     strength    unsafe refused      safe refused        degenerate  perplexity",
            "no steering                         –     83 % [70, 91]     19 % [10, 32]        0 % [0, 4]       1.00×",
            "random direction                   8×        0 % [0, 7]        0 % [0, 7]   100 % [96, 100]      2.1e6×",
            "",
        ];
        assert_eq!(table(&results()), expected.join("\n"));
    }

    /// A row of everything, under the condition, beside an unrelated latent.
    fn full_results() -> Results {
        let mut results = results();
        let capability = |n_right| Capability {
            multiple_choice: vec![MultipleChoice {
                set: "MMLU".into(),
                accuracy: Rate::wilson(n_right, 100),
                probability: 0.3,
                against_base: None,
            }],
            arithmetic: Some(Arithmetic { set: "GSM8K".into(), correct: Rate::wilson(2, 50) }),
            perplexity: 20.0,
        };
        results.rows[3].capability = Some(capability(30));
        results.rows[1].capability = Some(capability(24));
        let mut unrelated = row(Arm::ZeroShot, Method::UnrelatedLatent, 2.5, [0, 0, 1], 1.5);
        unrelated.capability = Some(capability(25));
        let mut gated = results.rows[1].clone();
        gated.treatment.condition = Condition::Probe;
        gated.look_alike_rate = Some(Rate::wilson(4, 48));
        gated.ordinary_rate = Some(Rate::wilson(0, 48));
        gated.capability = Some(capability(30));
        gated.unsafe_against_base = Some(McNemar::of([(false, true); 20]));
        gated.multi_turn = Some(MultiTurn {
            attack_success: Rate::wilson(3, 15),
            topics: vec![Topic { topic: "fraud".into(), attack_success: Rate::wilson(1, 3) }],
            dialogues_refused: Some(Rate::wilson(9, 20)),
        });
        let mut example = results.examples[0].clone();
        example.treatment.condition = Condition::Probe;
        results.conditional = Some(gated.treatment);
        results.examples.push(example);
        results.rows.extend([unrelated, gated]);
        results
    }

    #[test]
    fn everything_measured_is_shown() {
        let page = render(&full_results()).unwrap();
        let words = page.split_whitespace().collect::<Vec<_>>().join(" ");
        for shown in [
            "In the paper's layout",
            "chosen latents cost 6.0 points, the unrelated one 5.0",
            "<strong>8 % of those that only look unsafe",
            "where the probe says that the request is unsafe",
            "<th>MMLU",
            "<th>fraud</th>",
            "&lt; 0.001",
            "24 % <small>-6.0</small>",
        ] {
            assert!(words.contains(shown), "{shown} is not on the page");
        }
        // Three plots where capabilities were measured, and one group of answers to the prompt.
        assert_eq!(page.matches("role=\"img\"").count(), 5);
        assert_eq!(page.matches("<article").count(), 1);
        let table = table(&full_results());
        assert!(table.contains("one latent, if unsafe "), "{table}");
        assert!(table.contains("look-alikes"), "{table}");
        let mut missing = full_results();
        missing.rows.pop();
        let error = render(&missing).unwrap_err().to_string();
        assert_eq!(error, "the row under the condition is missing");
    }

    #[test]
    fn numbers_in_words() {
        assert_eq!(
            [0.5, 1.0, 9.99, 10.0, 1234.0, 2.1e6].map(ratio),
            ["0.50×", "1.00×", "9.99×", "10×", "1234×", "2.1e6×"]
        );
        assert_eq!([0.0, 0.0042, 0.5].map(p_value), ["< 0.001", "0.004", "0.50"]);
        assert_eq!([0, 999, 1_000, 1_234_567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([42.0, 754.0, 9000.0].map(duration), ["42 s", "13 min", "2.5 h"]);
    }
}
