"""Trains SAELens' TopK on the rows that `benches quality` trains ours on, with the same settings.

    python benches/peers/quality.py --rows target/peers/rows.safetensors --out target/peers/quality

Writes a folder for each seed, which `benches quality --theirs` measures. SAELens' own trainer, one
pass, the learning rate constant, inputs scaled by their mean norm over the first batches.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors import safe_open

BATCH = 4096
N_SCALED_BY = 4


def batches(rows, seed):
    """Batches in an order drawn from the seed, without end."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    while True:
        for first in range(0, len(rows) - BATCH + 1, BATCH):
            yield rows[order[first:first + BATCH]]


def train(rows, seed, options):
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(seed)
    sae_class, config_class = get_sae_training_class("topk")
    sae = sae_class(config_class(
        d_in=rows.shape[1], d_sae=options.d_sae, k=options.k,
        normalize_activations="expected_average_only_in"))
    config = SAETrainerConfig(
        total_training_samples=len(rows) // BATCH * BATCH, train_batch_size_samples=BATCH,
        lr=options.lr, lr_end=options.lr, n_batches_for_norm_estimate=N_SCALED_BY)
    return SAETrainer(config, sae, data_provider=batches(rows, seed)).fit()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with safe_open(options.rows, framework="pt") as file:
        rows = file.get_tensor("train")
    for seed in options.seeds:
        folder = options.out / f"seed-{seed}"
        if (folder / "cfg.json").is_file():
            continue
        start = time.perf_counter()
        train(rows, seed, options).save_inference_model(folder)
        seconds = time.perf_counter() - start
        print(json.dumps({"seed": seed, "seconds": seconds, "n_rows": len(rows)}), flush=True)


if __name__ == "__main__":
    main()
