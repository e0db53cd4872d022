"""Training steps of sparsify and dictionary_learning, for make.py.

Each writes KIND/CASE/ with the weights before the step, what the library computes of a batch, and the
gradients. Everything on CPU in f32; README.md says what the tensors are.
"""

import importlib
import importlib.metadata
import json
import math

import torch
from safetensors.torch import save_file

D_IN, D_SAE, K, N = 20, 80, 7, 12
WIDTHS = [10, 20, 40, 80]


def save(path, tensors):
    save_file({name: t.detach().contiguous().clone() for name, t in tensors.items()}, path)


def save_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def randomize(parameters, seed=0):
    """Weights of many norms, and thresholds among the pre-activations."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(parameters.items()):
            values = torch.randn(parameter.shape, generator=random)
            if parameter.dim() == 2:
                values = values / math.sqrt(D_IN)
            elif "threshold" in name:
                values = 0.1 + 0.5 * values.abs()
            else:
                values = 0.2 * values
            parameter.copy_(values)


def batch(seed):
    return 0.3 + 1.5 * torch.randn(N, D_IN, generator=torch.Generator().manual_seed(seed))


def gradients(module):
    return {f"grad.{name}": p.grad.clone() for name, p in module.named_parameters()}


SPARSIFY = {
    "topk": {"k": K},
    "groupmax": {"k": 8, "activation": "groupmax"},
    "topk_multi_dead": {"k": K, "multi_topk": True},
    "transcoder_skip": {"k": K, "skip_connection": True, "transcode": True},
}


def sparsify(out, _):
    from sparsify import SparseCoder, SparseCoderConfig

    for name, options in SPARSIFY.items():
        sae = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, **options))
        randomize(dict(sae.named_parameters()))
        sae.set_decoder_norm_to_unit_norm()
        folder = out / "sparsify" / name
        sae.save_to_disk(folder)
        tensors, mask = {"x": batch(2)}, None
        if name.endswith("_dead"):
            mask = torch.arange(D_SAE) % 3 == 0
            tensors["dead_mask"] = mask.to(torch.uint8)
        if options.get("transcode"):
            tensors["y"] = batch(3)
        found = sae(tensors["x"], tensors.get("y"), dead_mask=mask)
        loss = found.fvu + found.auxk_loss / 32 + found.multi_topk_fvu / 8
        loss.backward()
        encoded = sae.encode(tensors["x"])
        tensors |= {
            "top_acts": encoded.top_acts,
            "top_indices": encoded.top_indices,
            "pre_acts": encoded.pre_acts,
            "decode": sae.decode(encoded.top_acts, encoded.top_indices),
            "sae_out": found.sae_out,
        }
        if not options.get("transcode"):
            # In place: what follows as the gradient is projected too.
            sae.remove_gradient_parallel_to_decoder_directions()
            tensors["grad_projected.W_dec"] = sae.W_dec.grad.clone()
        tensors |= gradients(sae)
        save(folder / "golden.safetensors", tensors)
        golden = {
            "loss_formula": "fvu + auxk/32 + multi_topk_fvu/8",
            "loss": loss.item(),
            "fvu": found.fvu.item(),
            "auxk_loss": found.auxk_loss.item(),
            "multi_topk_fvu": found.multi_topk_fvu.item(),
            "sparsify": importlib.metadata.version("eai-sparsify"),
        }
        save_json(folder / "golden.json", golden)


# Name: the module and the class of the trainer, and its options.
DICTIONARY_LEARNING = {
    "standard": ("standard", "StandardTrainer", {"l1_penalty": 0.1}),
    "standard_april": ("standard", "StandardTrainerAprilUpdate", {"l1_penalty": 0.1}),
    "gated": ("gdm", "GatedSAETrainer", {"l1_penalty": 0.1}),
    "jumprelu": ("jumprelu", "JumpReluTrainer", {"bandwidth": 0.3}),
    "topk": ("top_k", "TopKTrainer", {"k": K}),
    "batchtopk": ("batch_top_k", "BatchTopKTrainer", {"k": K}),
    "matryoshka": (
        "matryoshka_batch_top_k",
        "MatryoshkaBatchTopKTrainer",
        {"k": K, "group_fractions": [0.125, 0.125, 0.25, 0.5]},
    ),
}


def dictionary_learning(out, _):
    at = 2000
    for name, (module, trainer_class, options) in DICTIONARY_LEARNING.items():
        module = importlib.import_module(f"dictionary_learning.trainers.{module}")
        if name in ("standard", "standard_april", "gated", "jumprelu"):
            options = options | {"sparsity_warmup_steps": None}
        trainer = getattr(module, trainer_class)(
            steps=1000,
            activation_dim=D_IN,
            dict_size=D_SAE,
            layer=1,
            lm_name="tiny",
            lr=1e-2,
            warmup_steps=10,
            device="cpu",
            **options,
        )
        sae = trainer.ae
        randomize(dict(sae.named_parameters()))
        if name in ("topk", "batchtopk", "matryoshka"):
            sae.threshold.fill_(0.3)
        folder = out / "dictionary_learning" / name
        folder.mkdir(parents=True, exist_ok=True)
        save(folder / "ae.safetensors", sae.state_dict())
        save_json(folder / "config.json", {"trainer": trainer.config})
        x, train_x = batch(1), batch(2)
        with torch.no_grad():
            latents = sae.encode(x)
            tensors = {
                "x": x,
                "encode": latents,
                "decode_of_encode": sae.decode(latents),
                "forward": sae(x),
                "train_x": train_x,
            }
        log = trainer.loss(train_x, step=at, logging=True)
        golden = {"losses": log.losses, "loss": log.losses["loss"], "step": at}
        if name in ("topk", "batchtopk", "matryoshka"):
            golden["threshold_after_loss"] = sae.threshold.item()
        # The gradient does not depend on the step; in the first ones the threshold stays.
        trainer.loss(train_x, step=0).backward()
        tensors |= gradients(sae)
        save(folder / "golden.safetensors", tensors)
        save_json(folder / "golden.json", golden)
