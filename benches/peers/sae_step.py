"""Times training steps of SAEs in other libraries, as `benches sae-step` times ours.

    python benches/peers/sae_step.py --library LIBRARY --kind KIND --d-sae 4608

Random activations `[4096, 576]` in f32: forward, backward, clipping and Adam, by each library's own
trainer where it has one that takes activations, with its defaults. Prints the same JSON line. The
product of the encoder is timed turn about with the steps, in the same process. With `--device cuda` on
a card, where sparsify has sparse kernels in Triton.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
import timing


def sae_lens(kind, options):
    """SAELens' own trainer, which also counts how often latents are active."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    more = {
        "topk": {"k": options.k},
        "batchtopk": {"k": options.k},
        "jumprelu": {"l0_coefficient": 1e-3},
        "gated": {"l1_coefficient": 1e-3},
        "standard": {"l1_coefficient": 1e-3},
    }[kind]
    sae_class, config_class = get_sae_training_class(kind)
    sae = sae_class(config_class(
        d_in=options.d_in, d_sae=options.d_sae, device=options.device, **more))
    config = SAETrainerConfig(
        total_training_samples=10**9, train_batch_size_samples=options.batch,
        lr=options.lr, lr_end=options.lr, device=options.device,
    )
    trainer = SAETrainer(config, sae, data_provider=iter(()))

    def step(x):
        out = trainer.step(x)
        trainer.n_training_steps += 1
        return out.loss.item(), (out.feature_acts != 0).sum().item() / len(x)

    # What it counts of the latents is in the step; what this script counts is not.
    def timed(x):
        return trainer.step(x)

    return timed, step, sae


def sparsify(kind, options):
    """What sparsify's trainer does of a batch, around its own module: the trainer runs a model."""
    from sparsify import SparseCoder, SparseCoderConfig

    assert kind == "topk", "sparsify has no other kind"
    config = SparseCoderConfig(num_latents=options.d_sae, k=options.k)
    sae = SparseCoder(options.d_in, config, device=options.device)
    adam = torch.optim.Adam(sae.parameters(), lr=options.lr)
    fired = torch.zeros(options.d_sae, dtype=torch.bool, device=options.device)

    def timed(x):
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x, dead_mask=torch.zeros_like(fired))
        fired[out.latent_indices.flatten()] = True
        (out.fvu + out.auxk_loss / 32).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        return out

    def step(x):
        out = timed(x)
        return out.fvu.item(), (out.latent_acts != 0).sum().item() / len(x)

    return timed, step, sae


def dictionary_learning(kind, options):
    """dictionary_learning's own trainers."""
    from dictionary_learning import trainers
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    more = {
        "topk": (TopKTrainer, {"k": options.k}),
        "batchtopk": (BatchTopKTrainer, {"k": options.k}),
        "jumprelu": (trainers.JumpReluTrainer, {}),
        "gated": (trainers.GatedSAETrainer, {}),
        "standard": (trainers.StandardTrainer, {}),
    }
    trainer_class, more = more[kind]
    trainer = trainer_class(
        steps=10**6, activation_dim=options.d_in, dict_size=options.d_sae, layer=0,
        lm_name="none", lr=options.lr, device=options.device, **more,
    )
    done = 0

    def timed(x):
        nonlocal done
        # Not from 0 on, where it computes a geometric median.
        done += 1
        return trainer.update(done, x)

    def step(x):
        loss = timed(x)
        by_rank = {"use_threshold": False} if "k" in more else {}
        return loss, (trainer.ae.encode(x, **by_rank) != 0).sum().item() / len(x)

    return timed, step, trainer.ae


def by_hand(kind, options):
    """The step in `sparse_step.py`."""
    from sparse_step import SparseStep

    assert kind == "topk", "there is no other kind"
    w_dec = torch.randn(options.d_sae, options.d_in, device=options.device)
    w_dec *= 0.1 / w_dec.norm(dim=1, keepdim=True)
    timed = SparseStep(w_dec, w_dec, options.k, options.lr)
    return timed, lambda x: (timed(x), float(options.k)), None


LIBRARIES = {
    "sae-lens": sae_lens,
    "sparsify": sparsify,
    "dictionary-learning": dictionary_learning,
    "by-hand": by_hand,
}


def agree(options):
    """Writes initial weights and batches, and what SAELens' losses on them are, for others to follow;
    fails unless the step by hand does."""
    from safetensors.torch import save_file
    from sparse_step import SparseStep

    torch.manual_seed(0)
    _, step, sae = sae_lens(options.kind, options)
    # Of directions, so that there is something to learn, and of more than these steps can learn:
    # where a loss has come near zero, SAELens' own parts from itself by percents if one weight is
    # rounded otherwise.
    n_directions = 4 * options.d_in
    directions = torch.randn(n_directions, options.d_in)
    batches = [
        torch.randn(options.batch, n_directions).relu() @ directions for _ in range(4)
    ]
    weights = {name: tensor.detach().float().clone().contiguous()
               for name, tensor in sae.named_parameters()}
    save_file(weights | {"x": torch.stack(batches)}, options.agree)
    hand = None
    if options.kind == "topk":
        hand = SparseStep(sae.W_enc.detach().T, sae.W_dec.detach(), options.k, options.lr)
    losses = []
    for i in range(options.steps):
        losses.append(step(batches[i % 4])[0])
        by_hand = hand and hand(batches[i % 4])
    print(json.dumps({"kind": options.kind, "losses": losses}), flush=True)
    if hand:
        assert abs(by_hand - losses[-1]) <= 0.01 * losses[-1], "the step by hand parts from SAELens'"


def finished(device):
    """Waits for the device, and says when that was."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def read_gb_s(device):
    """Bytes that the device reads from its memory in a second."""
    data = torch.ones(1 << 28, device=device)
    times = []
    for _ in range(5):
        start = finished(device)
        data.sum()
        times.append(finished(device) - start)
    return data.numel() * 4 / statistics.median(times) / 1e9


def reset_peak(device):
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timing.reset_peak()


def peak_mb(device):
    """The most memory held since the last reset, on a card by torch's own count."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return timing.peak_mb()


def measure(options):
    timed, step, _ = LIBRARIES[options.library](options.kind, options)
    device = options.device
    x = torch.randn(options.batch, options.d_in, device=device)
    w = torch.randn(options.d_in, options.d_sae, device=device)
    out = torch.empty(options.batch, options.d_sae, device=device)

    def product(tile):
        start = finished(device)
        for rows, place in zip(x.split(tile), out.split(tile)):
            torch.mm(rows, w, out=place)
        return finished(device) - start

    reset_peak(device)
    times, products, ratios = [], [], []
    for i in range(options.steps + options.warm_up):
        # Turn about, so that a change of the machine's pace hits both alike.
        encoder = min(product(512), product(options.batch))
        start = finished(device)
        timed(x)
        seconds = finished(device) - start
        if i >= options.warm_up:
            times.append(seconds)
            products.append(encoder)
            ratios.append(seconds / encoder)
    peak = peak_mb(device)
    _, l0 = step(x)
    step_s, encoder_s = statistics.median(times), statistics.median(products)
    print(json.dumps({
        "library": options.library,
        "kind": options.kind,
        "d_in": options.d_in,
        "d_sae": options.d_sae,
        "batch": options.batch,
        "l0": l0,
        "tokens_per_s": options.batch / step_s,
        "step_s": step_s,
        "encoder_gemm_s": encoder_s,
        "of_encoder": statistics.median(ratios),
        "gemm_gflops": 2 * options.batch * options.d_in * options.d_sae / encoder_s / 1e9,
        "read_gb_s": read_gb_s(device),
        "peak_rss_mb": peak,
    }), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=LIBRARIES, default="by-hand")
    parser.add_argument("--kind", default="topk",
                        choices=["topk", "batchtopk", "jumprelu", "gated", "standard"])
    parser.add_argument("--d-in", type=int, default=576)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--agree", type=Path, metavar="FILE",
                        help="write weights, batches and SAELens' losses, and time nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.device == "cpu":
        # Its kernels for GPUs stand in for the plain decoder wherever they can be imported.
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    agree(options) if options.agree else measure(options)


if __name__ == "__main__":
    main()
