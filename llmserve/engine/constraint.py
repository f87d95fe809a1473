"""The tokens that a grammar allows next: one that is asked about, or all, as a mask over scores.

Knows nothing of how grammars are written or tokens chosen.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmserve.engine.backend import Logits
from llmserve.engine.generation import Grammar
from llmserve.engine.grammar import GrammarCompiler
from llmserve.engine.tokenizer import Tokenizer
from llmserve.errors import InvalidGrammar
from llmserve.lru import LRU

if TYPE_CHECKING:
    from llmserve.engine.grammar import LLMatcher

log = logging.getLogger(__name__)

_REMEMBERED = 64
_REMEMBERED_BYTES = 1024**2  # of the grammars' texts

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_SCORES_OF_BITS = np.where(_BITS, np.float32(0), np.float32(-np.inf))
"""For each byte of a mask what to add to eight scores: ten times as fast as to choose by a condition."""


class Constraints:
    """The constraints of one tokenizer, by grammar; the last ones are remembered. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._compiler = GrammarCompiler(tokenizer)
        self._vocab_size = tokenizer.vocab_size
        self._lock = threading.Lock()
        self._compiled: LRU[Grammar, Constraint] = LRU(_REMEMBERED, _REMEMBERED_BYTES)  # guarded by _lock; never advanced

    def get(self, grammar: Grammar) -> Constraint:
        """The constraint at its beginning, to be copied. Compiles in the caller's thread. Raises InvalidGrammar."""
        with self._lock:
            constraint = self._compiled.get(grammar)
        if constraint is None:
            constraint = Constraint(self._compiler.compile(grammar), self._vocab_size)
            if constraint.stuck:
                raise InvalidGrammar("Nothing that this model can write begins as the grammar wants.")
            with self._lock:
                self._compiled.put(grammar, constraint, len(grammar.text))
        return constraint


class Constraint:
    """Where one sequence is in its grammar. Not thread-safe: a sequence owns it.

    `complete`: the grammar allows nothing more.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self.complete = False
        self._matcher = matcher
        self._num_bytes = (vocab_size + 31) // 32 * 4
        self._bits: NDArray[np.uint8] | None = None  # the mask, once it is needed: it is most of the work
        self._mask()  # the first one serves all copies

    def copy(self) -> Constraint:
        copy = object.__new__(Constraint)
        copy.__dict__.update(self.__dict__, _matcher=self._matcher.deep_copy())
        return copy

    @property
    def stuck(self) -> bool:
        """Nothing the vocabulary could write goes on, or only with more work than a token may take. Makes the mask."""
        return not self._mask().any()

    def allows(self, token_id: int) -> bool:
        """Whether a token may come next: microseconds, and no mask is made for it."""
        if self._bits is None:
            return self._matcher.validate_tokens([token_id]) == 1
        return bool(self._bits[token_id // 8] >> token_id % 8 & 1)

    def apply(self, logits: Logits) -> Logits:
        """A copy of scores of shape (vocab_size,) with -inf where the grammar does not allow the token."""
        mask: Logits = _SCORES_OF_BITS.take(self._mask(), axis=0).ravel()
        return logits + mask[: len(logits)]

    def advance(self, token_id: int) -> None:
        """Take a token that was allowed and is no EOS."""
        self._matcher.consume_token(token_id)
        self.complete = self._matcher.is_stopped() and not self._matcher.is_error()
        self._bits = None
        if not self.complete and self._matcher.compute_ff_bytes():
            self._mask()  # quick where text is forced, and it says how that is spelt: a question allows any spelling

    def _mask(self) -> NDArray[np.uint8]:
        """Releases the GIL; its time is bounded by the library's limits on a token."""
        if self._bits is None:
            bits = np.zeros(self._num_bytes, dtype=np.uint8)
            self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
            if self._matcher.is_error():
                bits[:] = 0
            if not bits.any():
                log.warning("a grammar got stuck: %s", self._matcher.get_error().partition("\n")[0])
            self._bits = bits
        return self._bits
