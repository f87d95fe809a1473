"""Guess what a sequence says next from what stands in it already, and decide how much of a guess is worth evaluating.

Text that copies from its prompt (edits, extraction, quotes), or repeats itself, is guessed right for long runs; several guessed
tokens evaluated in one pass cost less than one after the other. Knows nothing of models: it sees token ids and times.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Sequence

import numpy as np

_MATCH = 2  # tokens that must be the same for what followed them to be guessed again
_NUM_PLACES = 8
"""Of one run of tokens that are remembered: of lines that begin alike, the text before them tells which one comes."""
_LEVELS = (3, 4, 8, 16, 32)
"""Tokens alike in a row that make a guess one of another kind: short matches are chance, long ones a copy."""
_ACCURACIES_AT_FIRST = (0.35, 0.6, 0.8, 0.9, 0.96, 0.98)
_LEARNING_RATE = 0.05  # of an accuracy
_BEST_ACCURACY = 0.99
_LONGEST_DRAFT = 24  # tokens
_LARGEST = 1 + _LONGEST_DRAFT  # of the passes that have one

_KNOWN_AFTER = 3  # passes
_FORGOTTEN_AFTER = 500  # passes of other sizes
_PASS_RATE = 0.2  # of learning
_LARGEST_STEP = 0.05  # of the time known, so that a pass that another program has held up changes little
_FAR = 1e6  # tokens; more than any pass has


class PromptLookup:
    """The text of one sequence, and where in it the last few tokens stood before ("prompt lookup decoding", Saxena 2023).

    It learns how often its guesses are right from every token, also while none of them is evaluated: the longer the text has been
    what stood before, the more often. Not thread-safe.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = list(token_ids)
        self._followers: dict[tuple[int, ...], deque[int]] = {}  # the positions behind each run of _MATCH tokens, the last few
        for end in range(_MATCH, len(token_ids)):
            self._note(end)
        self._accuracies = list(_ACCURACIES_AT_FIRST)
        self._next: int | None = None  # the position whose token is guessed to come next
        self._num_alike = 0  # tokens before it that stand at the end too, as far as that tells anything
        self._look_up()
        self._note(len(self._token_ids))

    def accuracies(self, max_tokens: int) -> list[float]:
        """How often the tokens of a draft are right, each if all before it are; none where nothing is guessed.

        A right guess makes the run of tokens that are alike a longer one: the next is as good as those behind such a run.
        """
        if self._next is None:
            return []
        least = self._accuracies[_level(self._num_alike)]
        runs = range(self._num_alike, self._num_alike + min(max_tokens, _LONGEST_DRAFT))
        return [max(least, self._accuracies[_level(num_alike)]) for num_alike in runs]

    def append(self, token_id: int) -> None:
        """Take the next token of the sequence."""
        guessed = self._next
        right = guessed is not None and self._token_ids[guessed] == token_id
        if guessed is not None:
            level = _level(self._num_alike)
            self._accuracies[level] += _LEARNING_RATE * (right - self._accuracies[level])
        self._token_ids.append(token_id)
        if guessed is not None and right:
            self._next, self._num_alike = guessed + 1, self._num_alike + 1
        else:
            self._look_up()
        self._note(len(self._token_ids))

    def draft(self, max_tokens: int) -> list[int]:
        """What should come next, `max_tokens` ids or none; a text that repeats itself is guessed to go on so."""
        if self._next is None:
            return []
        draft = self._token_ids[self._next : self._next + max_tokens]
        period = len(draft)
        while len(draft) < max_tokens:
            draft.append(draft[-period])
        return draft

    def _look_up(self) -> None:
        """Find where the last tokens stood before: of several places the one where most of them did, and of such the last."""
        places = self._followers.get(tuple(self._token_ids[-_MATCH:]), ())
        self._num_alike, place = max(((self._count_alike(place), place) for place in places), default=(0, -1))
        self._next = place if place >= 0 else None

    def _note(self, end: int) -> None:
        """From now on the tokens before this position stand there."""
        self._followers.setdefault(tuple(self._token_ids[end - _MATCH : end]), deque(maxlen=_NUM_PLACES)).append(end)

    def _count_alike(self, place: int) -> int:
        ids, count = self._token_ids, 0
        while count < min(_LEVELS[-1], place) and ids[-1 - count] == ids[place - 1 - count]:
            count += 1
        return count


def _level(num_alike: int) -> int:
    return bisect.bisect_right(_LEVELS, num_alike)


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
