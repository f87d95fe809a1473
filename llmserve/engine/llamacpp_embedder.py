"""llama.cpp behind the `Embedder` protocol: a context that pools, one text at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp as library
import numpy as np

from llmserve.engine.backend import Piece, Vector
from llmserve.engine.llamacpp_backend import LlamaCppBackend, LlamaCppSettings

_POOLING = {"": -1, "mean": 1, "cls": 2, "last": 3}
"""By the values of enum llama_pooling_type (llama.h); "" is what the file says."""
_NO_POOLING = 0
_CHUNK = 512  # tokens, of texts whose last token's vector is the text's


class LlamaCppEmbedder(LlamaCppBackend):
    """A model, and a context for one text of `context_length` tokens. Not thread-safe, as `LlamaCppBackend` says."""

    threads_linger = True

    def __init__(self, path: Path, context_length: int, pooling: str, settings: LlamaCppSettings) -> None:
        """Raises RuntimeError with the library's reason when it refuses."""
        self._pooling = pooling
        # What attends to all of a text, or averages it, has all of it in one pass.
        super().__init__(
            path, context_length, 1, min(context_length, _CHUNK) if pooling == "last" else context_length, settings
        )
        self._text_memory = library.llama_get_memory(self._context)
        if library.llama_pooling_type(self._context) == _NO_POOLING:
            self.close()
            raise RuntimeError("it does not say how a text's vector is made of its tokens': set `pooling`")
        self.dimensions = int(library.llama_model_n_embd_out(self._model))

    def tokenize_whole(self, text: bytes) -> list[int]:
        """Token ids of UTF-8 text with the special tokens around it that the model was trained with."""
        return self._tokenize(text, add_special=True)

    def embed(self, token_ids: Sequence[int], threads: int) -> Vector:
        if self._text_memory:
            library.llama_memory_clear(self._text_memory, True)
        for begin in range(0, len(token_ids), self.batch_size):
            self._evaluate(token_ids[begin : begin + self.batch_size], begin, threads)
        pointer = library.llama_get_embeddings_seq(self._open(), 0)
        if not pointer:
            raise RuntimeError("the library gave no vector")
        return np.ctypeslib.as_array(pointer, shape=(self.dimensions,)).copy()

    def _evaluate(self, token_ids: Sequence[int], position: int, threads: int) -> None:
        self._batch.fill([Piece(0, position, token_ids, wants_logits=True, wants_all=True)])
        self._decode(threads)

    def _params(self, settings: LlamaCppSettings) -> Any:
        params = super()._params(settings)
        params.embeddings = True
        params.pooling_type = _POOLING[self._pooling]
        return params
