//! Gradients. The sparse operations have sparse ones, and what a transformer's block is made of has
//! fused ones; the others differentiate their defaults.

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{AutodiffBackend, Backend, TensorMetadata};

use crate::ops::{AttentionConfig, KernelOps, Nonlinearity, RotaryPairs, Search, Select, dims};
use crate::plain_attention::plain_attention;

#[derive(Debug)]
struct SparseDecode;

impl<B: Backend + KernelOps> Backward<B, 2> for SparseDecode {
    type State = (IntTensor<B>, FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [values_node, rows_node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let (indices, values, rows) = ops.state;
        let m = rows.shape()[0];
        if let Some(node) = values_node {
            let grad = B::sparse_dot(indices.clone(), rows, grad.clone());
            grads.register::<B>(node.id, grad);
        }
        if let Some(node) = rows_node {
            grads.register::<B>(node.id, B::sparse_decode_grad_rows(indices, values, grad, m));
        }
    }
}

#[derive(Debug)]
struct SparseEncode;

impl<B: Backend + KernelOps> Backward<B, 3> for SparseEncode {
    type State = (IntTensor<B>, FloatTensor<B>, FloatTensor<B>, FloatTensor<B>, Select);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [x_node, w_node, bias_node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let (indices, values, x, w, select) = ops.state;
        let grad = match select {
            Select::TopKMagnitude(_) | Select::TopKSigned(_) => grad,
            // What is kept is above zero; zeros are cut off by the relu, or fill a row up.
            _ => B::relu_backward(values, grad),
        };
        let m = w.shape()[1];
        if let Some(node) = bias_node {
            grads.register::<B>(node.id, B::sparse_sum(indices.clone(), grad.clone(), m));
        }
        if let Some(node) = w_node {
            // Latent-major, then a transposed view: one owner per row, no atomics.
            let rows = B::sparse_decode_grad_rows(indices.clone(), grad.clone(), x, m);
            grads.register::<B>(node.id, B::float_transpose(rows));
        }
        if let Some(node) = x_node {
            let rows = B::float_transpose(w);
            grads.register::<B>(node.id, B::sparse_decode(indices, grad, rows));
        }
    }
}

#[derive(Debug)]
struct Gated;

impl<B: Backend + KernelOps> Backward<B, 2> for Gated {
    type State = (FloatTensor<B>, FloatTensor<B>, Nonlinearity);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (gate, up, nonlinearity) = ops.state;
        let (of_gate, of_up) = B::gated_backward(gate, up, nonlinearity, grad);
        for (node, grad) in ops.parents.into_iter().zip([of_gate, of_up]) {
            if let Some(node) = node {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

#[derive(Debug)]
struct NonLinear;

impl<B: Backend + KernelOps> Backward<B, 1> for NonLinear {
    type State = (FloatTensor<B>, Nonlinearity);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (x, nonlinearity) = ops.state;
        if let [Some(node)] = ops.parents {
            let slope = B::nonlinear_slope(x, nonlinearity);
            grads.register::<B>(node.id, B::float_mul(grad, slope));
        }
    }
}

#[derive(Debug)]
struct RmsNorm;

impl<B: Backend + KernelOps> Backward<B, 2> for RmsNorm {
    type State = (FloatTensor<B>, FloatTensor<B>, f64);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [x_node, gain_node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let (x, gain, epsilon) = ops.state;
        if let Some(node) = gain_node {
            let ones = B::float_add_scalar(B::float_mul_scalar(gain.clone(), 0.into()), 1.into());
            let normed = B::rms_norm(x.clone(), ones, epsilon);
            let d = gain.shape();
            let sum = B::float_sum_dim(B::float_mul(grad.clone(), normed), 0);
            grads.register::<B>(node.id, B::float_reshape(sum, d));
        }
        if let Some(node) = x_node {
            grads.register::<B>(node.id, B::rms_norm_backward(x, gain, epsilon, grad));
        }
    }
}

#[derive(Debug)]
struct Rotary;

impl<B: Backend + KernelOps> Backward<B, 1> for Rotary {
    type State = (FloatTensor<B>, FloatTensor<B>, RotaryPairs);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (cos, sin, pairs) = ops.state;
        if let [Some(node)] = ops.parents {
            // The transpose of a rotation turns back.
            grads.register::<B>(node.id, B::rotary(grad, cos, B::float_neg(sin), pairs));
        }
    }
}

#[derive(Debug)]
struct Attention;

impl<B: Backend + KernelOps> Backward<B, 3> for Attention {
    type State = ([FloatTensor<B>; 3], IntTensor<B>, AttentionConfig);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let ([q, k, v], first_column, config) = ops.state;
        let (q, k, v) = B::attention_backward(q, k, v, first_column, config, grad);
        for (node, grad) in ops.parents.into_iter().zip([q, k, v]) {
            if let Some(node) = node {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

impl<B: Backend + KernelOps, C: CheckpointStrategy> KernelOps for Autodiff<B, C> {
    fn top_k(x: FloatTensor<Self>, k: usize) -> (FloatTensor<Self>, IntTensor<Self>) {
        let (values, indices) = B::top_k(Self::inner(x), k);
        (Self::from_inner(values), indices)
    }

    fn sparse_encode(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        by: FloatTensor<Self>,
        select: Select,
        search: Search,
    ) -> (FloatTensor<Self>, IntTensor<Self>) {
        let by = Self::inner(by);
        let ((x, x_node), (w, w_node), (bias, bias_node)) =
            (x.into_parts(), w.into_parts(), bias.into_parts());
        let (values, indices) = B::sparse_encode(x.clone(), w.clone(), bias, by, select, search);
        let prepared = SparseEncode.prepare::<C>([x_node, w_node, bias_node]);
        let values = match prepared.compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                prep.finish((indices.clone(), values.clone(), x, w, select), values)
            }
            OpsKind::UnTracked(prep) => prep.finish(values),
        };
        (values, indices)
    }

    fn sparse_decode(
        indices: IntTensor<Self>,
        values: FloatTensor<Self>,
        rows: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let ((values, values_node), (rows, rows_node)) = (values.into_parts(), rows.into_parts());
        let out = B::sparse_decode(indices.clone(), values.clone(), rows.clone());
        let prepared = SparseDecode.prepare::<C>([values_node, rows_node]);
        match prepared.compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((indices, values, rows), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn gated(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        nonlinearity: Nonlinearity,
    ) -> FloatTensor<Self> {
        let ((gate, gate_node), (up, up_node)) = (gate.into_parts(), up.into_parts());
        let out = B::gated(gate.clone(), up.clone(), nonlinearity);
        match Gated.prepare::<C>([gate_node, up_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((gate, up, nonlinearity), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn nonlinear(x: FloatTensor<Self>, nonlinearity: Nonlinearity) -> FloatTensor<Self> {
        let (x, node) = x.into_parts();
        let out = B::nonlinear(x.clone(), nonlinearity);
        match NonLinear.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((x, nonlinearity), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn rms_norm(x: FloatTensor<Self>, gain: FloatTensor<Self>, epsilon: f64) -> FloatTensor<Self> {
        let ((x, x_node), (gain, gain_node)) = (x.into_parts(), gain.into_parts());
        let out = B::rms_norm(x.clone(), gain.clone(), epsilon);
        match RmsNorm.prepare::<C>([x_node, gain_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((x, gain, epsilon), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    /// The tables are constants: they get no gradient.
    fn rotary(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        pairs: RotaryPairs,
    ) -> FloatTensor<Self> {
        let (x, node) = x.into_parts();
        let (cos, sin) = (Self::inner(cos), Self::inner(sin));
        let out = B::rotary(x, cos.clone(), sin.clone(), pairs);
        match Rotary.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((cos, sin, pairs), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn attention(
        q: FloatTensor<Self>,
        prefix_k: FloatTensor<Self>,
        prefix_v: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        first_column: IntTensor<Self>,
        config: AttentionConfig,
    ) -> FloatTensor<Self> {
        let [_, prefix, _, _]: [usize; 4] = dims(&prefix_k);
        if prefix > 0 || config.soft_cap.is_some() {
            return plain_attention::<Self>(q, [prefix_k, prefix_v], [k, v], first_column, config);
        }
        let ((q, q_node), (k, k_node), (v, v_node)) =
            (q.into_parts(), k.into_parts(), v.into_parts());
        let out = <B as KernelOps>::attention(
            q.clone(),
            Self::inner(prefix_k),
            Self::inner(prefix_v),
            k.clone(),
            v.clone(),
            first_column.clone(),
            config,
        );
        match Attention.prepare::<C>([q_node, k_node, v_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(([q, k, v], first_column, config), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }
}
