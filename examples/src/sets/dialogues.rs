//! Dialogues of several turns.

use std::path::Path;

use serde::Serialize;

use super::SetError;
use crate::corpus::Turn;
use crate::preference::pairs::{ASSISTANT, HUMAN, PreferencePair, read_pairs};

/// What came before, and what is asked last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Conversation {
    /// Requests that were answered.
    pub turns: Vec<Turn>,
    /// The request that waits for an answer.
    pub prompt: String,
}

/// The dialogues of a file of HH-RLHF's format (Bai et al., 2022), packed or not, each up to its last
/// request and with the answers that were preferred. Of the dialogues that have fewer than `min_turns`
/// requests none is kept, nor of those in which somebody says nothing.
///
/// # Errors
/// If the file cannot be read, a dialogue does not begin with a request, or none is left.
pub fn hh(path: &Path, min_turns: usize) -> Result<Vec<Conversation>, SetError> {
    let mut conversations = Vec::new();
    for (row, PreferencePair { chosen, .. }) in read_pairs(path)?.into_iter().enumerate() {
        let Some(conversation) = conversation(&chosen) else {
            return Err(SetError::Value {
                path: path.into(),
                row,
                field: "chosen",
                expected: format!("a dialogue that begins with {HUMAN:?}"),
                actual: chosen.chars().take(80).collect(),
            });
        };
        let Conversation { turns, prompt } = &conversation;
        let said = turns.iter().flat_map(|turn| [&turn.prompt, &turn.answer]);
        let is_whole = said.chain([prompt]).all(|text| !text.is_empty());
        if is_whole && turns.len() + 1 >= min_turns {
            conversations.push(conversation);
        }
    }
    match conversations.is_empty() {
        true => Err(SetError::Empty { path: path.into() }),
        false => Ok(conversations),
    }
}

/// Up to the last request; `None` where something else comes first.
fn conversation(text: &str) -> Option<Conversation> {
    let mut turns = Vec::new();
    let rest = text.strip_prefix(HUMAN.trim_end())?;
    for part in rest.split(HUMAN.trim_end()) {
        let (prompt, answer) = part.split_once(ASSISTANT.trim_end()).unwrap_or((part, ""));
        turns.push(Turn { prompt: prompt.trim().to_owned(), answer: answer.trim().to_owned() });
    }
    let last = turns.pop()?;
    Some(Conversation { turns, prompt: last.prompt })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dialogue_ends_with_its_last_request() {
        let text =
            "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHow are you?\n\nHuman: Fine\n\nAssistant:";
        let turn = Turn { prompt: "Hi".into(), answer: "Hello.\n\nHow are you?".into() };
        let expected = Conversation { turns: vec![turn], prompt: "Fine".into() };
        assert_eq!(conversation(text), Some(expected));
        assert_eq!(conversation("\n\nAssistant: Hello."), None);
        assert_eq!(conversation("\n\nHuman: Hi").unwrap().prompt, "Hi");
    }
}
