"""Makes reference files for the golden tests with the libraries that they are compared to.

    python make.py --out DIR models
    python make.py --out DIR sae_lens sae_lens_train sparsify dictionary_learning published
    python make.py --out DIR --gguf SmolLM2-135M-Instruct.Q4_1.gguf smollm2

Each kind writes DIR/KIND/CASE/; `GOLDENS=$(realpath DIR) cargo test --workspace golden` puts them
through the tests. Everything runs on CPU in f32. README.md lists the versions and says what the
tensors are.
"""

import argparse
import copy
import importlib.metadata
import json
import math
from pathlib import Path

import torch

import make_dictionaries
import make_published
from cases import D_IN, D_OUT, D_SAE, K, dead_mask, inputs, known, write_json, write_tensors


def version(package):
    return importlib.metadata.version(package)


# models: tiny random models of every architecture

N_ROWS, N_POS, N_PAD, N_NEW = 3, 15, 4, 12
VOCAB, PAD = 131, 3
TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD}
LLAMA = TOKENS | {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
GPT = TOKENS | {"n_embd": 48, "n_layer": 3, "n_positions": 64}
NEOX = TOKENS | {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
GEMMA = LLAMA | {
    "num_hidden_layers": 6,
    "head_dim": 16,
    "sliding_window": 6,
    "query_pre_attn_scalar": 24,
    "tie_word_embeddings": True,
}


def rope(theta=10000.0, kind="default", **parameters):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **parameters}}


def longrope(original):
    factors = {"short_factor": [1 + 0.05 * i for i in range(6)],
               "long_factor": [1 + 0.7 * i for i in range(6)]}
    return {
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "max_position_embeddings": 128,
        "original_max_position_embeddings": original,
        "rms_norm_eps": 1e-5,
    } | rope(kind="longrope", partial_rotary_factor=0.75,
             original_max_position_embeddings=original, **factors)


# Name: the prefix of transformers' classes, and what the config is told.
MODELS = {
    "gpt2": ("GPT2", GPT | {"n_head": 4}),
    "gptj": ("GPTJ", GPT | {"n_head": 3, "rotary_dim": 8}),
    "gptj_seqcls_reward": ("GPTJ", GPT | {"n_head": 3, "rotary_dim": 8, "n_layer": 2,
                                          "num_labels": 1}),
    "gpt_neox": ("GPTNeoX", NEOX | rope(partial_rotary_factor=0.5) | {"num_hidden_layers": 3}),
    "gpt_neox_sequential": ("GPTNeoX", NEOX | rope(partial_rotary_factor=1.0)
                            | {"num_hidden_layers": 2, "use_parallel_residual": False}),
    "opt": ("OPT", TOKENS | {"hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 96,
                             "num_hidden_layers": 3, "num_attention_heads": 4,
                             "max_position_embeddings": 64}),
    "llama_mha": ("Llama", LLAMA | rope() | {"num_key_value_heads": 4, "head_dim": 12}),
    "llama_gqa_theta_tied": ("Llama", LLAMA | rope(100000.0) | {
        "num_attention_heads": 6, "head_dim": 8, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True}),
    "llama_rope_linear": ("Llama", LLAMA | rope(kind="linear", factor=2.5)),
    "llama_rope_llama3": ("Llama", LLAMA | {"head_dim": 16} | rope(
        500000.0, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16)),
    "llama_rope_yarn": ("Llama", LLAMA | {"head_dim": 16} | rope(
        kind="yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama_seqcls_reward": ("Llama", LLAMA | rope() | {
        "num_hidden_layers": 2, "head_dim": 12, "num_labels": 1}),
    "mistral_sliding": ("Mistral", LLAMA | rope() | {"head_dim": 12, "sliding_window": 6}),
    "qwen2": ("Qwen2", LLAMA | rope(1000000.0)),
    "qwen2_sliding": ("Qwen2", LLAMA | rope(1000000.0) | {
        "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", LLAMA | rope(1000000.0) | {"head_dim": 16}),
    "phi3": ("Phi3", LLAMA | rope(partial_rotary_factor=1.0) | {
        "original_max_position_embeddings": 64, "rms_norm_eps": 1e-5}),
    "phi3_partial_longrope_short": ("Phi3", LLAMA | longrope(32)),
    "phi3_partial_longrope_long": ("Phi3", LLAMA | longrope(12) | {"sliding_window": 8}),
    "phi3_partial_longrope_switch": ("Phi3", LLAMA | longrope(20)),
    "gemma2": ("Gemma2", GEMMA | rope() | {
        "num_hidden_layers": 3, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", GEMMA | {"sliding_window_pattern": 3, "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}}}),
    "olmo2": ("Olmo2", LLAMA | rope(500000.0)),
}

# Where the parts of a model are: its blocks, and in them attention and MLP.
PARTS = {
    "GPT2": ("transformer.h", "attn", "mlp"),
    "GPTJ": ("transformer.h", "attn", "mlp"),
    "GPTNeoX": ("gpt_neox.layers", "attention", "mlp"),
    "OPT": ("model.decoder.layers", "self_attn", "fc2"),
}


def models(out, args):
    for name, (family, options) in MODELS.items():
        if args.case in (None, name):
            tiny(out / "models" / name, family, options)


def classes(family, options):
    import transformers

    config = "Gemma3TextConfig" if family == "Gemma3" else family + "Config"
    head = "ForSequenceClassification" if "num_labels" in options else {
        "GPT2": "LMHeadModel"}.get(family, "ForCausalLM")
    return getattr(transformers, config), getattr(transformers, family + head)


def tiny(folder, family, options):
    config_class, model_class = classes(family, options)
    folder.mkdir(parents=True, exist_ok=True)
    config = config_class(attn_implementation="eager", **options)
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    randomise(model)
    model.save_pretrained(folder)
    # The tests look at what the config says, not at what generation would default to.
    (folder / "generation_config.json").unlink(missing_ok=True)

    scores = "num_labels" in options
    ids = torch.randint(PAD + 1, VOCAB, (N_ROWS, N_POS))
    tensors = {"input_ids": ids}
    tensors |= activations(model, family, ids)
    with torch.no_grad():
        tensors["logits_f64"] = copy.deepcopy(model).double()(ids).logits
    tensors |= padded(model, family, ids, scores)
    if not scores:
        tensors["greedy_ids"] = greedy(model, ids, torch.ones_like(ids))
    tensors |= gradient(model, family, ids, scores)
    write_tensors(folder / "golden.safetensors", tensors)

    difference = (tensors["logits"].double() - tensors["logits_f64"]).abs().max()
    write_json(
        folder / "meta.json",
        {
            "class": type(model).__name__,
            "transformers": version("transformers"),
            "torch": torch.__version__,
            "attn": "eager",
            "max_abs_f32_vs_f64": difference.item(),
            "grad_metric": "sum of logits" if scores else "sum over batch of logits[:, -1, 7]",
            "grad_wrt": "hidden_states.1 (= output of block 0)",
            "v4_config_max_diff": old_config(folder, family, options, model, ids),
        },
    )


def randomise(model):
    """Weights large enough that every part of the model matters, and norms that are not 1."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if weight.dim() == 1:
                # Gains around what they are made as: 1, or 0 where 1 is added.
                weight.copy_(weight + 0.2 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name:
                weight.copy_(0.5 * noise)
            else:
                weight.copy_(1.2 * noise / math.sqrt(weight.shape[1]))


def first(output):
    return output[0] if isinstance(output, tuple) else output


def parts(model, family):
    blocks, attention, mlp = PARTS.get(family, ("model.layers", "self_attn", "mlp"))
    return [
        (block, block.get_submodule(attention), block.get_submodule(mlp))
        for block in model.get_submodule(blocks)
    ]


def activations(model, family, ids):
    tensors, handles = {}, []

    def keep(name):
        def hook(_module, _inputs, output):
            output = first(output)
            tensors[name] = output.view(*ids.shape, -1) if output.dim() == 2 else output

        return hook

    for i, (block, attention, mlp) in enumerate(parts(model, family)):
        handles.append(block.register_forward_hook(keep(f"block_out.{i}")))
        handles.append(attention.register_forward_hook(keep(f"attn_out.{i}")))
        handles.append(mlp.register_forward_hook(keep(f"mlp_out.{i}")))
    with torch.no_grad():
        output = model(ids, output_hidden_states=True, output_attentions=True)
    for handle in handles:
        handle.remove()
    tensors["logits"] = output.logits
    for i, hidden in enumerate(output.hidden_states):
        tensors[f"hidden_states.{i}"] = hidden
    for i, pattern in enumerate(output.attentions):
        tensors[f"attn_weights.{i}"] = pattern
    return tensors


def padded(model, family, ids, scores):
    """The first row cut short, with padding on either side; the other rows as they are."""
    tensors = {}
    for side in ["leftpad", "rightpad"]:
        padded_ids, mask = ids.clone(), torch.ones_like(ids)
        kept = slice(N_PAD, None) if side == "leftpad" else slice(None, -N_PAD)
        padded_ids[0], mask[0] = PAD, 0
        padded_ids[0, kept], mask[0, kept] = ids[0, :-N_PAD], 1
        with torch.no_grad():
            logits = model(padded_ids, attention_mask=mask).logits
        tensors |= {
            f"{side}.input_ids": padded_ids,
            f"{side}.attention_mask": mask,
            f"{side}.logits": logits,
        }
        if side == "leftpad":
            # OPT counts positions by the mask, and takes no others.
            if family != "OPT":
                positions = (mask.cumsum(-1) - 1).clamp(min=0)
                with torch.no_grad():
                    output = model(padded_ids, attention_mask=mask, position_ids=positions)
                tensors["leftpad.position_ids"] = positions
                tensors["leftpad.logits_with_position_ids"] = output.logits
            if not scores:
                tensors["leftpad.greedy_ids"] = greedy(model, padded_ids, mask)
    return tensors


def greedy(model, ids, mask):
    """Prompts and new tokens. `min_new_tokens` keeps the EOS id from being chosen."""
    with torch.no_grad():
        return model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=N_NEW,
            min_new_tokens=N_NEW,
            pad_token_id=PAD,
        )


def gradient(model, family, ids, scores):
    kept = []

    def hook(_module, _inputs, output):
        kept.append(first(output))
        kept[0].retain_grad()

    handle = parts(model, family)[0][0].register_forward_hook(hook)
    logits = model(ids).logits
    (logits if scores else logits[:, -1, 7]).sum().backward()
    handle.remove()
    model.zero_grad()
    return {"grad.hidden_states.1": kept[0].grad}


def old_config(folder, family, options, model, ids):
    """Writes config.v4.json, as transformers 4 spells it; gives how far its logits are off."""
    old = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parameters = old.pop("rope_parameters", None)
    if family == "Gemma3":
        old["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    if parameters is not None:
        scaling = dict(parameters)
        theta, partial = scaling.pop("rope_theta"), scaling.pop("partial_rotary_factor", None)
        if family == "GPTNeoX":
            old["rotary_emb_base"], old["rotary_pct"] = theta, partial
        else:
            old["rope_theta"] = theta
            if partial is not None:
                old["partial_rotary_factor"] = partial
            if family == "Phi3":
                scaling.pop("original_max_position_embeddings", None)
                scaling["type"] = scaling.pop("rope_type")
            kind = scaling.get("rope_type", scaling.get("type"))
            if kind != "default":
                old["rope_scaling"] = scaling
    old["torch_dtype"] = old.pop("dtype")
    old["transformers_version"] = "4.45.0"
    write_json(folder / "config.v4.json", old)

    config_class, model_class = classes(family, options)
    config = config_class.from_dict(copy.deepcopy(old), attn_implementation="eager")
    again = model_class(config).float().eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        difference = (again(ids).logits - model(ids).logits).abs().max().item()
    assert difference == 0.0, f"{folder.name}: config.v4.json is another model, by {difference}"
    return difference


# smollm2: the real model, dequantised out of its GGUF file

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QUESTIONS = ["Why does the sky look blue at noon?", "List two animals that can swim."]
TOKENIZER_TESTS = [
    "Good morning, Ada!",
    "b  47",
    "x   3 = 4",
    "\n\n  10",
    "naïve café 中文 🙂",
    "I'm sure they'll've gone",
    "  leading",
    "tab\tsep\r\nCRLF",
    "<|im_start|>user\nhi<|im_end|>",
    "1234567890",
    "def f(x):\n    return x+1\n",
    "ｆｕｌｌ ½ ²",
    "\u00a0nbsp\u200bzwsp",
]


def smollm2(out, args):
    from transformers import AutoModelForCausalLM

    gguf = args.gguf
    assert gguf is not None, "smollm2 needs --gguf"
    folder = out / "smollm2"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = gguf_tokenizer(gguf)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    prompts = [
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
        for question in QUESTIONS
    ]
    rows = [tokenizer.encode(prompt).ids for prompt in prompts]
    ids = torch.tensor(rows[:1])
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    last = output.logits[:, -1]
    tensors = {
        "input_ids": ids,
        "logits_last": last,
        "hidden_states.1": output.hidden_states[1],
        "hidden_states.16_resid_post_15": output.hidden_states[16],
        "hidden_states.30_final_norm": output.hidden_states[30],
        "greedy_ids": real_greedy(model, ids, torch.ones_like(ids)),
    }
    n = max(map(len, rows))
    pad = model.config.pad_token_id if model.config.pad_token_id is not None else 2
    batch = torch.tensor([[pad] * (n - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (n - len(row)) + [1] * len(row) for row in rows])
    tensors["batch.input_ids"], tensors["batch.attention_mask"] = batch, mask
    tensors["batch.greedy_ids"] = real_greedy(model, batch, mask)
    write_tensors(folder / "golden.safetensors", tensors)

    def text(row):
        return tokenizer.decode(row[n:].tolist(), skip_special_tokens=True)

    top = last[0].topk(10)
    write_json(
        folder / "meta.json",
        {
            "prompt": prompts[0],
            "text": tokenizer.decode(
                tensors["greedy_ids"][0, ids.shape[1] :].tolist(), skip_special_tokens=True
            ),
            "batch_texts": [text(row) for row in tensors["batch.greedy_ids"]],
            "tokenizer_tests": [[test, tokenizer.encode(test).ids] for test in TOKENIZER_TESTS],
            "top10": [
                [id_, tokenizer.decode([id_], skip_special_tokens=False), logit]
                for logit, id_ in zip(top.values.tolist(), top.indices.tolist())
            ],
        },
    )


def real_greedy(model, ids, mask):
    with torch.no_grad():
        return model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=32, pad_token_id=2
        )


def gguf_tokenizer(path):
    """transformers' own conversion loses this model's digit pre-split, so it is built here."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models as bpe, pre_tokenizers

    fields = GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = fields["tokenizer.ggml.merges"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    vocabulary = {token: id_ for id_, token in enumerate(tokens)}
    tokenizer = Tokenizer(bpe.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds)
            if kind == control
        ]
    )
    return tokenizer


# sae_lens and sae_lens_train: every architecture of SAELens

# Name: the architecture, and what its config is told beyond the sizes.
RESCALED = {"rescale_acts_by_decoder_norm": True}
TRANSCODER = {"d_out": D_OUT, "apply_b_dec_to_input": False}
INFERENCE = {
    "standard": ("standard", {}),
    "standard_no_bdec_input": ("standard", {"apply_b_dec_to_input": False}),
    "standard_layer_norm": ("standard", {"normalize_activations": "layer_norm"}),
    "standard_constant_norm_rescale": (
        "standard", {"normalize_activations": "constant_norm_rescale"}),
    "topk": ("topk", {"k": K}),
    "topk_rescale": ("topk", {"k": K} | RESCALED),
    "abstopk": ("abstopk", {"k": K}),
    "gated": ("gated", {}),
    "jumprelu": ("jumprelu", {}),
    "matching_pursuit": ("matching_pursuit", {}),
    "transcoder": ("transcoder", TRANSCODER),
    "skip_transcoder": ("skip_transcoder", TRANSCODER),
    "jumprelu_transcoder": ("jumprelu_transcoder", TRANSCODER),
    "jumprelu_skip_transcoder": ("jumprelu_skip_transcoder", TRANSCODER),
}

# Name: the architecture, what its config is told, and how many latents count as dead.
L1 = {"l1_coefficient": 0.7}
BATCH = {"k": 6.5, "aux_loss_coefficient": 1.0}
MATRYOSHKA = {"k": K, "aux_loss_coefficient": 1.0, "matryoshka_widths": [10, 20, 40, 80]}
JUMP = {"jumprelu_bandwidth": 0.3, "l0_coefficient": 0.4}
TRAINING = {
    "standard": ("standard", L1, 0),
    "standard_lp2": ("standard", L1 | {"lp_norm": 2.0}, 0),
    "gated": ("gated", L1, 0),
    "topk": ("topk", {"k": K, "aux_loss_coefficient": 1.0}, 0),
    "topk_dead": ("topk", {"k": K, "aux_loss_coefficient": 1.0}, 30),
    "topk_fewdead": ("topk", {"k": K, "aux_loss_coefficient": 1.0}, 4),
    "topk_norescale_dead": ("topk", {"k": K, "aux_loss_coefficient": 0.5,
                                     "rescale_acts_by_decoder_norm": False}, 30),
    "abstopk_dead": ("abstopk", {"k": K, "aux_loss_coefficient": 1.0}, 30),
    "batchtopk": ("batchtopk", BATCH, 0),
    "batchtopk_dead": ("batchtopk", BATCH, 30),
    "matryoshka": ("matryoshka_batchtopk", MATRYOSHKA, 0),
    "matryoshka_dead": ("matryoshka_batchtopk", MATRYOSHKA, 30),
    "matryoshka_dead_ownaux": (
        "matryoshka_batchtopk", MATRYOSHKA | {"use_matryoshka_aux_loss": True}, 30),
    "jumprelu_step": ("jumprelu", JUMP, 0),
    "jumprelu_step_preact_dead": ("jumprelu", JUMP | {"pre_act_loss_coefficient": 0.05}, 30),
    "jumprelu_tanh_ste": ("jumprelu", JUMP | {
        "jumprelu_sparsity_loss_mode": "tanh", "jumprelu_ste_to_input": True}, 0),
    "jumprelu_quadratic": ("jumprelu", JUMP | {
        "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 10.0}, 0),
    "matching_pursuit": ("matching_pursuit", {}, 0),
}


def set_weights(sae, options, case):
    """The same weights for every case, with decoder rows of many norms."""
    weights = known(options, case, "sae_weights.safetensors")
    if weights is not None:
        sae.load_state_dict(weights)
        return
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    state = sae.state_dict()
    d_out = state["W_dec"].shape[1]
    norms = 0.5 + 1.2 * torch.rand(D_SAE, 1, generator=random)
    weights = {
        "W_enc": normal(D_IN, D_SAE) / math.sqrt(D_IN),
        "b_enc": 0.2 * normal(D_SAE),
        "W_dec": norms * normal(D_SAE, d_out) / math.sqrt(d_out),
        "b_dec": 0.2 * normal(d_out),
        "b_gate": 0.2 * normal(D_SAE),
        "r_mag": 0.2 * normal(D_SAE),
        "b_mag": 0.2 * normal(D_SAE),
        "threshold": 0.2 + 0.6 * torch.rand(D_SAE, generator=random),
        "W_skip": normal(d_out, D_IN) / math.sqrt(D_IN),
        "topk_threshold": torch.tensor(0.05, dtype=torch.double),
    }
    if sae.cfg.architecture() == "matching_pursuit":
        # It takes latents off that it found by their products: of other norms it diverges.
        weights["W_dec"] /= weights["W_dec"].norm(dim=1, keepdim=True)
    sae.load_state_dict({name: weights[name] for name in state})


def sae_lens(out, options):
    from sae_lens import SAE
    from sae_lens.registry import get_sae_class

    for name, (architecture, more) in INFERENCE.items():
        case = f"sae_lens/{name}"
        folder = out / case
        sae_class, config_class = get_sae_class(architecture)
        sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **more))
        set_weights(sae, options, case)
        x = inputs(options, case, "x", 1)
        sae.save_model(folder)
        tensors = {"x": x} | outputs(sae, x)
        try:
            sae.fold_W_dec_norm()
        except NotImplementedError:
            pass
        else:
            # Those that choose by the order of latents refuse, unless norms rank them.
            folded = dict(sae.named_parameters()) | outputs(sae, x)
            del folded["forward"]
            tensors |= {f"folded.{key}": value for key, value in folded.items()}
        write_tensors(folder / "golden.safetensors", tensors)
    for name in TRAINING:
        case = f"sae_lens/from_training_{name}"
        folder = out / case
        trained(name, options)[0].save_inference_model(folder)
        sae = SAE.load_from_disk(folder)
        x = inputs(options, case, "x", 1)
        write_tensors(folder / "golden.safetensors", {"x": x} | outputs(sae, x))
    temporal(out, options)


def temporal(out, options):
    """One that is no function of a single activation, to be refused."""
    from sae_lens.registry import get_sae_class

    sae_class, config_class = get_sae_class("temporal")
    case = "sae_lens/temporal"
    torch.manual_seed(0)
    sae = sae_class(config_class(
        d_in=D_IN, d_sae=D_SAE, n_heads=2, n_attn_layers=1, bottleneck_factor=4))
    weights = known(options, case, "sae_weights.safetensors")
    if weights is not None:
        sae.load_state_dict(weights)
    sae.save_model(out / case)
    x = inputs(options, case, "x", 1)
    # One conversation, of which a position is told from those before it.
    tensors = {"x": x} | outputs(sae, x[None])
    with torch.no_grad():
        parts = sae.encode_with_predictions(x[None])
    tensors |= {f"encode_with_predictions.{i}": part for i, part in enumerate(parts)}
    write_tensors(out / case / "golden.safetensors", tensors)


def outputs(sae, x):
    with torch.no_grad():
        # SAELens forgets how it normalised a row once it has decoded it.
        latents = sae.encode(x)
        return {
            "encode": latents,
            "decode_of_encode": sae.decode(latents),
            "forward": sae(x),
        }


def training_sae(name, options):
    from sae_lens.registry import get_sae_training_class

    architecture, more, _ = TRAINING[name]
    sae_class, config_class = get_sae_training_class(architecture)
    sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **more))
    set_weights(sae, options, f"sae_lens_train/{name}")
    return sae


def sae_lens_train(out, options):
    for name in TRAINING:
        folder = out / "sae_lens_train" / name
        training_sae(name, options).save_model(folder)
        _, tensors, numbers = trained(name, options)
        write_tensors(folder / "golden.safetensors", tensors)
        write_json(folder / "golden.json", numbers)


def trained(name, options):
    """One step of Adam, without the clipping that SAELens' trainer does before it: the SAE behind
    it, and the tensors and numbers of the step."""
    from sae_lens.saes.sae import TrainStepInput

    sae = training_sae(name, options)
    x = inputs(options, f"sae_lens_train/{name}", "x", 2)
    dead = dead_mask(options, f"sae_lens_train/{name}", torch.arange(D_SAE) < TRAINING[name][2])
    adam = {"lr": 1e-2, "betas": [0.9, 0.999], "eps": 1e-8}
    optimizer = torch.optim.Adam(sae.parameters(), **adam)
    thresholds = {"topk_threshold_before": sae.topk_threshold.item()} if batch(sae) else {}
    coefficients = {
        key: value if isinstance(value, float) else value.value
        for key, value in sae.get_coefficients().items()
    }
    step = sae.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients=coefficients,
            dead_neuron_mask=dead,
            n_training_steps=0,
            is_logging_step=False,
        )
    )
    step.loss.backward()
    tensors = {
        "x": x,
        "dead_mask": dead.to(torch.uint8),
        "sae_out": step.sae_out,
        "feature_acts": step.feature_acts,
        "hidden_pre": step.hidden_pre,
    }
    tensors |= {f"grad.{key}": p.grad.clone() for key, p in sae.named_parameters()}
    # What SAETrainer would clip by.
    norm = torch.nn.utils.get_total_norm([p.grad for p in sae.parameters()]).item()
    optimizer.step()
    tensors |= {f"after_adam.{key}": p for key, p in sae.named_parameters()}
    if batch(sae):
        thresholds["topk_threshold_after"] = sae.topk_threshold.item()
    numbers = {
        "loss": step.loss.item(),
        "losses": {key: value.item() for key, value in step.losses.items()},
        "coefficients": coefficients,
        "grad_total_norm": norm,
        "adam": adam | {"clip": None},
        "l0": (step.feature_acts != 0).sum(-1).float().mean().item(),
        "sae_lens": version("sae-lens"),
        "inference_architecture": sae.cfg.get_inference_config_class().architecture(),
    }
    return sae, tensors, numbers | thresholds


def batch(sae):
    return hasattr(sae, "topk_threshold")


KINDS = {
    "models": models,
    "smollm2": smollm2,
    "sae_lens": sae_lens,
    "sae_lens_train": sae_lens_train,
    "sparsify": make_dictionaries.sparsify,
    "dictionary_learning": make_dictionaries.dictionary_learning,
    "published": make_published.published,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    parser.add_argument(
        "--like", type=Path,
        help="take the weights and activations of SAEs from this folder, to compare with it")
    parser.add_argument("--gguf", type=Path, help="the model of the kind smollm2")
    parser.add_argument("--case", choices=MODELS, help="one of the kind models, for all of them")
    parser.add_argument("kinds", nargs="+", choices=KINDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for kind in options.kinds:
        KINDS[kind](options.out, options)


if __name__ == "__main__":
    main()
