//! Where a request stands in what a model reads.

use anyhow::{Context, Result};
use model_hooks::text::{ChatTemplate, Message, Tokenizer};
use steering::Request;

/// A conversation that ends with a request, in tokens, up to where the answer begins.
///
/// # Errors
/// If there is no message, or the template or the tokenizer fails.
pub fn last_request(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
) -> Result<Request> {
    let encode = |messages: &[Message]| -> Result<Vec<u32>> {
        let text = template.render(messages, true).context("while laying out a conversation")?;
        tokenizer.encode(&text).context("while turning a conversation into tokens")
    };
    let ids = encode(messages)?;
    let mut other = messages.to_vec();
    let words = &mut other.last_mut().context("a conversation has a request")?.content;
    // The words begin where others in their place make a difference.
    *words = if words.trim_start().starts_with('?') { "!" } else { "?" }.into();
    let start = ids.iter().zip(&encode(&other)?).take_while(|(a, b)| a == b).count();
    Ok(Request { ids, start })
}
