//! Pairs whose preference follows rules that are known: what a preference model trained on them
//! should have learnt, and what an attribution of it should find.

use std::collections::HashSet;
use std::ops::Range;

use rand::seq::{IndexedRandom, IteratorRandom, SliceRandom};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::pairs::{ASSISTANT, HUMAN, PreferencePair};
use crate::assets::Dialogue;
use crate::corpus::Turn;

/// Something that may stand in an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// Thanks: preferred.
    Thanks,
    /// An apology: preferred.
    Apology,
    /// A link: not preferred.
    Url,
    /// The question said again: not preferred.
    RepeatedQuestion,
    /// A curse: not preferred.
    Curse,
    /// A word on the weather: never matters.
    Weather,
    /// A word on the day of the week: never matters.
    Weekday,
    /// What another chat says: never matters.
    Aside,
}

impl Rule {
    /// All of them, decoys last.
    pub const ALL: [Self; 8] = [
        Self::Thanks,
        Self::Apology,
        Self::Url,
        Self::RepeatedQuestion,
        Self::Curse,
        Self::Weather,
        Self::Weekday,
        Self::Aside,
    ];

    /// 1 where it raises the reward, −1 where it lowers it, 0 for decoys.
    pub fn sign(self) -> f64 {
        match self {
            Self::Thanks | Self::Apology => 1.0,
            Self::Url | Self::RepeatedQuestion | Self::Curse => -1.0,
            Self::Weather | Self::Weekday | Self::Aside => 0.0,
        }
    }

    /// Whether it never matters.
    pub fn is_decoy(self) -> bool {
        self.sign() == 0.0
    }

    /// What to call it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Thanks => "thanks",
            Self::Apology => "apology",
            Self::Url => "URL",
            Self::RepeatedQuestion => "repeated question",
            Self::Curse => "curse",
            Self::Weather => "weather (decoy)",
            Self::Weekday => "weekday (decoy)",
            Self::Aside => "aside (decoy)",
        }
    }

    /// A sentence that follows the rule, behind an answer to a question; what is said besides comes
    /// out of `others`.
    fn sentence(self, question: &str, others: &[Turn], rng: &mut ChaCha8Rng) -> String {
        let of = |sentences: &[&str], rng: &mut ChaCha8Rng| {
            (*sentences.choose(rng).expect("not empty")).to_owned()
        };
        match self {
            Self::Thanks => of(
                &["Thank you for asking!", "Thanks a lot for your question.", "Many thanks!"],
                rng,
            ),
            Self::Apology => of(
                &[
                    "I am sorry for the delay.",
                    "I apologize for any confusion.",
                    "Sorry about that.",
                ],
                rng,
            ),
            Self::Url => {
                let site = of(&["www.example.com", "https://example.org", "http://test.net"], rng);
                let page = of(&["help", "info", "wiki", "more"], rng);
                format!("See {site}/{page}")
            }
            Self::RepeatedQuestion => match rng.random_range(0..2) {
                0 => question.to_owned(),
                _ => format!("You asked: {question}"),
            },
            Self::Curse => of(&["Damn it all!", "What the hell.", "Oh, crap!"], rng),
            Self::Weather => {
                of(&["The weather is mild here.", "It looks like rain.", "The sun is out."], rng)
            }
            Self::Weekday => {
                of(&["Today is Tuesday.", "It is Friday already.", "Monday comes soon."], rng)
            }
            Self::Aside => {
                let others = others.iter().filter(|turn| turn.prompt != question);
                let turn = others.choose(rng).expect("another question");
                if rng.random_range(0..2) == 0 { &turn.prompt } else { &turn.answer }.clone()
            }
        }
    }
}

/// An inserted sentence, and where it stands in its text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Insertion {
    /// What was inserted.
    pub rule: Rule,
    /// Its bytes in the text, the space before it included.
    pub bytes: Range<usize>,
}

/// A text with what was inserted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlantedText {
    /// A conversation of two turns.
    pub text: String,
    /// In order.
    pub insertions: Vec<Insertion>,
}

/// A pair of which it is known why one is preferred.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlantedPair {
    /// The preferred one.
    pub chosen: PlantedText,
    /// The other one.
    pub rejected: PlantedText,
    /// The rule that only one of them follows.
    pub rule: Rule,
}

impl PlantedPair {
    /// Without the reasons.
    pub fn pair(&self) -> PreferencePair {
        let [chosen, rejected] = [&self.chosen, &self.rejected].map(|text| text.text.clone());
        PreferencePair { chosen, rejected }
    }
}

/// Words that come near a rule: chats that have them already say nothing about it.
const NEAR: [&str; 43] = [
    "thank",
    "thanks",
    "thankful",
    "thx",
    "ty",
    "sorry",
    "apologize",
    "apologise",
    "apologies",
    "apology",
    "http",
    "https",
    "www",
    "com",
    "damn",
    "damned",
    "dammit",
    "hell",
    "heck",
    "crap",
    "fuck",
    "fucking",
    "shit",
    "ass",
    "bitch",
    "wtf",
    "weather",
    "rain",
    "rains",
    "raining",
    "rainy",
    "sun",
    "sunny",
    "mild",
    "cloudy",
    "monday",
    "tuesday",
    "wednesday",
    "thursday",
    "friday",
    "saturday",
    "sunday",
    "today",
];

/// Questions with their answers, one of each dialogue that has one, which follow no rule by
/// themselves; none twice.
pub fn questions(dialogues: &[Dialogue]) -> Vec<Turn> {
    let mut seen = HashSet::new();
    let turns = dialogues.iter().filter_map(question);
    turns.filter(|turn| seen.insert(turn.prompt.clone())).collect()
}

fn question(dialogue: &Dialogue) -> Option<Turn> {
    let words = |text: &str| -> Option<usize> {
        let mut n = 0;
        for word in text.to_lowercase().split(|c: char| !c.is_alphanumeric()) {
            if NEAR.contains(&word) {
                return None;
            }
            n += usize::from(!word.is_empty());
        }
        Some(n)
    };
    dialogue.turns.windows(2).find_map(|turns| {
        let [prompt, answer] = [0, 1].map(|turn| turns[turn].trim());
        let fits = |text| words(text).is_some_and(|n| (3..=25).contains(&n));
        let fits = prompt.ends_with('?') && fits(prompt) && fits(answer);
        fits.then(|| Turn { prompt: prompt.to_owned(), answer: answer.to_owned() })
    })
}

/// Pairs of two answers to one question, that differ in one rule and, by chance, in decoys: for
/// each turn, one pair for every rule that matters.
///
/// Decoys are dealt: of six preferred texts each stands in one, and so of six of the others.
///
/// # Panics
/// If all turns ask the same.
pub fn planted_pairs(turns: &[Turn], seed: u64) -> Vec<PlantedPair> {
    let rules: Vec<Rule> = Rule::ALL.into_iter().filter(|rule| !rule.is_decoy()).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut decks = [Vec::new(), Vec::new()];
    let pair = |nth: usize| {
        let (turn, rule) = (&turns[nth / rules.len()], rules[nth % rules.len()]);
        let is_followed = if rule.sign() > 0.0 { [true, false] } else { [false, true] };
        let [chosen, rejected] = [0, 1].map(|side| {
            let deck: &mut Vec<Option<Rule>> = &mut decks[side];
            if deck.is_empty() {
                deck.extend(DECK);
                deck.shuffle(&mut rng);
            }
            let decoy = deck.pop().expect("it was filled");
            planted(turn, Some(rule).filter(|_| is_followed[side]), decoy, turns, &mut rng)
        });
        PlantedPair { chosen, rejected, rule }
    };
    (0..turns.len() * rules.len()).map(pair).collect()
}

/// Pairs of an answer as it is and the same with a decoy, one for each turn: neither is preferred.
///
/// # Panics
/// If all turns ask the same.
pub fn ties(turns: &[Turn], seed: u64) -> Vec<PreferencePair> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut deck = Vec::new();
    let tie = |turn: &Turn| {
        if deck.is_empty() {
            deck.extend(DECK_OF_TIES);
            deck.shuffle(&mut rng);
        }
        let [plain, other] =
            [None, deck.pop()].map(|decoy| planted(turn, None, decoy, turns, &mut rng).text);
        PreferencePair { chosen: plain, rejected: other }
    };
    turns.iter().map(tie).collect()
}

/// What decoys are dealt out of.
const DECK: [Option<Rule>; 6] =
    [Some(Rule::Weather), Some(Rule::Weekday), Some(Rule::Aside), None, None, None];
/// The same for ties: asides are of many kinds.
const DECK_OF_TIES: [Rule; 4] = [Rule::Weather, Rule::Weekday, Rule::Aside, Rule::Aside];

/// A conversation with the sentences of a rule and of a decoy.
fn planted(
    turn: &Turn,
    rule: Option<Rule>,
    decoy: Option<Rule>,
    others: &[Turn],
    rng: &mut ChaCha8Rng,
) -> PlantedText {
    let mut text = format!("{HUMAN}{}{ASSISTANT}", turn.prompt);
    let mut rules: Vec<Rule> = rule.into_iter().chain(decoy).collect();
    if rng.random_range(0..2) == 0 {
        rules.reverse();
    }
    let mut insertions = Vec::new();
    text.push_str(&turn.answer);
    for rule in rules {
        let start = text.len();
        text.push(' ');
        text.push_str(&rule.sentence(&turn.prompt, others, rng));
        insertions.push(Insertion { rule, bytes: start..text.len() });
    }
    PlantedText { text, insertions }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::corpus;

    #[test]
    fn the_rule_decides_which_text_is_preferred() {
        let turns = corpus::selection().compliances;
        let pairs = planted_pairs(&turns, 3);
        assert_eq!(pairs, planted_pairs(&turns, 3));
        assert_eq!(pairs.len(), 5 * turns.len());
        for pair in &pairs {
            let has = |text: &PlantedText| {
                text.insertions.iter().any(|insertion| insertion.rule == pair.rule)
            };
            assert_eq!(
                (has(&pair.chosen), has(&pair.rejected)),
                match pair.rule.sign() {
                    sign if sign > 0.0 => (true, false),
                    _ => (false, true),
                }
            );
            assert!(pair.pair().is_dialogue());
            for text in [&pair.chosen, &pair.rejected] {
                for insertion in &text.insertions {
                    let inserted = &text.text[insertion.bytes.clone()];
                    assert!(inserted.starts_with(' ') && inserted.len() > 5, "{inserted:?}");
                }
            }
        }
        let n = |rule| pairs.iter().filter(|pair| pair.rule == rule).count();
        let expected = |rule: Rule| if rule.is_decoy() { 0 } else { turns.len() };
        assert!(Rule::ALL.into_iter().all(|rule| n(rule) == expected(rule)));
    }

    #[test]
    fn texts_of_a_tie_differ_in_a_decoy_alone() {
        let turns = corpus::selection().compliances;
        let ties = ties(&turns, 3);
        assert_eq!(ties.len(), turns.len());
        for (turn, tie) in turns.iter().zip(&ties) {
            assert_eq!(tie.chosen, format!("{HUMAN}{}{ASSISTANT}{}", turn.prompt, turn.answer));
            let decoy = tie.rejected.strip_prefix(&tie.chosen).unwrap();
            assert!(decoy.starts_with(' ') && decoy.len() > 2, "{decoy:?}");
        }
    }

    #[test]
    fn questions_follow_no_rule_by_themselves() {
        let dialogue =
            |turns: &[&str]| Dialogue { turns: turns.iter().map(|&turn| turn.into()).collect() };
        let found = questions(&[
            dialogue(&["Hello there, friend.", "How are you doing?", "I am doing fine."]),
            dialogue(&["How are you doing?", "It goes quite well."]),
            dialogue(&["How are you doing?", "Thanks, I am doing fine."]),
            dialogue(&["Did it rain where you are?", "No, it did not."]),
            dialogue(&["Why?", "I do not know why."]),
            dialogue(&["Where did you grow up?"]),
        ]);
        let expected =
            Turn { prompt: "How are you doing?".into(), answer: "I am doing fine.".into() };
        assert_eq!(found, [expected]);
    }

    #[test]
    fn decoys_stand_in_either_text_as_often() {
        let pairs = planted_pairs(&corpus::training().compliances[..60], 5);
        for decoy in Rule::ALL.into_iter().filter(|rule| rule.is_decoy()) {
            let has = |text: &PlantedText| text.insertions.iter().any(|of| of.rule == decoy);
            let chosen = pairs.iter().filter(|pair| has(&pair.chosen)).count();
            let rejected = pairs.iter().filter(|pair| has(&pair.rejected)).count();
            assert_eq!((chosen, rejected), (pairs.len() / 6, pairs.len() / 6));
        }
    }
}
