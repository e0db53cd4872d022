//! Which latents make the model prefer one text to another by what it says.

use std::collections::BTreeMap;

use super::effects::TextEffects;

/// A latent, and where it does most of what it is ranked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct OnWords {
    pub(super) latent: usize,
    /// What it adds to the difference of rewards, the mean of all pairs.
    pub(super) difference: f64,
    pub(super) text: usize,
    pub(super) position: usize,
}

/// Latents in the order of what they add to the difference of rewards, chosen − rejected, on all
/// tokens but the last. What stands in either text by chance adds nothing to it.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Ranked {
    /// Those that raise rewards, most on the preferred texts.
    pub(super) raising: Vec<OnWords>,
    /// Those that lower them, most on the others.
    pub(super) lowering: Vec<OnWords>,
}

/// What one latent adds.
#[derive(Clone, Copy)]
struct Sums {
    reward: f64,
    difference: f64,
    /// The most that it raises at a token and the most that it lowers, and where.
    most: [(f64, [usize; 2]); 2],
}

impl Ranked {
    /// Of effects on texts, the preferred one of each pair first.
    pub(super) fn new(effects: &[TextEffects]) -> Self {
        let mut latents = BTreeMap::<usize, Sums>::new();
        for (text, of_text) in effects.iter().enumerate() {
            let sign = if text % 2 == 0 { 1.0 } else { -1.0 };
            for &(latent, position, effect) in &of_text.on_words {
                // What a latent adds is its effect with the sign turned.
                let adds = -effect;
                let none = (0.0, [text, position]);
                let empty = Sums { reward: 0.0, difference: 0.0, most: [none; 2] };
                let sums = latents.entry(latent).or_insert(empty);
                sums.reward += adds;
                sums.difference += sign * adds;
                for (most, adds) in sums.most.iter_mut().zip([adds, -adds]) {
                    if adds > most.0 {
                        *most = (adds, [text, position]);
                    }
                }
            }
        }
        let n_pairs = (effects.len() / 2).max(1) as f64;
        let side = |sign: f64, side: usize| {
            let of_side = latents.iter().filter(|(_, sums)| sign * sums.reward > 0.0);
            let on_words = of_side.map(|(&latent, sums)| {
                let (_, [text, position]) = sums.most[side];
                OnWords { latent, difference: sums.difference / n_pairs, text, position }
            });
            let mut ranked: Vec<OnWords> = on_words.filter(|of| of.difference > 0.0).collect();
            ranked.sort_by(|a, b| b.difference.total_cmp(&a.difference));
            ranked
        };
        Self { raising: side(1.0, 0), lowering: side(-1.0, 1) }
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
        let on_words =
            |latent, difference, text, position| OnWords { latent, difference, text, position };
        let expected = Ranked {
            raising: vec![on_words(2, 2.0, 0, 9), on_words(1, 1.0, 0, 8)],
            lowering: vec![on_words(4, 2.0, 1, 7)],
        };
        assert_eq!(Ranked::new(&effects), expected);
    }
}
