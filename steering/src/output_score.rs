//! Whether a latent writes what it seems to be about.

/// How far changing a latent brings up the tokens that it writes towards: those that its direction
/// raises most by itself. Of the two rows of logits, before and after,
///
/// ```text
/// score = w(after) − w(before),   w = (1 − rank / d_vocab) · p
/// ```
///
/// with the rank, from 0, and the probability of the likeliest of the tokens. Latents that score
/// high steer; those that score low only respond (after Arad et al., 2025).
///
/// # Panics
/// If `tokens` is empty or holds an id that the rows do not have, or the rows differ in length.
pub fn output_score(before: &[f32], after: &[f32], tokens: &[u32]) -> f64 {
    assert_eq!(before.len(), after.len(), "logits of one vocabulary");
    weighted(after, tokens) - weighted(before, tokens)
}

fn weighted(logits: &[f32], tokens: &[u32]) -> f64 {
    assert!(!tokens.is_empty(), "the score of no token");
    let best = tokens.iter().map(|&token| logits[token as usize]).fold(f32::NEG_INFINITY, f32::max);
    let rank = logits.iter().filter(|&&logit| logit > best).count();
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    (1.0 - rank as f64 / logits.len() as f64) * f64::from(best - max).exp() / sum
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Weights 1, 1, 2, 4 of 8: token 0 has probability 1/8 at rank 2, then, with weight 8 of 15, it
    /// leads.
    #[test]
    fn rank_and_probability_by_hand() {
        let before = [0.0, 0.0, 2f32.ln(), 4f32.ln()];
        let after = [8f32.ln(), 0.0, 2f32.ln(), 4f32.ln()];
        let expected = 8.0 / 15.0 - (1.0 - 2.0 / 4.0) / 8.0;
        assert!((output_score(&before, &after, &[0]) - expected).abs() < 1e-6);
        assert!((output_score(&before, &after, &[1, 0]) - expected).abs() < 1e-6);
        assert_eq!(output_score(&before, &before, &[2]), 0.0);
    }
}
