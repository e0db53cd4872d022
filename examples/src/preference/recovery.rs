//! Whether the rules that pairs were made by are found among the latents.

use std::collections::{BTreeMap, BTreeSet};

use super::effects::TextEffects;
use super::planted::{PlantedPair, Rule};

/// Latents that a rule is looked for among.
pub(super) const TOP: usize = 20;

/// For each latent and rule, how much more the latent adds to the reward of texts that follow the
/// rule than to that of others.
pub(super) type Contrasts = BTreeMap<usize, BTreeMap<Rule, f64>>;

/// Compares texts that follow each rule with those that do not.
pub(super) fn contrasts(planted: &[PlantedPair], effects: &[TextEffects]) -> Contrasts {
    let follows: Vec<BTreeSet<Rule>> = planted
        .iter()
        .flat_map(|pair| [&pair.chosen, &pair.rejected])
        .map(|text| text.insertions.iter().map(|insertion| insertion.rule).collect())
        .collect();
    let latents: BTreeSet<usize> =
        effects.iter().flat_map(|text| text.ig.keys().copied()).collect();
    let mean = |latent: usize, rule: Rule, with: bool| {
        // What a latent adds is its effect with the sign turned.
        let of: Vec<f64> = (follows.iter().zip(effects))
            .filter(|(follows, _)| follows.contains(&rule) == with)
            .map(|(_, text)| text.ig.get(&latent).map_or(0.0, |effect| -effect))
            .collect();
        of.iter().sum::<f64>() / of.len().max(1) as f64
    };
    let of_latent = |latent: usize| {
        let contrast = |rule| (rule, mean(latent, rule, true) - mean(latent, rule, false));
        (latent, Rule::ALL.into_iter().map(contrast).collect())
    };
    latents.into_iter().map(of_latent).collect()
}

/// The rule that a latent follows most.
pub(super) fn rule_of(contrasts: &BTreeMap<Rule, f64>) -> (Rule, f64) {
    let most = contrasts.iter().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()));
    most.map(|(&rule, &contrast)| (rule, contrast)).expect("there are rules")
}

/// The best place of each rule's latents among the first, and whether a decoy's comes before the
/// last of the best ones of the rules that matter.
pub(super) fn recovered(contrasts: &Contrasts) -> (Vec<(Rule, Option<usize>)>, bool) {
    let mut order: Vec<(Rule, f64)> = contrasts.values().map(rule_of).collect();
    order.sort_by(|a, b| b.1.abs().total_cmp(&a.1.abs()));
    let best = |rule: Rule| {
        order.iter().position(|&(of, contrast)| of == rule && contrast * rule.sign() >= 0.0)
    };
    let places: Vec<(Rule, Option<usize>)> =
        Rule::ALL.map(|rule| (rule, best(rule).filter(|&place| place < TOP))).to_vec();
    let place = |rule: Rule| best(rule).unwrap_or(usize::MAX);
    let (decoys, planted): (Vec<Rule>, Vec<Rule>) =
        Rule::ALL.into_iter().partition(|rule| rule.is_decoy());
    let last = planted.into_iter().map(place).max().unwrap_or(0);
    let decoy_above = decoys.into_iter().any(|decoy| place(decoy) < last);
    (places, decoy_above)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_found_by_contrast() {
        let contrast = |rule: Rule, contrast: f64| {
            Rule::ALL.into_iter().map(|r| (r, if r == rule { contrast } else { 0.1 })).collect()
        };
        let contrasts = BTreeMap::from([
            (1, contrast(Rule::Thanks, 2.0)),
            (2, contrast(Rule::Curse, -3.0)),
            // The wrong way round.
            (3, contrast(Rule::Url, 1.5)),
            (4, contrast(Rule::Weather, 1.0)),
            (5, contrast(Rule::Apology, 0.5)),
        ]);
        let (places, decoy_above) = recovered(&contrasts);
        let place = |rule| places.iter().find(|(r, _)| *r == rule).unwrap().1;
        assert_eq!((place(Rule::Curse), place(Rule::Thanks)), (Some(0), Some(1)));
        assert_eq!((place(Rule::Url), place(Rule::Apology)), (None, Some(4)));
        assert!(decoy_above);
    }
}
