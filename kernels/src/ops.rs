//! The operations as backends see them, with their plain defaults.

use std::f64::consts::PI;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata, backend_extension, get_or_init_device_settings};
use burn::tensor::{IndexingUpdateOp, Shape};
use serde::{Deserialize, Serialize};

#[cfg(feature = "fusion")]
use crate::cube::entries;
use crate::plain_attention::{plain_attention, plain_attention_backward};
use crate::plain_encode::plain_encode;
use crate::plain_top_k::plain_top_k;
use crate::plain_training::{plain_adam_step, plain_fit_residual, plain_project_rows, products_of};

/// The constants of an Adam step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamConfig {
    /// Learning rate.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta_1: f64,
    /// Decay of the second moment.
    pub beta_2: f64,
    /// Added to the root of the second moment (PyTorch's place for it, and its 1e-8).
    pub epsilon: f64,
    /// What the gradient is multiplied by first, to clip it.
    pub gradient_scale: f64,
    /// Whether rows whose gradient is zero everywhere stay as they are, moments included: another
    /// optimiser, whose cost falls with the share of rows that it moves.
    pub skips_idle_rows: bool,
    /// Whether rows that moved are brought to norm 1, unless they are zero.
    pub unit_rows: bool,
}

impl AdamConfig {
    /// The usual constants: betas 0.9 and 0.999, epsilon 1e-8, the gradient as it is; rows mean
    /// nothing.
    pub fn new(learning_rate: f64) -> Self {
        Self {
            learning_rate,
            beta_1: 0.9,
            beta_2: 0.999,
            epsilon: 1e-8,
            gradient_scale: 1.0,
            skips_idle_rows: false,
            unit_rows: false,
        }
    }
}

/// The non-linearity of an MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Nonlinearity {
    /// `x · sigmoid(x)`.
    Silu,
    /// `x · Φ(x)`, with the distribution function of the normal distribution.
    Gelu,
    /// The approximation of GELU by a tanh (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
}

/// Which dimensions of a head a rotary embedding turns together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RotaryPairs {
    /// `(i, i + n_pairs)`: Llama, NeoX and most others.
    Halves,
    /// `(2i, 2i + 1)`: GPT-J.
    Neighbours,
}

/// What attention does besides weighing values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionConfig {
    /// Scores are multiplied by this.
    pub scale: f64,
    /// Scores are then squashed to `cap · tanh(score / cap)`.
    pub soft_cap: Option<f64>,
    /// A query sees only keys less than so many positions back, itself included.
    pub window: Option<usize>,
}

impl AttentionConfig {
    /// Scaled, and nothing else.
    pub fn new(scale: f64) -> Self {
        Self { scale, soft_cap: None, window: None }
    }
}

/// Which of its pre-activations `p` an encoder keeps, and what their values are. `by` is a number
/// for each column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Select {
    /// `relu(p)` at the so many largest of `p ⊙ by` in each row.
    TopK(usize),
    /// `p`, of whatever sign, at the so many largest of `p ⊙ by` in each row.
    TopKSigned(usize),
    /// `p` at the so many largest of `|p ⊙ by|` in each row.
    TopKMagnitude(usize),
    /// `p` at the so many largest of `p ⊙ by` in all rows together, as far as they are above zero.
    BatchTopK(usize),
    /// `relu(p)` at the largest `p` in each of so many groups of neighbouring columns. `by` means
    /// nothing.
    GroupMax(usize),
    /// `p` where `p > max(by, 0)`.
    Above,
}

impl Select {
    /// The number of entries that are kept of each row, if they are the first of it.
    fn of_each_row(self) -> Option<usize> {
        match self {
            Self::TopK(k) | Self::TopKSigned(k) | Self::TopKMagnitude(k) => Some(k),
            Self::BatchTopK(_) | Self::GroupMax(_) | Self::Above => None,
        }
    }
}

/// How the entries to keep are found. All ways give the same result, bit for bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Search {
    /// By a product in f32.
    #[default]
    Full,
    /// By a product in 16-bit integers with a bound of its error; what may be kept by it is computed
    /// anew in f32.
    ///
    /// For [`Select::TopK`], [`Select::TopKSigned`], [`Select::TopKMagnitude`] and
    /// [`Select::BatchTopK`] that keep at most one of 16 entries of at least 256 rows, on `flex`, on
    /// processors with AVX2 and FMA. Everything else, and batches with numbers that are not finite, are
    /// searched in full.
    Proposed,
}

/// The operations of this crate on a backend's own tensors; see the functions of the crate root
/// for what each computes. A backend that overrides nothing runs the plain defaults.
///
/// Under Burn's fusion, what has a kernel in `cube` is an operation by itself, of which shape and type
/// are told before it runs; the plain defaults of the rest are fused.
#[allow(missing_docs)]
#[backend_extension(
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(feature = "cube"),
    Fusion: cfg(feature = "fusion"),
    Autodiff,
)]
pub trait KernelOps: Backend {
    #[fusion(meta = |x, k| entries(x, *k))]
    fn top_k(x: FloatTensor<Self>, k: usize) -> (FloatTensor<Self>, IntTensor<Self>) {
        plain_top_k::<Self>(x, k)
    }

    #[fusion(default)]
    fn sparse_encode(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        by: FloatTensor<Self>,
        select: Select,
        _search: Search,
    ) -> (FloatTensor<Self>, IntTensor<Self>) {
        match select.of_each_row() {
            Some(k) => Self::encode_top_k(x, w, bias, by, select, k),
            None => plain_encode::<Self>(x, w, bias, by, select),
        }
    }

    /// [`sparse_encode`](Self::sparse_encode) for a selection that keeps the first `k` of each row.
    #[fusion(meta = |x, _w, _bias, _by, _select, k| entries(x, *k))]
    fn encode_top_k(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        by: FloatTensor<Self>,
        select: Select,
        _k: usize,
    ) -> (FloatTensor<Self>, IntTensor<Self>) {
        plain_encode::<Self>(x, w, bias, by, select)
    }

    #[fusion(default)]
    fn sparse_encode_with(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        by: FloatTensor<Self>,
        select: Select,
        among: IntTensor<Self>,
    ) -> (FloatTensor<Self>, IntTensor<Self>, FloatTensor<Self>) {
        let products = products_of::<Self>(x.clone(), w.clone(), among);
        let (values, indices) = Self::sparse_encode(x, w, bias, by, select, Search::Full);
        (values, indices, products)
    }

    #[fusion(dtype = burn::tensor::DType::F32, shape = Shape::new([values[0], rows[1]]))]
    fn sparse_decode(
        indices: IntTensor<Self>,
        values: FloatTensor<Self>,
        rows: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let ([n, k], d) = (dims(&values), rows.shape()[1]);
        let gathered = cast_like::<Self>(gather_rows::<Self>(rows, indices), &values);
        let values = Self::float_reshape(values, Shape::new([n, 1, k]));
        Self::float_reshape(Self::float_matmul(values, gathered), Shape::new([n, d]))
    }

    /// Also the gradient of [`sparse_decode`](Self::sparse_decode) for the values.
    #[fusion(dtype = burn::tensor::DType::F32, shape = Shape::new([x[0], indices[1]]))]
    fn sparse_dot(
        indices: IntTensor<Self>,
        rows: FloatTensor<Self>,
        x: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let ([n, d], k) = (dims(&x), indices.shape()[1]);
        let gathered = cast_like::<Self>(gather_rows::<Self>(rows, indices), &x);
        let column = Self::float_reshape(x, Shape::new([n, d, 1]));
        Self::float_reshape(Self::float_matmul(gathered, column), Shape::new([n, k]))
    }

    /// Gradient of [`sparse_decode`](Self::sparse_decode) for the rows: `out[l] = Σ values[i, j] ·
    /// grad[i]` over the entries with `indices[i, j] = l`, for `l` below `m`.
    #[fusion(dtype = burn::tensor::DType::F32, shape = Shape::new([*m, grad[1]]))]
    fn sparse_decode_grad_rows(
        indices: IntTensor<Self>,
        values: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        m: usize,
    ) -> FloatTensor<Self> {
        let ([n, d], k) = (dims(&grad), indices.shape()[1]);
        let (device, dtype) = (grad.device(), grad.dtype());
        let outer = Self::float_matmul(
            Self::float_reshape(values, Shape::new([n, k, 1])),
            Self::float_reshape(grad, Shape::new([n, 1, d])),
        );
        Self::float_select_assign(
            Self::float_zeros(Shape::new([m, d]), &device, dtype.into()),
            0,
            Self::int_reshape(indices, Shape::new([n * k])),
            Self::float_reshape(outer, Shape::new([n * k, d])),
            IndexingUpdateOp::Add,
        )
    }

    /// `out[l] = Σ values[i, j]` over the entries with `indices[i, j] = l`, for `l` below `m`.
    #[fusion(dtype = burn::tensor::DType::F32, shape = Shape::new([*m]))]
    fn sparse_sum(
        indices: IntTensor<Self>,
        values: FloatTensor<Self>,
        m: usize,
    ) -> FloatTensor<Self> {
        let n_entries = values.shape().num_elements();
        let (device, dtype) = (values.device(), values.dtype());
        Self::float_select_assign(
            Self::float_zeros(Shape::new([m]), &device, dtype.into()),
            0,
            Self::int_reshape(indices, Shape::new([n_entries])),
            Self::float_reshape(values, Shape::new([n_entries])),
            IndexingUpdateOp::Add,
        )
    }

    /// `out[i, j] = vector[indices[i, j]]`.
    #[fusion(default)]
    fn sparse_gather(indices: IntTensor<Self>, vector: FloatTensor<Self>) -> FloatTensor<Self> {
        let shape = indices.shape();
        let indices = Self::int_reshape(indices, Shape::new([shape.num_elements()]));
        Self::float_reshape(Self::float_select(vector, 0, indices), shape)
    }

    #[fusion(default)]
    fn linear(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
        let w = cast_like::<Self>(w, &x);
        Self::float_matmul(x, w)
    }

    #[fusion(default)]
    fn dot_rows(x: FloatTensor<Self>, rows: FloatTensor<Self>) -> FloatTensor<Self> {
        let rows = cast_like::<Self>(rows, &x);
        Self::float_matmul(x, Self::float_transpose(rows))
    }

    #[fusion(default)]
    fn rms_norm(x: FloatTensor<Self>, gain: FloatTensor<Self>, epsilon: f64) -> FloatTensor<Self> {
        let d = x.shape()[1];
        let square = Self::float_mul(x.clone(), x.clone());
        let mean = Self::float_mean_dim(square, 1);
        let scale = Self::float_sqrt(Self::float_add_scalar(mean, epsilon.into()));
        let gain = Self::float_reshape(gain, Shape::new([1, d]));
        Self::float_mul(Self::float_div(x, scale), gain)
    }

    #[fusion(default)]
    fn layer_norm(
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        let d = x.shape()[1];
        let row = |t| Self::float_reshape(t, Shape::new([1, d]));
        let centred = Self::float_sub(x.clone(), Self::float_mean_dim(x, 1));
        let variance = Self::float_mean_dim(Self::float_mul(centred.clone(), centred.clone()), 1);
        let scale = Self::float_sqrt(Self::float_add_scalar(variance, epsilon.into()));
        let normalized = Self::float_div(centred, scale);
        Self::float_add(Self::float_mul(normalized, row(gain)), row(bias))
    }

    #[fusion(default)]
    fn nonlinear(x: FloatTensor<Self>, nonlinearity: Nonlinearity) -> FloatTensor<Self> {
        match nonlinearity {
            Nonlinearity::Silu => Self::float_mul(x.clone(), Self::sigmoid(x)),
            Nonlinearity::Gelu => Self::gelu(x),
            Nonlinearity::GeluTanh => {
                let cube = Self::float_mul(Self::float_mul(x.clone(), x.clone()), x.clone());
                let inner =
                    Self::float_add(x.clone(), Self::float_mul_scalar(cube, 0.044715.into()));
                let inner = Self::float_mul_scalar(inner, (2.0 / PI).sqrt().into());
                let half = Self::float_mul_scalar(x, 0.5.into());
                Self::float_mul(half, Self::float_add_scalar(Self::float_tanh(inner), 1.0.into()))
            }
            Nonlinearity::Relu => Self::relu(x),
        }
    }

    #[fusion(default)]
    fn gated(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        nonlinearity: Nonlinearity,
    ) -> FloatTensor<Self> {
        Self::float_mul(Self::nonlinear(gate, nonlinearity), up)
    }

    /// The derivative of [`nonlinear`](Self::nonlinear).
    #[fusion(default)]
    fn nonlinear_slope(x: FloatTensor<Self>, nonlinearity: Nonlinearity) -> FloatTensor<Self> {
        let one_less = |t| Self::float_add_scalar(Self::float_neg(t), 1.0.into());
        match nonlinearity {
            Nonlinearity::Silu => {
                let s = Self::sigmoid(x.clone());
                let rise = Self::float_mul(x, one_less(s.clone()));
                Self::float_mul(s, Self::float_add_scalar(rise, 1.0.into()))
            }
            Nonlinearity::Gelu => {
                let erf = Self::float_erf(Self::float_mul_scalar(x.clone(), 0.5f64.sqrt().into()));
                let below =
                    Self::float_mul_scalar(Self::float_add_scalar(erf, 1.0.into()), 0.5.into());
                let square = Self::float_mul(x.clone(), x.clone());
                let density = Self::float_exp(Self::float_mul_scalar(square, (-0.5).into()));
                let density = Self::float_mul_scalar(density, (1.0 / (2.0 * PI).sqrt()).into());
                Self::float_add(below, Self::float_mul(x, density))
            }
            Nonlinearity::GeluTanh => {
                let root: f64 = (2.0 / PI).sqrt();
                let square = Self::float_mul(x.clone(), x.clone());
                let cubic = Self::float_mul_scalar(square.clone(), 0.044715.into());
                let inner = Self::float_mul(x.clone(), Self::float_add_scalar(cubic, 1.0.into()));
                let t = Self::float_tanh(Self::float_mul_scalar(inner, root.into()));
                let steep = Self::float_mul_scalar(square, (3.0 * 0.044715).into());
                let steep = Self::float_mul_scalar(
                    Self::float_add_scalar(steep, 1.0.into()),
                    (0.5 * root).into(),
                );
                let bend = one_less(Self::float_mul(t.clone(), t.clone()));
                let rise = Self::float_mul(Self::float_mul(x, bend), steep);
                let half =
                    Self::float_mul_scalar(Self::float_add_scalar(t, 1.0.into()), 0.5.into());
                Self::float_add(half, rise)
            }
            Nonlinearity::Relu => {
                let bools = get_or_init_device_settings::<Self>(&x.device()).bool_dtype;
                let float = x.dtype().into();
                let is_above = Self::float_greater_elem(x, 0.0.into(), bools);
                Self::bool_into_float(is_above, float)
            }
        }
    }

    /// Gradients of [`gated`](Self::gated), for `gate` and for `up`.
    #[fusion(default)]
    fn gated_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        nonlinearity: Nonlinearity,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let slope = Self::nonlinear_slope(gate.clone(), nonlinearity);
        let of_gate = Self::float_mul(Self::float_mul(grad.clone(), up), slope);
        (of_gate, Self::float_mul(grad, Self::nonlinear(gate, nonlinearity)))
    }

    /// Gradient of [`rms_norm`](Self::rms_norm) for `x`: with `g = grad ⊙ gain` and the divisor `s`,
    /// `g / s − x · mean(g ⊙ x) / s³`.
    #[fusion(default)]
    fn rms_norm_backward(
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        epsilon: f64,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let d = x.shape()[1];
        let mean = Self::float_mean_dim(Self::float_mul(x.clone(), x.clone()), 1);
        let scale = Self::float_sqrt(Self::float_add_scalar(mean, epsilon.into()));
        let grad = Self::float_mul(grad, Self::float_reshape(gain, Shape::new([1, d])));
        let along = Self::float_mean_dim(Self::float_mul(grad.clone(), x.clone()), 1);
        let cube = Self::float_mul(Self::float_mul(scale.clone(), scale.clone()), scale.clone());
        let along = Self::float_mul(x, Self::float_div(along, cube));
        Self::float_sub(Self::float_div(grad, scale), along)
    }

    #[fusion(default)]
    fn rotary(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        pairs: RotaryPairs,
    ) -> FloatTensor<Self> {
        let [batch, pos, n_heads, d_head]: [usize; 4] = dims(&x);
        let [_, _, n_pairs]: [usize; 3] = dims(&cos);
        let turned = 2 * n_pairs;
        // The two members of a pair on an axis of their own: before the pairs, or after them.
        let (shape, axis) = match pairs {
            RotaryPairs::Halves => ([batch, pos, n_heads, 2, n_pairs], 3),
            RotaryPairs::Neighbours => ([batch, pos, n_heads, n_pairs, 2], 4),
        };
        let member = |turned: &FloatTensor<Self>, which: usize| {
            let mut slices = [all(); 5];
            slices[axis] = one(which);
            let member = Self::float_slice(turned.clone(), &slices);
            Self::float_reshape(member, Shape::new([batch, pos, n_heads, n_pairs]))
        };
        let part = |from: usize, to: usize| {
            let slice = burn::tensor::Slice::new(from as isize, Some(to as isize), 1);
            Self::float_slice(x.clone(), &[all(), all(), all(), slice])
        };
        let split = Self::float_reshape(part(0, turned), Shape::new(shape));
        let (a, b) = (member(&split, 0), member(&split, 1));
        let table = |t| Self::float_reshape(t, Shape::new([batch, pos, 1, n_pairs]));
        let (cos, sin) = (table(cos), table(sin));
        let first = Self::float_sub(
            Self::float_mul(a.clone(), cos.clone()),
            Self::float_mul(b.clone(), sin.clone()),
        );
        let second = Self::float_add(Self::float_mul(b, cos), Self::float_mul(a, sin));
        let mut shape = shape;
        shape[axis] = 1;
        let alone = |t| Self::float_reshape(t, Shape::new(shape));
        let joined = Self::float_cat(vec![alone(first), alone(second)], axis);
        let joined = Self::float_reshape(joined, Shape::new([batch, pos, n_heads, turned]));
        match turned == d_head {
            true => joined,
            false => Self::float_cat(vec![joined, part(turned, d_head)], 3),
        }
    }

    #[fusion(default)]
    fn attention(
        q: FloatTensor<Self>,
        prefix_k: FloatTensor<Self>,
        prefix_v: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        first_column: IntTensor<Self>,
        config: AttentionConfig,
    ) -> FloatTensor<Self> {
        plain_attention::<Self>(q, [prefix_k, prefix_v], [k, v], first_column, config)
    }

    /// Gradients of [`attention`](Self::attention) without a prefix and a soft cap, for queries,
    /// keys and values.
    #[fusion(default)]
    fn attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        first_column: IntTensor<Self>,
        config: AttentionConfig,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        plain_attention_backward::<Self>([q, k, v], first_column, config, grad)
    }

    #[fusion(meta = |parameter, _gradient, first, second, _step, _config| {
        (parameter.clone(), first.clone(), second.clone())
    })]
    fn adam_step(
        parameter: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        step: usize,
        config: AdamConfig,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        plain_adam_step::<Self>(parameter, gradient, [first, second], step, config)
    }

    #[fusion(default)]
    fn project_rows(gradient: FloatTensor<Self>, rows: FloatTensor<Self>) -> FloatTensor<Self> {
        plain_project_rows::<Self>(gradient, rows)
    }

    #[fusion(default)]
    fn fit_residual(
        x: FloatTensor<Self>,
        products: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        by: FloatTensor<Self>,
        rows: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        select: Select,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        plain_fit_residual::<Self>(x, products, [bias, by], rows, residual, select)
    }
}

pub(crate) fn dims<const D: usize>(tensor: &impl TensorMetadata) -> [usize; D] {
    let shape = tensor.shape();
    std::array::from_fn(|axis| shape[axis])
}

/// `tensor` in the precision of `like`.
pub(crate) fn cast_like<B: Backend>(
    tensor: FloatTensor<B>,
    like: &FloatTensor<B>,
) -> FloatTensor<B> {
    match tensor.dtype() == like.dtype() {
        true => tensor,
        false => B::float_cast(tensor, like.dtype().into()),
    }
}

fn all() -> burn::tensor::Slice {
    burn::tensor::Slice::full()
}

fn one(index: usize) -> burn::tensor::Slice {
    burn::tensor::Slice::new(index as isize, Some(index as isize + 1), 1)
}

/// `rows[indices]` as `[n, k, d]`.
fn gather_rows<B: Backend>(rows: FloatTensor<B>, indices: IntTensor<B>) -> FloatTensor<B> {
    let ([n, k], d) = (dims(&indices), rows.shape()[1]);
    let flat = B::int_reshape(indices, Shape::new([n * k]));
    B::float_reshape(B::float_select(rows, 0, flat), Shape::new([n, k, d]))
}
