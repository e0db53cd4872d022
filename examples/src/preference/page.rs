//! The page.

use anyhow::Result;
use minijinja::{AutoEscape, Environment, UndefinedBehavior, context};

use super::planted::Rule;
use super::results::Results;

/// The page: one file of HTML that needs no other and no network.
///
/// # Errors
/// If the results cannot be written as JSON.
pub fn render(results: &Results) -> Result<String> {
    let mut env = Environment::new();
    // Tokens are a model's, and may be markup.
    env.set_auto_escape_callback(|_| AutoEscape::Html);
    env.set_undefined_behavior(UndefinedBehavior::Strict);
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.add_filter("percent", |share: f64| format!("{:.0}\u{a0}%", 100.0 * share));
    env.add_filter("number", |value: f64, digits: usize| format!("{value:.digits$}"));
    env.add_template("page.html", include_str!("page.html.jinja"))?;
    let rules: Vec<(Rule, &str)> = Rule::ALL.map(|rule| (rule, rule.label())).to_vec();
    // Within a script, nothing may look like the end of it or the start of a comment.
    let json = serde_json::to_string(results)?.replace('<', "\\u003c");
    let page = context! { results, rules, json => minijinja::Value::from_safe_string(json) };
    Ok(env.get_template("page.html")?.render(page)?)
}

#[cfg(test)]
mod tests {
    use attribution::Check;
    use steering::Rate;

    use super::super::bradley_terry::Agreement;
    use super::super::results::{
        Estimate, Explained, Insertion, LatentRow, OnText, SaeResults, TopText, VerifiedText,
    };
    use super::*;

    const HOSTILE: &str = "</script><script>alert(1)</script><!--";

    fn results() -> Results {
        let check = Check { n: 2, pearson: 0.9, top_k: 2, top_k_recall: 1.0 };
        let estimate = Estimate::of(&[0.9, 0.8]);
        let text = || VerifiedText { tokens: vec![HOSTILE.into()], reward: 1.5, from: 0 };
        let latent = LatentRow {
            latent: 7,
            measured: -0.5,
            ig: -0.4,
            gxa: -0.3,
            density: 0.01,
            rule: Rule::Thanks,
            on_texts: vec![OnText { text: 0, effect: -1.0, values: vec![(0, 2.0)] }],
            top: vec![TopText { tokens: vec![HOSTILE.into()], values: vec![2.0] }],
            promoted: vec![HOSTILE.into()],
        };
        let sae = SaeResults {
            layer: 1,
            kind: "TopK 4".into(),
            d_sae: 16,
            l0: 4.0,
            fvu: 0.1,
            fvu_without_outliers: 0.2,
            ig: check,
            gxa: check,
            completeness_residual: 0.01,
            completeness_measured: 1.0,
            error_share: 0.2,
            recovered: vec![(Rule::Thanks, Some(0))],
            decoy_above: false,
            texts: vec![text(), text()],
            latents: vec![latent],
            effects: vec![-0.4, 0.1],
        };
        let rate = Rate::wilson(9, 10);
        Results {
            model: HOSTILE.into(),
            pm_accuracy: rate,
            agreement: Agreement::new(&[1.0, -1.0]),
            by_rule: vec![(Rule::Thanks, rate)],
            planted_recall: rate,
            ig_pearson: estimate,
            ig_top20_recall: estimate,
            gxa_pearson: estimate,
            gxa_top20_recall: estimate,
            insertion_success: rate,
            control_success: rate,
            insertion_threshold: 0.1,
            explained: vec![Explained { layer: 1, n_latents: 1, share: 0.5, low: 0.4, high: 0.6 }],
            explained_threshold: 0.1,
            saes: vec![sae],
            insertions: vec![Insertion {
                phrase: HOSTILE.into(),
                is_control: false,
                before: 0.0,
                after: 1.0,
                ablated: 0.2,
            }],
            seed: 0,
            seconds: 1.0,
        }
    }

    #[test]
    fn a_token_that_is_markup_stays_a_token() {
        let page = render(&results()).unwrap();
        assert_eq!(page.matches("</script>").count(), 1);
        assert!(!page.contains("<!--") && !page.contains("alert(1)</"));
        assert!(page.contains("90\u{a0}%"));
    }

    #[test]
    fn the_results_have_the_keys_that_others_read() {
        let json = serde_json::to_value(results()).unwrap();
        for key in [
            "pm_accuracy",
            "planted_recall",
            "ig_pearson",
            "ig_top20_recall",
            "gxa_pearson",
            "gxa_top20_recall",
            "insertion_success",
            "control_success",
        ] {
            let value = &json[key];
            assert!(value["low"].is_number() && value["high"].is_number(), "{key}: {value}");
        }
        let explained = &json["explained"][0];
        for key in ["layer", "n_latents", "share", "low", "high"] {
            assert!(explained[key].is_number(), "{key}: {explained}");
        }
    }
}
