//! A preference model: a language model with a head learnt from pairs.

use anyhow::{Context, Result};
use burn::tensor::{Tensor, TensorData};
use model_hooks::{
    ActivationCache, HookPoint, LanguageModel, RewardHead, RewardModel, SharedPrefix, TokenBatch,
    batches_in_order,
};

use super::bradley_terry::{Agreement, FitConfig, fit};
use super::pairs::{TokenPair, divergence};
use crate::progress::bar;

/// Tokens per forward pass.
pub(super) const BATCH_TOKENS: usize = 1024;
/// Tokens that texts have in common before it pays to run those by themselves.
const LEAST_SHARED: usize = 12;

/// What is wanted of a pass over texts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    /// Points of the residual stream.
    pub(super) points: &'a [HookPoint],
    /// Whether what a head reads is.
    pub(super) last: bool,
}

/// What a pass over texts leaves.
pub(super) struct Read {
    /// The normed residual stream at the last token of each text, in their order, if wanted.
    pub(super) last: Vec<Vec<f32>>,
    /// Activations at each of the points, token by token: the first of each text left out. What
    /// texts begin with in common comes once.
    pub(super) activations: Vec<Vec<f32>>,
    /// Which token each activation is of.
    pub(super) places: Vec<Place>,
    /// Texts that were run together behind what they have in common.
    pub(super) groups: Vec<Vec<usize>>,
}

/// A token of some texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Index of the group.
    pub(super) group: usize,
    /// The text, or none where it stands in what all of the group have in common.
    pub(super) text: Option<usize>,
    pub(super) position: usize,
}

/// Runs texts once, those that begin alike behind what they have in common.
pub(super) fn read(
    body: &LanguageModel,
    texts: &[&[u32]],
    wanted: Wanted<'_>,
    label: &'static str,
) -> Result<Read> {
    let (config, device) = (body.config(), body.device());
    // A head that hands through what it reads.
    let states =
        RewardModel::new(body.clone(), RewardHead::new(Tensor::eye(config.d_model, device)));
    let n_blocks = if wanted.last { config.n_layers } else { depth(wanted.points) };
    let mut read = Read {
        last: vec![Vec::new(); texts.len()],
        activations: vec![Vec::new(); wanted.points.len()],
        places: Vec::new(),
        groups: Vec::new(),
    };
    let bar = bar(label, texts.iter().map(|text| text.len() as u64).sum());
    for (n_shared, group) in groups(texts) {
        let group_idx = read.groups.len();
        let prefix = if n_shared == 0 {
            SharedPrefix::default()
        } else {
            let mut cache = ActivationCache::new(wanted.points.iter().copied());
            let ids = &texts[group[0]][..n_shared];
            let prefix = body.prefix(ids, &mut cache).context("while reading texts")?;
            read.keep(&cache, wanted.points, config.d_model, &[(None, n_shared)], [0, group_idx])?;
            prefix
        };
        let mut order = group.clone();
        order.sort_by_key(|&text| texts[text].len());
        let own: Vec<&[u32]> = order.iter().map(|&text| &texts[text][n_shared..]).collect();
        for batch in batches_in_order(&own, BATCH_TOKENS) {
            let tokens = TokenBatch::new(&own[batch.clone()], config, device)?;
            let mut cache = body.cache(prefix.clone(), &tokens);
            let positions = tokens.positions(n_shared);
            let mut kept = ActivationCache::new(wanted.points.iter().copied());
            let residual = body.embed(&tokens, &positions, &mut kept);
            let residual = body.blocks(residual, 0..n_blocks, &mut cache, &mut kept);
            let residual = residual.context("while reading texts")?;
            if wanted.last {
                let last = states.score(residual, &positions, &mut ());
                let last: Vec<f32> = last.into_data().iter().collect();
                for (state, &text) in last.chunks_exact(config.d_model).zip(&order[batch.clone()]) {
                    read.last[text] = state.to_vec();
                }
            }
            let rows: Vec<(Option<usize>, usize)> = order[batch]
                .iter()
                .map(|&text| (Some(text), texts[text].len() - n_shared))
                .collect();
            read.keep(&kept, wanted.points, config.d_model, &rows, [n_shared, group_idx])?;
        }
        bar.inc(group.iter().map(|&text| texts[text].len() as u64).sum());
        read.groups.push(group);
    }
    bar.finish();
    Ok(read)
}

/// Blocks that have to be run for these points of the residual stream.
fn depth(points: &[HookPoint]) -> usize {
    let layer = |point: &HookPoint| match *point {
        HookPoint::Block { layer, .. } => layer + 1,
        _ => 0,
    };
    points.iter().map(layer).max().unwrap_or(0)
}

impl Read {
    /// Keeps what a cache holds of some rows: which text each is, and its tokens.
    fn keep(
        &mut self,
        cache: &ActivationCache,
        points: &[HookPoint],
        d_model: usize,
        rows: &[(Option<usize>, usize)],
        [n_before, group]: [usize; 2],
    ) -> Result<()> {
        let columns = rows.iter().map(|&(_, n)| n).max().unwrap_or(0);
        // Position 0 is unlike all others.
        let first = usize::from(n_before == 0);
        for (point, kept) in points.iter().zip(&mut self.activations) {
            let x = cache.get::<3>(*point).context("a point of the residual stream")?;
            let x: Vec<f32> = x.into_data().iter().collect();
            for (row, &(_, n)) in rows.iter().enumerate() {
                let begin = row * columns + columns - n + first;
                kept.extend_from_slice(&x[begin * d_model..(row + 1) * columns * d_model]);
            }
        }
        for &(text, n) in rows {
            let place = |own| Place { group, text, position: n_before + own };
            self.places.extend((first..n).map(place));
        }
        Ok(())
    }

    /// The texts that a token stands in.
    pub(super) fn texts_at(&self, place: Place) -> &[usize] {
        match &place.text {
            None => &self.groups[place.group],
            Some(text) => {
                let group = &self.groups[place.group];
                let at = group.iter().position(|other| other == text);
                std::slice::from_ref(&group[at.expect("a text of its group")])
            }
        }
    }
}

/// Texts that begin alike, with the number of tokens that they have in common: zero where it would
/// not pay to run those by themselves.
fn groups(texts: &[&[u32]]) -> Vec<(usize, Vec<usize>)> {
    let mut order: Vec<usize> = (0..texts.len()).collect();
    order.sort_by_key(|&text| texts[text]);
    let mut groups: Vec<(usize, Vec<usize>)> = Vec::new();
    for text in order {
        let own = texts[text].len() - 1;
        if let Some((n_shared, group)) = groups.last_mut() {
            let n = divergence(&texts[group[0]][..*n_shared], texts[text]).min(own);
            if n >= LEAST_SHARED && 2 * n >= own {
                *n_shared = n;
                group.push(text);
                continue;
            }
        }
        groups.push((own, vec![text]));
    }
    for (n_shared, group) in &mut groups {
        if group.len() == 1 {
            *n_shared = 0;
        }
    }
    groups
}

/// Ridges that are tried.
const RIDGES: [f64; 4] = [1e-3, 1e-2, 1e-1, 1.0];
/// The last pairs, one of so many, choose the ridge.
pub(super) const CHOOSES: usize = 5;

/// A head fitted to pairs, whose states come two by two, the preferred one first, and to ties, which
/// count as preferred both ways. The last fifth of the pairs chooses the ridge, by its loss under
/// heads that learnt from the others.
pub(super) fn head(pairs: &[Vec<f32>], ties: &[Vec<f32>]) -> Vec<f32> {
    let differences = differences(pairs);
    let mut both_ways = self::differences(ties);
    let turned: Vec<Vec<f32>> =
        both_ways.iter().map(|row| row.iter().map(|x| -x).collect()).collect();
    both_ways.extend(turned);
    let learn_from = |pairs: &[Vec<f32>], ridge: f64| {
        let config = FitConfig { ridge, ..FitConfig::default() };
        fit(&[pairs, both_ways.as_slice()].concat(), config)
    };
    let (learn, choose) = differences.split_at(differences.len() - differences.len() / CHOOSES);
    let loss = |ridge: f64| {
        let head = learn_from(learn, ridge);
        let tell = |row: &Vec<f32>| -> f64 {
            row.iter().zip(&head).map(|(&x, weight)| f64::from(x) * weight).sum()
        };
        let told = choose.iter().map(tell);
        Agreement::new(&told.collect::<Vec<f64>>()).loss
    };
    let losses = RIDGES.map(|ridge| (ridge, loss(ridge)));
    let best = losses.into_iter().min_by(|a, b| a.1.total_cmp(&b.1));
    let (ridge, _) = best.expect("some ridges");
    learn_from(&differences, ridge).into_iter().map(|weight| weight as f32).collect()
}

/// Chosen − rejected, of states that come two by two.
pub(super) fn differences(states: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let difference = |pair: &[Vec<f32>]| -> Vec<f32> {
        pair[0].iter().zip(&pair[1]).map(|(chosen, rejected)| chosen - rejected).collect()
    };
    states.chunks_exact(2).map(difference).collect()
}

/// The model with the head on it.
pub(super) fn with_head(body: &LanguageModel, head: &[f32]) -> RewardModel {
    let weight = TensorData::new(head.to_vec(), [1, head.len()]);
    RewardModel::new(body.clone(), RewardHead::new(Tensor::from_data(weight, body.device())))
}

/// The rewards that the model gives to states that its head reads.
pub(super) fn rewards(states: &[Vec<f32>], model: &RewardModel) -> Vec<f64> {
    let head: Vec<f32> = model.head().weight().into_data().iter().collect();
    let d_model = model.body().config().d_model;
    let reward = |state: &Vec<f32>| {
        let products = state.iter().zip(&head[..d_model]);
        products.map(|(&x, &weight)| f64::from(x) * f64::from(weight)).sum()
    };
    states.iter().map(reward).collect()
}

/// The texts of pairs, the preferred one of each first.
pub(super) fn texts(pairs: &[TokenPair]) -> Vec<&[u32]> {
    pairs.iter().flat_map(TokenPair::texts).collect()
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use model_hooks::load;

    use super::*;

    fn body() -> LanguageModel {
        let mut checkpoint = load::open(&goldens::own("models/llama_mha")).unwrap();
        let device = Device::flex();
        LanguageModel::load(checkpoint.config, checkpoint.tensors.as_mut(), &device).unwrap()
    }

    #[test]
    fn what_was_read_is_what_the_model_scores_and_captures() {
        let (body, device) = (body(), Device::flex());
        let shared: Vec<u32> = (20..34).collect();
        let with = |end: &[u32]| [&shared, end].concat();
        // Three that begin alike, one that is the beginning of another, and two by themselves.
        let rows = [
            with(&[5, 9, 40]),
            vec![44, 3],
            with(&[77, 12, 8, 5, 6]),
            with(&[5]),
            vec![7, 7, 19],
            with(&[5, 9, 40, 41]),
        ];
        let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        let point = HookPoint::resid_post(1);
        let wanted = Wanted { points: &[point], last: true };
        let read = read(&body, &rows, wanted, "reading").unwrap();
        assert_eq!(read.groups.iter().map(Vec::len).max(), Some(4));
        let head: Vec<f32> = (0..48).map(|i| (i as f32 * 0.7).sin()).collect();
        let model = with_head(&body, &head);
        let mut seen = vec![0; rows.len()];
        for (text, ids) in rows.iter().enumerate() {
            let tokens = TokenBatch::new(&[ids], body.config(), &device).unwrap();
            let reward: Vec<f64> =
                model.scores(&tokens, &mut ()).unwrap().into_data().iter().collect();
            let found = rewards(&read.last[text..=text], &model)[0];
            assert!((reward[0] - found).abs() < 1e-4, "{text}: {} {found}", reward[0]);
            let x = body.capture(&tokens, [point]).unwrap().get::<3>(point).unwrap();
            let x: Vec<f32> = x.into_data().iter().collect();
            for (row, &place) in read.places.iter().enumerate() {
                if read.texts_at(place).contains(&text) {
                    let expected = &x[place.position * 48..][..48];
                    let actual = &read.activations[0][row * 48..][..48];
                    goldens::assert_close("activation", actual, expected, 1e-4);
                    seen[text] += 1;
                }
            }
        }
        let expected: Vec<usize> = rows.iter().map(|ids| ids.len() - 1).collect();
        assert_eq!(seen, expected, "every token but the first");
        let shallow = Wanted { points: &[point], last: false };
        let shallow = super::read(&body, &rows, shallow, "reading").unwrap();
        assert_eq!(shallow.places, read.places);
        goldens::assert_close("alike", &shallow.activations[0], &read.activations[0], 1e-5);
    }

    #[test]
    fn a_head_prefers_what_it_learnt() {
        let state = |sign: f32, noise: f32| {
            let mut state = vec![0.0; 48];
            state[..3].copy_from_slice(&[sign + noise, 3.0 * noise, 1.0]);
            state
        };
        let states: Vec<Vec<f32>> = (0..40)
            .flat_map(|i| {
                let noise = (i as f32 * 1.3).sin() * 0.2;
                [state(1.0, noise), state(-1.0, -noise)]
            })
            .collect();
        let learnt = head(&states, &[]);
        let told = |states: &[Vec<f32>], head: &[f32]| rewards(states, &with_head(&body(), head));
        let told_pairs = told(&states, &learnt);
        assert!(told_pairs.chunks_exact(2).all(|pair| pair[0] > pair[1] + 1.0), "{told_pairs:?}");
        // What ties differ in goes along with a preference, and is learnt not to matter.
        let mut tied = state(0.0, 0.0);
        tied[1] = 0.5;
        let ties = vec![[state(0.0, 0.0), tied]; 20].concat();
        let apart = |head: &[f32]| {
            let told = told(&ties, head);
            (told[0] - told[1]).abs()
        };
        let (without, with) = (apart(&learnt), apart(&head(&states, &ties)));
        assert!(with < 0.5 * without, "{without} {with}");
    }
}
