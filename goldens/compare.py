"""Says where two folders of goldens differ, case by case: for what `make.py --like` made.

    python compare.py MADE COMMITTED
"""

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("made", type=Path)
    parser.add_argument("committed", type=Path)
    options = parser.parse_args()
    n_same = n_other = 0
    for path in sorted(options.made.rglob("*")):
        name = path.relative_to(options.made)
        there = options.committed / name
        if path.suffix not in (".safetensors", ".json"):
            continue
        found = ["not there"] if not there.exists() else list(differences(path, there))
        n_same, n_other = n_same + (not found), n_other + bool(found)
        for difference in found:
            print(f"{name}: {difference}")
    print(f"{n_same} files have the same content, {n_other} not")


def differences(made, committed):
    """What differs; of tensors the largest difference, beside the largest value."""
    if made.suffix == ".json":
        ours, theirs = flat(json.loads(made.read_text())), flat(json.loads(committed.read_text()))
    else:
        ours, theirs = load_file(made), load_file(committed)
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        if a is None or b is None:
            yield f"{key} is only {'made' if b is None else 'committed'}"
        elif not isinstance(a, torch.Tensor):
            both = isinstance(a, float) and isinstance(b, float)
            # A sum that threads share is another one with another number of them.
            if not (math.isclose(a, b, rel_tol=1e-6) if both else a == b):
                yield f"{key}: {a!r}, not {b!r}"
        elif a.shape != b.shape:
            yield f"{key}: {list(a.shape)}, not {list(b.shape)}"
        elif not torch.equal(a, b):
            difference = (a.double() - b.double()).abs().max().item()
            yield f"{key} by {difference:.2e} of {b.abs().max().item():.2e}"


def flat(value, prefix=""):
    """The leaves of JSON by their paths, so that a null is no absence."""
    if isinstance(value, dict):
        parts = (flat(inner, f"{prefix}.{key}") for key, inner in value.items())
        return {name: leaf for part in parts for name, leaf in part.items()}
    return {prefix: str(value) if value is None else value}


if __name__ == "__main__":
    main()
