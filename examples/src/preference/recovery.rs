//! Whether the rules that pairs were made by are found among the latents.

use std::collections::BTreeMap;

use anyhow::Result;
use model_hooks::text::Tokenizer;

use super::effects::TextEffects;
use super::pairs::divergence;
use super::planted::{PlantedPair, Rule};
use super::ranked::{OnWords, Ranked};

/// Latents that a rule is looked for among.
pub(super) const TOP: usize = 20;

/// For each latent and rule, what the latent adds to the difference of rewards, chosen − rejected,
/// where the rule's sentences stand: the mean of all pairs.
///
/// Decoys stand in either text alike, and so add nothing but by chance.
pub(super) type ByRule = BTreeMap<usize, BTreeMap<Rule, f64>>;

/// Adds up effects on the tokens of the sentences that texts were made with.
///
/// # Errors
/// If a text cannot be encoded.
pub(super) fn by_rule(
    planted: &[PlantedPair],
    effects: &[TextEffects],
    tokenizer: &Tokenizer,
) -> Result<ByRule> {
    let mut by_rule = ByRule::new();
    let texts = planted.iter().flat_map(|pair| [(&pair.chosen, 1.0), (&pair.rejected, -1.0)]);
    for ((text, sign), effects) in texts.zip(effects) {
        let ids = tokenizer.encode(&text.text)?;
        for insertion in &text.insertions {
            let token = |byte: usize| -> Result<usize> {
                Ok(divergence(&tokenizer.encode(&text.text[..byte])?, &ids))
            };
            let tokens = token(insertion.bytes.start)?..token(insertion.bytes.end)?;
            for &(latent, position, effect) in &effects.on_words {
                if tokens.contains(&position) {
                    // What a latent adds is its effect with the sign turned.
                    let adds = -effect * sign / planted.len() as f64;
                    *by_rule.entry(latent).or_default().entry(insertion.rule).or_default() += adds;
                }
            }
        }
    }
    Ok(by_rule)
}

/// The rule that a latent does most for.
pub(super) fn rule_of(by_rule: &BTreeMap<Rule, f64>) -> Option<Rule> {
    by_rule.iter().max_by(|a, b| a.1.total_cmp(b.1)).map(|(&rule, _)| rule)
}

/// The best place of each rule's latents among the first of those that raise rewards, or lower them
/// as the rule does, and whether a decoy's comes before the last of the best ones of the rules.
pub(super) fn recovered(by_rule: &ByRule, ranked: &Ranked) -> (Vec<(Rule, Option<usize>)>, bool) {
    let place = |rule: Rule, among: &[OnWords]| {
        let is_of = |of: &OnWords| by_rule.get(&of.latent).and_then(rule_of) == Some(rule);
        among.iter().position(is_of)
    };
    let sides = [(1.0, &ranked.raising), (-1.0, &ranked.lowering)];
    let best = |rule: Rule| {
        let sides = sides.iter().filter(|(sign, _)| rule.is_decoy() || *sign == rule.sign());
        sides.filter_map(|(_, among)| place(rule, among)).min()
    };
    let places = Rule::ALL.map(|rule| (rule, best(rule).filter(|&place| place < TOP)));
    let decoy_above = sides.iter().any(|(sign, among)| {
        let planted = Rule::ALL.into_iter().filter(|rule| rule.sign() == *sign);
        let last = planted.map(|rule| place(rule, among).unwrap_or(usize::MAX)).max();
        let decoys = Rule::ALL.into_iter().filter(|rule| rule.is_decoy());
        decoys.filter_map(|decoy| place(decoy, among)).min() < last
    });
    (places.to_vec(), decoy_above)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_found_among_the_latents_of_their_side() {
        let adds = |rule: Rule, adds: f64| {
            Rule::ALL.into_iter().map(|r| (r, if r == rule { adds } else { 0.1 })).collect()
        };
        let by_rule = BTreeMap::from([
            (1, adds(Rule::Thanks, 2.0)),
            (2, adds(Rule::Curse, 3.0)),
            (3, adds(Rule::Weather, 1.0)),
            (4, adds(Rule::Apology, 0.5)),
            (5, adds(Rule::Url, 1.5)),
        ]);
        let on_words = |latent| OnWords { latent, difference: 1.0 };
        let ranked = Ranked {
            // The fifth the wrong way round.
            raising: [1, 5, 3, 4].map(on_words).to_vec(),
            lowering: [2].map(on_words).to_vec(),
        };
        let (places, decoy_above) = recovered(&by_rule, &ranked);
        let place = |rule| places.iter().find(|(r, _)| *r == rule).unwrap().1;
        assert_eq!((place(Rule::Curse), place(Rule::Thanks)), (Some(0), Some(0)));
        assert_eq!((place(Rule::Url), place(Rule::Apology)), (None, Some(3)));
        assert!(decoy_above);
    }
}
