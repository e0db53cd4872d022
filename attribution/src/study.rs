//! Conversations of which a metric is to be explained.

use burn::tensor::{Int, Tensor, TensorData};
use model_hooks::{Hook, HookPoint, LanguageModel, Positions, SharedPrefix, Site, TokenBatch};

use crate::error::AttributionError;
use crate::metric::{End, Metric};

/// Conversations, and the metric of each that is to be explained.
///
/// It runs passes over any choice of its conversations, the same one in several rows if need be, so
/// that many interventions share a pass. [`start_at`](Self::start_at) runs what comes before the
/// first intervention once for all of them.
#[derive(Debug, Clone)]
pub struct Study<'a, M> {
    metric: &'a M,
    conversations: Vec<Vec<u32>>,
    firsts: Vec<usize>,
    start: Option<Start>,
    batch_tokens: usize,
}

/// Where passes begin, if not with tokens.
#[derive(Debug, Clone)]
struct Start {
    /// Before block `layer`, of all conversations padded to one length.
    residual: Tensor<3>,
    layer: usize,
    /// A point that this residual stream stands at, and no block comes by any more.
    fires: Option<HookPoint>,
}

impl<'a, M: Metric> Study<'a, M> {
    /// Tokens per pass unless told otherwise.
    const BATCH_TOKENS: usize = 2048;

    /// Of these conversations, changed from their first tokens on.
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
        let firsts = vec![0; conversations.len()];
        let (start, batch_tokens) = (None, Self::BATCH_TOKENS);
        Ok(Self { metric, conversations, firsts, start, batch_tokens })
    }

    /// Leaves the positions of each conversation alone that come before its own first one: those
    /// that the two texts of a pair share, for example.
    ///
    /// # Panics
    /// If there is not one for each conversation.
    #[must_use]
    pub fn from_positions(mut self, firsts: Vec<usize>) -> Self {
        assert_eq!(
            firsts.len(),
            self.conversations.len(),
            "a first position for each conversation"
        );
        self.firsts = firsts;
        self
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
        let residual = body.run_until(&self.tokens(&self.all())?, layer, &mut ())?;
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

    /// The first position of each conversation that is changed.
    pub fn firsts(&self) -> &[usize] {
        &self.firsts
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

    /// The tokens of some conversations, the same one as often as it is named.
    pub(crate) fn tokens(&self, rows: &[usize]) -> Result<TokenBatch, AttributionError> {
        let ids: Vec<&[u32]> = rows.iter().map(|&row| &self.conversations[row][..]).collect();
        let body = self.body();
        Ok(TokenBatch::new(&ids, body.config(), body.device())?)
    }

    /// Where the columns of all conversations stand, padded to one length.
    pub(crate) fn positions(&self) -> Result<Positions, AttributionError> {
        Ok(self.tokens(&self.all())?.positions(0))
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
        let (positions, mut cache) =
            (tokens.positions(0), body.cache(SharedPrefix::default(), &tokens));
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
        let texts: Vec<&[u32]> = rows.iter().map(|&row| &self.conversations[row][..]).collect();
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
        let mut mask = Vec::with_capacity(n * self.firsts.len());
        for (row, &first) in self.firsts.iter().enumerate() {
            let changed =
                |column| positions.get(row, column).is_some_and(|p| p >= first.max(least));
            mask.extend((0..n).map(|column| f32::from(changed(column))));
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
