"""The ctransformers library behind the `Backend` protocol. The only module that knows it.

Its llama.cpp is of September 2023; models/adapt.py makes files it can run and refuses the others. A broken file kills
the process that opens it: models/probe.py does that in a child first.

Its C interface is called directly (declared in the project's models/llm.cc), not through its Python package: importing that
imports a download client too, which costs 0.2 s and 13 MB, and asking it for its library costs another second.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import platform
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from llmserve.engine.backend import Logits, Vector

GRID = 32
"""The SIMD step of ggml's f16 dot product (GGML_F16_STEP). A row's attention sum runs over the positions up to its chunk's
end: those in whole steps are summed by the vector loop, the rest by the scalar one, which rounds differently."""

_GGML_TURN = threading.Lock()
"""ggml's code for its older model types has scratch buffers that the whole process shares: one pass at a time."""

_LONGEST_PASS = 512
_LONGEST_GGML_PASS = 8
"""Most tokens of one pass: the library aborts, or writes behind its buffers, where they do not do. It sizes them for llama.cpp's
default n_batch; for its older types they have fixed sizes that do for its own default of 8, and not for 64 of a GPT-J."""

_MAX_OBJECTS = 24
"""ggml has room for 64 contexts in a process, and dies of the next one. An object takes two; a load and a pass take some more for a
moment."""
_objects = threading.BoundedSemaphore(_MAX_OBJECTS)

_INTS = ctypes.POINTER(ctypes.c_int)
_MODEL = ctypes.c_void_p


class _Config(ctypes.Structure):
    """A 0 context length is the library's default; weights are mapped, not read."""

    _fields_ = (
        ("context_length", ctypes.c_int),
        ("gpu_layers", ctypes.c_int),
        ("mmap", ctypes.c_bool),
        ("mlock", ctypes.c_bool),
    )


_FUNCTIONS = {
    "create": ([ctypes.c_char_p, ctypes.c_char_p, _Config], _MODEL),  # path, model type
    "delete": ([_MODEL], None),
    "tokenize": ([_MODEL, ctypes.c_char_p, ctypes.c_bool, _INTS], ctypes.c_int),  # text, add BOS, ids out
    "detokenize": ([_MODEL, ctypes.c_int], ctypes.c_char_p),
    "eos_token_id": ([_MODEL], ctypes.c_int),
    "vocab_size": ([_MODEL], ctypes.c_int),
    "context_length": ([_MODEL], ctypes.c_int),
    # ids, their number, position, batch size, threads
    "batch_eval": ([_MODEL, _INTS, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int], ctypes.c_bool),
    "logits_data": ([_MODEL], ctypes.c_void_p),
    "logits_size": ([_MODEL], ctypes.c_int),
    "embeddings_data": ([_MODEL], ctypes.c_void_p),
    "embeddings_size": ([_MODEL], ctypes.c_int),
}


class CTransformersBackend:
    """One model object of the library: a KV cache over weights that all objects of one file share through mmap.

    Not thread-safe, as `Backend` says; `tokenize` and `piece` touch only the vocabulary, but share a buffer with each other.
    """

    grid = GRID

    def __init__(self, path: Path, context_length: int, model_type: str = "") -> None:
        """Raises RuntimeError when the library refuses the file; may kill the process when the file is broken."""
        self._library = _library()
        config = _Config(context_length=context_length, mmap=True)
        if not _objects.acquire(blocking=False):
            raise RuntimeError(f"the library has room for {_MAX_OBJECTS} slots, of all models together")
        self._model: int | None = self._call("create", str(path).encode(), (model_type or "gguf").encode(), config)
        if self._model is None:
            _objects.release()
            raise RuntimeError("the library refuses it")
        self.vocab_size: int = self._call("vocab_size", self._model)
        self.context_length: int = self._call("context_length", self._model)
        self._turn = _GGML_TURN if model_type else nullcontext()
        self._longest_pass = _LONGEST_GGML_PASS if model_type else _LONGEST_PASS
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
        batch_size = min(num_tokens, self._longest_pass)
        with self._turn:
            done = self._call("batch_eval", self._open(), buffer, num_tokens, position, batch_size, threads)
        if not done:
            raise RuntimeError("the library could not evaluate the tokens")

    def logits(self) -> Logits:
        """A view of the library's own buffer, made again only when the buffer has moved."""
        address = self._call("logits_data", self._open())
        if address != self._view_of:
            size = self._call("logits_size", self._open())
            self._view = np.ctypeslib.as_array((ctypes.c_float * size).from_address(address))
            self._view_of = address
        return self._view

    @property
    def dimensions(self) -> int:
        """Of the vectors of llama models."""
        return int(self._call("embeddings_size", self._open()))

    def embedding(self) -> Vector:
        """The last evaluated token's vector behind the last layer's norm, of llama models. A copy."""
        return np.array(
            (ctypes.c_float * self.dimensions).from_address(self._call("embeddings_data", self._open())), dtype=np.float32
        )

    def tokenize(self, text: bytes) -> list[int]:
        """Token ids of UTF-8 text by the library's own tokenizer, without BOS."""
        # One id per byte at most, after SPM has put a space in front and made "▁", of three bytes, of each.
        buffer = (ctypes.c_int * (3 * (len(text) + 1)))()
        return buffer[: self._call("tokenize", self._open(), text, False, buffer)]

    def piece(self, token_id: int) -> bytes:
        """The bytes of one token, as the library detokenizes it."""
        return bytes(self._call("detokenize", self._open(), token_id))

    @property
    def eos_token_id(self) -> int:
        return int(self._call("eos_token_id", self._open()))

    def close(self) -> None:
        if self._model is not None:
            self._view = np.empty(0, dtype=np.float32)
            self._call("delete", self._model)
            self._model = None
            _objects.release()

    def _open(self) -> int:
        if self._model is None:
            raise RuntimeError("the model is closed")
        return self._model

    def _call(self, name: str, *arguments: object) -> Any:
        return self._library[name](*arguments)


@functools.cache
def _library() -> dict[str, ctypes._NamedFuncPointer]:
    """The library's functions by name, of the build for this CPU."""
    package = importlib.util.find_spec("ctransformers")
    if package is None or not package.submodule_search_locations:
        raise RuntimeError("ctransformers is not installed")
    folder = Path(package.submodule_search_locations[0]) / "lib" / _build()
    name = {"Darwin": "libctransformers.dylib", "Windows": "ctransformers.dll"}.get(platform.system(), "libctransformers.so")
    library = ctypes.CDLL(str(folder / name))
    functions = {}
    for function, (arguments, result) in _FUNCTIONS.items():
        functions[function] = getattr(library, f"ctransformers_llm_{function}")
        functions[function].argtypes, functions[function].restype = arguments, result
    return functions


def _build() -> str:
    """The folder of the build that uses what this CPU has."""
    flags = _cpu_flags()
    if {"avx2", "fma", "f16c"} <= flags:
        return "avx2"
    return "avx" if {"avx", "f16c"} <= flags else "basic"


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux; every x86 machine of the last ten years has them, and no other has
        return {"avx2", "fma", "f16c"} if platform.machine().lower() in ("x86_64", "amd64") else set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())
