//! Conversations of which a metric is to be explained.

use std::ops::Range;

use burn::tensor::{Int, Tensor, TensorData};
use model_hooks::{
    Activation, ActivationCache, Hook, HookPoint, KvCache, LanguageModel, Positions, SharedPrefix,
    Site, TokenBatch,
};

use crate::activations::position_axis;
use crate::error::AttributionError;
use crate::metric::{End, Metric};
use crate::site::other_run;

/// Conversations, and the metric of each that is to be explained.
///
/// It runs passes over any choice of its conversations, the same one in several rows if need be, so
/// that many interventions share a pass. [`share_prefix`](Self::share_prefix) and
/// [`start_at`](Self::start_at) run what comes before the first intervention, of the tokens and of
/// the blocks, once for all of them.
#[derive(Debug, Clone)]
pub struct Study<'a, M> {
    metric: &'a M,
    conversations: Vec<Vec<u32>>,
    /// The positions of each that are changed.
    changed: Vec<Range<usize>>,
    /// What all conversations begin with, and passes leave out.
    prefix: SharedPrefix,
    start: Option<Start>,
    batch_tokens: usize,
}

/// Where passes begin, if not with tokens.
#[derive(Debug, Clone)]
struct Start {
    /// Before block `layer`, of what follows the prefix in all conversations, padded to one length.
    residual: Tensor<3>,
    layer: usize,
    /// A point that this residual stream stands at, and no block comes by any more.
    fires: Option<HookPoint>,
}

impl<'a, M: Metric> Study<'a, M> {
    /// Tokens per pass unless told otherwise.
    const BATCH_TOKENS: usize = 2048;

    /// Of these conversations, changed at all their tokens.
    ///
    /// # Errors
    /// If there are none, or they do not fit the model.
    pub fn new(
        metric: &'a M,
        conversations: &[impl AsRef<[u32]>],
    ) -> Result<Self, AttributionError> {
        let body = metric.body();
        TokenBatch::new(conversations, body.config(), body.device())?;
        let conversations: Vec<_> = conversations.iter().map(|ids| ids.as_ref().to_vec()).collect();
        let changed = conversations.iter().map(|ids| 0..ids.len()).collect();
        let (prefix, start, batch_tokens) = (SharedPrefix::default(), None, Self::BATCH_TOKENS);
        Ok(Self { metric, conversations, changed, prefix, start, batch_tokens })
    }

    /// Leaves the positions of each conversation alone that come before its own first one: those
    /// that the two texts of a pair share, for example.
    ///
    /// # Panics
    /// If there is not one for each conversation, or a prefix is shared already.
    #[must_use]
    pub fn from_positions(mut self, firsts: Vec<usize>) -> Self {
        assert_eq!(
            firsts.len(),
            self.conversations.len(),
            "a first position for each conversation"
        );
        assert_eq!(self.prefix.n_tokens(), 0, "a prefix is shared already");
        for (changed, first) in self.changed.iter_mut().zip(firsts) {
            changed.start = first;
        }
        self
    }

    /// Leaves the positions of each conversation alone from its own end on: the token that a reward
    /// is read at, for example, which gathers what the others say.
    ///
    /// # Panics
    /// If there is not one for each conversation.
    #[must_use]
    pub fn to_positions(mut self, ends: Vec<usize>) -> Self {
        assert_eq!(ends.len(), self.conversations.len(), "an end for each conversation");
        for (changed, end) in self.changed.iter_mut().zip(ends) {
            changed.end = end;
        }
        self
    }

    /// Runs the tokens that all conversations begin with now, as far as they are left alone, and
    /// never again. Nothing changes but the time it takes.
    ///
    /// # Errors
    /// If the pass fails.
    ///
    /// # Panics
    /// If the study starts behind some blocks already.
    pub fn share_prefix(mut self) -> Result<Self, AttributionError> {
        assert!(self.start.is_none(), "a prefix is shared before blocks are");
        let [first, others @ ..] = &self.conversations[..] else { return Ok(self) };
        let common = |other: &Vec<u32>| first.iter().zip(other).take_while(|(a, b)| a == b).count();
        let common = others.iter().map(common).min().unwrap_or(first.len());
        // The last token of each stays, as the metric is read there.
        let lengths = self.conversations.iter().map(|ids| ids.len() - 1);
        let firsts = self.changed.iter().map(|changed| changed.start);
        let alone = firsts.chain(lengths).min().unwrap_or(0);
        let prefix = &first[..common.min(alone)];
        if !prefix.is_empty() {
            self.prefix = self.body().prefix(prefix, &mut ())?;
        }
        Ok(self)
    }

    /// Tokens per pass where many interventions are measured, at most (a longer conversation runs
    /// alone).
    #[must_use]
    pub fn with_batch_tokens(mut self, batch_tokens: usize) -> Self {
        self.batch_tokens = batch_tokens;
        self
    }

    /// Runs what comes before `point` now, and never again. Hooks at earlier points will not fire,
    /// which is an error of the pass.
    ///
    /// # Errors
    /// If the model does not have the point.
    pub fn start_at(mut self, point: HookPoint) -> Result<Self, AttributionError> {
        let body = self.body();
        body.check_point(point)?;
        let n_layers = body.config().n_layers;
        let (layer, fires) = match point {
            HookPoint::Embed | HookPoint::PosEmbed => {
                self.start = None;
                return Ok(self);
            }
            HookPoint::Block { layer, site: Site::ResidPost } => (layer + 1, Some(point)),
            HookPoint::Block { layer, .. } => (layer, None),
            HookPoint::LnFinalScale | HookPoint::LnFinalNormalized => (n_layers, None),
        };
        let tokens = self.tokens(&self.all())?;
        let (positions, mut cache) = self.pass(&tokens);
        let residual = body.embed(&tokens, &positions, &mut ());
        let residual = body.blocks(residual, 0..layer, &mut cache, &mut ())?;
        self.start = Some(Start { residual, layer, fires });
        Ok(self)
    }

    /// The transformer.
    pub fn body(&self) -> &'a LanguageModel {
        self.metric.body()
    }

    /// The token ids of each conversation.
    pub fn conversations(&self) -> &[Vec<u32>] {
        &self.conversations
    }

    /// The positions of each conversation that are changed.
    pub fn changed(&self) -> &[Range<usize>] {
        &self.changed
    }

    /// The metric of each conversation as it is.
    ///
    /// # Errors
    /// If a pass fails.
    pub fn clean(&self) -> Result<Vec<f64>, AttributionError> {
        self.in_batches(&self.all(), |_, rows| self.measure(rows, &mut ()))
    }

    /// The metric of each conversation with a hook in the pass.
    ///
    /// # Shapes
    /// `[n_conversations]`, in the hook's graph.
    ///
    /// # Errors
    /// If the pass fails.
    pub fn metric<H: Hook>(&self, hook: &mut H) -> Result<Tensor<1>, AttributionError> {
        self.measure(&self.all(), hook)
    }

    pub(crate) fn all(&self) -> Vec<usize> {
        (0..self.conversations.len()).collect()
    }

    /// Tokens per pass, at most.
    pub(crate) fn batch_tokens(&self) -> usize {
        self.batch_tokens
    }

    /// Tokens that all conversations begin with, and passes leave out.
    pub(crate) fn n_prefix(&self) -> usize {
        self.prefix.n_tokens()
    }

    /// What follows the prefix in a conversation: the tokens that passes run.
    pub(crate) fn own(&self, row: usize) -> &[u32] {
        &self.conversations[row][self.n_prefix()..]
    }

    /// The tokens of some conversations behind the prefix, the same one as often as it is named.
    pub(crate) fn tokens(&self, rows: &[usize]) -> Result<TokenBatch, AttributionError> {
        let ids: Vec<&[u32]> = rows.iter().map(|&row| self.own(row)).collect();
        let body = self.body();
        Ok(TokenBatch::new(&ids, body.config(), body.device())?)
    }

    /// Where the columns of all conversations behind the prefix stand, padded to one length.
    pub(crate) fn positions(&self) -> Result<Positions, AttributionError> {
        Ok(self.tokens(&self.all())?.positions(self.n_prefix()))
    }

    /// What a pass over some tokens needs.
    fn pass(&self, tokens: &TokenBatch) -> (Positions, KvCache) {
        let cache = self.body().cache(self.prefix.clone(), tokens);
        (tokens.positions(self.n_prefix()), cache)
    }

    /// The activation at a point, of all conversations behind the prefix.
    pub(crate) fn captured(&self, point: HookPoint) -> Result<Activation, AttributionError> {
        if let Some(Start { residual, fires: Some(fires), .. }) = &self.start
            && *fires == point
        {
            return Ok(Activation::new(residual.clone()));
        }
        let kept = |cache: &ActivationCache| cache.iter().next().expect("captured").1.clone();
        if self.n_prefix() == 0 {
            return Ok(kept(&self.body().capture(&self.tokens(&self.all())?, [point])?));
        }
        self.check_by_position(point)?;
        let mut cache = ActivationCache::new([point]);
        self.metric(&mut cache)?;
        Ok(kept(&cache))
    }

    /// The activation at a point in another run of as many tokens, without those that stand where
    /// the prefix does.
    pub(crate) fn captured_other(
        &self,
        point: HookPoint,
        other: &[Vec<u32>],
    ) -> Result<Activation, AttributionError> {
        let tokens = other_run(self, other)?;
        let cache = self.body().capture(&tokens, [point])?;
        let kept = cache.iter().next().expect("captured").1.clone();
        if self.n_prefix() == 0 {
            return Ok(kept);
        }
        self.check_by_position(point)?;
        let n = self.positions()?.n_columns();
        let padding = tokens.dims()[1] - n;
        Ok(match kept {
            Activation::Rank3(x) => Activation::new(x.narrow(1, padding, n)),
            Activation::Rank4(x) => Activation::new(x.narrow(1, padding, n)),
        })
    }

    /// Rows for every position can be told apart from those of the prefix.
    fn check_by_position(&self, point: HookPoint) -> Result<(), AttributionError> {
        match position_axis(point) {
            1 => Ok(()),
            _ => Err(AttributionError::NotByPosition { point }),
        }
    }

    /// One pass over some conversations.
    ///
    /// # Shapes
    /// `[rows]`.
    pub(crate) fn measure<H: Hook>(
        &self,
        rows: &[usize],
        hook: &mut H,
    ) -> Result<Tensor<1>, AttributionError> {
        let body = self.body();
        let tokens = self.tokens(rows)?;
        let (positions, mut cache) = self.pass(&tokens);
        let n_layers = body.config().n_layers;
        let (residual, layer) = match &self.start {
            None => (body.embed(&tokens, &positions, hook), 0),
            Some(Start { residual, layer, fires }) => {
                let x = of_rows(residual, rows, positions.n_columns());
                let x = match *fires {
                    Some(point) if hook.wants(point) => hook.at(point, x, &positions),
                    _ => x,
                };
                (x, *layer)
            }
        };
        let residual = body.blocks(residual, layer..n_layers, &mut cache, hook)?;
        let end = End { residual, positions: &positions, conversations: rows };
        let metric = self.metric.measure(end, hook)?;
        hook.finish()?;
        assert_eq!(metric.dims(), [rows.len()], "a metric has one number for each conversation");
        Ok(metric)
    }

    /// Runs conversations in batches, in order, and reads the metrics back. `run` is given the first
    /// of `rows` that the batch holds, and the batch.
    pub(crate) fn in_batches(
        &self,
        rows: &[usize],
        mut run: impl FnMut(usize, &[usize]) -> Result<Tensor<1>, AttributionError>,
    ) -> Result<Vec<f64>, AttributionError> {
        let texts: Vec<&[u32]> = rows.iter().map(|&row| self.own(row)).collect();
        let mut metrics = Vec::with_capacity(rows.len());
        for batch in model_hooks::batches_in_order(&texts, self.batch_tokens) {
            let first = batch.start;
            metrics.extend(run(first, &rows[batch])?.into_data().iter::<f64>());
        }
        Ok(metrics)
    }

    /// 1 where a column is a token that may be changed, else 0: one for every position of every
    /// conversation in turn. `least` is the first position of any conversation that may be.
    ///
    /// # Shapes
    /// `[batch · pos, 1]`.
    pub(crate) fn mask(&self, least: usize) -> Result<Tensor<2>, AttributionError> {
        let positions = self.positions()?;
        let n = positions.n_columns();
        let mut mask = Vec::with_capacity(n * self.changed.len());
        for (row, changed) in self.changed.iter().enumerate() {
            let is_changed = |position: usize| position >= least && changed.contains(&position);
            let is_changed = |column| positions.get(row, column).is_some_and(is_changed);
            mask.extend((0..n).map(|column| f32::from(is_changed(column))));
        }
        let shape = [mask.len(), 1];
        Ok(Tensor::from_data(TensorData::new(mask, shape), self.body().device()))
    }
}

/// Some rows of a padded batch, cut to their last `n` columns.
///
/// # Shapes
/// `x`: `[batch, pos, width]`; result: `[rows, n, width]`.
pub(crate) fn of_rows<const D: usize>(x: &Tensor<D>, rows: &[usize], n: usize) -> Tensor<D> {
    let shape = x.dims();
    let picked = if rows.iter().copied().eq(0..shape[0]) {
        x.clone()
    } else {
        let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        let indices = TensorData::new(rows.clone(), [rows.len()]);
        x.clone().select(0, Tensor::<1, Int>::from_data(indices, &x.device()))
    };
    match shape[1] - n {
        0 => picked,
        padding => picked.narrow(1, padding, n),
    }
}
