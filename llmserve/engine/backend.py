"""The seams to model libraries: token ids in, next-token scores out, one sequence at a time or many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
Vector = NDArray[np.float32]


class Backend(Protocol):
    """One KV cache of a model. Not thread-safe: a slot owns it.

    Weights may be shared with other backends of the same file.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def context_length(self) -> int:
        """Most token ids the KV cache holds."""
        ...

    @property
    def grid(self) -> int:
        """Prefill chunks that end on multiples of this give the same scores, bit for bit, however a prompt is cut into them."""
        ...

    def forward(self, token_ids: Sequence[int], position: int, threads: int) -> None:
        """Evaluate `token_ids` as positions `position`, `position + 1`, …; what the cache held from `position` on is gone.

        Releases the GIL while it computes on `threads` cores. Raises RuntimeError when the library fails.
        """

    def logits(self) -> Logits:
        """Next-token scores after the last forward pass, shape (vocab_size,). A view: valid until the next forward pass."""
        ...

    def close(self) -> None:
        """Free the KV cache, and the weights with their last user. Idempotent."""


class Piece(NamedTuple):
    """Part of one pass over many sequences: `token_ids` as positions `position`, `position + 1`, … of sequence `sequence`.

    `wants_logits`: whether the scores after its last token are asked for; `wants_all`: after each of its tokens.
    """

    sequence: int
    position: int
    token_ids: Sequence[int]
    wants_logits: bool
    wants_all: bool = False


class BatchBackend(Protocol):
    """The KV caches of `num_sequences` sequences, all evaluated in one pass. Not thread-safe: one thread of an engine owns it."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def num_sequences(self) -> int: ...

    @property
    def context_length(self) -> int:
        """Most token ids that each sequence holds."""
        ...

    @property
    def batch_size(self) -> int:
        """Most token ids of one pass; no less than `grid`."""
        ...

    @property
    def grid(self) -> int:
        """Prompts cut at multiples of this get the same scores, bit for bit: in pieces from one multiple to another, and a rest
        of less than that."""
        ...

    def forward(self, pieces: Sequence[Piece], threads: int) -> None:
        """Evaluate the pieces, all of one length and each of another sequence. Releases the GIL. Raises RuntimeError when the library
        fails."""

    def logits(self, index: int, token: int = -1) -> Logits:
        """Next-token scores after a token of piece `index` of the last pass that were asked for, shape (vocab_size,).

        A view: valid until the next pass.
        """
        ...

    def truncate(self, sequence: int, num_tokens: int) -> None:
        """Forget what the sequence holds behind its first `num_tokens` positions."""

    def copy(self, source: int, target: int) -> None:
        """Make `target` hold what `source` holds, and nothing else."""

    def close(self) -> None:
        """Free everything. Idempotent."""


class Embedder(Protocol):
    """What makes a vector of a text. Not thread-safe: one thread of an engine owns it."""

    threads_linger: bool  # as of compute.Passes

    @property
    def dimensions(self) -> int: ...

    def embed(self, token_ids: Sequence[int], threads: int) -> Vector:
        """The pooled vector, shape (dimensions,), of any length. Releases the GIL. Raises RuntimeError when the library fails."""
        ...

    def close(self) -> None:
        """Free everything. Idempotent."""
