"""Writes the binary seeds, with the libraries that own the formats.

pip install gguf==0.19.0 safetensors numpy; python make.py
"""

from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent
rng = np.random.default_rng(0)


def floats(*shape):
    return rng.standard_normal(shape, dtype=np.float32)


def blocks(kind, n_rows):
    """Rows of one block each: small numbers with small scales, whatever the layout."""
    _, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    return np.full((n_rows, n_bytes), 0x11, dtype=np.uint8)


# A Llama of one block, d_model 4 and one head, with a tokenizer and a chat template.
writer = gguf.GGUFWriter(FOLDER / "gguf" / "llama.gguf", "llama")
writer.add_embedding_length(4)
writer.add_block_count(1)
writer.add_feed_forward_length(2)
writer.add_context_length(8)
writer.add_head_count(1)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_freq_base(1e4)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("smollm")
writer.add_token_list(["<s>", "a", "b", "ab", "Ġ", "1"])
writer.add_token_types([3, 1, 1, 1, 1, 4])
writer.add_token_merges(["a b"])
writer.add_bos_token_id(0)
writer.add_chat_template("{{ bos_token }}{{ messages[0].content }}")
writer.add_tensor("token_embd.weight", floats(6, 4))
writer.add_tensor("output_norm.weight", floats(4).astype(np.float16))
writer.add_tensor("blk.0.attn_q.weight", floats(4, 4))
writer.add_tensor("rope_freqs.weight", np.ones(2, dtype=np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

# Every encoding, and every type of metadata. It is no model.
writer = gguf.GGUFWriter(FOLDER / "gguf" / "encodings.gguf", "none")
for name in ["UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "UINT64", "INT64"]:
    writer.add_key_value(name, 7, gguf.GGUFValueType[name])
writer.add_float32("FLOAT32", 0.5)
writer.add_float64("FLOAT64", 0.5)
writer.add_bool("BOOL", True)
writer.add_array("ARRAY", [[1, 2], [3]])
writer.add_tensor("F64", np.ones(2))
for name in "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K BF16".split():
    kind = gguf.GGMLQuantizationType[name]
    writer.add_tensor(name, blocks(kind, 1), raw_dtype=kind)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

save_file(
    {"a": floats(3, 1), "b": floats(2).astype(np.float16), "c": np.ones((1, 2, 1)),
     "empty": floats(0, 4), "ids": np.arange(3)},
    FOLDER / "safetensors" / "dtypes.safetensors",
    {"format": "pt"},
)
