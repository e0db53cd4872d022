//! Multiple choice.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{SetError, not_empty, read_csv, read_json_lines, words};

/// A question with one right answer.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Question {
    /// What is asked.
    pub question: String,
    /// What there is to choose from, two at least.
    pub choices: Vec<String>,
    /// Which of them is right.
    pub answer: usize,
}

/// MMLU (Hendrycks et al., 2021): columns `question`, `choice0` to `choice3` and `answer`, from 0.
/// Of a folder, all its tables, in the order of their names.
///
/// # Errors
/// If a file cannot be read, is another table, or has an answer out of range.
pub fn mmlu(path: &Path) -> Result<Vec<Question>, SetError> {
    #[derive(Deserialize)]
    struct Row {
        question: String,
        choice0: String,
        choice1: String,
        choice2: String,
        choice3: String,
        answer: usize,
    }
    let mut questions = Vec::new();
    for path in tables(path)? {
        for (row, fields) in read_csv::<Row>(&path)?.into_iter().enumerate() {
            let Row { question, choice0, choice1, choice2, choice3, answer } = fields;
            let choices = vec![choice0, choice1, choice2, choice3];
            if answer >= choices.len() {
                let (expected, actual) = ("0 to 3".into(), answer.to_string());
                return Err(SetError::Value { path, row, field: "answer", expected, actual });
            }
            let question = words(&path, row, "question", &question)?;
            questions.push(Question { question, choices, answer });
        }
    }
    Ok(questions)
}

fn tables(path: &Path) -> Result<Vec<PathBuf>, SetError> {
    if !path.is_dir() {
        return Ok(vec![path.into()]);
    }
    let io = |source| SetError::Io { path: path.into(), source };
    let entries: Result<Vec<_>, _> = fs::read_dir(path).map_err(io)?.collect();
    let paths = entries.map_err(io)?.into_iter().map(|entry| entry.path());
    let mut paths: Vec<_> =
        paths.filter(|path| path.extension().is_some_and(|e| e == "csv")).collect();
    paths.sort();
    not_empty(path, paths)
}

/// TruthfulQA's MC1 (Lin et al., 2022): the best answer against the incorrect ones, which a semicolon
/// separates. The best comes first: who shows the choices to a model has to shuffle them.
///
/// # Errors
/// If the file cannot be read, is another table, or a question has no incorrect answer.
pub fn truthful_qa(path: &Path) -> Result<Vec<Question>, SetError> {
    #[derive(Deserialize)]
    struct Row {
        #[serde(rename = "Question")]
        question: String,
        #[serde(rename = "Best Answer")]
        best: String,
        #[serde(rename = "Incorrect Answers")]
        incorrect: String,
    }
    let rows = read_csv::<Row>(path)?.into_iter().enumerate();
    rows.map(|(row, Row { question, best, incorrect })| {
        let question = words(path, row, "Question", &question)?;
        let best = words(path, row, "Best Answer", &best)?;
        let others = incorrect.split(';').map(str::trim);
        let others: Vec<String> =
            others.filter(|other| !other.is_empty() && *other != best).map(str::to_owned).collect();
        words(path, row, "Incorrect Answers", &others.concat())?;
        let choices = std::iter::once(best).chain(others).collect();
        Ok(Question { question, choices, answer: 0 })
    })
    .collect()
}

/// CommonsenseQA (Talmor et al., 2019): `{question: {stem, choices: [{label, text}]}, answerKey}` on
/// each line.
///
/// # Errors
/// If the file cannot be read, is something else, or no choice has the label of the answer.
pub fn commonsense_qa(path: &Path) -> Result<Vec<Question>, SetError> {
    #[derive(Deserialize)]
    struct Row {
        #[serde(rename = "answerKey")]
        answer_key: String,
        question: Stem,
    }
    #[derive(Deserialize)]
    struct Stem {
        stem: String,
        choices: Vec<Choice>,
    }
    #[derive(Deserialize)]
    struct Choice {
        label: String,
        text: String,
    }
    let rows = read_json_lines::<Row>(path)?.into_iter().enumerate();
    rows.map(|(row, Row { answer_key, question: Stem { stem, choices } })| {
        let answer = choices.iter().position(|choice| choice.label == answer_key);
        let Some(answer) = answer.filter(|_| choices.len() > 1) else {
            let labels: Vec<&str> = choices.iter().map(|choice| choice.label.as_str()).collect();
            return Err(SetError::Value {
                path: path.into(),
                row,
                field: "answerKey",
                expected: format!("one of two or more labels {labels:?}"),
                actual: answer_key,
            });
        };
        let question = words(path, row, "stem", &stem)?;
        let choices = choices.into_iter().map(|choice| choice.text).collect();
        Ok(Question { question, choices, answer })
    })
    .collect()
}
