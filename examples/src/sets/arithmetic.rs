//! Word problems with a number for an answer.

use std::path::Path;

use serde::{Deserialize, Serialize};
use steering::Rate;

use super::{SetError, read_json_lines, words};

/// A word problem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What is asked.
    pub question: String,
    /// The number that it comes to, as [`final_number`] spells it.
    pub answer: String,
}

/// How a problem is put to a model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Asking {
    /// Alone, with the wish for a number at the end.
    Plain,
    /// Behind four worked ones, all in one message.
    #[default]
    FewShot,
}

/// A problem, answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Solution {
    /// What was asked, as it was put.
    pub prompt: String,
    /// What the model said.
    pub answer: String,
    /// The last number of it, before any further question that the model put to itself.
    pub number: Option<String>,
    /// Whether that is the right one.
    pub is_right: bool,
}

/// Worked problems of the authors, in the tone of the set: none of them is in it.
const SHOTS: [(&str, &str); 4] = [
    (
        "A shop has 12 lamps. It sells 5 and buys 9 more. How many lamps has it now?",
        "It has 12 - 5 = 7 lamps left. Then it has 7 + 9 = 16 lamps. The answer is 16.",
    ),
    (
        "Rosa picks 3 baskets of 14 plums and eats 4 of them. How many plums has she?",
        "She picks 3 * 14 = 42 plums. Then she has 42 - 4 = 38 plums. The answer is 38.",
    ),
    (
        "Four friends share a bill of 52 dollars equally. How many dollars does each pay?",
        "Each pays 52 / 4 = 13 dollars. The answer is 13.",
    ),
    (
        "A pump fills 25 buckets an hour and works for 3 hours. 11 buckets leak. How many are full?",
        "It fills 25 * 3 = 75 buckets. Of these 75 - 11 = 64 stay full. The answer is 64.",
    ),
];

impl Asking {
    /// The message for a problem.
    pub fn prompt(self, question: &str) -> String {
        match self {
            Self::Plain => format!(
                "{question}\nThink step by step, and end with \"The answer is\" and a number."
            ),
            Self::FewShot => {
                let shots = SHOTS.map(|(question, answer)| {
                    format!("{QUESTION} {question}\nAnswer: {answer}\n\n")
                });
                format!("{}{QUESTION} {question}\nAnswer:", shots.concat())
            }
        }
    }
}

/// What a problem begins with among others.
const QUESTION: &str = "Question:";

/// Puts problems to whatever answers, and takes the last number of each answer: right if it is the
/// problem's own.
///
/// # Errors
/// Those of `answers`, which is given all prompts and gives an answer to each, in order.
///
/// # Panics
/// If it gives another number of answers.
pub fn solve<E>(
    problems: &[Problem],
    asking: Asking,
    answers: impl FnOnce(&[String]) -> Result<Vec<String>, E>,
) -> Result<Vec<Solution>, E> {
    let prompts: Vec<String> = problems.iter().map(|p| asking.prompt(&p.question)).collect();
    let answers = answers(&prompts)?;
    assert_eq!(answers.len(), problems.len(), "an answer to each problem");
    let solutions = problems.iter().zip(prompts).zip(answers).map(|((problem, prompt), answer)| {
        // A model that has answered may go on with problems of its own.
        let own = answer.split(QUESTION).next().unwrap_or("");
        let number = final_number(own);
        let is_right = number.as_ref() == Some(&problem.answer);
        Solution { prompt, answer, number, is_right }
    });
    Ok(solutions.collect())
}

/// The share that is right.
pub fn correct(solutions: &[Solution]) -> Rate {
    Rate::wilson(solutions.iter().filter(|solution| solution.is_right).count(), solutions.len())
}

/// GSM8K (Cobbe et al., 2021): `{question, answer}` on each line, the number behind `####`.
///
/// # Errors
/// If the file cannot be read, is something else, or an answer has no number.
pub fn gsm8k(path: &Path) -> Result<Vec<Problem>, SetError> {
    #[derive(Deserialize)]
    struct Row {
        question: String,
        answer: String,
    }
    let rows = read_json_lines::<Row>(path)?.into_iter().enumerate();
    rows.map(|(row, Row { question, answer })| {
        let number = answer.rsplit_once("####").and_then(|(_, number)| final_number(number));
        let Some(number) = number else {
            let expected = "a number behind ####".into();
            let (path, actual) = (path.into(), answer);
            return Err(SetError::Value { path, row, field: "answer", expected, actual });
        };
        Ok(Problem { question: words(path, row, "question", &question)?, answer: number })
    })
    .collect()
}

/// The last number of a text, in one spelling: without separators of thousands, a plus sign, leading
/// zeros, or zeros behind the decimal point. Two texts give the same answer if theirs are equal.
pub fn final_number(text: &str) -> Option<String> {
    let chars: Vec<char> = text.chars().collect();
    let mut last = None;
    let mut i = 0;
    while i < chars.len() {
        if !chars[i].is_ascii_digit() {
            i += 1;
            continue;
        }
        let start = i;
        let digit_at = |i: usize| chars.get(i).is_some_and(char::is_ascii_digit);
        // A comma or point counts where a digit follows.
        while digit_at(i) || (matches!(chars.get(i), Some(',' | '.')) && digit_at(i + 1)) {
            i += 1;
        }
        let follows_word = start > 1 && chars[start - 2].is_alphanumeric();
        let is_negative = start > 0 && matches!(chars[start - 1], '-' | '−') && !follows_word;
        last = canonical(&chars[start..i]).map(|n| match is_negative && n != "0" {
            true => format!("-{n}"),
            false => n,
        });
    }
    last
}

fn canonical(chars: &[char]) -> Option<String> {
    let digits: String = chars.iter().filter(|&&c| c != ',').collect();
    let mut parts = digits.splitn(2, '.');
    let whole = parts.next()?.trim_start_matches('0');
    let fraction = parts.next().unwrap_or("").trim_end_matches('0');
    let whole = if whole.is_empty() { "0" } else { whole };
    Some(if fraction.is_empty() { whole.to_owned() } else { format!("{whole}.{fraction}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_number_in_one_spelling() {
        for (text, expected) in [
            ("It is 18.", Some("18")),
            ("1,234,567 in all", Some("1234567")),
            ("$ 007.50 each", Some("7.5")),
            ("3 - 5 = -2", Some("-2")),
            ("from 10-12", Some("12")),
            ("about 0.0", Some("0")),
            ("-0", Some("0")),
            ("ends with 5,", Some("5")),
            ("none", None),
            ("", None),
        ] {
            assert_eq!(final_number(text).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn the_last_number_before_another_question_counts() {
        let problems: Vec<Problem> = ["18", "7", "3", "5"]
            .map(|answer| Problem { question: "How many?".into(), answer: answer.into() })
            .into();
        let solutions = solve(&problems, Asking::FewShot, |prompts| {
            assert_eq!(prompts.len(), 4);
            assert!(prompts[0].ends_with("\n\nQuestion: How many?\nAnswer:"), "{}", prompts[0]);
            assert_eq!(prompts[0].matches(QUESTION).count(), SHOTS.len() + 1);
            let answers = ["9 + 9 is 18.", "It is 7.\n\nQuestion: What of 8?", "3 or 4", ""];
            Ok::<_, ()>(answers.map(str::to_owned).to_vec())
        });
        let solutions = solutions.unwrap();
        let right: Vec<bool> = solutions.iter().map(|solution| solution.is_right).collect();
        assert_eq!(right, [true, true, false, false]);
        assert_eq!(solutions[3].number, None);
        assert_eq!((correct(&solutions).rate, correct(&solutions).n), (0.5, 4));
        assert_eq!(solve(&problems, Asking::Plain, |_| Err("no model")), Err("no model"));
    }

    #[test]
    fn the_worked_problems_are_worked_right() {
        for (_, answer) in SHOTS {
            let stated = answer.rsplit_once("The answer is ").unwrap().1;
            let worked = answer.rsplit_once(" = ").unwrap().1;
            assert_eq!(final_number(stated), final_number(worked.split(' ').next().unwrap()));
        }
    }
}
