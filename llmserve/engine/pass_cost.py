"""How long passes of one sequence take by the number of their tokens, and so how much of a guess is worth evaluating.

Knows nothing of models: it sees times and likelihoods.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

LONGEST_DRAFT = 24
"""Tokens of which it is worth asking whether they are worth it."""

_BEST_ACCURACY = 0.99
_KNOWN_AFTER = 3  # passes
_FORGOTTEN_AFTER = 500  # passes of other sizes
_PASS_RATE = 0.2  # of learning
_LARGEST = 1 + LONGEST_DRAFT  # of the passes that have one
_LARGEST_STEP = 0.05  # of the time known, so that a pass that another program has held up changes little
_FAR = 1e6  # tokens; more than any pass has


class PassCost:
    """How long passes of one sequence take by the number of their tokens. Not thread-safe.

    Kernels work on tiles of tokens: the time grows by steps, and a line through it is wrong just where a draft is to end. So every
    size that a draft can give a pass is known by itself, larger ones together up to the next power of two. Passes take longer as a
    text grows, and less again in the next one: a size that is used learns that; one that is not used, perhaps because it is thought
    too dear, is forgotten after a while, and tried again if its neighbours promise something.
    """

    def __init__(self) -> None:
        self._num_passes = 0
        self._typical: dict[int, _Typical] = {}  # by the least of their sizes

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Learn from a pass."""
        self._num_passes += 1
        typical = self._typical.setdefault(_least_alike(num_tokens), _Typical(num_tokens))
        typical.add(num_tokens, seconds)
        typical.last_pass = self._num_passes
        self._forget(self._num_passes - _FORGOTTEN_AFTER)

    @property
    def seconds_per_token(self) -> float | None:
        """In passes of the size in which a token costs least, as far as is known."""
        return min((typical.seconds / typical.num_tokens for typical in self._known()), default=None)

    def draft_length(self, accuracies: Sequence[float]) -> int:
        """How many guessed tokens, right as often as is said of each if all before it are, make passes yield most for what they cost."""
        if not accuracies:
            return 0
        best_cost, *costs = self._seconds(1 + len(accuracies))
        best, best_tokens = 0, 1.0  # that a pass yields on average
        tokens = likelihood = 1.0
        for length, (accuracy, cost) in enumerate(zip(accuracies, costs, strict=True), start=1):
            likelihood *= min(accuracy, _BEST_ACCURACY)
            tokens += likelihood
            if tokens * best_cost > best_tokens * cost:
                best, best_tokens, best_cost = length, tokens, cost
        return best

    def _seconds(self, max_tokens: int) -> list[float]:
        """Of passes of 1, 2, … tokens: on a line between sizes that are known; beyond them, one more token is half a pass of one."""
        known = sorted((typical.num_tokens, typical.seconds) for typical in self._known()) or [(1.0, 1.0)]
        (first, least), (last, most) = known[0], known[-1]
        sizes, seconds = zip((0.0, least / (1 + first)), *known, (_FAR, most * (1 + _FAR) / (1 + last)), strict=True)
        found: list[float] = np.interp(range(1, max_tokens + 1), sizes, seconds).tolist()
        return found

    def _known(self) -> list[_Typical]:
        return [typical for typical in self._typical.values() if typical.count >= _KNOWN_AFTER]

    def _forget(self, last_pass: int) -> None:
        """What drafts of sizes that were not used since took. How fast prompts are read stays known."""
        for size in [size for size, typical in self._typical.items() if size <= _LARGEST and typical.last_pass <= last_pass]:
            del self._typical[size]


def _least_alike(num_tokens: int) -> int:
    """The least size of the passes that one of so many tokens is known with."""
    return num_tokens if num_tokens <= _LARGEST else max(1 << num_tokens.bit_length() - 1, _LARGEST + 1)


class _Typical:
    """Passes of about one size: how many tokens they have and how long they take, whatever the machine does besides."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = float(num_tokens)
        self.seconds = math.inf
        self.count = 0
        self.last_pass = 0

    def add(self, num_tokens: int, seconds: float) -> None:
        self.count += 1
        self.num_tokens += _PASS_RATE * (num_tokens - self.num_tokens)
        if self.count <= _KNOWN_AFTER:
            self.seconds = min(self.seconds, seconds)
        else:
            step = _LARGEST_STEP * self.seconds
            self.seconds += min(max(_PASS_RATE * (seconds - self.seconds), -step), step)
