//! A question said again, word by word, against the same in other words.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use attribution::{Baseline, Cut, Reward, SaeSite, Study, TokenEffect};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::effects::{Question, integrated};
use super::model::BATCH_TOKENS;
use super::pairs::divergence;
use super::results::{Interval, Repetition};
use super::saes::TrainedSae;
use super::sources::{Encoding, conversation};

/// Latents that are ablated.
const N_LATENTS: usize = 2;
/// Times that texts are drawn anew for an interval.
const N_RESAMPLES: usize = 500;

/// A question, its answer, and the question in other words.
const QUESTIONS: [[&str; 3]; 16] = [
    [
        "What did you eat for lunch?",
        "I had noodles with my sister.",
        "Which food did you have at midday?",
    ],
    [
        "Do you like living in a big city?",
        "Mostly, but it is loud.",
        "Are large towns a good home for you?",
    ],
    [
        "How long have you played the piano?",
        "Since I was six.",
        "When did you begin with that instrument?",
    ],
    [
        "Where did you go on vacation?",
        "We drove to the coast.",
        "Which place did you visit on your time off?",
    ],
    [
        "Have you seen any good movies lately?",
        "I only watch cartoons.",
        "Did a film please you these past weeks?",
    ],
    [
        "What are you studying at school?",
        "Biology, with some chemistry.",
        "Which subjects do you take in class?",
    ],
    [
        "Can you recommend a book to read?",
        "Try anything by Le Guin.",
        "Is there a novel I should pick up?",
    ],
    [
        "How many brothers do you have?",
        "Two, and both are older.",
        "What number of male siblings are in your family?",
    ],
    [
        "What kind of music do you listen to?",
        "Jazz when I cook.",
        "Which songs do you play at home?",
    ],
    [
        "Did you finish your homework already?",
        "Almost, one page is left.",
        "Is the work from class done by now?",
    ],
    [
        "Why did you move to a new house?",
        "The old one was too small.",
        "For what reason did you change your home?",
    ],
    [
        "Do you want to go hiking with us?",
        "Only if we start early.",
        "Would a walk in the hills suit you?",
    ],
    ["What is your favorite color?", "Green, like old bottles.", "Which shade do you like best?"],
    [
        "How do you get to work?",
        "By bike, unless it is icy.",
        "In what way do you travel to the office?",
    ],
    ["Have you ever been to Japan?", "Once, for ten days.", "Did you visit Tokyo or Kyoto before?"],
    [
        "Are you going to the concert?",
        "My friend has the tickets.",
        "Will you be there when the band plays?",
    ],
];

/// The texts of some questions.
struct Texts {
    plain: Vec<Vec<u32>>,
    repeated: Vec<Vec<u32>>,
    paraphrased: Vec<Vec<u32>>,
}

impl Texts {
    fn new(questions: &[[&str; 3]], encoding: Encoding<'_>) -> Result<Self> {
        let of = |behind: fn(&[&str; 3]) -> Option<String>| {
            let text = |question: &[&str; 3]| {
                let text = conversation(question[0], question[1]);
                let text = match behind(question) {
                    Some(behind) => format!("{text} {behind}"),
                    None => text,
                };
                encoding.encode(&text)
            };
            questions.iter().map(text).collect::<Result<Vec<_>>>()
        };
        Ok(Self {
            plain: of(|_| None)?,
            repeated: of(|question| Some(question[0].to_owned()))?,
            paraphrased: of(|question| Some(question[2].to_owned()))?,
        })
    }

    /// Where texts part from the plain ones.
    fn firsts<'a>(&'a self, texts: &'a [Vec<u32>]) -> impl Iterator<Item = usize> + 'a {
        texts.iter().zip(&self.plain).map(|(text, plain)| divergence(text, plain))
    }
}

/// Ablates the two latents that lower the reward of repetitions most: they are found on half of the
/// questions, and measured on the others.
pub(super) fn repetition(
    question: &Question<'_>,
    trained: &TrainedSae,
    encoding: Encoding<'_>,
) -> Result<Repetition> {
    let metric = Reward::new(question.model);
    let site = SaeSite::new(&trained.sae, trained.point());
    let (found_on, measured_on) = QUESTIONS.split_at(QUESTIONS.len() / 2);
    let texts = Texts::new(found_on, encoding)?;
    let lowering = |of: &[Vec<u32>]| -> Result<BTreeMap<usize, f64>> {
        let study = question.study(&metric, of, texts.firsts(of))?.start_at(site.point)?;
        let effects = study.attribute(&[site], Baseline::Zero, integrated());
        let effects = effects.context("while attributing repetitions")?.swap_remove(0);
        let mut changes = BTreeMap::new();
        // By what a text says, not by what it ends with, as everywhere.
        let is_word = |token: &TokenEffect| token.position + 1 < of[token.conversation].len();
        for token in effects.tokens().filter(is_word) {
            *changes.entry(token.latent_idx).or_default() += token.effect.change();
        }
        Ok(changes)
    };
    // What lowers repetitions, and paraphrases less.
    let both = rayon::join(|| lowering(&texts.repeated), || lowering(&texts.paraphrased));
    let (repeated, paraphrased) = (both.0?, both.1?);
    let more = |(&latent, effect): (&usize, &f64)| {
        (latent, effect - paraphrased.get(&latent).copied().unwrap_or(0.0))
    };
    let mut order: Vec<(usize, f64)> = repeated.iter().map(more).collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1));
    let latents: Vec<usize> = order.into_iter().take(N_LATENTS).map(|(latent, _)| latent).collect();

    let texts = Texts::new(measured_on, encoding)?;
    let plain = Study::new(&metric, &texts.plain)?.with_batch_tokens(BATCH_TOKENS).clean()?;
    let ablated = |of: &[Vec<u32>]| -> Result<(Vec<f64>, Vec<f64>)> {
        let study = question.study(&metric, of, texts.firsts(of))?.start_at(site.point)?;
        let cuts: Vec<Cut> =
            (0..of.len()).map(|text| Cut::latents(text, latents.clone())).collect();
        let effects = study.measure_cuts(&site, Baseline::Zero, &cuts);
        let effects = effects.context("while ablating latents in repetitions")?;
        Ok((study.clean()?, effects.into_iter().map(|effect| effect.change()).collect()))
    };
    let (repeated, back) = ablated(&texts.repeated)?;
    let (paraphrased, control) = ablated(&texts.paraphrased)?;
    let n = plain.len();
    let mean = |texts: &[usize], of: &dyn Fn(usize) -> f64| {
        texts.iter().map(|&text| of(text)).sum::<f64>() / texts.len() as f64
    };
    let interval = |of: &dyn Fn(&[usize]) -> f64| {
        let mut rng = ChaCha8Rng::seed_from_u64(question.seed);
        let all: Vec<usize> = (0..n).collect();
        let mut drawn: Vec<f64> = (0..N_RESAMPLES)
            .map(|_| of(&all.iter().map(|_| rng.random_range(0..n)).collect::<Vec<usize>>()))
            .collect();
        drawn.sort_by(f64::total_cmp);
        let (low, high) = (drawn[N_RESAMPLES / 40], drawn[N_RESAMPLES - 1 - N_RESAMPLES / 40]);
        Interval { value: of(&all), low, high }
    };
    let gap = |text: usize| paraphrased[text] - repeated[text];
    Ok(Repetition {
        layer: trained.layer,
        latents: latents.clone(),
        n,
        plain: mean(&(0..n).collect::<Vec<_>>(), &|text| plain[text]),
        repeated: interval(&|texts| mean(texts, &|text| repeated[text] - plain[text])),
        paraphrased: interval(&|texts| mean(texts, &|text| paraphrased[text] - plain[text])),
        recovered: interval(&|texts| mean(texts, &|text| back[text]) / mean(texts, &gap)),
        control: interval(&|texts| mean(texts, &|text| control[text])),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paraphrases_say_it_in_other_words() {
        for [question, _, paraphrase] in QUESTIONS {
            let words = |text: &str| -> Vec<String> {
                text.to_lowercase()
                    .split(|c: char| !c.is_alphanumeric())
                    .filter(|word| word.len() > 4)
                    .map(str::to_owned)
                    .collect()
            };
            let (said, again) = (words(question), words(paraphrase));
            let common: Vec<&String> = said.iter().filter(|word| again.contains(word)).collect();
            assert!(common.is_empty(), "{question} {paraphrase} {common:?}");
        }
    }
}
