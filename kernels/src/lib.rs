//! Fused tensor operations with plain defaults and gradients.
//!
//! The only crate of the workspace that knows a backend. Every operation has a plain default made
//! of Burn's own operations, which serves as the oracle in tests and as the implementation on any
//! backend without a kernel of its own; the `flex` backend (CPU) has hand-written ones. Nothing
//! here knows what a sparse autoencoder or a transformer is for.
//!
//! | operation | gradient |
//! |---|---|
//! | [`top_k`] | none: the values are cut from the graph |
//! | [`sparse_encode`] | sparse, at the selected entries |
//! | [`sparse_decode`] | sparse, latent-major for the rows |
//! | [`rms_norm`], [`nonlinear`], [`gated`], [`rotary`] | fused |
//! | [`attention`] | fused without a prefix and a soft cap, else through the plain default |
//! | [`sparse_encode_with`], [`sparse_dot`], [`sparse_grad_rows`], [`sparse_sum`], [`sparse_gather`], [`linear`], [`dot_rows`], [`layer_norm`] | through the plain default |
//! | [`adam_step`], [`project_rows`], [`fit_residual`] | none |

mod autodiff;
#[cfg(feature = "cube")]
mod cube;
#[cfg(feature = "flex")]
mod flex;
#[cfg(feature = "ndarray")]
mod ndarray;
// Burn deprecates ndarray, which the operations name among the backends.
#[cfg_attr(feature = "ndarray", allow(deprecated))]
mod ops;
mod plain_attention;
mod plain_encode;
mod plain_top_k;
mod plain_training;

pub use ops::{AdamConfig, AttentionConfig, KernelOps, Nonlinearity, RotaryPairs, Search, Select};

use burn::backend::Dispatch;
use burn::tensor::{Device, Int, Tensor, TensorData};

/// The `k` largest entries of every row, largest first; ties go to the lowest index.
///
/// NaN counts as the smallest value. The values carry no gradient.
///
/// # Shapes
/// `x`: `[n, m]`; both results: `[n, k]`.
///
/// # Panics
/// If `k` is zero or above `m`.
pub fn top_k(x: Tensor<2>, k: usize) -> (Tensor<2>, Tensor<2, Int>) {
    let [_, m] = x.dims();
    assert!(0 < k && k <= m, "top_k: k = {k} is not in 1..={m}");
    let (values, indices) = Dispatch::top_k(x.into_dispatch(), k);
    (Tensor::from_dispatch(values), Tensor::from_dispatch(indices))
}

/// Some entries of `p = x·w + bias`: the encoder of a sparse autoencoder.
///
/// The pre-activations `[n, m]` are produced and consumed tile by tile and never stored whole (by
/// the plain default they are). [`Select`] says which are kept, and what `by` means for it: a scale
/// that only ranks (decoder norms, usually), or a threshold. The gradient reaches `x`, `w` and
/// `bias` through the kept entries; `by` gets none.
///
/// Where rows keep different numbers of entries, `k` is the largest, at least 1, and the rows are
/// filled up with entries of value zero. Within a row the entries of [`Select::TopK`],
/// [`Select::TopKSigned`] and [`Select::TopKMagnitude`] come largest first, ties by the lowest
/// index; the others in any order that does not depend on the number of threads. A pre-activation
/// that is NaN ranks last; a row of nothing else keeps zeros, or NaN where it keeps any sign.
///
/// # Shapes
/// `x`: `[n, d]`, `w`: `[d, m]`, f32 or, where it gets no gradient, bf16; `bias` and `by`: `[m]`;
/// values and indices: `[n, k]`. The arithmetic is f32.
///
/// # Panics
/// If a shape does not fit, a number to keep is zero or above the number of entries, or groups
/// would differ in size.
pub fn sparse_encode(
    x: Tensor<2>,
    w: Tensor<2>,
    bias: Tensor<1>,
    by: Tensor<1>,
    select: Select,
) -> (Tensor<2>, Tensor<2, Int>) {
    sparse_encode_by(Search::Full, x, w, bias, by, select)
}

/// [`sparse_encode`] with a way to find the entries.
///
/// # Panics
/// As [`sparse_encode`].
pub fn sparse_encode_by(
    search: Search,
    x: Tensor<2>,
    w: Tensor<2>,
    bias: Tensor<1>,
    by: Tensor<1>,
    select: Select,
) -> (Tensor<2>, Tensor<2, Int>) {
    assert_encodes(&x, &w, [&bias, &by], select);
    let (values, indices) = Dispatch::sparse_encode(
        x.into_dispatch(),
        w.into_dispatch(),
        bias.into_dispatch(),
        by.into_dispatch(),
        select,
        search,
    );
    (Tensor::from_dispatch(values), Tensor::from_dispatch(indices))
}

/// Refuses what cannot be encoded; gives the number of columns.
fn assert_encodes(
    x: &Tensor<2>,
    w: &Tensor<2>,
    by_column: [&Tensor<1>; 2],
    select: Select,
) -> usize {
    let [bias, by] = by_column;
    let ([n, d], [w_rows, m]) = (x.dims(), w.dims());
    assert_eq!(d, w_rows, "sparse_encode: x has {d} columns, w {w_rows} rows");
    assert_eq!(bias.dims(), [m], "sparse_encode: bias does not fit w");
    assert_eq!(by.dims(), [m], "sparse_encode: by does not fit w");
    let (kept, there_are) = match select {
        Select::TopK(k) | Select::TopKSigned(k) | Select::TopKMagnitude(k) => (k, m),
        Select::GroupMax(k) => (k, m),
        Select::BatchTopK(kept) => (kept, n * m),
        Select::Above => (1, m),
    };
    assert!(0 < kept && kept <= there_are, "sparse_encode: {select:?} of {there_are} entries");
    if let Select::GroupMax(k) = select {
        assert!(m.is_multiple_of(k), "sparse_encode: {m} entries make no {k} groups");
    }
    m
}

/// [`sparse_encode`], and the products `x·w` at some columns besides, which the selection makes
/// anyway: values, indices, and these.
///
/// # Shapes
/// As [`sparse_encode`], `among`: `[m']`; the products: `[n, m']`.
///
/// # Panics
/// As [`sparse_encode`], or if (on CPU) a column is not below `m`.
pub fn sparse_encode_with(
    x: Tensor<2>,
    w: Tensor<2>,
    [bias, by]: [Tensor<1>; 2],
    select: Select,
    among: Tensor<1, Int>,
) -> (Tensor<2>, Tensor<2, Int>, Tensor<2>) {
    let m = assert_encodes(&x, &w, [&bias, &by], select);
    assert!(among.dims()[0] <= m, "sparse_encode_with: {} of {m} columns", among.dims()[0]);
    let (values, indices, products) = Dispatch::sparse_encode_with(
        x.into_dispatch(),
        w.into_dispatch(),
        bias.into_dispatch(),
        by.into_dispatch(),
        select,
        among.into_dispatch(),
    );
    (Tensor::from_dispatch(values), Tensor::from_dispatch(indices), Tensor::from_dispatch(products))
}

/// `out[i] = Σ_j values[i, j] · rows[indices[i, j]]`: a sparse matrix times a dense one.
///
/// # Shapes
/// `indices` and `values`: `[n, k]`, `rows`: `[m, d]`, f32 or, where they get no gradient, bf16;
/// result: `[n, d]`. The arithmetic is f32.
///
/// # Panics
/// If the shapes of `indices` and `values` differ, or (on CPU) an index is not below `m`.
pub fn sparse_decode(indices: Tensor<2, Int>, values: Tensor<2>, rows: Tensor<2>) -> Tensor<2> {
    assert_eq!(indices.dims(), values.dims(), "sparse_decode: indices and values differ in shape");
    Tensor::from_dispatch(Dispatch::sparse_decode(
        indices.into_dispatch(),
        values.into_dispatch(),
        rows.into_dispatch(),
    ))
}

/// `out[i, j] = ⟨x[i], rows[indices[i, j]]⟩`: the entries of `x · rowsᵀ` at some places only.
///
/// # Shapes
/// `indices` and the result: `[n, k]`, `rows`: `[m, d]`, f32 or bf16, `x`: `[n, d]`. The arithmetic
/// is f32.
///
/// # Panics
/// If a shape does not fit, or (on CPU) an index is not below `m`.
pub fn sparse_dot(indices: Tensor<2, Int>, rows: Tensor<2>, x: Tensor<2>) -> Tensor<2> {
    let ([n, _], [_, d]) = (indices.dims(), rows.dims());
    assert_eq!(x.dims(), [n, d], "sparse_dot: x does not fit");
    Tensor::from_dispatch(Dispatch::sparse_dot(
        indices.into_dispatch(),
        rows.into_dispatch(),
        x.into_dispatch(),
    ))
}

/// `out[l] = Σ values[i, j] · x[i]` over the entries with `indices[i, j] = l`: the gradient of
/// [`sparse_decode`] for its rows, and of [`sparse_encode`] for its columns. Each row of the result
/// has one owner, so the sums do not depend on the number of threads.
///
/// # Shapes
/// `indices` and `values`: `[n, k]`, `x`: `[n, d]`; result: `[m, d]`.
///
/// # Panics
/// If a shape does not fit, or (on CPU) an index is not below `m`.
pub fn sparse_grad_rows(
    indices: Tensor<2, Int>,
    values: Tensor<2>,
    x: Tensor<2>,
    m: usize,
) -> Tensor<2> {
    assert_eq!(indices.dims(), values.dims(), "sparse_grad_rows: indices and values differ");
    assert_eq!(indices.dims()[0], x.dims()[0], "sparse_grad_rows: x does not fit");
    Tensor::from_dispatch(Dispatch::sparse_decode_grad_rows(
        indices.into_dispatch(),
        values.into_dispatch(),
        x.into_dispatch(),
        m,
    ))
}

/// `out[l] = Σ values[i, j]` over the entries with `indices[i, j] = l`.
///
/// # Shapes
/// `indices` and `values`: `[n, k]`; result: `[m]`.
///
/// # Panics
/// If the shapes differ, or (on CPU) an index is not below `m`.
pub fn sparse_sum(indices: Tensor<2, Int>, values: Tensor<2>, m: usize) -> Tensor<1> {
    assert_eq!(indices.dims(), values.dims(), "sparse_sum: indices and values differ in shape");
    let sum = Dispatch::sparse_sum(indices.into_dispatch(), values.into_dispatch(), m);
    Tensor::from_dispatch(sum)
}

/// `out[i, j] = vector[indices[i, j]]`.
///
/// # Shapes
/// `indices`: `[n, k]`, `vector`: `[m]`; result: `[n, k]`.
///
/// # Panics
/// If (on CPU) an index is not below `m`.
pub fn sparse_gather(indices: Tensor<2, Int>, vector: Tensor<1>) -> Tensor<2> {
    let gathered = Dispatch::sparse_gather(indices.into_dispatch(), vector.into_dispatch());
    Tensor::from_dispatch(gathered)
}

/// `x · w`: a product with fixed weights, which may be kept in bf16. The arithmetic is f32.
///
/// # Shapes
/// `x`: `[n, d_in]`, f32; `w`: `[d_in, d_out]`, f32 or bf16; result: `[n, d_out]`, f32.
///
/// # Panics
/// If the widths differ.
pub fn linear(x: Tensor<2>, w: Tensor<2>) -> Tensor<2> {
    assert_eq!(x.dims()[1], w.dims()[0], "linear: the widths differ");
    Tensor::from_dispatch(Dispatch::linear(x.into_dispatch(), w.into_dispatch()))
}

/// `x · rowsᵀ`: a product with a matrix that lies transposed, as embeddings do, and may be kept in
/// bf16. The arithmetic is f32.
///
/// # Shapes
/// `x`: `[n, d]`, f32; `rows`: `[m, d]`, f32 or bf16; result: `[n, m]`, f32.
///
/// # Panics
/// If the widths differ.
pub fn dot_rows(x: Tensor<2>, rows: Tensor<2>) -> Tensor<2> {
    assert_eq!(x.dims()[1], rows.dims()[1], "dot_rows: the widths differ");
    Tensor::from_dispatch(Dispatch::dot_rows(x.into_dispatch(), rows.into_dispatch()))
}

/// `x / sqrt(mean(x²) + epsilon) ⊙ gain` over the last axis (Zhang & Sennrich, 2019).
///
/// # Shapes
/// `x`: `[n, d]`, `gain`: `[d]`; result: `[n, d]`.
///
/// # Panics
/// If `gain` does not fit `x`.
pub fn rms_norm(x: Tensor<2>, gain: Tensor<1>, epsilon: f64) -> Tensor<2> {
    let [_, d] = x.dims();
    assert_eq!(gain.dims(), [d], "rms_norm: gain does not fit x");
    Tensor::from_dispatch(Dispatch::rms_norm(x.into_dispatch(), gain.into_dispatch(), epsilon))
}

/// `(x − mean(x)) / sqrt(var(x) + epsilon) ⊙ gain + bias` over the last axis (Ba et al., 2016), with
/// the biased variance.
///
/// # Shapes
/// `x`: `[n, d]`, `gain` and `bias`: `[d]`; result: `[n, d]`.
///
/// # Panics
/// If `gain` or `bias` does not fit `x`.
pub fn layer_norm(x: Tensor<2>, gain: Tensor<1>, bias: Tensor<1>, epsilon: f64) -> Tensor<2> {
    let [_, d] = x.dims();
    assert_eq!(gain.dims(), [d], "layer_norm: gain does not fit x");
    assert_eq!(bias.dims(), [d], "layer_norm: bias does not fit x");
    Tensor::from_dispatch(Dispatch::layer_norm(
        x.into_dispatch(),
        gain.into_dispatch(),
        bias.into_dispatch(),
        epsilon,
    ))
}

/// A non-linearity, element by element.
///
/// # Shapes
/// `x` and the result: `[n, m]`.
pub fn nonlinear(x: Tensor<2>, nonlinearity: Nonlinearity) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::nonlinear(x.into_dispatch(), nonlinearity))
}

/// `f(gate) ⊙ up`: the hidden layer of a gated MLP (Shazeer, 2020).
///
/// # Shapes
/// `gate`, `up` and the result: `[n, m]`.
///
/// # Panics
/// If the shapes differ.
pub fn gated(gate: Tensor<2>, up: Tensor<2>, nonlinearity: Nonlinearity) -> Tensor<2> {
    assert_eq!(gate.dims(), up.dims(), "gated: gate and up differ");
    let out = Dispatch::gated(gate.into_dispatch(), up.into_dispatch(), nonlinearity);
    Tensor::from_dispatch(out)
}

/// Rotary position embedding (Su et al., 2021): turns pairs of dimensions of every head. Dimensions
/// past `2 · n_pairs` stay as they are. The tables are constants: they get no gradient.
///
/// # Shapes
/// `x`: `[batch, pos, head, d_head]`, `cos` and `sin`: `[batch, pos, n_pairs]`.
///
/// # Panics
/// If a table does not fit.
pub fn rotary(x: Tensor<4>, cos: Tensor<3>, sin: Tensor<3>, pairs: RotaryPairs) -> Tensor<4> {
    let [batch, pos, _, d_head] = x.dims();
    let [_, _, n_pairs] = cos.dims();
    assert!(2 * n_pairs <= d_head, "rotary: {n_pairs} pairs in a head of {d_head}");
    assert_eq!(cos.dims(), [batch, pos, n_pairs], "rotary: cos does not fit x");
    assert_eq!(sin.dims(), cos.dims(), "rotary: sin does not fit cos");
    Tensor::from_dispatch(Dispatch::rotary(
        x.into_dispatch(),
        cos.into_dispatch(),
        sin.into_dispatch(),
        pairs,
    ))
}

/// Keys and values in the two parts that [`attention`] reads.
///
/// `prefix` is shared by all rows of the batch (a prompt run once); `own` belongs to each row.
#[derive(Debug, Clone)]
pub struct KeyValues {
    /// Keys and values `[1, prefix, kv_head, d_head]` that every row attends to, if any.
    pub prefix: Option<(Tensor<4>, Tensor<4>)>,
    /// Keys and values `[batch, own, kv_head, d_head]`; the last columns are the queries' own.
    pub own: (Tensor<4>, Tensor<4>),
}

/// Causal grouped-query attention over a shared prefix and each row's own columns.
///
/// Query `i` of `n` stands at own column `own − n + i`. It sees the whole prefix and those own
/// columns `c` of its row with `first_column[row, i] ≤ c ≤` its own column: the columns before are
/// left padding, or another text of the same row. A query that sees nothing (itself padding) gives
/// zero. With a window it sees only keys less than so many positions back; the prefix stands
/// directly before `first_column`.
///
/// # Shapes
/// `q`: `[batch, n, head, d_head]`, `first_column`: `[batch, n]`; result: as `q`.
///
/// # Panics
/// If a shape does not fit.
pub fn attention(
    q: Tensor<4>,
    key_values: KeyValues,
    first_column: Tensor<2, Int>,
    config: AttentionConfig,
) -> Tensor<4> {
    let [batch, n, n_heads, d_head] = q.dims();
    let (k, v) = key_values.own;
    let [_, own, n_kv_heads, _] = k.dims();
    assert_eq!(k.dims(), [batch, own, n_kv_heads, d_head], "attention: keys");
    assert_eq!(v.dims(), k.dims(), "attention: values do not fit the keys");
    assert_eq!(first_column.dims(), [batch, n], "attention: first_column");
    assert_eq!(n_heads % n_kv_heads, 0, "attention: {n_heads} heads over {n_kv_heads} key heads");
    assert!(n <= own, "attention: {n} queries but {own} own columns");
    let (prefix_k, prefix_v) = key_values.prefix.unwrap_or_else(|| {
        let empty = || empty_prefix(n_kv_heads, d_head, &q.device());
        (empty(), empty())
    });
    assert_eq!(prefix_k.dims(), prefix_v.dims(), "attention: prefix values");
    Tensor::from_dispatch(Dispatch::attention(
        q.into_dispatch(),
        prefix_k.into_dispatch(),
        prefix_v.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        first_column.into_dispatch(),
        config,
    ))
}

fn empty_prefix(n_kv_heads: usize, d_head: usize, device: &Device) -> Tensor<4> {
    let data = TensorData::new(Vec::<f32>::new(), [1, 0, n_kv_heads, d_head]);
    Tensor::from_data(data, device)
}

/// A parameter with the moments of Adam (Kingma & Ba, 2015).
#[derive(Debug, Clone)]
pub struct AdamState {
    /// First moment, as the parameter.
    pub first: Tensor<2>,
    /// Second moment, as the parameter.
    pub second: Tensor<2>,
}

/// One step of Adam in a single pass; `step` counts from 1. Works in place where it can.
///
/// # Shapes
/// All of them `[n, m]`.
///
/// # Panics
/// If the shapes differ or `step` is zero.
pub fn adam_step(
    parameter: Tensor<2>,
    gradient: Tensor<2>,
    state: AdamState,
    step: usize,
    config: AdamConfig,
) -> (Tensor<2>, AdamState) {
    assert_eq!(parameter.dims(), gradient.dims(), "adam_step: gradient");
    assert_eq!(parameter.dims(), state.first.dims(), "adam_step: moments");
    assert_eq!(parameter.dims(), state.second.dims(), "adam_step: moments");
    assert!(step > 0, "adam_step: steps count from 1");
    let (parameter, first, second) = Dispatch::adam_step(
        parameter.into_dispatch(),
        gradient.into_dispatch(),
        state.first.into_dispatch(),
        state.second.into_dispatch(),
        step,
        config,
    );
    (
        Tensor::from_dispatch(parameter),
        AdamState { first: Tensor::from_dispatch(first), second: Tensor::from_dispatch(second) },
    )
}

/// `gradient[i] − rows[i] · ⟨gradient[i], rows[i]⟩ / ‖rows[i]‖²`: a gradient without what would change
/// the norms of rows. Where a row is zero, it stays. Works in place where it can.
///
/// # Shapes
/// All of them `[n, m]`.
///
/// # Panics
/// If the shapes differ.
pub fn project_rows(gradient: Tensor<2>, rows: Tensor<2>) -> Tensor<2> {
    assert_eq!(gradient.dims(), rows.dims(), "project_rows: the gradient does not fit the rows");
    Tensor::from_dispatch(Dispatch::project_rows(gradient.into_dispatch(), rows.into_dispatch()))
}

/// What [`fit_residual`] finds.
#[derive(Debug, Clone)]
pub struct ResidualFit {
    /// `‖e[i]‖²`, `[n]`.
    pub squares: Tensor<1>,
    /// The gradient of `½ Σ ‖e[i]‖²` at `rows`, `[m, d_out]`.
    pub rows: Tensor<2>,
    /// The same at `w`, transposed: `[m, d]`.
    pub w: Tensor<2>,
    /// The same at `bias`, `[m]`.
    pub bias: Tensor<1>,
}

/// How well selected entries of `p = x·w + bias` fit a residual: `e = z · rows + residual`, with `z`
/// what [`sparse_encode`] would keep of `p`, and where `½ Σ ‖e[i]‖²` falls. Nothing reaches `x`.
///
/// `products` are `x·w`, as [`sparse_encode_with`] gives them. The work is that of dense products, on
/// some rows at a time: it is for selections that keep a large share of few columns.
///
/// # Shapes
/// `x`: `[n, d]`, `products`: `[n, m]`, `bias` and `by`: `[m]`, `rows`: `[m, d_out]`, `residual`:
/// `[n, d_out]`.
///
/// # Panics
/// If a shape does not fit, or the selection is not one by rows of 1 to `m` entries.
pub fn fit_residual(
    x: Tensor<2>,
    products: Tensor<2>,
    [bias, by]: [Tensor<1>; 2],
    rows: Tensor<2>,
    residual: Tensor<2>,
    select: Select,
) -> ResidualFit {
    let ([n, m], [_, d_out]) = (products.dims(), rows.dims());
    assert_eq!(x.dims()[0], n, "fit_residual: x does not fit the products");
    assert_eq!(rows.dims(), [m, d_out], "fit_residual: rows do not fit the products");
    assert_eq!(residual.dims(), [n, d_out], "fit_residual: residual");
    assert_eq!((bias.dims(), by.dims()), ([m], [m]), "fit_residual: bias or by does not fit");
    match select {
        Select::TopK(k) | Select::TopKSigned(k) | Select::TopKMagnitude(k) => {
            assert!(0 < k && k <= m, "fit_residual: {select:?} of {m} columns");
        }
        _ => panic!("fit_residual: {select:?} is not a selection by rows"),
    }
    let (squares, rows, w, bias) = Dispatch::fit_residual(
        x.into_dispatch(),
        products.into_dispatch(),
        bias.into_dispatch(),
        by.into_dispatch(),
        rows.into_dispatch(),
        residual.into_dispatch(),
        select,
    );
    ResidualFit {
        squares: Tensor::from_dispatch(squares),
        rows: Tensor::from_dispatch(rows),
        w: Tensor::from_dispatch(w),
        bias: Tensor::from_dispatch(bias),
    }
}
