"""Times llama.cpp, by its Python bindings, on what `benches model` times ours on.

    python benches/peers/llama.py --model SmolLM2-135M-Instruct.Q4_1.gguf

Prints the same JSON lines: all logits of `[8, 128]` tokens and greedy decoding, in f32 and with
weights in bf16, and with a vector added after a block. The quantised file is written out in both types
first, beside the others' measurements; llama.cpp keeps its cache of keys and values in f16. It has no
way to stop at a block, nor to clamp a latent.
"""

import argparse
import ctypes
import time
from pathlib import Path

import llama_cpp as cpp
import numpy as np

from timing import (
    N_DECODED, N_POS, N_PROMPT, N_ROWS, STEERED_LAYER, measure, measure_decoding, say, token_ids)

TYPES = {"f32": cpp.LLAMA_FTYPE_ALL_F32, "bf16": cpp.LLAMA_FTYPE_MOSTLY_BF16}


def written_out(model, kind, folder):
    """The file with all matrices in one type."""
    path = folder / f"{model.stem}.{kind}.gguf"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        params = cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = TYPES[kind], True
        # One type for all: it would keep some matrices in another.
        params.pure = True
        beside = path.with_suffix(".part")
        status = cpp.llama_model_quantize(
            str(model).encode(), str(beside).encode(), ctypes.byref(params))
        assert status == 0, f"{model} could not be written in {kind}"
        beside.rename(path)
    return path


class Model:
    def __init__(self, path, threads):
        params = cpp.llama_model_default_params()
        params.use_mmap = False
        self.model = cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, path
        params = cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = N_ROWS * N_POS, N_ROWS
        params.n_batch = params.n_ubatch = N_ROWS * N_POS
        params.n_threads = params.n_threads_batch = threads
        self.context = cpp.llama_init_from_model(self.model, params)
        assert self.context, path
        self.memory = cpp.llama_get_memory(self.context)
        vocabulary = cpp.llama_model_get_vocab(self.model)
        self.d_vocab = cpp.llama_vocab_n_tokens(vocabulary)
        self.ids = token_ids(self.d_vocab)

    def close(self):
        cpp.llama_free(self.context)
        cpp.llama_model_free(self.model)

    def step(self, tokens, all_logits=False):
        """Reads `(id, position, row)`; the logits of the last, or of all."""
        batch = cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, row) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = all_logits or i + 1 == len(tokens)
        assert cpp.llama_decode(self.context, batch) == 0
        logits = cpp.llama_get_logits(self.context)
        n = len(tokens) if all_logits else 1
        cpp.llama_batch_free(batch)
        return np.ctypeslib.as_array(logits, shape=(n, self.d_vocab))

    def forward_logits(self):
        cpp.llama_memory_clear(self.memory, False)
        tokens = [(token, i % N_POS, i // N_POS) for i, token in enumerate(self.ids)]
        return self.step(tokens, all_logits=True)

    def decode(self):
        """Seconds of greedy steps behind a short prompt, without the prompt's own; and the ids."""
        cpp.llama_memory_clear(self.memory, False)
        prompt = [(token, i, 0) for i, token in enumerate(self.ids[:N_PROMPT])]
        ids = [int(self.step(prompt).argmax())]
        start = time.perf_counter()
        for i in range(N_DECODED):
            ids.append(int(self.step([(ids[-1], N_PROMPT + i, 0)]).argmax()))
        return time.perf_counter() - start, ids

    def add(self, vector):
        """Adds a vector after the block, for all positions; none for none."""
        width, n_layers = len(vector), cpp.llama_model_n_layer(self.model)
        # Rows are for the blocks from the second on, in whose numbers the range is as well.
        rows = np.zeros((n_layers - 1, width), dtype=np.float32)
        rows[STEERED_LAYER - 1] = vector
        data = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        status = cpp.llama_set_adapter_cvec(
            self.context, data, rows.size, width, STEERED_LAYER, STEERED_LAYER)
        assert status == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("target/peers"),
                        help="where the files in other types go")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    # Its log of what it loads is long.
    quiet = cpp.llama_log_callback(lambda _level, _text, _data: None)
    cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    cpp.llama_backend_init()
    paths = {kind: written_out(options.model, kind, options.folder) for kind in TYPES}

    start = time.perf_counter()
    model = Model(paths["f32"], options.threads)
    say("load", seconds=time.perf_counter() - start)
    measure("forward_logits", N_ROWS * N_POS, model.forward_logits)
    measure_decoding("decode_f32", lambda: model.decode()[0])
    plain = model.decode()[1]
    rng = np.random.default_rng(0)
    vector = rng.standard_normal(cpp.llama_model_n_embd(model.model)).astype(np.float32)
    # Long enough to be heard, so that it is known to be added.
    model.add(50 * vector / np.linalg.norm(vector))
    assert model.decode()[1] != plain, "the vector does nothing"
    measure_decoding("decode_vector", lambda: model.decode()[0])
    model.close()

    model = Model(paths["bf16"], options.threads)
    measure_decoding("decode_bf16", lambda: model.decode()[0])
    model.close()


if __name__ == "__main__":
    main()
