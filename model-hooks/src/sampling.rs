//! Which token comes next.

use std::cmp::Ordering;

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How the next token is chosen from the logits.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub enum Sampling {
    /// The largest logit, the lowest id among equals.
    #[default]
    Greedy,
    /// A draw from the softmax of the logits, cut off in the order of the fields.
    Random(RandomSampling),
}

/// A draw from the softmax of the logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RandomSampling {
    /// Logits are divided by this.
    pub temperature: f64,
    /// Only so many of the likeliest tokens.
    pub top_k: Option<usize>,
    /// Only the likeliest tokens that together have at least this probability (Holtzman et al.,
    /// 2020).
    pub top_p: Option<f64>,
    /// Only tokens at least this share as likely as the likeliest (Nguyen et al., 2024).
    pub min_p: Option<f64>,
    /// Row `i` of a batch draws from stream `i` of this seed, whatever the other rows do.
    pub seed: u64,
}

/// An option of sampling that cannot be.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{name} is {actual}: expected {expected}")]
pub struct SamplingError {
    /// The option.
    pub name: &'static str,
    /// What it may be.
    pub expected: &'static str,
    /// What it is.
    pub actual: f64,
}

impl RandomSampling {
    /// From the whole softmax.
    pub fn new(temperature: f64, seed: u64) -> Self {
        Self { temperature, top_k: None, top_p: None, min_p: None, seed }
    }

    fn check(&self) -> Result<(), SamplingError> {
        let share = |x: f64| x > 0.0 && x <= 1.0;
        check("the temperature", "above 0, and finite", self.temperature, is_positive)?;
        let top_k = self.top_k.map_or(1.0, |k| k as f64);
        check("top_k", "at least 1", top_k, |k| k >= 1.0)?;
        check("top_p", "above 0 and at most 1", self.top_p.unwrap_or(1.0), share)?;
        check("min_p", "above 0 and at most 1", self.min_p.unwrap_or(1.0), share)
    }

    /// Draws an id.
    fn draw(&self, logits: &[f32], rng: &mut impl Rng) -> u32 {
        let mut tokens: Vec<(u32, f64)> =
            (0..).zip(logits).map(|(id, &x)| (id, f64::from(x) / self.temperature)).collect();
        if let Some(k) = self.top_k.filter(|&k| k < tokens.len()) {
            tokens.select_nth_unstable_by(k - 1, likeliest_first);
            tokens.truncate(k);
        }
        tokens.sort_unstable_by(likeliest_first);
        let largest = tokens[0].1;
        for (_, weight) in &mut tokens {
            let p = (*weight - largest).exp();
            *weight = if p.is_nan() { 0.0 } else { p };
        }
        if let Some(top_p) = self.top_p {
            let total: f64 = tokens.iter().map(|t| t.1).sum();
            let mut sum = 0.0;
            let enough = tokens.iter().position(|t| {
                sum += t.1;
                sum >= top_p * total
            });
            tokens.truncate(enough.map_or(tokens.len(), |last| last + 1));
        }
        if let Some(min_p) = self.min_p {
            tokens.retain(|t| t.1 >= min_p);
        }
        let total: f64 = tokens.iter().map(|t| t.1).sum();
        let mut left = rng.random::<f64>() * total;
        for &(id, weight) in &tokens {
            left -= weight;
            if left < 0.0 {
                return id;
            }
        }
        tokens[0].0
    }
}

/// The lowest id first among equals, NaN last.
fn likeliest_first(a: &(u32, f64), b: &(u32, f64)) -> Ordering {
    let by_logit = b.1.partial_cmp(&a.1).unwrap_or_else(|| a.1.is_nan().cmp(&b.1.is_nan()));
    by_logit.then(a.0.cmp(&b.0))
}

fn is_positive(x: f64) -> bool {
    x > 0.0 && x.is_finite()
}

fn check(
    name: &'static str,
    expected: &'static str,
    actual: f64,
    holds: impl Fn(f64) -> bool,
) -> Result<(), SamplingError> {
    match holds(actual) {
        true => Ok(()),
        false => Err(SamplingError { name, expected, actual }),
    }
}

/// Chooses the tokens of a generation.
pub(crate) struct Sampler {
    sampling: Sampling,
    repetition_penalty: f64,
    /// One for every row of the generation.
    rngs: Vec<ChaCha8Rng>,
}

impl Sampler {
    pub(crate) fn new(
        sampling: Sampling,
        repetition_penalty: f64,
        n_rows: usize,
    ) -> Result<Self, SamplingError> {
        let finite = "above 0, and finite";
        check("the repetition penalty", finite, repetition_penalty, is_positive)?;
        let rngs = match sampling {
            Sampling::Greedy => Vec::new(),
            Sampling::Random(random) => {
                random.check()?;
                let rng = |row| {
                    let mut rng = ChaCha8Rng::seed_from_u64(random.seed);
                    rng.set_stream(row);
                    rng
                };
                (0..n_rows as u64).map(rng).collect()
            }
        };
        Ok(Self { sampling, repetition_penalty, rngs })
    }

    /// The next token of a row, after `seen`, none of `banned`.
    pub(crate) fn next<'a>(
        &mut self,
        row: usize,
        logits: &mut [f32],
        seen: impl Iterator<Item = &'a u32>,
        banned: &[u32],
    ) -> u32 {
        if self.repetition_penalty != 1.0 {
            penalise(logits, seen, self.repetition_penalty as f32);
        }
        for &id in banned {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
        match self.sampling {
            Sampling::Greedy => largest(logits),
            Sampling::Random(random) => random.draw(logits, &mut self.rngs[row]),
        }
    }
}

/// Makes every token less likely that was seen already (Keskar et al., 2019).
fn penalise<'a>(logits: &mut [f32], seen: impl Iterator<Item = &'a u32>, penalty: f32) {
    let mut ids: Vec<u32> = seen.copied().collect();
    ids.sort_unstable();
    ids.dedup();
    for id in ids {
        let logit = &mut logits[id as usize];
        *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
    }
}

fn largest(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, &logit) in (0..).zip(logits) {
        if logit > best.1 {
            best = (id, logit);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, f32::NAN, 3.0, 2.0];

    fn shares(sampling: RandomSampling) -> [f64; 5] {
        const N: usize = 20_000;
        let mut sampler = Sampler::new(Sampling::Random(sampling), 1.0, 1).unwrap();
        let mut counts = [0; 5];
        for _ in 0..N {
            let id = sampler.next(0, &mut LOGITS.clone(), [].iter(), &[]);
            counts[id as usize] += 1;
        }
        counts.map(|n| f64::from(n) / N as f64)
    }

    fn assert_near(actual: [f64; 5], expected: [f64; 5]) {
        let near = actual.iter().zip(&expected).all(|(a, e)| (a - e).abs() < 0.015);
        assert!(near, "{actual:?} is not {expected:?}");
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals_and_no_nan() {
        let mut sampler = Sampler::new(Sampling::Greedy, 1.0, 1).unwrap();
        assert_eq!(sampler.next(0, &mut LOGITS.clone(), [].iter(), &[]), 1);
        assert_eq!(sampler.next(0, &mut LOGITS.clone(), [].iter(), &[1]), 3);
    }

    #[test]
    fn draws_follow_the_softmax_and_its_cuts() {
        let plain = RandomSampling::new(1.0, 7);
        // e^−2, 1, 1, e^−1 over their sum 2.5032.
        assert_near(shares(plain), [0.0541, 0.3995, 0.0, 0.3995, 0.1470]);
        let cold = RandomSampling { temperature: 0.5, ..plain };
        assert_near(shares(cold), [0.0085, 0.4640, 0.0, 0.4640, 0.0628]);
        let top_1 = RandomSampling { top_k: Some(1), ..plain };
        assert_eq!(shares(top_1), [0.0, 1.0, 0.0, 0.0, 0.0]);
        let top_p = RandomSampling { top_p: Some(0.79), ..plain };
        assert_near(shares(top_p), [0.0, 0.5, 0.0, 0.5, 0.0]);
        let min_p = RandomSampling { min_p: Some(0.3), ..plain };
        assert_near(shares(min_p), [0.0, 0.4223, 0.0, 0.4223, 0.1554]);
    }

    #[test]
    fn seen_tokens_are_penalised_once() {
        let mut logits = [2.0, -2.0, 1.0];
        penalise(&mut logits, [0, 1, 0].iter(), 2.0);
        assert_eq!(logits, [1.0, -4.0, 1.0]);
    }

    #[test]
    fn impossible_options_are_named() {
        let plain = RandomSampling::new(1.0, 7);
        for (sampling, name) in [
            (RandomSampling { temperature: 0.0, ..plain }, "the temperature"),
            (RandomSampling { top_k: Some(0), ..plain }, "top_k"),
            (RandomSampling { top_p: Some(1.5), ..plain }, "top_p"),
            (RandomSampling { min_p: Some(f64::NAN), ..plain }, "min_p"),
        ] {
            let error = Sampler::new(Sampling::Random(sampling), 1.0, 1).err().unwrap();
            assert_eq!(error.name, name);
        }
        assert!(Sampler::new(Sampling::Greedy, f64::INFINITY, 1).is_err());
    }
}
