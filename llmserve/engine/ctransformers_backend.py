"""The ctransformers library behind the `Backend` protocol. The only module that imports it.

Its llama.cpp is of September 2023; models/adapt.py makes files it can run and refuses the others. A broken file kills
the process that opens it: models/probe.py does that in a child first.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from ctransformers.lib import find_library
from ctransformers.llm import LLM, Config

from llmserve.engine.backend import Logits

GRID = 32
"""The SIMD step of ggml's f16 dot product (GGML_F16_STEP). A row's attention sum runs over the positions up to its chunk's
end: those in whole steps are summed by the vector loop, the rest by the scalar one, which rounds differently."""


_GGML_TURN = threading.Lock()
"""ggml's code for its older model types has scratch buffers that the whole process shares: one pass at a time."""


class CTransformersBackend:
    """One ctransformers model object: a KV cache over weights that all objects of one file share through mmap.

    Not thread-safe, as `Backend` says; `tokenize` and `piece` touch only the vocabulary, but share a buffer with each other.
    """

    grid = GRID

    def __init__(self, path: Path, context_length: int, model_type: str = "") -> None:
        """Raises RuntimeError when the library refuses the file; may kill the process when the file is broken."""
        llm = LLM(str(path), model_type or None, config=Config(context_length=context_length), lib=_library())
        self._llm: LLM | None = llm
        self.vocab_size: int = llm.vocab_size
        self.context_length: int = llm.context_length
        self._eval = llm.ctransformers_llm_batch_eval
        self._logits_address = llm.ctransformers_llm_logits_data
        self._num_logits = llm.ctransformers_llm_logits_size
        self._turn = _GGML_TURN if model_type else nullcontext()
        self._one = (ctypes.c_int * 1)()
        self._view: Logits = np.empty(0, dtype=np.float32)
        self._view_of = 0

    def forward(self, token_ids: Sequence[int], position: int, threads: int) -> None:
        num_tokens = len(token_ids)
        if position + num_tokens > self.context_length:  # the library would write behind its cache
            raise RuntimeError(f"position {position + num_tokens} is beyond the context of {self.context_length}")
        if num_tokens == 1:
            buffer = self._one
            buffer[0] = token_ids[0]
        else:
            buffer = (ctypes.c_int * num_tokens)(*token_ids)
        with self._turn:
            done = self._eval(buffer, num_tokens, position, num_tokens, threads)
        if not done:
            raise RuntimeError("the library could not evaluate the tokens")

    def logits(self) -> Logits:
        """A view of the library's own buffer, made again only when the buffer has moved."""
        address = ctypes.addressof(self._logits_address().contents)
        if address != self._view_of:
            self._view = np.ctypeslib.as_array((ctypes.c_float * self._num_logits()).from_address(address))
            self._view_of = address
        return self._view

    def tokenize(self, text: bytes) -> list[int]:
        """Token ids of UTF-8 text by the library's own tokenizer, without BOS."""
        llm = self._open()
        buffer = (ctypes.c_int * (len(text) + 4))()  # one id per byte at most, and the "▁" that SPM puts in front
        return buffer[: llm.ctransformers_llm_tokenize(text, False, buffer)]

    def piece(self, token_id: int) -> bytes:
        """The bytes of one token, as the library detokenizes it."""
        return bytes(self._open().ctransformers_llm_detokenize(token_id))

    def close(self) -> None:
        """The library frees the model with the last reference to its object, and these callables hold it by address only."""
        self._view = np.empty(0, dtype=np.float32)
        self._llm = None

    def _open(self) -> LLM:
        if self._llm is None:
            raise RuntimeError("the model is closed")
        return self._llm


def _library() -> str | None:
    """The build for this CPU, or None to let the library find out: it asks py-cpuinfo, which takes a second."""
    try:
        flags = _cpu_flags()
    except OSError:
        return None
    if "avx2" in flags and "fma" in flags and "f16c" in flags:
        return find_library("avx2")  # type: ignore[no-any-return]
    return find_library("avx" if "avx" in flags and "f16c" in flags else "basic")  # type: ignore[no-any-return]


def _cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            return set(line.split())
    raise OSError("/proc/cpuinfo names no flags")
