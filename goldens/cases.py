"""What the scripts that make goldens have in common: sizes, random inputs, and how files are written."""

import json

import torch
from safetensors.torch import load_file, save_file

D_IN, D_SAE, D_OUT, K, N = 20, 80, 16, 7, 12


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(path, tensors):
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, path)


def batch(seed):
    """Activations that are not centred."""
    return 0.3 + 1.5 * torch.randn(N, D_IN, generator=torch.Generator().manual_seed(seed))


def known(options, case, file, tensor=None):
    """The tensors, or one, of a file of this case in the folder `--like`; none without it."""
    if options.like is None:
        return None
    tensors = load_file(options.like / case / file)
    return tensors if tensor is None else tensors[tensor]


def inputs(options, case, name, seed):
    """The activations of a case: those of the folder `--like`, or new ones."""
    there = known(options, case, "golden.safetensors", name)
    return batch(seed) if there is None else there


def dead_mask(options, case, new):
    """Which latents count as dead: as in the folder `--like`, or these."""
    there = known(options, case, "golden.safetensors")
    return new if there is None else there["dead_mask"].bool()
