//! What all kinds with an encoder share: entries, reconstructions, and the sums of gradients.

use burn::tensor::{IndexingUpdateOp, Int, Tensor};
use kernels::{
    Search, Select, fit_residual, sparse_decode, sparse_dot, sparse_encode, sparse_encode_by,
    sparse_encode_with, sparse_gather, sparse_grad_rows, sparse_sum,
};

use super::aux_k::latents as latents_tensor;
use super::{Batch, ErrorMeasure, Objective, Term, Upstream};
use crate::sae::{row_norms, row_squares};
use crate::train::parameters::{ParameterName, Parameters};

/// Some entries of a matrix `[n, d_sae]`.
#[derive(Debug, Clone)]
pub(super) struct Entries {
    /// `[n, k]`
    pub(super) indices: Tensor<2, Int>,
    /// `[n, k]`; zero in places that only fill a row up.
    pub(super) values: Tensor<2>,
}

impl Entries {
    /// Other values in the same places.
    pub(super) fn with(&self, values: Tensor<2>) -> Self {
        Self { indices: self.indices.clone(), values }
    }

    /// `vector[index]` for every entry.
    pub(super) fn gather(&self, vector: Tensor<1>) -> Tensor<2> {
        sparse_gather(self.indices.clone(), vector)
    }

    /// The first `k` of every row.
    pub(super) fn first(&self, k: usize) -> Self {
        Self {
            indices: self.indices.clone().narrow(1, 0, k),
            values: self.values.clone().narrow(1, 0, k),
        }
    }
}

/// `tensor` where `values` are above zero, zero elsewhere.
pub(super) fn where_positive(tensor: Tensor<2>, values: Tensor<2>) -> Tensor<2> {
    tensor.mask_fill(values.lower_equal_elem(0.0), 0.0)
}

/// Entries of some latents, as entries of all.
pub(super) fn globally(latents: &Tensor<1, Int>, among: Entries) -> Entries {
    let Entries { indices, values } = among;
    let [n, k] = indices.dims();
    let indices = latents.clone().select(0, indices.reshape([n * k])).reshape([n, k]);
    Entries { indices, values }
}

pub(super) fn number(scalar: Tensor<1>) -> f64 {
    f64::from(scalar.into_scalar::<f32>())
}

/// Where a loss behind the reconstruction falls.
pub(super) type Downstream<'a> = &'a mut dyn FnMut(Tensor<2>) -> Upstream;

/// One batch on its way there and back.
pub(super) struct Pass<'a> {
    pub(super) parameters: &'a Parameters,
    pub(super) n: usize,
    pub(super) d_sae: usize,
    /// What the encoder reads.
    x: Tensor<2>,
    /// What is to be reconstructed.
    y: Tensor<2>,
    /// What entries have to decode to: the same less `b_dec` and the skip.
    target: Tensor<2>,
    /// `x` as it came, where a skip reads it.
    skipped: Option<Tensor<2>>,
    is_centred: bool,
    norms: Option<Tensor<1>>,
    /// Some latents, and what their rows of the encoder make of the input.
    seen: Option<(Vec<u32>, Tensor<2>)>,
    /// What a squared error is multiplied by.
    error_scale: f64,
    /// What the reconstruction is good for beyond itself.
    downstream: Option<Downstream<'a>>,
    terms: Vec<(Term, f64)>,
    projections: Vec<Entries>,
    blocks: Vec<Block>,
    gradient: Parameters,
}

/// The encoder's share of the gradient at all entries of some latents.
struct Block {
    latents: Tensor<1, Int>,
    /// `[latents, d_in]`
    rows: Tensor<2>,
    /// `[1, latents]`
    sum: Tensor<2>,
}

impl<'a> Pass<'a> {
    pub(super) fn new(objective: &Objective, parameters: &'a Parameters, batch: &Batch) -> Self {
        let [n, _] = batch.x.dims();
        let w_skip = parameters.get(ParameterName::WSkip).cloned();
        let b_dec = parameters.matrix(ParameterName::BDec);
        let is_centred = objective.apply_b_dec_to_input;
        let (x, target) = match (&batch.target, is_centred, &w_skip) {
            (None, true, None) => {
                let centred = batch.x.clone() - b_dec;
                (centred.clone(), centred)
            }
            (target, ..) => {
                let target = target.as_ref().unwrap_or(&batch.x).clone() - b_dec.clone();
                let target = match w_skip.clone() {
                    Some(w_skip) => target - batch.x.clone().matmul(w_skip.transpose()),
                    None => target,
                };
                let x = match is_centred {
                    true => batch.x.clone() - b_dec,
                    false => batch.x.clone(),
                };
                (x, target)
            }
        };
        let error_scale = match objective.error {
            ErrorMeasure::Squared => 1.0 / n as f64,
            ErrorMeasure::Fvu => {
                let y = batch.target.as_ref().unwrap_or(&batch.x);
                1.0 / number(row_squares(&(y.clone() - y.clone().mean_dim(0))).sum())
            }
        };
        Self {
            parameters,
            n,
            d_sae: parameters.d_sae(),
            x,
            y: batch.target.as_ref().unwrap_or(&batch.x).clone(),
            target,
            skipped: w_skip.map(|_| batch.x.clone()),
            is_centred,
            norms: None,
            seen: None,
            error_scale,
            downstream: None,
            terms: Vec::new(),
            projections: Vec::new(),
            blocks: Vec::new(),
            gradient: Parameters::default(),
        }
    }

    /// The same, with a loss behind the reconstruction.
    pub(super) fn before(self, downstream: Option<Downstream<'a>>) -> Self {
        Self { downstream, ..self }
    }

    /// `‖w_dec[i]‖`, `[d_sae]`.
    pub(super) fn norms(&mut self) -> Tensor<1> {
        let parameters = self.parameters;
        self.norms.get_or_insert_with(|| row_norms(parameters.w_dec())).clone()
    }

    /// What a squared error counts.
    pub(super) fn error_scale(&self) -> f64 {
        self.error_scale
    }

    /// Some pre-activations. The bias is moved by `shift`, and so are they.
    pub(super) fn encode(&self, by: Tensor<1>, select: Select, shift: f64) -> Entries {
        self.encode_by(Search::Full, by, select, shift)
    }

    /// The same, with a way to find them.
    pub(super) fn encode_by(
        &self,
        search: Search,
        by: Tensor<1>,
        select: Select,
        shift: f64,
    ) -> Entries {
        let w_enc = self.parameters.matrix(ParameterName::WEnc).transpose();
        let b_enc = match self.parameters.vector(ParameterName::BEnc) {
            b_enc if shift == 0.0 => b_enc,
            b_enc => b_enc + shift,
        };
        let (values, indices) = sparse_encode_by(search, self.x.clone(), w_enc, b_enc, by, select);
        Entries { indices, values }
    }

    /// The same without a shift, which keeps what [`fit`](Self::fit) needs of some latents.
    pub(super) fn encode_with(&mut self, by: Tensor<1>, select: Select, seen: &[u32]) -> Entries {
        let w_enc = self.parameters.matrix(ParameterName::WEnc).transpose();
        let b_enc = self.parameters.vector(ParameterName::BEnc);
        let among = latents_tensor(seen, &self.x);
        let (values, indices, products) =
            sparse_encode_with(self.x.clone(), w_enc, [b_enc, by], select, among);
        self.seen = Some((seen.to_vec(), products));
        Entries { indices, values }
    }

    /// Some pre-activations of some latents alone, or those multiplied by −1. Indices are places
    /// among these latents; [`globally`] makes latents of them.
    pub(super) fn encode_among(
        &self,
        latents: &Tensor<1, Int>,
        sign: f64,
        shift: Tensor<1>,
        by: Tensor<1>,
        select: Select,
    ) -> Entries {
        let w_enc = self.parameters.matrix(ParameterName::WEnc).select(0, latents.clone());
        let b_enc = self.parameters.vector(ParameterName::BEnc).select(0, latents.clone());
        let (w_enc, b_enc) = match sign == 1.0 {
            true => (w_enc, b_enc),
            false => (w_enc.mul_scalar(sign), b_enc.mul_scalar(sign)),
        };
        let (values, indices) =
            sparse_encode(self.x.clone(), w_enc.transpose(), b_enc + shift, by, select);
        Entries { indices, values }
    }

    /// All pre-activations of some latents, `[n, latents]`.
    pub(super) fn pre_activations(&self, latents: &Tensor<1, Int>) -> Tensor<2> {
        let b_enc = self.parameters.matrix(ParameterName::BEnc).select(1, latents.clone());
        self.projected(latents) + b_enc
    }

    /// The same without their bias.
    fn projected(&self, latents: &Tensor<1, Int>) -> Tensor<2> {
        let w_enc = self.parameters.matrix(ParameterName::WEnc).select(0, latents.clone());
        self.x.clone().matmul(w_enc.transpose())
    }

    /// Adds the gradients of `scale · ‖z · w_dec + error‖²`, of those pre-activations `z` of some
    /// latents that are selected; gives its squares.
    pub(super) fn fit(
        &mut self,
        latents: &[u32],
        by: Tensor<1>,
        select: Select,
        error: &Tensor<2>,
        scale: f64,
    ) -> f64 {
        let seen = self.seen.take().filter(|(seen, _)| seen == latents);
        let latents = &latents_tensor(latents, &self.x);
        let products = match seen {
            Some((_, products)) => products,
            None => self.projected(latents),
        };
        let b_enc = self.parameters.vector(ParameterName::BEnc).select(0, latents.clone());
        let w_dec = self.parameters.w_dec().select(0, latents.clone());
        let fit = fit_residual(self.x.clone(), products, [b_enc, by], w_dec, error.clone(), select);
        self.decoder_rows_gradient(latents, fit.rows.mul_scalar(2.0 * scale));
        self.blocks.push(Block {
            latents: latents.clone(),
            rows: fit.w.mul_scalar(2.0 * scale),
            sum: fit.bias.mul_scalar(2.0 * scale).unsqueeze(),
        });
        number(fit.squares.sum())
    }

    /// What entries decode to, less what they have to.
    pub(super) fn error(&self, latents: &Entries) -> Tensor<2> {
        self.decode(latents) - self.target.clone()
    }

    /// What entries decode to, without `b_dec`.
    pub(super) fn decode(&self, latents: &Entries) -> Tensor<2> {
        let Entries { indices, values } = latents.clone();
        sparse_decode(indices, values, self.parameters.w_dec())
    }

    /// The decoder's share of the gradient of `scale · ‖error‖²`, of which the latents get theirs.
    pub(super) fn decoder_gradient(&mut self, latents: &Entries, error: &Tensor<2>, scale: f64) {
        let values = latents.values.clone().mul_scalar(2.0 * scale);
        let rows = sparse_grad_rows(latents.indices.clone(), values, error.clone(), self.d_sae);
        self.gradient.add(ParameterName::WDec, rows);
    }

    /// The gradient of `scale · ‖error‖²` at the latents.
    pub(super) fn latent_gradient(
        &self,
        latents: &Entries,
        error: &Tensor<2>,
        scale: f64,
    ) -> Tensor<2> {
        let dots = sparse_dot(latents.indices.clone(), self.parameters.w_dec(), error.clone());
        dots.mul_scalar(2.0 * scale)
    }

    /// The shares of `b_dec`, and of the skip, in the gradient of `scale · ‖error‖²`.
    pub(super) fn output_gradient(&mut self, error: &Tensor<2>, scale: f64) {
        let sum = error.clone().sum_dim(0).mul_scalar(2.0 * scale);
        self.gradient.add(ParameterName::BDec, sum);
        if let Some(x) = &self.skipped {
            let product = error.clone().transpose().matmul(x.clone());
            self.gradient.add(ParameterName::WSkip, product.mul_scalar(2.0 * scale));
        }
    }

    /// All of it for a reconstruction that is nothing but this: the term, the gradients, the squared
    /// errors of the rows. Gives the gradient at the latents.
    pub(super) fn reconstruct(
        &mut self,
        term: Term,
        latents: &Entries,
        weight: f64,
    ) -> (Tensor<2>, Tensor<2>, Tensor<1>) {
        let error = self.error(latents);
        let row_errors = row_squares(&error);
        let (counted, weight) = self.counted(term, &error, weight);
        let scale = self.error_scale;
        self.term(term, scale * weight * number(row_errors.clone().sum()));
        self.decoder_gradient(latents, &counted, scale);
        self.output_gradient(&counted, scale);
        (self.latent_gradient(latents, &counted, scale), error, row_errors)
    }

    /// The error whose square has the gradient of all that a reconstruction counts for, and the
    /// weight that its own square has in that.
    pub(super) fn counted(
        &mut self,
        term: Term,
        error: &Tensor<2>,
        weight: f64,
    ) -> (Tensor<2>, f64) {
        let weighted = |weight: f64| match weight == 1.0 {
            true => error.clone(),
            false => error.clone().mul_scalar(weight),
        };
        let Some(downstream) = self.downstream.as_mut().filter(|_| term == Term::Reconstruction)
        else {
            return (weighted(weight), weight);
        };
        let upstream = downstream(error.clone() + self.y.clone());
        assert_eq!(upstream.gradient.dims(), error.dims(), "a gradient at another place");
        self.terms.push((Term::Downstream, upstream.loss));
        let weight = weight * upstream.error_weight;
        (weighted(weight) + upstream.gradient.div_scalar(2.0 * self.error_scale), weight)
    }

    pub(super) fn term(&mut self, term: Term, value: f64) {
        self.terms.push((term, value));
    }

    /// Gradients at `(x − b_dec) · w_encᵀ`, and at `b_enc` unless that gets one of its own.
    pub(super) fn projection_gradient(&mut self, gradient: Entries) {
        self.projections.push(gradient);
    }

    /// Adds to the gradient of a matrix.
    pub(super) fn matrix_gradient(&mut self, name: ParameterName, gradient: Tensor<2>) {
        self.gradient.add(name, gradient);
    }

    /// Gradients at all pre-activations of some latents, `[n, latents]`, `b_enc` included.
    pub(super) fn block_gradient(&mut self, latents: &Tensor<1, Int>, gradient: Tensor<2>) {
        self.blocks.push(Block {
            latents: latents.clone(),
            rows: gradient.clone().transpose().matmul(self.x.clone()),
            sum: gradient.sum_dim(0),
        });
    }

    /// Adds to the gradients of some rows of the decoder.
    pub(super) fn decoder_rows_gradient(&mut self, latents: &Tensor<1, Int>, rows: Tensor<2>) {
        let sum = self.gradient.take(ParameterName::WDec);
        let sum = sum.unwrap_or_else(|| self.parameters.w_dec().zeros_like());
        let sum = sum.select_assign(0, latents.clone(), rows, IndexingUpdateOp::Add);
        self.gradient.insert(ParameterName::WDec, sum);
    }

    /// Adds to the gradient of a vector.
    pub(super) fn vector_gradient(&mut self, name: ParameterName, gradient: Tensor<1>) {
        self.gradient.add(name, gradient.unsqueeze());
    }

    /// Adds what the decoder gets through the norms of its rows.
    pub(super) fn norm_gradient(&mut self, gradient: Tensor<1>) {
        let along = (gradient / self.norms()).unsqueeze_dim(1);
        self.gradient.add(ParameterName::WDec, self.parameters.w_dec() * along);
    }

    /// `out[l] = Σ values` over the entries of latent `l`.
    pub(super) fn by_latent(&self, entries: &Entries, values: Tensor<2>) -> Tensor<1> {
        sparse_sum(entries.indices.clone(), values, self.d_sae)
    }

    /// The terms, and the gradient with the encoder's share, zero where nothing had one.
    pub(super) fn finish(self) -> (Vec<(Term, f64)>, Parameters) {
        let Self {
            parameters, d_sae, x, is_centred, terms, projections, blocks, mut gradient, ..
        } = self;
        let (indices, values): (Vec<_>, Vec<_>) =
            projections.into_iter().map(|entries| (entries.indices, entries.values)).unzip();
        // One product for all of them: they have the input in common.
        let (indices, values) = match indices.len() {
            1 => (indices[0].clone(), values[0].clone()),
            _ => (Tensor::cat(indices, 1), Tensor::cat(values, 1)),
        };
        let mut sum: Tensor<2> = sparse_sum(indices.clone(), values.clone(), d_sae).unsqueeze();
        let mut by_w_enc = sparse_grad_rows(indices, values, x, d_sae);
        for Block { latents, rows, sum: of_block } in blocks {
            by_w_enc = by_w_enc.select_assign(0, latents.clone(), rows, IndexingUpdateOp::Add);
            let add = |sum: Tensor<2>| {
                sum.select_assign(1, latents.clone(), of_block.clone(), IndexingUpdateOp::Add)
            };
            // The bias of gates has a gradient of its own, of which the blocks are no part yet.
            if let Some(own) = gradient.take(ParameterName::BEnc) {
                gradient.insert(ParameterName::BEnc, add(own));
            }
            sum = add(sum);
        }
        if is_centred {
            // Through the input of the encoder: the same for all rows but for a sum.
            let w_enc = parameters.matrix(ParameterName::WEnc);
            gradient.add(ParameterName::BDec, sum.clone().matmul(w_enc).neg());
        }
        gradient.add(ParameterName::WEnc, by_w_enc);
        if gradient.get(ParameterName::BEnc).is_none() {
            gradient.insert(ParameterName::BEnc, sum);
        }
        for (name, tensor) in parameters.named() {
            if gradient.get(name).is_none() {
                gradient.insert(name, tensor.zeros_like());
            }
        }
        (terms, gradient)
    }
}
