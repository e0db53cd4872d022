//! Which latents make the model prefer one text to another by what it says.

use std::collections::BTreeMap;

use super::effects::TextEffects;

/// A latent, and what it is ranked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct OnWords {
    pub(super) latent: usize,
    /// What it adds to the difference of rewards: the mean of all pairs, less its standard error.
    pub(super) difference: f64,
}

/// Latents in the order of what they add to the difference of rewards, chosen − rejected, on all
/// tokens but the last: its mean over the pairs, less its standard error. What stands in either text
/// by chance adds nothing to the mean, but for that error.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Ranked {
    /// Those that raise rewards, most on the preferred texts.
    pub(super) raising: Vec<OnWords>,
    /// Those that lower them, most on the others.
    pub(super) lowering: Vec<OnWords>,
}

/// What one latent adds.
#[derive(Default)]
struct Added {
    reward: f64,
    /// To the difference of rewards, by pair.
    differences: BTreeMap<usize, f64>,
}

impl Added {
    /// The mean difference of so many pairs, less its standard error.
    fn difference(&self, n_pairs: usize) -> f64 {
        let n = n_pairs as f64;
        let mean = self.differences.values().sum::<f64>() / n;
        let square = self.differences.values().map(|x| x * x).sum::<f64>() / n;
        mean - ((square - mean * mean).max(0.0) / n).sqrt()
    }
}

impl Ranked {
    /// Of effects on texts, the preferred one of each pair first.
    pub(super) fn new(effects: &[TextEffects]) -> Self {
        let mut latents = BTreeMap::<usize, Added>::new();
        for (text, of_text) in effects.iter().enumerate() {
            let sign = if text % 2 == 0 { 1.0 } else { -1.0 };
            for &(latent, _, effect) in &of_text.on_words {
                // What a latent adds is its effect with the sign turned.
                let adds = -effect;
                let added = latents.entry(latent).or_default();
                added.reward += adds;
                *added.differences.entry(text / 2).or_default() += sign * adds;
            }
        }
        let side = |sign: f64| {
            let of_side = latents.iter().filter(|(_, added)| sign * added.reward > 0.0);
            let on_words = of_side.map(|(&latent, added)| OnWords {
                latent,
                difference: added.difference(effects.len() / 2),
            });
            let mut ranked: Vec<OnWords> = on_words.filter(|of| of.difference > 0.0).collect();
            ranked.sort_by(|a, b| b.difference.total_cmp(&a.difference));
            ranked
        };
        Self { raising: side(1.0), lowering: side(-1.0) }
    }

    /// The first of either side, so many of each.
    pub(super) fn first(&self, n: usize) -> impl Iterator<Item = &OnWords> {
        self.raising.iter().take(n).chain(self.lowering.iter().take(n))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latents_are_ranked_by_the_difference_that_they_make() {
        let text = |on_words: &[(usize, usize, f64)]| TextEffects {
            on_words: on_words.to_vec(),
            ..TextEffects::default()
        };
        // 1 raises the preferred text, 2 more so; 3 raises both alike; 4 lowers the other one, and
        // 5 the preferred one.
        let effects = [
            text(&[(1, 8, -1.0), (2, 8, -0.5), (2, 9, -1.5), (3, 9, -5.0), (5, 8, 1.0)]),
            text(&[(3, 9, -5.0), (4, 7, 2.0)]),
        ];
        let on_words = |latent, difference| OnWords { latent, difference };
        let expected = Ranked {
            raising: vec![on_words(2, 2.0), on_words(1, 1.0)],
            lowering: vec![on_words(4, 2.0)],
        };
        assert_eq!(Ranked::new(&effects), expected);
    }

    #[test]
    fn what_comes_by_chance_is_behind_what_comes_again() {
        let text = |on_words: &[(usize, usize, f64)]| TextEffects {
            on_words: on_words.to_vec(),
            ..TextEffects::default()
        };
        // 1 raises the preferred text of both pairs, 2 that of one as much as 1 both.
        let effects =
            [text(&[(1, 8, -1.0), (2, 8, -2.0)]), text(&[]), text(&[(1, 9, -1.0)]), text(&[])];
        let raising = Ranked::new(&effects).raising;
        assert_eq!((raising.len(), raising[0].latent, raising[0].difference), (2, 1, 1.0));
        assert!((raising[1].difference - (1.0 - 0.5f64.sqrt())).abs() < 1e-12, "{raising:?}");
    }
}
