"""llama.cpp behind the `BatchBackend` protocol, by llama-cpp-python's low-level interface. The only module that knows it.

A context holds many sequences, each with KV cells of its own (`kv_unified` off): a pass over several costs no more attention
than each alone. A broken file may kill the process that opens it: models/probe.py does that in a child first.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp as library
import numpy as np
from numpy.typing import NDArray

from llmserve.engine import matmul
from llmserve.engine.backend import Logits, Piece

log = logging.getLogger("llama.cpp")

KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}
"""By the ids of enum ggml_type (ggml.h)."""
FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
"""By the values of enum llama_flash_attn_type (llama.h)."""

TILES_FROM = 12
"""Tokens of a pass from which on tiles (engine/matmul.py) are faster, of types without kernels of ours. Measured with Q8_0: 8 take 18.6 ms without and 22.0 with them, 12
26.9 and 26.5, 16 34 and 26."""

_Q8_0 = 7
"""Of enum llama_ftype (llama.h): all matrices in that type."""

_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}
"""Of enum ggml_log_level (ggml.h). What it tells of a load is for those who look for a fault."""

_GRID = 64
"""Rows from which on the library's fused attention has a kernel of its own (ggml-cpu/ops.cpp), which rounds otherwise. Measured:
pieces of 64, 128 and 256 tokens that begin at multiples of 64 give the same bits, and so do shorter ones of any length."""

_Context = Any  # a pointer

_errors = threading.local()
"""`lines`: what the library said was wrong while this thread opened a model."""


class LlamaCppSettings(NamedTuple):
    """How a model is opened.

    `repack`: be as fast as can be: rearrange weights for this CPU's matrix instructions, where the library knows how to, and choose how
    it multiplies (engine/matmul.py). `tiles_from`: the least tokens of a pass that is made with tiles.
    """

    kv_type: str = "f16"
    flash_attention: str = "auto"
    gpu_layers: int = 0
    repack: bool = True
    tiles_from: int = 0


class LlamaCppBackend:
    """A model, and a context of `num_sequences` sequences with room for `context_length` tokens each.

    Not thread-safe, but for what only reads the vocabulary: `tokenize`, `piece`, `is_end`.
    """

    grid = _GRID

    def __init__(
        self,
        path: Path,
        context_length: int,
        num_sequences: int,
        batch_size: int,
        settings: LlamaCppSettings,
    ) -> None:
        """`batch_size` is the most tokens of one pass. Raises RuntimeError with the library's reason when it refuses."""
        _start()
        _errors.lines = []
        self.context_length = context_length
        self.num_sequences = num_sequences
        self.batch_size = batch_size
        self._tiles_from = settings.tiles_from
        self._context: _Context = None
        if settings.repack:
            matmul.process.choose(library.llama_decode)
        with matmul.process.loading(), ThreadPoolExecutor(1) as thread:
            self._model = thread.submit(_load, path, settings).result()
        self._context = library.llama_init_from_model(self._model, self._params(settings))
        if not self._context:
            self.close()
            raise _refusal()
        self._memory = library.llama_get_memory(self._context)
        self._vocab = library.llama_model_get_vocab(self._model)
        self.vocab_size = int(library.llama_vocab_n_tokens(self._vocab))
        self._batch = _Batch(batch_size)
        self._rows: list[range] = []  # of the last pass's scores, for each piece
        self._scores: NDArray[np.float32] | None = None  # of the last pass: the library's own, once they are looked at
        self._threads = 0

    def forward(self, pieces: Sequence[Piece], threads: int) -> None:
        self._rows, self._scores = self._batch.fill(pieces), None
        self._decode(threads, tiles=self._batch.struct.n_tokens >= self._tiles_from)

    def _decode(self, threads: int, *, tiles: bool = True) -> None:
        """Evaluate what the batch describes."""
        if threads != self._threads:  # a call gives the GIL away, for a moment that may take long
            library.llama_set_n_threads(self._open(), threads, threads)
            self._threads = threads
        with matmul.process.passing(threads, tiles=tiles):
            outcome = library.llama_decode(self._open(), self._batch.struct)
        if outcome:
            raise RuntimeError(f"the library could not evaluate {self._batch.struct.n_tokens} tokens (llama_decode: {outcome})")

    def logits(self, index: int, token: int = -1) -> Logits:
        if self._scores is None:  # asked for once a pass: it takes 30 µs, and they lie one behind the other (llama.h)
            address = ctypes.addressof(library.llama_get_logits(self._open()).contents)
            shape = (self._rows[-1].stop, self.vocab_size)
            self._scores = np.ctypeslib.as_array((ctypes.c_float * (shape[0] * shape[1])).from_address(address)).reshape(shape)
        row: Logits = self._scores[self._rows[index][token]]
        return row

    def truncate(self, sequence: int, num_tokens: int) -> None:
        if not library.llama_memory_seq_rm(self._memory, sequence, num_tokens or -1, -1):
            raise RuntimeError("the library cannot take tokens back")

    def copy(self, source: int, target: int) -> None:
        # Whole sequences only: the library aborts the process on a part of one.
        library.llama_memory_seq_rm(self._memory, target, -1, -1)
        library.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def tokenize(self, text: bytes) -> list[int]:
        """Token ids of UTF-8 text, none of them control tokens', without BOS."""
        return self._tokenize(text, add_special=False)

    def _tokenize(self, text: bytes, *, add_special: bool) -> list[int]:
        size = len(text) + 16
        buffer = (ctypes.c_int32 * size)()
        count = library.llama_tokenize(self._vocab, text, len(text), buffer, size, add_special, False)
        if count < 0:
            buffer = (ctypes.c_int32 * -count)()
            count = library.llama_tokenize(self._vocab, text, len(text), buffer, -count, add_special, False)
        return buffer[:count]

    def piece(self, token_id: int) -> bytes:
        """The bytes of one token; none of a control token."""
        buffer = ctypes.create_string_buffer(64)
        count = library.llama_token_to_piece(self._vocab, token_id, buffer, len(buffer), 0, False)
        if count < 0:
            buffer = ctypes.create_string_buffer(-count)
            count = library.llama_token_to_piece(self._vocab, token_id, buffer, len(buffer), 0, False)
        return buffer.raw[:count]

    def is_end(self, token_id: int) -> bool:
        """Whether it ends a text or a turn."""
        return bool(library.llama_vocab_is_eog(self._vocab, token_id))

    @property
    def bos_token_id(self) -> int | None:
        token_id = int(library.llama_vocab_bos(self._vocab))
        return token_id if token_id >= 0 else None

    @property
    def add_bos(self) -> bool:
        return bool(library.llama_vocab_get_add_bos(self._vocab))

    @property
    def can_truncate(self) -> bool:
        """Whether a sequence can be taken back to any position; the state of recurrent models cannot."""
        return not library.llama_model_is_recurrent(self._model) and not library.llama_model_is_hybrid(self._model)

    def close(self) -> None:
        if self._context:
            library.llama_free(self._context)
        if self._model:
            library.llama_model_free(self._model)
        self._context = self._model = self._scores = None  # the scores were the context's

    def _params(self, settings: LlamaCppSettings) -> Any:
        """Of the context; a subclass may have others."""
        return _context_params(self, settings)

    def _open(self) -> _Context:
        if not self._context:
            raise RuntimeError("the model is closed")
        return self._context


def requantize(source: Path, target: Path) -> None:
    """Write the model of `source` to `target` with weights in Q8_0 where they are matrices. Raises RuntimeError with the library's reason."""
    _start()
    _errors.lines = []
    params = library.llama_model_quantize_default_params()
    params.ftype = _Q8_0
    params.allow_requantize = True
    params.nthread = 1  # other models may be running
    if library.llama_model_quantize(os.fsencode(source), os.fsencode(target), params):
        raise _refusal()


class _Batch:
    """The library's description of a pass (llama_batch of llama.h), in arrays that are used over and over."""

    def __init__(self, size: int) -> None:
        self._tokens = np.zeros(size, np.int32)
        self._positions = np.zeros(size, np.int32)
        self._sequences = np.zeros(size, np.int32)
        self._counts = np.ones(size, np.int32)
        self._wanted = np.zeros(size, np.int8)
        first = self._sequences.ctypes.data
        self._pointers = np.arange(first, first + 4 * size, 4, dtype=np.uint64)  # each token is of one sequence
        self.struct = library.llama_batch(
            0,
            self._tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            None,
            self._positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            self._counts.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            self._pointers.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
            self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def fill(self, pieces: Sequence[Piece]) -> list[range]:
        """Describe the pieces; which rows of the scores are of each one's tokens."""
        end, rows, num_rows = 0, [], 0
        for piece in pieces:
            begin, end = end, end + len(piece.token_ids)
            if end > len(self._tokens):  # the library would abort the process
                raise RuntimeError(f"a pass has {end} tokens or more; {len(self._tokens)} is the most")
            self._tokens[begin:end] = piece.token_ids
            self._positions[begin:end] = range(piece.position, piece.position + end - begin)
            self._sequences[begin:end] = piece.sequence
            self._wanted[begin:end] = piece.wants_all
            self._wanted[end - 1] = piece.wants_logits or piece.wants_all
            rows.append(range(num_rows, num_rows + (end - begin if piece.wants_all else int(piece.wants_logits))))
            num_rows = rows[-1].stop
        self.struct.n_tokens = end
        return rows


def _load(path: Path, settings: LlamaCppSettings) -> Any:
    """Open a file. For a thread that ends with it, and with it the threads that rearrange weights for AMX: libgomp would count them
    as long as their caller lives, and when its threads outnumber the cores they sleep at every barrier, here for 31 ms a pass instead of 5."""
    _errors.lines = []
    model = library.llama_model_load_from_file(str(path).encode(), _model_params(settings))
    if not model:
        raise _refusal()
    return model


def _model_params(settings: LlamaCppSettings) -> Any:
    params = library.llama_model_default_params()
    params.n_gpu_layers = settings.gpu_layers
    params.use_extra_bufts = settings.repack
    return params


def _context_params(backend: LlamaCppBackend, settings: LlamaCppSettings) -> Any:
    params = library.llama_context_default_params()
    params.n_ctx = backend.context_length * backend.num_sequences
    params.n_seq_max = backend.num_sequences
    params.n_batch = params.n_ubatch = backend.batch_size
    params.type_k = params.type_v = KV_TYPES[settings.kv_type]
    params.flash_attn_type = FLASH_ATTENTION[settings.flash_attention]
    params.kv_unified = False
    params.no_perf = True
    return params


@functools.cache
def _start() -> None:
    library.llama_log_set(_on_log, ctypes.c_void_p())
    library.llama_backend_init()


@library.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, user_data: object) -> None:
    """The library's own words, line by line, into the log."""
    line = text.decode(errors="replace").strip()
    if not line.strip("."):  # a progress bar
        return
    severity = _LEVELS.get(level, logging.DEBUG)
    log.log(severity, "%s", line)
    if severity == logging.ERROR and hasattr(_errors, "lines"):
        _errors.lines.append(line)


def _refusal() -> RuntimeError:
    """Of what the library said in this thread, the first: what follows says only that it fails for that."""
    said = _errors.lines[0].partition(": ")[2] if _errors.lines else ""
    return RuntimeError(said.rstrip(".") or "the library refuses it")
