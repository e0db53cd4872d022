//! What steering costs, against the definitions.

use goldens::assert_close;
use steering::{Intervention, Part, Region, Steering, TokenQuestion, choice_scores, mean_kl};

use super::*;

fn questions() -> Vec<TokenQuestion> {
    let question = |prompt: &[u32], choices: &[&[u32]]| TokenQuestion {
        prompt: prompt.to_vec(),
        choices: choices.iter().map(|choice| choice.to_vec()).collect(),
    };
    vec![
        question(ROWS[0], &[&[4], &[9, 8, 7], &[100, 2]]),
        question(ROWS[1], &[&[50, 51, 52, 53], &[6]]),
    ]
}

/// Of prompts, of answers, and from a token on that one choice has.
fn regions() -> [Region; 3] {
    let marked = Region { marker: Some(9), ..Region::default() };
    [Region::default().part(Part::Prompt), Region::default().part(Part::Answer), marked]
}

fn steering(region: &Region) -> Steering<'static> {
    let add = Intervention::Add { direction: direction(5) };
    Steering::new([POINT], add, region.clone()).unwrap()
}

/// Logits of a single text, steered.
fn logits(model: &LanguageModel, text: &[u32], n_prompt: usize, region: &Region) -> Vec<f32> {
    let mut steering = steering(region);
    steering.set_prompt_lengths(vec![n_prompt]);
    run(model, &[text], &mut steering).0
}

fn log_prob(logits: &[f32], id: u32) -> f64 {
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
    f64::from(logits[id as usize]) - sum.ln()
}

#[test]
fn choices_have_the_log_probability_of_their_tokens() {
    let model = model();
    let (questions, d_vocab) = (questions(), model.config().d_vocab);
    for region in regions() {
        let expected = questions.iter().flat_map(|question| {
            question.choices.iter().map(|choice| {
                let n = question.prompt.len();
                let text = [question.prompt.as_slice(), choice].concat();
                let logits = logits(&model, &text, n, &region);
                let tokens = choice.iter().zip(logits.chunks(d_vocab).skip(n - 1));
                tokens.map(|(&id, row)| log_prob(row, id)).sum::<f64>() as f32
            })
        });
        let expected: Vec<f32> = expected.collect();
        for batch_tokens in [1, 24, 1000] {
            let scores =
                choice_scores(&model, &questions, batch_tokens, &steering(&region)).unwrap();
            let actual: Vec<f32> =
                scores.iter().flat_map(|scores| &scores.log_probs).map(|&p| p as f32).collect();
            assert_close("log-probabilities", &actual, &expected, 1e-4);
            assert_eq!(scores[1].n_tokens, [4, 1]);
        }
    }
}

#[test]
fn divergence_is_the_mean_over_prompts() {
    let model = model();
    let prompts = Region::default().part(Part::Prompt);
    let none = mean_kl(&model, &ROWS, 100, &mut ()).unwrap();
    assert!(none.abs() < 1e-9, "{none}");
    let divergence = |row: &[u32]| {
        let last = |logits: Vec<f32>| logits[logits.len() - model.config().d_vocab..].to_vec();
        let plain = last(run(&model, &[row], &mut ()).0);
        let steered = last(logits(&model, row, row.len(), &prompts));
        let terms = (0..plain.len() as u32).map(|id| {
            let p = log_prob(&plain, id);
            p.exp() * (p - log_prob(&steered, id))
        });
        terms.sum::<f64>()
    };
    let expected = ROWS.iter().map(|row| divergence(row)).sum::<f64>() / 3.0;
    assert!(expected > 1e-3, "{expected}");
    for batch_tokens in [1, 100] {
        let actual = mean_kl(&model, &ROWS, batch_tokens, &mut steering(&prompts)).unwrap();
        assert!((actual - expected).abs() < 1e-5, "{actual}, expected {expected}");
    }
}
