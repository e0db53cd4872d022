//! Finds and reads text to train on.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::wheel::WheelFile;

/// Human dialogues (MIT), the default training text.
const CHITCHAT: WheelFile = WheelFile {
    requirement: "chitchat-dataset==0.9.0",
    entry: "chitchat_dataset/dataset.json",
    size: 40_303_934,
    sha256: "d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a",
};

/// A conversation: the user speaks first, then they take turns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dialogue {
    /// What was said, in order.
    pub turns: Vec<String>,
}

/// Reads dialogues from files, or the default ones.
///
/// `.txt` and `.md`: each paragraph is one user turn. `.jsonl`: objects with `prompt` and `answer`,
/// or `text`. `.json`: dialogues as the chitchat package has them.
///
/// # Errors
/// If a file cannot be had or read, has another form, or holds no text.
pub fn load_texts(paths: &[std::path::PathBuf]) -> Result<Vec<Dialogue>> {
    if paths.is_empty() {
        let path = CHITCHAT.fetch().context(
            "no text to train on: none was given with --text, and the default one could be had \
             neither from the cache nor from the Python package index; pass --text PATH",
        )?;
        return read(&path);
    }
    let mut dialogues = Vec::new();
    for path in paths {
        dialogues.extend(read(path)?);
    }
    Ok(dialogues)
}

fn read(path: &Path) -> Result<Vec<Dialogue>> {
    let place = || format!("the text {}", path.display());
    let text = fs::read_to_string(path).with_context(place)?;
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or("");
    let dialogues = match extension {
        "txt" | "md" => paragraphs(&text),
        "jsonl" => lines(&text).with_context(place)?,
        "json" => chitchat(&text).with_context(place)?,
        _ => bail!("{}: expected .txt, .md, .jsonl or .json", path.display()),
    };
    ensure!(!dialogues.is_empty(), "{} holds no text", path.display());
    Ok(dialogues)
}

fn paragraphs(text: &str) -> Vec<Dialogue> {
    let paragraphs = text.split("\n\n").map(str::trim).filter(|paragraph| !paragraph.is_empty());
    paragraphs.map(|paragraph| Dialogue { turns: vec![paragraph.to_owned()] }).collect()
}

fn lines(text: &str) -> Result<Vec<Dialogue>> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Line {
        Chat { prompt: String, answer: String },
        Text { text: String },
    }
    let mut dialogues = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let turns = match serde_json::from_str(line)
            .with_context(|| format!("line {}: expected prompt and answer, or text", number + 1))?
        {
            Line::Chat { prompt, answer } => vec![prompt, answer],
            Line::Text { text } => vec![text],
        };
        if turns.iter().any(|turn| !turn.trim().is_empty()) {
            dialogues.push(Dialogue { turns });
        }
    }
    Ok(dialogues)
}

/// `{id: {messages: [[{text, …}, …], …], …}, …}`: each inner list is one speaker's turn.
fn chitchat(text: &str) -> Result<Vec<Dialogue>> {
    #[derive(Deserialize)]
    struct Conversation {
        messages: Vec<Vec<Message>>,
    }
    #[derive(Deserialize)]
    struct Message {
        text: String,
    }
    let file: serde_json::Map<String, serde_json::Value> = serde_json::from_str(text)?;
    let mut dialogues = Vec::new();
    for (id, value) in file {
        let conversation: Conversation =
            serde_json::from_value(value).with_context(|| format!("conversation {id}"))?;
        let turn = |messages: &Vec<Message>| {
            messages.iter().map(|message| message.text.trim()).collect::<Vec<_>>().join(" ")
        };
        let turns: Vec<String> = conversation.messages.iter().map(turn).collect();
        if turns.iter().any(|turn| !turn.is_empty()) {
            dialogues.push(Dialogue { turns });
        }
    }
    Ok(dialogues)
}
