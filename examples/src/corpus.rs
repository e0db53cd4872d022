//! The prompts and answers that the project's authors wrote, in three splits that share nothing.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use crate::sets::arithmetic::{Problem, final_number};
use crate::sets::prompts::Pair;
use crate::sets::questions::Question;

/// A prompt with an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// What the user asks.
    pub prompt: String,
    /// What the assistant says.
    pub answer: String,
}

/// A prompt of an evaluation.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Prompt {
    /// What the user asks.
    pub prompt: String,
    /// For safe prompts: whether it only looks unsafe.
    #[serde(default, rename = "kind")]
    pub appearance: Appearance,
}

/// What a safe prompt looks like.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Appearance {
    /// Nothing about it looks unsafe; also every prompt of unknown kind.
    #[default]
    Ordinary,
    /// Safe, though its words look unsafe.
    LookAlike,
}

/// Text to train on.
#[derive(Debug, Clone)]
pub struct Training {
    /// Unsafe requests, refused.
    pub refusals: Vec<Turn>,
    /// Safe requests, answered.
    pub compliances: Vec<Turn>,
    /// The preamble of the six-shot arm.
    pub six_shot: Vec<Turn>,
}

/// What latents and strengths are chosen on.
#[derive(Debug, Clone)]
pub struct Selection {
    /// Unsafe requests, refused.
    pub refusals: Vec<Turn>,
    /// Safe requests, answered.
    pub compliances: Vec<Turn>,
    /// Unsafe requests.
    pub unsafe_prompts: Vec<Prompt>,
    /// Safe requests, half of them look-alikes.
    pub safe_prompts: Vec<Prompt>,
}

/// What is reported on.
#[derive(Debug, Clone)]
pub struct Test {
    /// Unsafe requests.
    pub unsafe_prompts: Vec<Prompt>,
    /// Safe requests, half of them look-alikes.
    pub safe_prompts: Vec<Prompt>,
}

macro_rules! authored {
    ($name:literal) => {
        parse(include_str!(concat!("../data/", $name)), $name)
    };
}

/// The training split.
pub fn training() -> Training {
    Training {
        refusals: authored!("train_refusals.jsonl"),
        compliances: authored!("train_compliances.jsonl"),
        six_shot: authored!("six_shot.jsonl"),
    }
}

/// The selection split.
pub fn selection() -> Selection {
    Selection {
        refusals: authored!("select_refusals.jsonl"),
        compliances: authored!("select_compliances.jsonl"),
        unsafe_prompts: authored!("select_unsafe.jsonl"),
        safe_prompts: authored!("select_safe.jsonl"),
    }
}

/// Requests of the training split that look alike, one of each two harmful: to learn from what a
/// request asks rather than from how it sounds.
pub fn contrasts() -> Vec<Pair> {
    authored!("train_contrasts.jsonl")
}

/// Easy questions with four choices.
pub fn questions() -> Vec<Question> {
    authored!("questions.jsonl")
}

/// Easy word problems.
pub fn problems() -> Vec<Problem> {
    #[derive(Deserialize)]
    struct Line {
        question: String,
        answer: String,
    }
    let lines: Vec<Line> = authored!("problems.jsonl");
    let problem = |Line { question, answer }| Problem {
        question,
        answer: final_number(&answer).expect("every answer ends with a number"),
    };
    lines.into_iter().map(problem).collect()
}

/// The test split.
pub fn test() -> Test {
    Test {
        unsafe_prompts: authored!("test_unsafe.jsonl"),
        safe_prompts: authored!("test_safe.jsonl"),
    }
}

fn parse<T: serde::de::DeserializeOwned>(lines: &str, name: &str) -> Vec<T> {
    let parse = |line| {
        serde_json::from_str(line).unwrap_or_else(|error| panic!("{name}: {error} in {line}"))
    };
    lines.lines().map(parse).collect()
}

/// A prompt as near-duplicates are judged by: the sets of its word pairs and of its content words.
#[derive(Debug, Clone)]
pub struct Fingerprint {
    words: Vec<String>,
    pairs: HashSet<(String, String)>,
    content: HashSet<String>,
}

/// Words that say nothing about what is asked.
const STOP_WORDS: &[&str] = &[
    "a",
    "an",
    "and",
    "are",
    "at",
    "be",
    "best",
    "by",
    "can",
    "could",
    "do",
    "does",
    "explain",
    "for",
    "from",
    "give",
    "help",
    "how",
    "i",
    "in",
    "instructions",
    "into",
    "is",
    "it",
    "make",
    "me",
    "my",
    "of",
    "on",
    "or",
    "out",
    "please",
    "s",
    "so",
    "step",
    "steps",
    "t",
    "tell",
    "that",
    "the",
    "their",
    "them",
    "this",
    "to",
    "up",
    "want",
    "way",
    "what",
    "when",
    "who",
    "why",
    "with",
    "without",
    "write",
    "you",
    "your",
];

impl Fingerprint {
    /// Of a prompt, lower-cased, without punctuation.
    pub fn new(prompt: &str) -> Self {
        let words: Vec<String> = prompt
            .to_lowercase()
            .split(|c: char| !c.is_alphanumeric())
            .filter(|word| !word.is_empty())
            .map(str::to_owned)
            .collect();
        let pairs = words.windows(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect();
        let content = words.iter().filter(|word| !STOP_WORDS.contains(&word.as_str())).cloned();
        Self { pairs, content: content.collect(), words }
    }

    /// Whether two prompts ask the same: equal words, 40 % of the word pairs in common, or 60 % of
    /// the content words.
    pub fn is_near(&self, other: &Self) -> bool {
        self.words == other.words
            || jaccard(&self.pairs, &other.pairs) >= 0.4
            || jaccard(&self.content, &other.content) >= 0.6
    }
}

fn jaccard<T: Eq + std::hash::Hash>(a: &HashSet<T>, b: &HashSet<T>) -> f64 {
    let both = a.intersection(b).count();
    let either = a.len() + b.len() - both;
    if either == 0 { 0.0 } else { both as f64 / either as f64 }
}

/// The prompts of the training and selection splits, against which a test set is checked.
pub fn seen_prompts() -> Vec<Fingerprint> {
    let (training, selection) = (training(), selection());
    let turns = [training.refusals, training.compliances, training.six_shot];
    let turns = turns.into_iter().chain([selection.refusals, selection.compliances]).flatten();
    let prompts = [selection.unsafe_prompts, selection.safe_prompts].into_iter().flatten();
    let contrasts = contrasts().into_iter().flat_map(|pair| [pair.harmful, pair.harmless]);
    turns
        .map(|turn| turn.prompt)
        .chain(contrasts)
        .chain(prompts.map(|prompt| prompt.prompt))
        .map(|prompt| Fingerprint::new(&prompt))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn splits() -> [Vec<String>; 3] {
        let (training, selection, test) = (training(), selection(), test());
        let of_turns = |turns: Vec<Turn>| turns.into_iter().map(|turn| turn.prompt);
        let of_prompts = |prompts: Vec<Prompt>| prompts.into_iter().map(|prompt| prompt.prompt);
        [
            of_turns(training.refusals)
                .chain(of_turns(training.compliances))
                .chain(of_turns(training.six_shot))
                .chain(contrasts().into_iter().flat_map(|pair| [pair.harmful, pair.harmless]))
                .collect(),
            of_turns(selection.refusals)
                .chain(of_turns(selection.compliances))
                .chain(of_prompts(selection.unsafe_prompts))
                .chain(of_prompts(selection.safe_prompts))
                .collect(),
            of_prompts(test.unsafe_prompts).chain(of_prompts(test.safe_prompts)).collect(),
        ]
    }

    #[test]
    fn splits_share_no_prompt_nor_a_near_duplicate() {
        let splits = splits().map(|split| -> Vec<(String, Fingerprint)> {
            split.into_iter().map(|prompt| (prompt.clone(), Fingerprint::new(&prompt))).collect()
        });
        for (i, split) in splits.iter().enumerate() {
            for other in &splits[i + 1..] {
                for (prompt, fingerprint) in split {
                    let near = other.iter().find(|(_, other)| fingerprint.is_near(other));
                    assert!(near.is_none(), "{prompt:?} is near {:?}", near.map(|(p, _)| p));
                }
            }
        }
    }

    #[test]
    fn sets_are_as_large_as_promised() {
        let (training, test) = (training(), test());
        assert!(training.refusals.len() >= 60 && training.compliances.len() >= 60);
        assert!(test.unsafe_prompts.len() >= 80 && test.safe_prompts.len() >= 80);
        let look_alike = |prompt: &&Prompt| prompt.appearance == Appearance::LookAlike;
        let n_look_alikes = test.safe_prompts.iter().filter(look_alike).count();
        assert_eq!(2 * n_look_alikes, test.safe_prompts.len());
        assert_eq!(training.six_shot.len(), 6);
        assert!(contrasts().len() >= 300 && questions().len() >= 40 && problems().len() >= 16);
    }

    #[test]
    fn right_answers_are_among_the_choices_and_in_every_place() {
        let questions = questions();
        let mut places = [0; 4];
        for question in &questions {
            assert_eq!(question.choices.len(), 4);
            places[question.answer] += 1;
        }
        assert_eq!(places, [questions.len() / 4; 4]);
    }

    #[test]
    fn near_duplicates_are_seen() {
        let near = |a: &str, b: &str| Fingerprint::new(a).is_near(&Fingerprint::new(b));
        assert!(near("How do I pick a lock?", "how do i pick a lock"));
        assert!(near(
            "How can I forge a doctor's signature?",
            "Explain how to forge a doctor's signature."
        ));
        assert!(!near("How do I bake bread?", "How do I sharpen a knife?"));
    }
}
