"""Writes the seeds of SAE files, with the libraries that own the containers.

pip install numpy safetensors torch; python make_saes.py

Two inputs, three latents. Where a format has two files, a seed is the configuration, a zero byte, and
the weights. The seeds of our own formats (`checkpoint`, `store_manifest`, `store_shard`) are written by
a test of sae-core's: `cargo test --workspace --test hostile -- --ignored`.
"""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

FOLDER = Path(__file__).parent
D_IN, D_SAE = 2, 3
torch.manual_seed(0)


def floats(*shape):
    return torch.randn(*shape)


def write(name, file, content):
    (FOLDER / name).mkdir(exist_ok=True)
    (FOLDER / name / file).write_bytes(content)


def pair(name, file, config, tensors):
    write(name, file, json.dumps(config).encode() + b"\0" + save({k: v.clone() for k, v in tensors.items()}))


W_ENC, W_DEC = floats(D_IN, D_SAE), floats(D_SAE, D_IN)
B_ENC, B_DEC, THRESHOLD = floats(D_SAE), floats(D_IN), floats(D_SAE).abs()
PLAIN = {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC}
LINEAR = {"encoder.weight": W_ENC.T.contiguous(), "encoder.bias": B_ENC,
          "decoder.weight": W_DEC.T.contiguous()}


def sae_lens(file, architecture, tensors, **options):
    config = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32",
              "metadata": {"hook_name": "blocks.0.hook_resid_post"}} | options
    pair("sae_lens", file, config, tensors)


sae_lens("standard", "standard", PLAIN, normalize_activations="layer_norm")
sae_lens("topk", "topk", {k: v.half() for k, v in PLAIN.items()}, k=2,
         rescale_acts_by_decoder_norm=True)
gates = {"b_gate": B_ENC, "b_mag": B_ENC, "r_mag": THRESHOLD}
sae_lens("gated", "gated", {k: v for k, v in PLAIN.items() if k != "b_enc"} | gates)
sae_lens("transcoder", "jumprelu_skip_transcoder",
         PLAIN | {"threshold": THRESHOLD, "W_skip": floats(D_IN, D_IN)},
         d_out=D_IN, apply_b_dec_to_input=False)
sae_lens("matching_pursuit", "matching_pursuit", {"W_dec": W_DEC, "b_dec": B_DEC},
         residual_threshold=0.1, max_iterations=4, stop_on_duplicate_support=True)
sae_lens("batchtopk", "batchtopk", PLAIN | {"topk_threshold": torch.tensor(0.5).double()}, k=1.5,
         rescale_acts_by_decoder_norm=True)
flat = {"d_in": D_IN, "d_sae": D_SAE, "hook_point": "blocks.0.attn.hook_z", "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 1}, "normalize_activations": False}
pair("sae_lens", "flat", flat, PLAIN)

sparsify = {"activation": "topk", "expansion_factor": 32, "num_latents": D_SAE, "k": 2, "d_in": D_IN}
coder = {"encoder.weight": W_ENC.T.contiguous(), "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
pair("sparsify", "topk", sparsify, coder)
pair("sparsify", "skip", sparsify | {"activation": "groupmax", "k": 3, "transcode": True,
                                     "skip_connection": True}, coder | {"W_skip": floats(D_IN, D_IN)})


def dictionary(file, dict_class, tensors, **options):
    trainer = {"dict_class": dict_class, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 0} | options
    pair("dictionary_learning", file, {"trainer": trainer}, tensors)


dictionary("standard", "AutoEncoder", LINEAR | {"bias": B_DEC})
dictionary("gated", "GatedAutoEncoder", {
    "encoder.weight": LINEAR["encoder.weight"], "decoder.weight": LINEAR["decoder.weight"],
    "decoder_bias": B_DEC, "gate_bias": B_ENC, "mag_bias": B_ENC, "r_mag": THRESHOLD})
ranked = {"k": torch.tensor(2, dtype=torch.int), "threshold": torch.tensor(0.5)}
dictionary("topk", "AutoEncoderTopK", LINEAR | {"b_dec": B_DEC} | ranked, k=2)
dictionary("matryoshka", "MatryoshkaBatchTopKSAE",
           PLAIN | ranked | {"group_sizes": torch.tensor([1, 2])}, k=2)

jump = PLAIN | {"threshold": THRESHOLD}
arrays = io.BytesIO()
np.savez(arrays, **{name: tensor.numpy() for name, tensor in jump.items()})
write("gemma_scope", "stored.npz", arrays.getvalue())
arrays = io.BytesIO()
np.savez_compressed(arrays, **{name: tensor.numpy() for name, tensor in jump.items()})
write("gemma_scope", "deflated.npz", arrays.getvalue())
for file, array in [("rows.npy", W_ENC.numpy()), ("columns.npy", np.asfortranarray(W_ENC.numpy())),
                    ("f64.npy", W_ENC.double().numpy())]:
    content = io.BytesIO()
    np.save(content, array)
    write("gemma_scope_array", file, content.getvalue())
lower = {name.replace("W_", "w_"): tensor for name, tensor in jump.items()}
pair("gemma_scope_2", "sae", {"architecture": "jump_relu", "model_name": "tiny"}, lower)
points = {"hf_hook_point_in": "model.layers.0.mlp.input", "hf_hook_point_out": "model.layers.0.mlp.output"}
pair("gemma_scope_2", "transcoder", {"architecture": "jump_relu", "affine_connection": True} | points,
     lower | {"affine_skip_connection": floats(D_IN, D_IN)})
pair("llama_scope", "jumprelu",
     {"d_model": D_IN, "d_sae": D_SAE, "jump_relu_threshold": 0.5, "act_fn": "jumprelu",
      "norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": 1.5, "out": 1.5}},
     {name: tensor.bfloat16() for name, tensor in (LINEAR | {"decoder.bias": B_DEC}).items()})

# In the order and of the sizes that the reader `openai_pickle` has storages for.
state = {"pre_bias": B_DEC, "latent_bias": B_ENC, "encoder.weight": LINEAR["encoder.weight"],
         "decoder.weight": LINEAR["decoder.weight"]}
top_k = {"activation": "TopK", "activation_state_dict": {"k": 2, "postact_fn": "ReLU"}}
for file, content in [("relu", state), ("topk", state | top_k)]:
    checkpoint = io.BytesIO()
    torch.save(content, checkpoint)
    write("openai", f"{file}.pt", checkpoint.getvalue())
    with zipfile.ZipFile(checkpoint) as archive:
        (pickle,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        write("openai_pickle", f"{file}.pkl", archive.read(pickle))
