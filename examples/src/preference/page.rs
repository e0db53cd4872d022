//! The page.

use anyhow::Result;
use minijinja::{AutoEscape, Environment, UndefinedBehavior, context};

use super::options::SaeKind;
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
    env.add_filter("signed", |value: f64| format!("{value:+.2}"));
    env.add_filter("number", |value: f64, digits: usize| format!("{value:.digits$}"));
    env.add_template("page.html", include_str!("page.html.jinja"))?;
    let rules: Vec<(Rule, &str)> = Rule::ALL.map(|rule| (rule, rule.label())).to_vec();
    // Within a script, nothing may look like the end of it or the start of a comment.
    let json = serde_json::to_string(results)?.replace('<', "\\u003c");
    let kinds: Vec<&str> = results.saes.iter().map(|sae| sae.kind.label()).collect();
    let kind_labels = [SaeKind::TopK, SaeKind::Gated].map(|kind| (kind, kind.label())).to_vec();
    let json = minijinja::Value::from_safe_string(json);
    let page = context! { results, rules, kinds, kind_labels, json };
    Ok(env.get_template("page.html")?.render(page)?)
}

#[cfg(test)]
mod tests {
    use attribution::Check;
    use steering::{McNemar, Rate};

    use super::super::bradley_terry::Agreement;
    use super::super::results::{
        Estimate, Explained, Head, Human, Insertion, Interval, LatentRow, OnText, PairsUsed,
        Repetition, SaeResults, TextBySae, TextResults, TopText, VerifiedText,
    };
    use super::*;

    const HOSTILE: &str = "</script><script>alert(1)</script><!--";

    fn results() -> Results {
        let check = Check { n: 2, pearson: 0.9, top_k: 2, top_k_recall: 1.0 };
        let estimate = Estimate::of(&[0.9, 0.8]);
        let interval = Interval { value: 0.5, low: 0.4, high: 0.6 };
        let text = || VerifiedText { tokens: vec![HOSTILE.into()], reward: 1.5, from: 0 };
        let latent = LatentRow {
            latent: 7,
            measured: -0.5,
            ig: -0.4,
            together: -0.2,
            gxa: -0.3,
            density: 0.01,
            adds: Some(0.5),
            rule: Some(Rule::Thanks),
            on_texts: vec![OnText { text: 0, effect: -1.0, values: vec![(0, 2.0)] }],
            top: vec![TopText { tokens: vec![HOSTILE.into()], values: vec![2.0] }],
            promoted: vec![HOSTILE.into()],
        };
        let sae = SaeResults {
            layer: 1,
            kind: SaeKind::TopK,
            d_sae: 16,
            l0: 4.0,
            fvu: 0.1,
            fvu_without_outliers: 0.2,
            n_outliers: 1,
            n_tokens: 100,
            ig: check,
            together: check,
            gxa: check,
            ig_by_text: check,
            gxa_by_text: check,
            completeness_residual: 0.01,
            completeness_measured: 1.0,
            latents_share: interval,
            error_share: interval,
            attributed_to_latents: 0.7,
            attributed_to_error: 0.2,
            recovered: vec![(Rule::Thanks, Some(0))],
            decoy_above: Some(false),
            texts: vec![text(), text()],
            latents: vec![latent],
            effects: vec![-0.4, 0.1],
        };
        let rate = Rate::wilson(9, 10);
        let test = McNemar::of([(true, false)]);
        Results {
            model: HOSTILE.into(),
            head: Head::Learnt,
            tuned: None,
            pairs: PairsUsed {
                file: None,
                n_train: 10,
                n_test: 5,
                n_attributed: 5,
                n_verified: 1,
                left_out: None,
            },
            pm_accuracy: rate,
            agreement: Agreement::new(&[1.0, -1.0]),
            by_rule: vec![(Rule::Thanks, rate)],
            planted_recall: Some(rate),
            decoys_above: Some(rate),
            ig_pearson: estimate,
            ig_top20_recall: estimate,
            together_pearson: estimate,
            together_top20_recall: estimate,
            gxa_pearson: estimate,
            gxa_top20_recall: estimate,
            insertion_success: rate,
            control_success: rate,
            insertion_threshold: 0.1,
            explained: vec![Explained { layer: 1, n_latents: 1, share: 0.5, low: 0.4, high: 0.6 }],
            explained_threshold: 0.1,
            saes: vec![sae],
            insertions: vec![Insertion {
                layer: 1,
                phrase: HOSTILE.into(),
                is_control: false,
                before: 0.0,
                after: 1.0,
                ablated: 0.2,
            }],
            repetition: vec![Repetition {
                layer: 1,
                latents: vec![3, 4],
                n: 8,
                plain: 0.0,
                repeated: interval,
                paraphrased: interval,
                recovered: interval,
                control: interval,
            }],
            human: Some(Human {
                n: 10,
                n_folds: 5,
                head: Agreement::new(&[1.0, -1.0]),
                layers: vec![1],
                by_layer: vec![(1, rate)],
                tf_idf: rate,
                shorter: rate,
                against_tf_idf: test,
                against_shorter: test,
            }),
            text: Some(TextResults {
                tokens: vec![HOSTILE.into()],
                reward: 0.3,
                saes: vec![TextBySae {
                    layer: 1,
                    by_token: vec![0.1],
                    error: 0.1,
                    latents: vec![(7, 0, 0.1)],
                }],
            }),
            with_last: false,
            seed: 0,
            seconds: 1.0,
            steps: vec![("Model".into(), 1.0)],
        }
    }

    #[test]
    fn a_token_that_is_markup_stays_a_token() {
        for file in [None, Some(HOSTILE.to_owned())] {
            let mut results = results();
            results.pairs.file = file;
            let page = render(&results).unwrap();
            assert_eq!(page.matches("</script>").count(), 1);
            assert!(!page.contains("<!--") && !page.contains("alert(1)</"));
            assert!(page.contains("90\u{a0}%"));
        }
    }

    #[test]
    fn what_was_not_done_is_not_shown() {
        let page = render(&results()).unwrap();
        let parts =
            ["<h2>Repetition", "<h2>Preferences of people", "id=\"own-text\"", "planted rules"];
        assert!(parts.iter().all(|part| page.contains(part)));
        let mut results = results();
        (results.repetition, results.human, results.text) = (Vec::new(), None, None);
        results.planted_recall = None;
        let page = render(&results).unwrap();
        for part in parts {
            assert!(!page.contains(part), "{part}");
        }
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
