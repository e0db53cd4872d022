"""A TopK training step in torch with its gradients written by hand: what there is to beat.

One product into a buffer that is kept, and sparse work from there on: nothing of the backward pass is
dense but the gradients of the weights themselves. It computes what SAELens' TopK computes: latents
ranked in units of their decoder norms, the squared error, clipping to a norm of 1, Adam.
"""

import torch
import torch.nn.functional as F


class SparseStep:
    """Weights lie latent-major, `[d_sae, d_in]`, so that a gradient is whole rows of them."""

    def __init__(self, w_enc, w_dec, k, lr):
        d_sae, d_in = w_dec.shape
        self.k, self.device = k, w_dec.device
        # Rows in one piece, whatever they are a view of: the fused Adam goes by memory, not by index.
        rows = torch.contiguous_format
        self.w_enc = w_enc.clone(memory_format=rows)
        self.w_dec = w_dec.clone(memory_format=rows)
        self.b_enc = torch.zeros(d_sae, device=self.device)
        self.b_dec = torch.zeros(d_in, device=self.device)
        self.parameters = [self.w_enc, self.b_enc, self.w_dec, self.b_dec]
        self.adam = torch.optim.Adam(self.parameters, lr=lr, fused=True)
        # The fused step divides gradients by this as it goes: clipping without a pass of its own.
        self.adam.found_inf = torch.zeros((), device=self.device)
        self.ranking = torch.empty(d_sae, d_in, device=self.device)
        self.pre = None
        # Latents of a group in the first round of ranking: the fastest of those tried.
        self.group = 16 if d_sae < 8192 else 64

    def arange(self, *range):
        return torch.arange(*range, device=self.device)

    @torch.no_grad()
    def __call__(self, x):
        n, k = len(x), self.k
        norms = self.w_dec.norm(dim=1)
        torch.mul(self.w_enc, norms[:, None], out=self.ranking)
        centred = x - self.b_dec
        values, indices = self.rank(centred, norms)
        kept = values.relu_().div_(norms[indices.view(-1)].view(n, k))

        error = F.embedding_bag(indices, self.w_dec, per_sample_weights=kept, mode="sum")
        error += self.b_dec - x
        loss = error.square().sum() / n
        error *= 2 / n
        by_latent = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            error, self.w_dec, indices.view(-1), self.arange(0, n * k, k),
            self.arange(n).repeat_interleave(k), 0)
        by_latent = by_latent.view(n, k).mul_(kept > 0)

        # The pairs of latent and row in the order of latents: one owner for each row of a gradient.
        latents, order = indices.view(-1).sort(stable=True)
        rows = order // k
        starts = torch.searchsorted(latents, self.arange(len(norms)))

        def rows_of(source, weights):
            return F.embedding_bag(
                rows, source, starts, per_sample_weights=weights.view(-1)[order], mode="sum")

        d_b_enc = torch.zeros_like(self.b_enc).index_add_(
            0, indices.view(-1), by_latent.view(-1))
        gradients = [
            rows_of(centred, by_latent),
            d_b_enc,
            rows_of(error, kept),
            error.sum(0) - d_b_enc @ self.w_enc,
        ]
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        self.adam.grad_scale = norm.clamp(min=1.0)
        for parameter, gradient in zip(self.parameters, gradients):
            parameter.grad = gradient
        self.adam.step()
        return loss.item()

    def rank(self, centred, norms):
        """The `k` largest of each row, in any order.

        A row's `k` largest are in the `k` groups with the largest maxima: ranking those first leaves
        a tenth of the comparisons, and the same result.
        """
        n, group = len(centred), self.group
        if self.pre is None:
            # In one piece: tiles of rows that stay in the caches were slower.
            self.pre = torch.empty(n, len(norms), device=self.device)
        torch.addmm(self.b_enc * norms, centred, self.ranking.T, out=self.pre)
        _, largest = self.pre.view(n, -1, group).amax(-1).topk(self.k, sorted=False)
        candidates = (largest[..., None] * group + self.arange(group)).flatten(1)
        found, at = self.pre.gather(1, candidates).topk(self.k, sorted=False)
        return found, candidates.gather(1, at)
