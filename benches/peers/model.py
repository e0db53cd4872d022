"""Times transformers on what `benches model` times ours on, and prints a JSON line for each.

The same weights (a GGUF file, or a Hugging Face folder), the same token ids, `[8, 128]` tokens, the
same number of threads. Decoding is a bare loop of forward passes with a KV cache, which is faster
than `generate`.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache

N_ROWS, N_POS = 8, 128
N_PROMPT, N_DECODED = 16, 48
AT_LEAST_S, AT_LEAST_REPEATS = 1.5, 5


def load(path, dtype):
    kind = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **kind)
    return model.eval()


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb():
    """The most memory held since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kb,) = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return kb * 1024 / 1e6


def median_s(run):
    run()
    times, start = [], time.perf_counter()
    while len(times) < AT_LEAST_REPEATS or time.perf_counter() - start < AT_LEAST_S:
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def say(name, tokens_per_s):
    line = {"name": name, "tokens_per_s": tokens_per_s, "peak_rss_mb": peak_mb()}
    print(json.dumps(line), flush=True)


def passes(model, ids, layer):
    trunk = model.model
    blocks, norm = trunk.layers, trunk.norm
    # A model of the first blocks alone, so that nothing behind them runs.
    trunk.layers, trunk.norm = blocks[: layer + 1], torch.nn.Identity()
    reset_peak()
    seconds = median_s(lambda: trunk(ids, use_cache=False))
    say(f"harvest_l{layer}", ids.numel() / seconds)
    trunk.layers, trunk.norm = blocks, norm
    reset_peak()
    seconds = median_s(lambda: model(ids, use_cache=False))
    say("forward_logits", ids.numel() / seconds)


def decode(model, prompt, name):
    """Greedy steps behind a short prompt, without the prompt's own."""

    def steps():
        cache = DynamicCache(config=model.config)
        ids, first = prompt, None
        for _ in range(N_DECODED + 1):
            out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1:].argmax(-1)
            first = first or time.perf_counter()
        return time.perf_counter() - first

    reset_peak()
    steps()
    seconds = statistics.median(steps() for _ in range(AT_LEAST_REPEATS))
    say(name, N_DECODED / seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model = load(options.model, torch.float32)
    n_ids = N_ROWS * N_POS
    # As `benches model` chooses them.
    ids = [(i + 1) * 7919 % model.config.vocab_size for i in range(n_ids)]
    ids = torch.tensor(ids).view(N_ROWS, N_POS)
    with torch.inference_mode():
        passes(model, ids, options.layer)
        decode(model, ids[:1, :N_PROMPT], "decode_f32")
        # The same values, rounded: products of bf16 by bf16 here, of f32 by bf16 in ours.
        model = model.to(torch.bfloat16)
        decode(model, ids[:1, :N_PROMPT], "decode_bf16")


if __name__ == "__main__":
    main()
