"""SAEs of sparsify and dictionary_learning, for make.py: their files, latents, and a training step.

Each writes KIND/CASE/ with the weights before the step, what the library computes of a batch, and the
gradients. Everything on CPU in f32; README.md says what the tensors are.
"""

import importlib
import importlib.metadata
import math
import os

import torch

from cases import D_IN, D_SAE, K, dead_mask, inputs, known, write_json, write_tensors


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


def gradients(module):
    return {f"grad.{name}": p.grad.clone() for name, p in module.named_parameters()}


SPARSIFY = {
    "topk": {"k": K},
    "groupmax": {"k": 8, "activation": "groupmax"},
    "topk_multi_dead": {"k": K, "multi_topk": True},
    "transcoder_skip": {"k": K, "skip_connection": True, "transcode": True},
}


def sparsify(out, options):
    # Its kernels for GPUs stand in for the plain decoder wherever they can be imported.
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig

    for name, config in SPARSIFY.items():
        case = f"sparsify/{name}"
        sae = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, **config))
        weights = known(options, case, "sae.safetensors")
        if weights is None:
            randomize(dict(sae.named_parameters()))
            sae.set_decoder_norm_to_unit_norm()
        else:
            sae.load_state_dict(weights)
        folder = out / case
        sae.save_to_disk(folder)
        tensors, mask = {"x": inputs(options, case, "x", 2)}, None
        if name.endswith("_dead"):
            mask = dead_mask(options, case, torch.arange(D_SAE) % 3 == 0)
            tensors["dead_mask"] = mask.to(torch.uint8)
        if config.get("transcode"):
            tensors["y"] = inputs(options, case, "y", 3)
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
        if not config.get("transcode"):
            # In place: what follows as the gradient is projected too.
            sae.remove_gradient_parallel_to_decoder_directions()
            tensors["grad_projected.W_dec"] = sae.W_dec.grad.clone()
        tensors |= gradients(sae)
        write_tensors(folder / "golden.safetensors", tensors)
        golden = {
            "loss_formula": "fvu + auxk/32 + multi_topk_fvu/8",
            "loss": loss.item(),
            "fvu": found.fvu.item(),
            "auxk_loss": found.auxk_loss.item(),
            "multi_topk_fvu": found.multi_topk_fvu.item(),
            "sparsify": importlib.metadata.version("eai-sparsify"),
            "note": "top_k unsorted: compare as sets",
        }
        write_json(folder / "golden.json", golden)


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


def dictionary_learning(out, options):
    at = 2000
    for name, (module, trainer_class, more) in DICTIONARY_LEARNING.items():
        case = f"dictionary_learning/{name}"
        module = importlib.import_module(f"dictionary_learning.trainers.{module}")
        if name in ("standard", "standard_april", "gated", "jumprelu"):
            more = more | {"sparsity_warmup_steps": None}
        trainer = getattr(module, trainer_class)(
            steps=1000,
            activation_dim=D_IN,
            dict_size=D_SAE,
            layer=1,
            lm_name="tiny",
            lr=1e-2,
            warmup_steps=10,
            device="cpu",
            **more,
        )
        sae = trainer.ae
        ranks = name in ("topk", "batchtopk", "matryoshka")
        weights = known(options, case, "ae.safetensors")
        if weights is None:
            randomize(dict(sae.named_parameters()))
            if ranks:
                sae.threshold.fill_(0.3)
        else:
            sae.load_state_dict(weights)
        folder = out / case
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(sae.state_dict(), folder / "ae.pt")
        write_tensors(folder / "ae.safetensors", sae.state_dict())
        write_json(folder / "config.json", {"trainer": trainer.config})
        x, train_x = inputs(options, case, "x", 1), inputs(options, case, "train_x", 2)
        with torch.no_grad():
            latents = sae.encode(x)
            tensors = {
                "x": x,
                "encode": latents,
                "decode_of_encode": sae.decode(latents),
                "forward": sae(x),
                "train_x": train_x,
            }
            if ranks:
                tensors["encode_use_threshold"] = sae.encode(x, use_threshold=True)
                tensors["encode_no_threshold"] = sae.encode(x, use_threshold=False)
        log = trainer.loss(train_x, step=at, logging=True)
        golden = {"losses": log.losses, "loss": log.losses["loss"], "step": at}
        if ranks:
            golden["threshold_after_loss"] = sae.threshold.item()
        # The gradient does not depend on the step; in the first ones the threshold stays.
        trainer.loss(train_x, step=0).backward()
        tensors |= gradients(sae)
        write_tensors(folder / "golden.safetensors", tensors)
        write_json(folder / "golden.json", golden)
