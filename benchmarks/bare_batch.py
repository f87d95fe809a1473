"""The floor of continuous batching: a bare llama.cpp loop in a process of its own, without server, sampler or text.

`python -m benchmarks.bare_batch FILE [plain]` speaks as benchmarks/bare.py does; "slots" are the sequences that one pass
evaluates. Each prompt is read in a pass of its own. `plain`: the weights stay as the file has them.
"""

from __future__ import annotations

import ctypes
import sys
import time

import llama_cpp as library
import numpy as np

from benchmarks.bare import CONTEXT_LENGTH, serve

MAX_SEQUENCES = 8


class Loop:
    """A model and a context of MAX_SEQUENCES sequences, each with cells of its own."""

    def __init__(self, path: str, repack: bool) -> None:
        library.llama_log_set(_silent, ctypes.c_void_p())
        library.llama_backend_init()
        model_params = library.llama_model_default_params()
        model_params.use_extra_bufts = repack
        self.model = library.llama_model_load_from_file(path.encode(), model_params)
        params = library.llama_context_default_params()
        params.n_ctx = MAX_SEQUENCES * CONTEXT_LENGTH
        params.n_seq_max = MAX_SEQUENCES
        params.n_batch = params.n_ubatch = 512
        params.kv_unified = False
        params.flash_attn_type = -1  # as the library has it
        self.context = library.llama_init_from_model(self.model, params)
        self.memory = library.llama_get_memory(self.context)
        self.batch = library.llama_batch_init(512, 0, 1)
        self.vocab_size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self.model))

    def run(self, num_sequences: int, threads: int, prompts: list[list[int]], num_tokens: int) -> tuple[float, float]:
        """(seconds of all the work, seconds of decoding), `num_sequences` prompts after the other."""
        library.llama_set_n_threads(self.context, threads, threads)
        begun, decoding = time.perf_counter(), 0.0
        for first in range(0, len(prompts), num_sequences):
            decoding += self._wave(prompts[first : first + num_sequences], num_tokens)
        return time.perf_counter() - begun, decoding

    def _wave(self, prompts: list[list[int]], num_tokens: int) -> float:
        library.llama_memory_clear(self.memory, False)
        token_ids = []
        for sequence, prompt in enumerate(prompts):
            for position, token_id in enumerate(prompt):
                self._put(position, token_id, position, sequence, position == len(prompt) - 1)
            self._decode(len(prompt))
            token_ids.append(self._best(len(prompt) - 1))
        begun = time.perf_counter()
        for step in range(num_tokens - 1):
            for sequence, prompt in enumerate(prompts):
                self._put(sequence, token_ids[sequence], len(prompt) + step, sequence, True)
            self._decode(len(prompts))
            token_ids = [self._best(sequence) for sequence in range(len(prompts))]
        return time.perf_counter() - begun

    def _put(self, row: int, token_id: int, position: int, sequence: int, wanted: bool) -> None:
        batch = self.batch
        batch.token[row], batch.pos[row], batch.logits[row] = token_id, position, wanted
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = sequence

    def _decode(self, num_rows: int) -> None:
        self.batch.n_tokens = num_rows
        if outcome := library.llama_decode(self.context, self.batch):
            raise RuntimeError(f"llama_decode: {outcome}")

    def _best(self, row: int) -> int:
        address = ctypes.addressof(library.llama_get_logits_ith(self.context, row).contents)
        return int(np.ctypeslib.as_array((ctypes.c_float * self.vocab_size).from_address(address)).argmax())


@library.llama_log_callback
def _silent(level: int, text: bytes, user_data: object) -> None:
    pass


if __name__ == "__main__":
    serve(Loop(sys.argv[1], repack="plain" not in sys.argv[2:]).run)
