"""The tokens that a grammar allows next, as a mask over scores. Knows nothing of how grammars are written or answers made."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import numpy as np

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

    `complete`: the grammar allows nothing more. `stuck`: nothing the vocabulary could write goes on, or only with more work
    than a token may take.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self.complete = False
        self.stuck = False
        self._matcher = matcher
        self._bits = np.zeros((vocab_size + 31) // 32 * 4, dtype=np.uint8)
        self._find_allowed()

    def copy(self) -> Constraint:
        copy = object.__new__(Constraint)
        copy.__dict__.update(self.__dict__, _matcher=self._matcher.deep_copy(), _bits=self._bits.copy())
        return copy

    def apply(self, logits: Logits) -> Logits:
        """A copy of scores of shape (vocab_size,) with -inf where the grammar does not allow the token."""
        mask: Logits = _SCORES_OF_BITS.take(self._bits, axis=0).ravel()
        return logits + mask[: len(logits)]

    def advance(self, token_id: int) -> None:
        """Take a token that was allowed and is no EOS."""
        self._matcher.consume_token(token_id)
        self.complete = self._matcher.is_stopped() and not self._matcher.is_error()
        if not self.complete:
            self._find_allowed()

    def _find_allowed(self) -> None:
        """Releases the GIL; its time is bounded by the library's limits on a token."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error() or not self._bits.any():
            self.stuck = True
            log.warning("a grammar got stuck: %s", self._matcher.get_error().partition("\n")[0])
