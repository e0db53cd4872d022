//! Word problems with a number for an answer.

use std::path::Path;

use serde::Deserialize;

use super::{SetError, read_json_lines, words};

/// A word problem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What is asked.
    pub question: String,
    /// The number that it comes to, as [`final_number`] spells it.
    pub answer: String,
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
}
