//! Logistic regression on words: what a preference model has to beat.

use std::collections::{HashMap, HashSet};

/// A text as weights of its words and pairs of words, of length 1.
type Weights = HashMap<usize, f64>;

/// Which of two texts is preferred, by their words: weights are term frequency × inverse document
/// frequency, of length 1, and the score is linear in them.
#[derive(Debug, Clone)]
pub struct TfIdf {
    terms: HashMap<String, usize>,
    inverse_frequencies: Vec<f64>,
    scores: Vec<f64>,
}

/// Steps of the accelerated gradient.
const N_STEPS: usize = 400;

impl TfIdf {
    /// Learns from pairs, the preferred text of each first: minimises
    /// `Σ −log σ(score(chosen) − score(rejected)) + ½‖scores‖²`.
    ///
    /// # Panics
    /// If there are none.
    pub fn fit(pairs: &[[&str; 2]]) -> Self {
        assert!(!pairs.is_empty(), "pairs to learn from");
        let documents: Vec<Vec<String>> = pairs.iter().flatten().map(|text| terms(text)).collect();
        let (mut ids, mut counts) = (HashMap::new(), Vec::<usize>::new());
        for document in &documents {
            for term in document.iter().collect::<HashSet<_>>() {
                let next = ids.len();
                let id = *ids.entry(term.clone()).or_insert(next);
                counts.resize(ids.len(), 0);
                counts[id] += 1;
            }
        }
        let n = documents.len() as f64;
        let inverse = |&count: &usize| ((1.0 + n) / (1.0 + count as f64)).ln() + 1.0;
        let inverse_frequencies = counts.iter().map(inverse).collect();
        let mut model = Self { scores: vec![0.0; ids.len()], terms: ids, inverse_frequencies };
        let differences: Vec<Vec<(usize, f64)>> = pairs
            .iter()
            .map(|[chosen, rejected]| {
                let mut difference = model.weights(chosen);
                for (term, weight) in model.weights(rejected) {
                    *difference.entry(term).or_default() -= weight;
                }
                let mut difference: Vec<(usize, f64)> = difference.into_iter().collect();
                // Sums in one order: a run is to be the same each time.
                difference.sort_unstable_by_key(|&(term, _)| term);
                difference
            })
            .collect();
        model.scores = minimise(&differences, model.scores.len());
        model
    }

    /// The score of a text: the higher the better.
    pub fn score(&self, text: &str) -> f64 {
        let mut weights: Vec<(usize, f64)> = self.weights(text).into_iter().collect();
        weights.sort_unstable_by_key(|&(term, _)| term);
        weights.into_iter().map(|(term, weight)| weight * self.scores[term]).sum()
    }

    fn weights(&self, text: &str) -> Weights {
        let mut weights = Weights::new();
        for term in terms(text) {
            if let Some(&id) = self.terms.get(&term) {
                *weights.entry(id).or_default() += self.inverse_frequencies[id];
            }
        }
        let mut squares: Vec<f64> = weights.values().map(|weight| weight * weight).collect();
        squares.sort_unstable_by(f64::total_cmp);
        let length = squares.into_iter().sum::<f64>().sqrt();
        weights.values_mut().for_each(|weight| *weight /= length.max(f64::MIN_POSITIVE));
        weights
    }
}

/// Words and pairs of words, lower-cased.
fn terms(text: &str) -> Vec<String> {
    let words: Vec<String> = text
        .to_lowercase()
        .split(|c: char| !c.is_alphanumeric() && c != '\'')
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect();
    let pairs = words.windows(2).map(|pair| pair.join(" "));
    words.iter().cloned().chain(pairs).collect()
}

/// Nesterov's accelerated gradient on a smooth and strongly convex function.
fn minimise(differences: &[Vec<(usize, f64)>], n_terms: usize) -> Vec<f64> {
    let square = |row: &Vec<(usize, f64)>| row.iter().map(|(_, x)| x * x).sum::<f64>();
    // A step is as long as the curvature allows, which no sum of squares exceeds.
    let curvature = 0.25 * differences.iter().map(square).sum::<f64>() + 1.0;
    let (step, slow) = (1.0 / curvature, (1.0 / curvature).sqrt());
    let momentum = (1.0 - slow) / (1.0 + slow);
    let (mut at, mut ahead) = (vec![0.0; n_terms], vec![0.0; n_terms]);
    for _ in 0..N_STEPS {
        let mut gradient = ahead.clone();
        for row in differences {
            let product: f64 = row.iter().map(|&(term, x)| x * ahead[term]).sum();
            let share = 1.0 / (1.0 + product.exp());
            row.iter().for_each(|&(term, x)| gradient[term] -= share * x);
        }
        let next: Vec<f64> = ahead.iter().zip(&gradient).map(|(x, g)| x - step * g).collect();
        let forward = next.iter().zip(&at).map(|(next, at)| next + momentum * (next - at));
        ahead = forward.collect();
        at = next;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_are_words_and_pairs_of_them() {
        assert_eq!(terms("I don't, know"), ["i", "don't", "know", "i don't", "don't know"]);
    }

    #[test]
    fn the_optimum_by_hand() {
        // One term, in one difference of 1: w = σ(−w), so w = 0.4010581.
        let w = minimise(&[vec![(0, 1.0)]], 1);
        assert!((w[0] - 0.401_058_1).abs() < 1e-6, "{w:?}");
        // The gradient vanishes: w = Σ σ(−⟨w, x⟩) x.
        let rows = [vec![(0, 0.5), (2, -0.3)], vec![(0, -0.2), (1, 0.9)], vec![(1, 0.4), (2, 0.8)]];
        let w = minimise(&rows, 3);
        let mut expected = [0.0; 3];
        for row in &rows {
            let product: f64 = row.iter().map(|&(term, x)| x * w[term]).sum();
            row.iter().for_each(|&(term, x)| expected[term] += x / (1.0 + product.exp()));
        }
        for (w, expected) in w.iter().zip(expected) {
            assert!((w - expected).abs() < 1e-6, "{w} {expected}");
        }
    }

    #[test]
    fn it_learns_words() {
        let pairs = [
            ["thank you for asking", "what the hell"],
            ["many thanks to you", "go to hell"],
            ["thanks for that", "a hell of a day"],
        ];
        let model = TfIdf::fit(&pairs);
        assert!(model.score("thanks") > 0.0 && model.score("hell") < 0.0);
        assert_eq!(model.score("unheard"), 0.0);
        assert_eq!(model.score(""), 0.0);
        let again = TfIdf::fit(&pairs);
        assert_eq!(
            again.score("thanks for hell").to_bits(),
            again.score("thanks for hell").to_bits()
        );
    }
}
