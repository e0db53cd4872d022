//! Prompt lists from files: JSON, JSONL, CSV or plain lines.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::corpus::{Appearance, Prompt};

/// What a list is to hold, where the file says which of its prompts are which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Unsafe requests.
    Unsafe,
    /// Safe requests.
    Safe,
}

/// Fields that published prompt sets keep the request in.
const FIELDS: &[&str] = &["prompt", "instruction", "goal", "Goal", "question", "text", "behavior"];

/// Reads a list of prompts.
///
/// JSON arrays and JSONL hold strings, or objects with a field such as `prompt` or `instruction`;
/// CSV has a header with such a column (else the only column counts); every line of any other file
/// is a prompt. Where an entry has a `label` of `safe` or `unsafe`, only those wanted are kept; a
/// `kind` of `look_alike` is kept too.
///
/// # Errors
/// If the file cannot be read, an entry has no such field, or nothing is left.
pub fn read_prompts(path: &Path, wanted: Wanted) -> Result<Vec<Prompt>> {
    let place = || format!("the prompts {}", path.display());
    let text = fs::read_to_string(path).with_context(place)?;
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or("");
    let entries = match extension {
        "json" => json(&text),
        "jsonl" => jsonl(&text),
        "csv" => csv(&text),
        _ => Ok(text.lines().map(|line| Value::String(line.to_owned())).collect()),
    };
    let mut prompts = Vec::new();
    for (number, entry) in entries.with_context(place)?.iter().enumerate() {
        let prompt = prompt(entry, wanted)
            .with_context(|| format!("entry {} of {}", number + 1, path.display()))?;
        prompts.extend(prompt.filter(|prompt| !prompt.prompt.is_empty()));
    }
    ensure!(!prompts.is_empty(), "{} holds no prompts of the kind wanted", path.display());
    Ok(prompts)
}

fn json(text: &str) -> Result<Vec<Value>> {
    match serde_json::from_str(text)? {
        Value::Array(entries) => Ok(entries),
        _ => bail!("expected an array of strings or objects"),
    }
}

fn jsonl(text: &str) -> Result<Vec<Value>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(number, line)| {
            serde_json::from_str(line).with_context(|| format!("line {}", number + 1))
        })
        .collect()
}

fn csv(text: &str) -> Result<Vec<Value>> {
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let header = reader.headers()?.clone();
    let mut entries = Vec::new();
    for record in reader.records() {
        let record = record?;
        let fields = header.iter().zip(record.iter());
        let entry = match header.len() {
            1 => Value::String(record[0].to_owned()),
            _ => fields.map(|(name, value)| (name.to_owned(), Value::from(value))).collect(),
        };
        entries.push(entry);
    }
    Ok(entries)
}

fn prompt(entry: &Value, wanted: Wanted) -> Result<Option<Prompt>> {
    let text = match entry {
        Value::String(text) => text,
        entry => match FIELDS.iter().find_map(|field| entry.get(field)?.as_str()) {
            Some(text) => text,
            None => bail!("expected a string, or one of the fields {}", FIELDS.join(", ")),
        },
    };
    match (entry.get("label").and_then(Value::as_str), wanted) {
        (Some("safe"), Wanted::Unsafe) | (Some("unsafe"), Wanted::Safe) => return Ok(None),
        _ => {}
    }
    let look_alike = entry.get("kind").and_then(Value::as_str) == Some("look_alike");
    let appearance = if look_alike { Appearance::LookAlike } else { Appearance::Ordinary };
    Ok(Some(Prompt { prompt: text.trim().to_owned(), appearance }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, text: &str, wanted: Wanted) -> Result<Vec<String>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        Ok(read_prompts(&path, wanted)?.into_iter().map(|prompt| prompt.prompt).collect())
    }

    #[test]
    fn every_form_gives_the_same_prompts() {
        let both = ["How?", "Why, \"then\"?"];
        for (name, text) in [
            ("a.txt", "How?\n\nWhy, \"then\"?\n"),
            ("a.json", r#"["How?", {"instruction": "Why, \"then\"?", "category": "x"}]"#),
            ("a.jsonl", "{\"prompt\": \"How?\"}\n\n\"Why, \\\"then\\\"?\"\n"),
            ("a.csv", "id,prompt\n1,How?\n2,\"Why, \"\"then\"\"?\"\n"),
        ] {
            assert_eq!(read(name, text, Wanted::Safe).unwrap(), both, "{name}");
        }
    }

    #[test]
    fn labels_choose_what_is_wanted() {
        let text = "prompt,label\nHow?,safe\nWhy?,unsafe\n";
        assert_eq!(read("a.csv", text, Wanted::Safe).unwrap(), ["How?"]);
        assert_eq!(read("a.csv", text, Wanted::Unsafe).unwrap(), ["Why?"]);
    }

    #[test]
    fn errors_name_the_file_and_the_entry() {
        let error = read("a.json", r#"["How?", {"x": 1}]"#, Wanted::Safe).unwrap_err();
        assert!(format!("{error:#}").contains("entry 2 of"), "{error:#}");
        for (name, text) in
            [("a.json", "{"), ("a.json", "{}"), ("a.txt", "\n"), ("a.csv", "x,y\n1")]
        {
            assert!(read(name, text, Wanted::Safe).is_err(), "{name} {text:?}");
        }
    }
}
