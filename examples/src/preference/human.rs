//! How well people's preferences are told by a linear head on a language model's states, against
//! words and length.

use anyhow::{Context, Result};
use model_hooks::HookPoint;
use model_hooks::text::{TextError, Tokenizer};
use rayon::prelude::*;
use serde_json::json;
use steering::{McNemar, Rate};

use super::bradley_terry::{Agreement, FitConfig, fit};
use super::model::{Read, Wanted, differences, read, texts};
use super::pairs::{ASSISTANT, divergence};
use super::results::Human;
use super::sources::{HumanPairs, N_FOLDS};
use super::stages::{Fingerprint, Stages};
use super::tf_idf::TfIdf;
use crate::assets::TextModel;
use crate::progress::{bar, tell};

/// Blocks that heads are tried after, as shares of the depth.
const DEPTHS: [f64; 4] = [0.45, 0.6, 0.7, 0.85];
/// Ridges that are tried.
const RIDGES: [f64; 3] = [0.3, 1.0, 3.0];
/// The one for the table of blocks.
const RIDGE: f64 = 1.0;
/// Pairs that are kept together.
const PAIRS_OF_A_STAGE: usize = 10;

/// What heads read of pairs, block by block: of each text the state of its last token, and the mean of
/// those of its last answer. A few thousand pairs tell more by both than by either.
struct States {
    layers: Vec<usize>,
    /// For each block, chosen − rejected of each pair.
    differences: Vec<Vec<Vec<f32>>>,
}

/// Cross-validates heads over all pairs, each told by heads that have not seen its part.
pub(super) fn cross_validate(
    loaded: &TextModel,
    human: &HumanPairs,
    stages: &Stages,
) -> Result<Human> {
    let states = states(loaded, human, stages)?;
    let n = human.pairs.len();
    let parts: Vec<usize> = (0..N_FOLDS).filter(|part| human.folds.contains(part)).collect();
    anyhow::ensure!(parts.len() > 2, "{n} pairs are too few to be divided into parts");
    let fitting = bar("fitting heads", (parts.len() * states.layers.len() * RIDGES.len()) as u64);
    let (mut head, mut layers) = (vec![0.0; n], Vec::new());
    for (nth, &part) in parts.iter().enumerate() {
        // A part that the head will learn from chooses the block and the ridge.
        let chooses = parts[(nth + 1) % parts.len()];
        let tried: Vec<(usize, f64)> =
            (0..states.layers.len()).flat_map(|layer| RIDGES.map(|ridge| (layer, ridge))).collect();
        let loss = |&(layer, ridge): &(usize, f64)| {
            let told = told(&states, human, layer, ridge, &[part, chooses], chooses);
            fitting.inc(1);
            Agreement::new(&told.into_iter().map(|told| told.1).collect::<Vec<f64>>()).loss
        };
        let losses: Vec<f64> = tried.par_iter().map(loss).collect();
        let best = tried.into_iter().zip(losses).min_by(|a, b| a.1.total_cmp(&b.1));
        let ((layer, ridge), _) = best.context("blocks to choose from")?;
        layers.push(states.layers[layer]);
        for (pair, difference) in told(&states, human, layer, ridge, &[part], part) {
            head[pair] = difference;
        }
    }
    fitting.finish();
    let by_layer = (0..states.layers.len()).into_par_iter().map(|layer| {
        let told = |&part: &usize| told(&states, human, layer, RIDGE, &[part], part);
        let n_right = parts.iter().flat_map(told).filter(|&(_, told)| told > 0.0).count();
        (states.layers[layer], Rate::wilson(n_right, n))
    });
    let by_layer: Vec<(usize, Rate)> = by_layer.collect();
    let by_words = by_words(human, &parts);
    let shorter: Vec<bool> = human
        .pairs
        .iter()
        .map(|pair| last_answer(&pair.chosen).len() < last_answer(&pair.rejected).len())
        .collect();
    let right: Vec<bool> = head.iter().map(|&difference| difference > 0.0).collect();
    let rate = |right: &[bool]| Rate::wilson(right.iter().filter(|&&right| right).count(), n);
    let against = |other: &[bool]| McNemar::of(right.iter().copied().zip(other.iter().copied()));
    Ok(Human {
        n,
        n_folds: parts.len(),
        head: Agreement::new(&head),
        layers,
        by_layer,
        tf_idf: rate(&by_words),
        shorter: rate(&shorter),
        against_tf_idf: against(&by_words),
        against_shorter: against(&shorter),
    })
}

/// Fits a head without some parts, and tells the pairs of one by it: each pair with the difference
/// of its rewards.
fn told(
    states: &States,
    human: &HumanPairs,
    layer: usize,
    ridge: f64,
    without: &[usize],
    part: usize,
) -> Vec<(usize, f64)> {
    let of = &states.differences[layer];
    let rows = of.iter().zip(&human.folds).filter(|(_, fold)| !without.contains(fold));
    let rows: Vec<Vec<f32>> = rows.map(|(row, _)| row.clone()).collect();
    let head = fit(&rows, FitConfig { ridge, tolerance: 1e-6 });
    let tell = |pair: usize| of[pair].iter().zip(&head).map(|(&x, w)| f64::from(x) * w).sum();
    let of_part = (0..of.len()).filter(|&pair| human.folds[pair] == part);
    of_part.map(|pair| (pair, tell(pair))).collect()
}

/// Whether words tell each pair right.
fn by_words(human: &HumanPairs, parts: &[usize]) -> Vec<bool> {
    let answers: Vec<[&str; 2]> = human
        .pairs
        .iter()
        .map(|pair| [last_answer(&pair.chosen), last_answer(&pair.rejected)])
        .collect();
    let mut right = vec![false; answers.len()];
    for &part in parts {
        let is_of = |pair: &usize| human.folds[*pair] == part;
        let learn: Vec<[&str; 2]> =
            (0..answers.len()).filter(|pair| !is_of(pair)).map(|pair| answers[pair]).collect();
        let model = TfIdf::fit(&learn);
        for pair in (0..answers.len()).filter(is_of) {
            let [chosen, rejected] = answers[pair];
            right[pair] = model.score(chosen) > model.score(rejected);
        }
    }
    right
}

/// What the assistant said last.
fn last_answer(text: &str) -> &str {
    let mark = ASSISTANT.trim_end();
    text.rsplit_once(mark).map_or(text, |(_, answer)| answer.trim())
}

/// The first token of what the assistant says last. What ends a text belongs to it, so that there is
/// one.
fn answer_begin(text: &str, ids: &[u32], tokenizer: &Tokenizer) -> Result<usize, TextError> {
    let mark = ASSISTANT.trim_end();
    let before = text.rfind(mark).map_or(0, |at| at + mark.len());
    Ok(divergence(&tokenizer.encode(&text[..before])?, ids).min(ids.len() - 1))
}

/// Reads the states of all pairs, or takes those that were kept.
fn states(loaded: &TextModel, human: &HumanPairs, stages: &Stages) -> Result<States> {
    let body = loaded.model.body();
    let (n_layers, d_model) = (body.config().n_layers, body.config().d_model);
    let block = |depth: f64| ((depth * n_layers as f64) as usize).clamp(1, n_layers) - 1;
    let mut layers: Vec<usize> = DEPTHS.map(block).to_vec();
    layers.dedup();
    let points: Vec<HookPoint> = layers.iter().map(|&layer| HookPoint::resid_post(layer)).collect();
    let mut by_layer = vec![Vec::with_capacity(human.tokens.len()); layers.len()];
    let n_tokens: usize = texts(&human.tokens).iter().map(|text| text.len()).sum();
    tell(&format!("{} pairs, {n_tokens} tokens", human.tokens.len()));
    let bar = bar("pairs of people", human.tokens.len() as u64);
    let stages_of = human.tokens.chunks(PAIRS_OF_A_STAGE);
    for (pairs, tokens) in human.pairs.chunks(PAIRS_OF_A_STAGE).zip(stages_of) {
        let ids = texts(tokens);
        let begins = pairs.iter().flat_map(|pair| [&pair.chosen, &pair.rejected]).zip(&ids);
        let begins = begins.map(|(text, ids)| answer_begin(text, ids, &loaded.tokenizer));
        let begins: Vec<usize> = begins.collect::<Result<_, _>>()?;
        let key = Fingerprint::new(&json!({
            "model": loaded.hash, "layers": layers, "texts": Fingerprint::of_texts(&ids),
            "answers": begins,
        }));
        let shape = [ids.len(), 2 * layers.len() * d_model];
        let rows = stages.rows("states", &key, shape, || {
            let read = read(body, &ids, Wanted { points: &points, last: false }, "")?;
            Ok(last_and_mean(&read, &ids, &begins, d_model))
        });
        let rows = rows.context("while reading the states of pairs")?;
        for (layer, by_layer) in by_layer.iter_mut().enumerate() {
            let of = |row: &Vec<f32>| row[2 * layer * d_model..][..2 * d_model].to_vec();
            by_layer.extend(differences(&rows.iter().map(of).collect::<Vec<_>>()));
        }
        bar.inc(pairs.len() as u64);
    }
    bar.finish();
    Ok(States { layers, differences: by_layer })
}

/// For each text, block by block: the state of its last token, and the mean from the answer's first
/// token on.
fn last_and_mean(read: &Read, texts: &[&[u32]], begins: &[usize], d_model: usize) -> Vec<Vec<f32>> {
    let mut rows = vec![vec![0.0; 2 * read.activations.len() * d_model]; texts.len()];
    for (token, &place) in read.places.iter().enumerate() {
        for &text in read.texts_at(place) {
            let (begin, n) = (begins[text], texts[text].len());
            if place.position < begin {
                continue;
            }
            let share = 1.0 / (n - begin) as f32;
            let of_blocks = rows[text].chunks_exact_mut(2 * d_model);
            for (row, activations) in of_blocks.zip(&read.activations) {
                let state = normed(&activations[token * d_model..][..d_model]);
                let (last, mean) = row.split_at_mut(d_model);
                mean.iter_mut().zip(&state).for_each(|(mean, x)| *mean += share * x);
                if place.position + 1 == n {
                    last.copy_from_slice(&state);
                }
            }
        }
    }
    rows
}

/// A state as a norm before a head would leave it.
fn normed(x: &[f32]) -> Vec<f32> {
    let square = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
    let scale = square.sqrt().max(f32::MIN_POSITIVE);
    x.iter().map(|x| x / scale).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preference::model::Place;
    use crate::preference::pairs::{LeftOut, PreferencePair};

    /// Pairs in five parts whose preference one of two dimensions tells, in the second block's states.
    fn human(n: usize) -> (HumanPairs, States) {
        let text = |answer: &str| format!("\n\nHuman: Hi\n\nAssistant: {answer}");
        let pair = |i: usize| PreferencePair {
            chosen: text(&format!("Fine, number {i} is good.")),
            rejected: text(&format!("Go, {i} and on and on it is, number and number.")),
        };
        let noise = |i: usize, k: f64| ((i as f64 * k).sin()) as f32;
        let states = States {
            layers: vec![1, 4],
            differences: vec![
                (0..n).map(|i| vec![noise(i, 1.7), noise(i, 2.9)]).collect(),
                (0..n).map(|i| vec![1.1 + noise(i, 1.3), noise(i, 2.3)]).collect(),
            ],
        };
        let human = HumanPairs {
            pairs: (0..n).map(pair).collect(),
            tokens: Vec::new(),
            folds: (0..n).map(|i| i % N_FOLDS).collect(),
            left_out: LeftOut::default(),
        };
        (human, states)
    }

    #[test]
    fn heads_tell_parts_that_they_have_not_seen() {
        let (human, states) = human(100);
        let good = told(&states, &human, 1, 0.01, &[2], 2);
        assert_eq!(good.len(), 20);
        assert!(good.iter().all(|&(pair, _)| human.folds[pair] == 2));
        let right = |told: &[(usize, f64)]| told.iter().filter(|told| told.1 > 0.0).count();
        assert!(right(&good) >= 18, "{}", right(&good));
        let blind = told(&states, &human, 0, 0.01, &[2], 2);
        assert!(right(&blind) <= 15, "{}", right(&blind));
        let words = by_words(&human, &[0, 1, 2, 3, 4]);
        assert!(words.iter().all(|&right| right));
    }

    #[test]
    fn swapping_the_texts_of_all_pairs_changes_nothing() {
        let (human, states) = human(60);
        let swapped = States {
            layers: states.layers.clone(),
            differences: states
                .differences
                .iter()
                .map(|of| of.iter().map(|row| row.iter().map(|x| -x).collect()).collect())
                .collect(),
        };
        let (told, back) =
            (told(&states, &human, 1, 0.1, &[0], 0), told(&swapped, &human, 1, 0.1, &[0], 0));
        for (a, b) in told.iter().zip(&back) {
            // Preferred the other way round, the head is turned: what it tells stays.
            assert!((a.1 - b.1).abs() < 1e-9, "{a:?} {b:?}");
        }
    }

    #[test]
    fn a_head_reads_the_last_token_and_the_mean_of_the_answer() {
        let place = |text, position| Place { group: 0, text, position };
        // Two texts that share two tokens, the first of which is left out; the first goes on with
        // three, whose answer begins at the second, the other with one.
        let read = Read {
            last: Vec::new(),
            activations: vec![vec![9.0, 9.0, 2.0, 0.0, 0.0, 5.0, 1.0, 1.0, 0.0, 3.0]],
            places: [(None, 1), (Some(0), 2), (Some(0), 3), (Some(0), 4), (Some(1), 2)]
                .map(|(text, position)| place(text, position))
                .to_vec(),
            groups: vec![vec![0, 1]],
        };
        let texts: [&[u32]; 2] = [&[1, 2, 3, 4, 5], &[1, 2, 6]];
        let rows = last_and_mean(&read, &texts, &[3, 1], 2);
        let r = 2f32.sqrt();
        // Normed, the states are [1, 1], [√2, 0], [0, √2], [1, 1] and [0, √2].
        let expected = [[1.0, 1.0, 0.5, (r + 1.0) / 2.0], [0.0, r, 0.5, (1.0 + r) / 2.0]];
        for (row, expected) in rows.iter().zip(expected) {
            let is_near = row.iter().zip(expected).all(|(x, e)| (x - e).abs() < 1e-6);
            assert!(is_near, "{row:?} is not {expected:?}");
        }
    }

    #[test]
    fn the_last_answer_is_what_is_compared() {
        assert_eq!(
            last_answer("\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: D e"),
            "D e"
        );
        assert_eq!(last_answer("\n\nHuman: A\n\nAssistant:"), "");
    }
}
