//! The pairs and the text of a run: planted ones, or those of a file.

use anyhow::{Context, Result, ensure};
use model_hooks::text::Tokenizer;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::options::{Options, Scale};
use super::pairs::{ASSISTANT, HUMAN, LeftOut, PairFilter, PreferencePair, TokenPair, read_pairs};
use super::planted::{PlantedPair, planted_pairs, questions, ties};
use crate::assets::load_texts;
use crate::corpus::Turn;
use crate::storage::hash_bytes;

/// Parts that pairs of a file are divided into.
pub(super) const N_FOLDS: usize = 5;
/// Tokens of a piece of chat that autoencoders are trained on, at most.
const CHAT_PIECE: usize = 96;
/// Every so many-th piece is held out.
const HELD_OUT: usize = 10;

/// What a run is about.
pub(super) struct Sources {
    /// Pairs to learn from.
    pub(super) train: Vec<TokenPair>,
    /// Pairs to learn from of which neither text is preferred.
    pub(super) ties: Vec<TokenPair>,
    /// Pairs to measure on and to explain.
    pub(super) test: Vec<TokenPair>,
    /// Where the pairs come from.
    pub(super) origin: Origin,
    /// Questions with answers that none of the pairs have.
    pub(super) hosts: Vec<Turn>,
    /// Other text: to train autoencoders on, and to measure them on.
    pub(super) chat: [Vec<Vec<u32>>; 2],
}

/// Where pairs come from.
pub(super) enum Origin {
    /// Made by known rules.
    Planted {
        /// The pairs to measure on.
        test: Vec<PlantedPair>,
    },
    /// Out of a file.
    File(HumanPairs),
}

/// Pairs of a file that the model can read.
pub(super) struct HumanPairs {
    pub(super) pairs: Vec<PreferencePair>,
    pub(super) tokens: Vec<TokenPair>,
    /// The part that each belongs to, which its own text decides.
    pub(super) folds: Vec<usize>,
    pub(super) left_out: LeftOut,
}

/// How texts become tokens.
#[derive(Clone, Copy)]
pub(super) struct Encoding<'a> {
    pub(super) tokenizer: &'a Tokenizer,
    /// What ends a text.
    pub(super) end: Option<u32>,
    /// Tokens of a text that is learnt from or explained, at most.
    pub(super) max_tokens: usize,
    /// Tokens of any text, at most.
    pub(super) n_ctx: usize,
}

impl Encoding<'_> {
    pub(super) fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.tokenizer.encode(text)?;
        ids.extend(self.end);
        Ok(ids)
    }

    fn filter(&self, max_tokens: usize) -> PairFilter {
        PairFilter { max_tokens, end: self.end }
    }

    /// Whether both texts of a pair can be learnt from.
    fn fits(&self, pair: &TokenPair) -> bool {
        pair.texts().iter().all(|text| text.len() <= self.max_tokens)
    }
}

/// A conversation of one question and one answer.
pub(super) fn conversation(prompt: &str, answer: &str) -> String {
    format!("{HUMAN}{prompt}{ASSISTANT}{answer}")
}

/// Finds the pairs and the text.
pub(super) fn sources(options: &Options, scale: &Scale, encoding: Encoding<'_>) -> Result<Sources> {
    match &options.pairs {
        None => planted(options, scale, encoding),
        Some(path) => {
            let pairs = read_pairs(path)?;
            human(pairs, options.n_pairs.unwrap_or(usize::MAX), scale, encoding)
                .with_context(|| format!("the pairs of {}", path.display()))
        }
    }
}

fn planted(options: &Options, scale: &Scale, encoding: Encoding<'_>) -> Result<Sources> {
    let mut dialogues = load_texts(&options.chat)?;
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    dialogues.shuffle(&mut rng);
    let mut turns = questions(&dialogues);
    let (n_train, n_test) = (scale.n_train_chats, scale.n_test_chats);
    ensure!(n_train > 1, "--n-chats {n_train}: asides come out of other chats, pass at least 2");
    let wanted = n_train + n_test + 1;
    ensure!(
        turns.len() >= wanted,
        "the chats hold {} questions with an answer of 3 to 25 words each, {wanted} are needed",
        turns.len()
    );
    let rest = turns.split_off(n_train + n_test);
    let of = |turns: &[Turn], seed: u64| -> Result<(Vec<PlantedPair>, Vec<TokenPair>)> {
        let mut made = planted_pairs(turns, seed);
        let tokens =
            made.iter().map(|pair| TokenPair::new(&pair.pair(), encoding.tokenizer, encoding.end));
        let mut tokens = tokens.collect::<Result<Vec<_>, _>>()?;
        let fits: Vec<bool> = tokens.iter().map(|pair| encoding.fits(pair)).collect();
        let (mut kept, mut kept_tokens) = (fits.iter(), fits.iter());
        made.retain(|_| *kept.next().expect("one for each"));
        tokens.retain(|_| *kept_tokens.next().expect("one for each"));
        ensure!(!made.is_empty(), "no text of at most {} tokens", encoding.max_tokens);
        Ok((made, tokens))
    };
    let (_, train) = of(&turns[..n_train], options.seed)?;
    let ties = ties(&turns[..n_train], options.seed);
    let (ties, _) = encoding.filter(encoding.max_tokens).keep(&ties, encoding.tokenizer)?;
    let ties = ties.into_iter().map(|(_, tie)| tie).collect();
    let (test, test_tokens) = of(&turns[n_train..], options.seed + 1)?;
    // What dialogues say apart from the questions that pairs are made of.
    let of_pairs = |turn: &String| turns.iter().any(|of| of.prompt == *turn || of.answer == *turn);
    let mut pieces = Vec::new();
    let mut n_tokens = 0;
    for dialogue in &dialogues {
        if n_tokens >= scale.n_chat_tokens {
            break;
        }
        if dialogue.turns.iter().any(of_pairs) {
            continue;
        }
        let mut text = String::new();
        for (nth, turn) in dialogue.turns.iter().enumerate() {
            text.push_str(if nth % 2 == 0 { HUMAN } else { ASSISTANT });
            text.push_str(turn);
        }
        let mut ids = encoding.tokenizer.encode(&text)?;
        ids.truncate(CHAT_PIECE.min(encoding.max_tokens));
        if ids.len() > 1 {
            n_tokens += ids.len();
            pieces.push(ids);
        }
    }
    let origin = Origin::Planted { test };
    Ok(Sources { train, ties, test: test_tokens, origin, hosts: rest, chat: apart(pieces) })
}

/// Most pieces, and those that are held out.
fn apart(pieces: Vec<Vec<u32>>) -> [Vec<Vec<u32>>; 2] {
    let mut parts = [Vec::new(), Vec::new()];
    for (nth, piece) in pieces.into_iter().enumerate() {
        parts[usize::from(nth % HELD_OUT == HELD_OUT - 1)].push(piece);
    }
    parts
}

fn human(
    mut pairs: Vec<PreferencePair>,
    n_pairs: usize,
    scale: &Scale,
    encoding: Encoding<'_>,
) -> Result<Sources> {
    // By what is in them: neither the order of the file nor a seed matters.
    pairs.sort_by_cached_key(|pair| hash_bytes(format!("{pair:?}").as_bytes()));
    pairs.truncate(n_pairs);
    let (kept, left_out) = encoding.filter(encoding.n_ctx).keep(&pairs, encoding.tokenizer)?;
    let (indices, tokens): (Vec<usize>, Vec<TokenPair>) = kept.into_iter().unzip();
    let pairs: Vec<PreferencePair> = indices.iter().map(|&index| pairs[index].clone()).collect();
    let folds: Vec<usize> = pairs.iter().map(fold).collect();
    let of = |is_test: bool| -> Vec<TokenPair> {
        let of = tokens.iter().zip(&folds).filter(|(_, fold)| (**fold == 0) == is_test);
        of.map(|(pair, _)| pair).filter(|pair| encoding.fits(pair)).cloned().collect()
    };
    let (train, test) = (of(false), of(true));
    for (what, n) in [("learn from", train.len()), ("measure on", test.len())] {
        ensure!(n > 1, "only {n} to {what}, of {} that can be used ({left_out:?})", tokens.len());
    }
    let hosts: Vec<Turn> = (pairs.iter().zip(&folds))
        .filter(|(_, fold)| **fold == 1)
        .filter_map(|(pair, _)| last_turn(&pair.rejected))
        .take(4 * scale.n_insertions)
        .collect();
    let origin = Origin::File(HumanPairs { pairs, tokens, folds, left_out });
    let (ties, chat) = (Vec::new(), [Vec::new(), Vec::new()]);
    Ok(Sources { train, ties, test, origin, hosts, chat })
}

/// The part that a pair belongs to, by how its conversation begins: those that begin alike are not
/// taken apart.
fn fold(pair: &PreferencePair) -> usize {
    let begin = pair.chosen.split(ASSISTANT.trim_end()).next().unwrap_or_default();
    let hash = hash_bytes(begin.trim().as_bytes());
    usize::from_str_radix(&hash[..8], 16).expect("hex") % N_FOLDS
}

/// The last question of a conversation, with its answer.
fn last_turn(text: &str) -> Option<Turn> {
    let (before, answer) = text.rsplit_once(ASSISTANT)?;
    let (_, prompt) = before.rsplit_once(HUMAN)?;
    let prompt = prompt.split(ASSISTANT.trim_end()).next()?;
    let turn = Turn { prompt: prompt.trim().to_owned(), answer: answer.trim().to_owned() };
    (!turn.prompt.is_empty() && !turn.answer.is_empty()).then_some(turn)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(question: &str, answers: [&str; 2]) -> PreferencePair {
        let text = |answer: &str| conversation(question, answer);
        PreferencePair { chosen: text(answers[0]), rejected: text(answers[1]) }
    }

    #[test]
    fn conversations_that_begin_alike_are_in_one_part() {
        let parts: Vec<usize> = (0..200)
            .map(|i| {
                let question = format!("Question {i}?");
                let first = fold(&pair(&question, ["a", "b"]));
                assert_eq!(first, fold(&pair(&question, ["c", "d"])));
                assert_eq!(first, fold(&pair(&question, ["b", "a"])), "swapped");
                first
            })
            .collect();
        for part in 0..N_FOLDS {
            let n = parts.iter().filter(|&&of| of == part).count();
            assert!((20..=60).contains(&n), "{n} of 200 in part {part}");
        }
    }

    #[test]
    fn the_last_turn_is_found() {
        let text = format!("{}{}", conversation("One?", "Yes."), conversation("Two?", "No."));
        let turn = last_turn(&text).unwrap();
        assert_eq!((turn.prompt.as_str(), turn.answer.as_str()), ("Two?", "No."));
        assert_eq!(last_turn(&conversation("One?", "")), None);
        assert_eq!(last_turn("nothing"), None);
    }
}
