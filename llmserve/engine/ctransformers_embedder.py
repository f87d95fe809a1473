"""ctransformers behind the `Embedder` protocol, for its llama models: it gives the vector of a pass's last token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmserve.engine.backend import Vector
from llmserve.engine.ctransformers_backend import CTransformersBackend

_CHUNK = 512  # tokens; the library aborts beyond


class CTransformersEmbedder:
    """Not thread-safe, as `Embedder` says. `pooling` is "last", "mean" or "cls", which is the first token's."""

    threads_linger = False

    def __init__(self, backend: CTransformersBackend, pooling: str) -> None:
        self._backend = backend
        self._pooling = pooling
        self.dimensions = backend.dimensions

    def embed(self, token_ids: Sequence[int], threads: int) -> Vector:
        if self._pooling == "last":
            for begin in range(0, len(token_ids), _CHUNK):
                self._backend.forward(token_ids[begin : begin + _CHUNK], begin, threads)
            return self._backend.embedding()
        vectors: list[Vector] = []
        for position, token_id in enumerate(token_ids[:1] if self._pooling == "cls" else token_ids):
            self._backend.forward([token_id], position, threads)
            vectors.append(self._backend.embedding())
        return np.asarray(np.mean(vectors, axis=0, dtype=np.float64), dtype=np.float32)

    def close(self) -> None:
        self._backend.close()
