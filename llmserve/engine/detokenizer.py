"""Pieces in, text out, one sequence at a time. Knows nothing of vocabularies or stop strings."""

from __future__ import annotations

import codecs


class Detokenizer:
    """Incremental UTF-8. A character split over pieces is held until it is whole; bytes that never can be become U+FFFD.

    All text together is `b"".join(pieces).decode("utf-8", "replace")`. Not thread-safe: a sequence owns it.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, piece: bytes) -> str:
        """The characters that are complete with `piece`, often none or several."""
        return self._decoder.decode(piece)

    @property
    def num_pending(self) -> int:
        """How many bytes of a character that is not whole are held."""
        return len(self._decoder.getstate()[0])

    def flush(self) -> str:
        """What was held of a character that never came whole, as U+FFFD. The end of the sequence."""
        return self._decoder.decode(b"", final=True)
