//! A continuous score of what a model is about to say.

/// `log P(S) − log(1 − P(S))` of a set of tokens `S` under the softmax of a row of logits, in nats:
/// with the first tokens of refusals, how much the model leans towards refusing before it has said
/// a word (Arditi et al., 2024).
///
/// # Panics
/// If `tokens` is empty or holds an id that the row does not have.
pub fn log_odds(logits: &[f32], tokens: &[u32]) -> f64 {
    assert!(!tokens.is_empty(), "the odds of no token");
    let mut inside = vec![false; logits.len()];
    for &token in tokens {
        inside[token as usize] = true;
    }
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let (mut within, mut without) = (0f64, 0f64);
    for (&logit, &inside) in logits.iter().zip(&inside) {
        let weight = f64::from(logit - max).exp();
        *(if inside { &mut within } else { &mut without }) += weight;
    }
    within.ln() - without.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odds_of_one_in_four_equal_tokens() {
        // P = 1/4: ln(1/3).
        let odds = log_odds(&[5.0; 4], &[2]);
        assert!((odds - (1f64 / 3.0).ln()).abs() < 1e-12);
        // P = 3/4, whatever the constant added to all logits; twice the same token counts once.
        let odds = log_odds(&[-100.0; 4], &[0, 1, 3, 3]);
        assert!((odds - 3f64.ln()).abs() < 1e-12);
    }
}
