//! What a run says on the way.

use super::insertions::Insertions;
use super::recovery::TOP;
use super::results::{Human, Repetition, SaeResults};
use crate::progress::tell;

/// Heads on pairs of people.
pub(super) fn tell_human(human: &Human) {
    tell(&format!(
        "people's preferences, {} pairs in {} parts: {} by heads after blocks {:?}",
        human.n, human.n_folds, human.head.accuracy, human.layers
    ));
    tell(&format!("  words {} (p = {:.3})", human.tf_idf, human.against_tf_idf.p_value));
    tell(&format!("  the shorter {} (p = {:.3})", human.shorter, human.against_shorter.p_value));
}

/// What was found of one autoencoder.
pub(super) fn tell_sae(sae: &SaeResults, insertions: &Insertions, repetition: Option<&Repetition>) {
    for (name, check) in [
        ("integrated gradients", sae.ig),
        ("those of all latents together", sae.together),
        ("gradient × activation", sae.gxa),
    ] {
        tell(&format!(
            "{name} against {} ablated latents: r {:.3}, top {} recall {:.2}",
            check.n, check.pearson, check.top_k, check.top_k_recall
        ));
    }
    tell(&format!(
        "on {} latents of single texts: r {:.3} and {:.3}",
        sae.ig_by_text.n, sae.ig_by_text.pearson, sae.gxa_by_text.pearson
    ));
    let places = sae.recovered.iter().map(|(rule, place)| match place {
        Some(place) => format!("{} #{}", rule.label(), place + 1),
        None => format!("{} not among {TOP}", rule.label()),
    });
    let places: Vec<String> = places.collect();
    if !places.is_empty() {
        tell(&places.join(", "));
    }
    tell(&format!(
        "the difference of rewards: {:.0} % with all latents, {:.0} % with the error",
        100.0 * sae.latents_share.value,
        100.0 * sae.error_share.value
    ));
    tell(&format!("insertions {}, controls {}", insertions.success, insertions.control));
    if let Some(Repetition { repeated, paraphrased, recovered, .. }) = repetition {
        tell(&format!(
            "a question said again {:+.2}, in other words {:+.2}; without two latents {:.0} % back",
            repeated.value,
            paraphrased.value,
            100.0 * recovered.value
        ));
    }
}
