//! A text of the user's: its reward, and what latents do to it.

use anyhow::{Context, Result};
use attribution::{Baseline, Reward, SaeSite, Study};
use model_hooks::{HookPoint, RewardModel};
use sae_core::Sae;

use super::effects::integrated;
use super::pairs::{ASSISTANT, HUMAN};
use super::results::TextBySae;
use super::sources::conversation;

/// Latents named.
const N_NAMED: usize = 20;

/// The conversation that a text is: itself where its turns are marked, else an answer.
pub fn as_conversation(text: &str) -> String {
    let marked = text.trim_start().starts_with(HUMAN.trim()) && text.contains(ASSISTANT.trim());
    match marked {
        true => format!("\n\n{}", text.trim_start()),
        false => conversation("", text),
    }
}

/// The reward of a text, and what the latents of an autoencoder after a block add to it at each
/// token, by integrated gradients.
///
/// # Errors
/// If the text does not fit the model, or the autoencoder the block.
pub fn attribute_text(
    model: &RewardModel,
    sae: &Sae,
    layer: usize,
    ids: &[u32],
) -> Result<(f64, TextBySae)> {
    let metric = Reward::new(model);
    let site = SaeSite::new(sae, HookPoint::resid_post(layer));
    let study = Study::new(&metric, &[ids])?.start_at(site.point)?;
    let mut effects = study.attribute(&[site], Baseline::Zero, integrated())?;
    let effects = effects.pop().context("one site was asked for")?;
    let mut by_token = vec![0.0; ids.len()];
    let mut latents: Vec<(usize, usize, f64)> = Vec::new();
    for token in effects.tokens() {
        let adds = token.effect.contribution();
        by_token[token.position] += adds;
        latents.push((token.latent_idx, token.position, adds));
    }
    latents.sort_by(|a, b| b.2.abs().total_cmp(&a.2.abs()));
    latents.truncate(N_NAMED);
    let error = effects.error_by_conversation().iter().map(|effect| effect.contribution()).sum();
    Ok((study.clean()?[0], TextBySae { layer, by_token, error, latents }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_without_turns_is_an_answer() {
        assert_eq!(as_conversation("Yes."), "\n\nHuman: \n\nAssistant: Yes.");
        let marked = "\n\nHuman: Hi\n\nAssistant: Yes.";
        assert_eq!(as_conversation(marked), marked);
        assert_eq!(as_conversation(marked.trim()), marked);
    }
}
