"""The seam to a model library: token ids in, next-token scores out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


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
