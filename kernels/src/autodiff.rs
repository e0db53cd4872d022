//! Gradients. The sparse operations have sparse ones; the others differentiate their defaults.

use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{AutodiffBackend, Backend, TensorMetadata};

use crate::ops::KernelOps;

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
struct TopKEncode;

impl<B: Backend + KernelOps> Backward<B, 3> for TopKEncode {
    type State = (IntTensor<B>, FloatTensor<B>, FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [x_node, w_node, bias_node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let (indices, values, x, w) = ops.state;
        let grad = B::relu_backward(values, grad);
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

impl<B: Backend + KernelOps, C: CheckpointStrategy> KernelOps for Autodiff<B, C> {
    fn top_k(x: FloatTensor<Self>, k: usize) -> (FloatTensor<Self>, IntTensor<Self>) {
        let (values, indices) = B::top_k(Self::inner(x), k);
        (Self::from_inner(values), indices)
    }

    fn top_k_encode(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        scale: FloatTensor<Self>,
        k: usize,
    ) -> (FloatTensor<Self>, IntTensor<Self>) {
        let scale = Self::inner(scale);
        let ((x, x_node), (w, w_node), (bias, bias_node)) =
            (x.into_parts(), w.into_parts(), bias.into_parts());
        let (values, indices) = B::top_k_encode(x.clone(), w.clone(), bias, scale, k);
        let prepared = TopKEncode.prepare::<C>([x_node, w_node, bias_node]);
        let values = match prepared.compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((indices.clone(), values.clone(), x, w), values),
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
}
