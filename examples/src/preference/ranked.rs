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

/// What something adds to the difference of rewards, by pair.
#[derive(Default)]
pub(super) struct Added(BTreeMap<usize, f64>);

impl Added {
    /// Adds what it does to a text, the preferred one of each pair first.
    pub(super) fn add(&mut self, text: usize, adds: f64) {
        let sign = if text.is_multiple_of(2) { 1.0 } else { -1.0 };
        *self.0.entry(text / 2).or_default() += sign * adds;
    }

    /// The mean over so many pairs, less its standard error.
    fn difference(&self, n_pairs: usize) -> f64 {
        let n = n_pairs as f64;
        let mean = self.0.values().sum::<f64>() / n;
        let square = self.0.values().map(|x| x * x).sum::<f64>() / n;
        mean - ((square - mean * mean).max(0.0) / n).sqrt()
    }

    /// The same over the pairs that it was added to, if those are more than one.
    pub(super) fn where_added(&self) -> Option<f64> {
        (self.0.len() > 1).then(|| self.difference(self.0.len()))
    }
}

impl Ranked {
    /// Of effects on texts, the preferred one of each pair first.
    pub(super) fn new(effects: &[TextEffects]) -> Self {
        let mut latents = BTreeMap::<usize, (f64, Added)>::new();
        for (text, of_text) in effects.iter().enumerate() {
            for &(latent, _, effect) in &of_text.on_words {
                let (reward, added) = latents.entry(latent).or_default();
                // What a latent adds is its effect with the sign turned.
                *reward -= effect;
                added.add(text, -effect);
            }
        }
        let side = |sign: f64| {
            let of_side = latents.iter().filter(|(_, (reward, _))| sign * reward > 0.0);
            let on_words = of_side.map(|(&latent, (_, added))| OnWords {
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
    fn what_is_added_counts_where_it_is_added_or_over_all_pairs() {
        let mut added = Added::default();
        added.add(0, 3.0);
        assert_eq!(added.where_added(), None);
        // The other text of the second pair loses as much as the preferred one gains.
        added.add(3, -1.0);
        // Of 3 and 1 the mean is 2 and the deviation 1; among four pairs, 1 and √1.5.
        assert!((added.where_added().unwrap() - (2.0 - 0.5f64.sqrt())).abs() < 1e-12);
        assert!((added.difference(4) - (1.0 - 1.5f64.sqrt() / 2.0)).abs() < 1e-12);
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
