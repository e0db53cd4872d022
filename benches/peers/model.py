"""Times the Python tools on what `benches model` times ours on, and prints a JSON line for each.

The same weights (a GGUF file, or a Hugging Face folder), the same token ids, `[8, 128]` tokens, the
same number of threads. Decoding is a bare loop of forward passes with a KV cache, which is faster
than `generate`; steered, with a hook as repeng and SAELens' users write it.
"""

import argparse
import time
from pathlib import Path

import torch
from timing import (
    N_DECODED, N_POS, N_PROMPT, N_ROWS, STEERED_LAYER, measure, measure_decoding, say, token_ids)
from transformers import AutoModelForCausalLM, DynamicCache

D_SAE, K = 4608, 32


def load(path, dtype, **more):
    kind = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, **kind, **more)
    return model.eval()


def transformers_passes(model, ids, layer):
    """Bare modules, the fastest that there is: nothing behind the layer runs, nothing is hooked."""
    trunk = model.model
    blocks, norm = trunk.layers, trunk.norm
    trunk.layers, trunk.norm = blocks[: layer + 1], torch.nn.Identity()
    measure(f"harvest_l{layer}", ids.numel(), lambda: trunk(ids, use_cache=False))
    trunk.layers, trunk.norm = blocks, norm
    measure("forward_logits", ids.numel(), lambda: model(ids, use_cache=False))


def transformer_lens_passes(model, ids, layer):
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        model.path.parent, gguf_file=model.path.name, local_files_only=True)
    bridge = TransformerBridge.boot_transformers(
        "HuggingFaceTB/SmolLM2-135M-Instruct", hf_model=model, tokenizer=tokenizer, device="cpu")
    point = f"blocks.{layer}.hook_resid_post"

    def harvest():
        _, cache = bridge.run_with_cache(ids, names_filter=point, stop_at_layer=layer + 1)
        return cache[point]

    assert harvest().shape[:2] == ids.shape
    measure(f"harvest_l{layer}", ids.numel(), harvest)
    measure("forward_logits", ids.numel(), lambda: bridge(ids))


def nnsight_passes(model, ids, layer):
    from nnsight import NNsight

    traced = NNsight(model)

    def harvest():
        with traced.trace(ids, use_cache=False) as tracer:
            x = traced.model.layers[layer].output.save()
            tracer.stop()
        return x

    found = harvest()
    found = found[0] if isinstance(found, tuple) else found
    assert found.shape[-2] == ids.shape[1]

    def logits():
        with traced.trace(ids, use_cache=False):
            x = traced.lm_head.output.save()
        return x

    measure(f"harvest_l{layer}", ids.numel(), harvest)
    measure("forward_logits", ids.numel(), logits)


PASSES = {
    "transformers": transformers_passes,
    "transformer-lens": transformer_lens_passes,
    "nnsight": nnsight_passes,
}


def decode(model, prompt, name):
    def steps():
        cache = DynamicCache(config=model.config)
        ids, first = prompt, None
        for _ in range(N_DECODED + 1):
            out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1:].argmax(-1)
            first = first or time.perf_counter()
        return time.perf_counter() - first

    measure_decoding(name, steps)


def steered(model, prompt):
    """Decoding with a vector added after a block, and with a latent of a TopK SAE clamped there."""
    from sae_lens import TopKSAE, TopKSAEConfig

    d_model = model.config.hidden_size
    vector = torch.nn.functional.normalize(torch.randn(d_model), dim=0)
    sae = TopKSAE(TopKSAEConfig(d_in=d_model, d_sae=D_SAE, k=K))

    def add(x):
        return x + vector

    def clamp(x):
        latents = sae.encode(x)
        error = x - sae.decode(latents)
        latents[..., 7] = 1.0
        return sae.decode(latents) + error

    for name, edit in [("decode_vector", add), ("decode_clamp", clamp)]:
        def hook(_module, _inputs, out, edit=edit):
            return (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)

        handle = model.model.layers[STEERED_LAYER].register_forward_hook(hook)
        decode(model, prompt, name)
        handle.remove()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--library", choices=PASSES, default="transformers")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    start = time.perf_counter()
    model = load(options.model, torch.float32)
    say("load", seconds=time.perf_counter() - start)
    model.path = options.model
    ids = torch.tensor(token_ids(model.config.vocab_size)).view(N_ROWS, N_POS)
    with torch.inference_mode():
        PASSES[options.library](model, ids, options.layer)
        if options.library == "transformers":
            prompt = ids[:1, :N_PROMPT]
            decode(model, prompt, "decode_f32")
            steered(model, prompt)
            # The same values, rounded: products of bf16 by bf16 here, of f32 by bf16 in ours.
            model = model.to(torch.bfloat16)
            decode(model, prompt, "decode_bf16")


if __name__ == "__main__":
    main()
