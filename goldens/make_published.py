"""Files as Gemma Scope, Llama Scope and OpenAI publish theirs, for make.py.

Random weights under the names and in the layout that the published files have; what they compute is
SAELens' word, which reads them by loaders of its own, and for OpenAI's, which it does not read, the
published equations in f64. Everything on CPU; README.md says what the tensors are.
"""

from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from cases import write_json, write_tensors

D_IN, D_SAE, D_OUT, K, N = 8, 24, 6, 4, 6


def published(out, _):
    for name, make in CASES.items():
        folder = out / "published" / name
        folder.mkdir(parents=True, exist_ok=True)
        random = torch.Generator().manual_seed(0)
        x = 0.3 + 1.5 * torch.randn(N, D_IN, generator=random)
        tensors = make(folder, Weights(random), x)
        write_tensors(folder / "golden.safetensors", {"x": x} | tensors)


class Weights:
    """Random weights: latents in the rows of a decoder, in the columns of an encoder."""

    def __init__(self, random):
        self.random = random

    def normal(self, *shape, scale=1.0):
        return scale * torch.randn(*shape, generator=self.random)

    def jump_relu(self, d_out):
        return {
            "W_enc": self.normal(D_IN, D_SAE, scale=D_IN**-0.5),
            "b_enc": self.normal(D_SAE, scale=0.2),
            "W_dec": self.normal(D_SAE, d_out, scale=d_out**-0.5),
            "b_dec": self.normal(d_out, scale=0.2),
            "threshold": 0.1 + 0.5 * torch.rand(D_SAE, generator=self.random),
        }


def by_sae_lens(folder, loader, published_folder, x, scale=None, **overrides):
    """What SAELens makes of the files in `folder`, as if they came from the hub."""
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def downloaded(repo_id, filename, subfolder="", **_):
        inner = f"{subfolder}/{filename}".lstrip("/").removeprefix(published_folder).lstrip("/")
        return str(folder / inner)

    def shapes(repo_id, filename):
        tensors = load_file(downloaded(repo_id, filename))
        return {name: list(tensor.shape) for name, tensor in tensors.items()}

    def convert(path, device, cfg_overrides):
        config, state, _ = getattr(loaders, loader)(
            "google/gemma-scope-2b-pt-res", published_folder, device=device,
            cfg_overrides=overrides)
        return config, state

    with patch.object(loaders, "hf_hub_download", downloaded), \
            patch.object(loaders, "get_safetensors_tensor_shapes", shapes):
        sae = SAE.load_from_disk(folder, converter=convert)
    if scale is not None:
        # What `from_pretrained` does with the scale that a release is listed with.
        sae.fold_activation_norm_scaling_factor(scale)
    with torch.no_grad():
        return {"encode": sae.encode(x), "forward": sae(x)}


def gemma_scope(folder, weights, x):
    arrays = {name: tensor.numpy() for name, tensor in weights.jump_relu(D_IN).items()}
    np.savez(folder / "params.npz", **arrays)
    return by_sae_lens(folder, "gemma_2_sae_huggingface_loader",
                       "layer_3/width_16k/average_l0_59", x, d_in=D_IN, d_sae=D_SAE)


def gemma_scope_transcoder(folder, weights, x):
    arrays = {name: tensor.numpy() for name, tensor in weights.jump_relu(D_OUT).items()}
    np.savez_compressed(folder / "params.npz", **arrays)
    return by_sae_lens(folder, "gemma_2_transcoder_huggingface_loader",
                       "layer_3/width_16k/average_l0_59", x, d_in=D_IN, d_sae=D_SAE, d_out=D_OUT)


def gemma_scope_2(folder, weights, x):
    tensors = weights.jump_relu(D_IN)
    tensors["w_enc"], tensors["w_dec"] = tensors.pop("W_enc"), tensors.pop("W_dec")
    save_file(tensors, folder / "params.safetensors")
    write_json(folder / "config.json", {
        "hf_hook_point_in": "model.layers.7.output",
        "hf_hook_point_out": "model.layers.7.output",
        "width": D_SAE, "model_name": "gemma-v3-1b-pt", "architecture": "jump_relu",
        "l0": 60, "affine_connection": False, "type": "sae",
    })
    return by_sae_lens(folder, "gemma_3_sae_huggingface_loader",
                       "resid_post/layer_7_width_16k_l0_medium", x)


def gemma_scope_2_transcoder(folder, weights, x):
    tensors = weights.jump_relu(D_OUT)
    tensors["w_enc"], tensors["w_dec"] = tensors.pop("W_enc"), tensors.pop("W_dec")
    tensors["affine_skip_connection"] = weights.normal(D_IN, D_OUT, scale=D_IN**-0.5)
    save_file(tensors, folder / "params.safetensors")
    write_json(folder / "config.json", {
        "hf_hook_point_in": "model.layers.7.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.7.post_feedforward_layernorm.output",
        "width": D_SAE, "model_name": "gemma-v3-1b-pt", "architecture": "jump_relu",
        "l0": 60, "affine_connection": True, "type": "transcoder",
    })
    return by_sae_lens(folder, "gemma_3_sae_huggingface_loader",
                       "transcoder/layer_7_width_16k_l0_medium_affine", x)


def llama_scope(folder, weights, x):
    tensors = weights.jump_relu(D_IN)
    (folder / "checkpoints").mkdir(exist_ok=True)
    save_file({
        "encoder.weight": tensors["W_enc"].T.contiguous().bfloat16(),
        "encoder.bias": tensors["b_enc"].bfloat16(),
        "decoder.weight": tensors["W_dec"].T.contiguous().bfloat16(),
        "decoder.bias": tensors["b_dec"].bfloat16(),
    }, folder / "checkpoints" / "final.safetensors")
    norm = 3.75
    write_json(folder / "hyperparams.json", {
        "hook_point_in": "blocks.3.hook_resid_post", "hook_point_out": "blocks.3.hook_resid_post",
        "use_decoder_bias": True, "use_glu_encoder": False,
        "apply_decoder_bias_to_pre_encoder": False, "expansion_factor": D_SAE // D_IN,
        "d_model": D_IN, "d_sae": D_SAE, "act_fn": "jumprelu", "jump_relu_threshold": 0.3125,
        "norm_activation": "dataset-wise", "top_k": 50,
        "dataset_average_activation_norm": {"in": norm, "out": norm},
        "sparsity_include_decoder_norm": True, "dtype": "torch.bfloat16",
    })
    # In f32, of the published bf16 weights.
    return by_sae_lens(folder, "llama_scope_sae_huggingface_loader", "Llama3_1-8B-Base-L3R-8x", x,
                       scale=D_IN**0.5 / norm, dtype="float32")


def openai(folder, weights, x, activation="TopK"):
    state = {
        "pre_bias": weights.normal(D_IN, scale=0.2),
        "latent_bias": weights.normal(D_SAE, scale=0.2),
        "encoder.weight": weights.normal(D_SAE, D_IN, scale=D_IN**-0.5),
        "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.long),
        "activation": activation,
    }
    # One storage in other strides, as a tied initialisation leaves it.
    state["decoder.weight"] = state["encoder.weight"].T
    if activation == "TopK":
        state["activation_state_dict"] = {"k": K, "postact_fn": "ReLU"}
    torch.save(state, folder / "autoencoder.pt")

    # Gao et al., 2024, as in OpenAI's `sparse_autoencoder`.
    state = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
    x, mean, deviation = x.double(), 0.0, 1.0
    if activation == "TopK":
        mean = x.mean(dim=-1, keepdim=True)
        deviation = (x - mean).std(dim=-1, keepdim=True)
        x = (x - mean) / (deviation + 1e-5)
    pre = (x - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
    latents = pre.relu()
    if activation == "TopK":
        kept = pre.topk(K, dim=-1)
        latents = torch.zeros_like(pre).scatter(-1, kept.indices, kept.values.relu())
    forward = latents @ state["decoder.weight"].T + state["pre_bias"]
    return {"encode": latents.float(), "forward": (forward * deviation + mean).float()}


def openai_relu(folder, weights, x):
    return openai(folder, weights, x, "ReLU")


def sae_lens_flat(folder, weights, x):
    """A configuration from before version 6, as published with SAEs for GPT-2."""
    from sae_lens import SAE

    tensors = weights.jump_relu(D_IN)
    del tensors["threshold"]
    save_file(tensors, folder / "sae_weights.safetensors")
    write_json(folder / "cfg.json", {
        "architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32",
        "device": "cpu", "model_name": "gpt2-small", "hook_name": "blocks.8.hook_resid_pre",
        "hook_layer": 8, "hook_head_index": None, "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K}, "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False, "sae_lens_training_version": "5.1.0",
        "prepend_bos": True, "dataset_path": "none", "context_size": 64,
        "dataset_trust_remote_code": True, "normalize_activations": "layer_norm",
        "seqpos_slice": [None], "model_from_pretrained_kwargs": {}, "neuronpedia_id": None,
    })
    sae = SAE.load_from_disk(folder)
    with torch.no_grad():
        return {"encode": sae.encode(x), "forward": sae(x)}


CASES = {
    "gemma_scope": gemma_scope,
    "gemma_scope_transcoder": gemma_scope_transcoder,
    "gemma_scope_2": gemma_scope_2,
    "gemma_scope_2_transcoder": gemma_scope_2_transcoder,
    "llama_scope": llama_scope,
    "openai": openai,
    "openai_relu": openai_relu,
    "sae_lens_flat": sae_lens_flat,
}
