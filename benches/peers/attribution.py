"""Times gradient × activation for all latents by torch on what `benches attribution` times ours on.

The same weights, token ids and shape. The blocks below the autoencoder keep no graph, the
autoencoder is dense with its error kept apart, and only the logits of the last position are computed:
a line each from the tokens, and from the residual stream kept after the block.
"""

import argparse
from pathlib import Path

import torch
from model import load
from timing import N_POS, N_ROWS, median_s, reset_peak, say, token_ids

K = 32


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model = load(options.model, torch.float32).requires_grad_(False)
    trunk = model.model
    ids = torch.tensor(token_ids(model.config.vocab_size)).view(N_ROWS, N_POS)
    w_dec = torch.nn.functional.normalize(torch.randn(options.d_sae, model.config.hidden_size), dim=1)
    blocks, norm = trunk.layers, trunk.norm
    below, above = blocks[: options.layer + 1], blocks[options.layer + 1 :]
    places = torch.arange(N_POS)[None]
    mask = torch.full((N_POS, N_POS), float("-inf")).triu(1)[None, None]

    def run(layers, x):
        angles = trunk.rotary_emb(x, places)
        for layer in layers:
            x = layer(x, attention_mask=mask, position_ids=places, position_embeddings=angles)
            x = x[0] if isinstance(x, tuple) else x
        return x

    def residual():
        with torch.no_grad():
            return run(below, trunk.embed_tokens(ids))

    def attribute(x):
        pre = x @ w_dec.T
        top = pre.topk(K, dim=-1)
        latents = torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())
        error = x - latents @ w_dec
        latents.requires_grad_(True)
        end = run(above, latents @ w_dec + error)
        logits = model.lm_head(norm(end[:, -1]))
        (logits[:, 1] - logits[:, 2]).sum().backward()
        return latents * latents.grad

    # That the blocks were put together right: the logits are the model's own.
    with torch.no_grad():
        own = model(ids[:1], use_cache=False, logits_to_keep=1).logits[0, -1]
        ours = model.lm_head(norm(run(blocks, trunk.embed_tokens(ids[:1]))[:, -1]))[0]
        assert torch.allclose(own, ours, atol=1e-3), (own - ours).abs().max()
    reset_peak()
    say("attribute", seconds=median_s(lambda: attribute(residual())))
    kept = residual()
    reset_peak()
    say("attribute_from_kept", seconds=median_s(lambda: attribute(kept)))


if __name__ == "__main__":
    main()
