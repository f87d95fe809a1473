"""Guess what a sequence says next from what stands in it already, and decide how much of a guess is worth evaluating.

Text that copies from its prompt (edits, extraction, quotes), or repeats itself, is guessed right for long runs; several guessed
tokens evaluated in one pass cost less than one after the other. Knows nothing of models: it sees token ids and times.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Sequence

_MATCH = 3  # tokens that must be the same for what followed them to be guessed again
_NUM_PLACES = 8
"""Of one run of tokens that are remembered: of lines that begin alike, the text before them tells which one comes."""
_LEVELS = (4, 8, 16, 32)
"""Tokens alike in a row that make a guess one of another kind: short matches are chance, long ones a copy."""
_ACCURACIES_AT_FIRST = (0.3, 0.45, 0.7, 0.85, 0.95)
_LEARNING_RATE = 0.1  # of an accuracy
_BEST_ACCURACY = 0.99
_LONGEST_DRAFT = 24  # tokens

_SLOPE_AT_FIRST = 1.0
_SLOPES = (0.25, 100.0)  # what is believed; less than the first was never seen on a CPU but in noise
_KNOWN_AFTER = 3  # passes
_PASS_RATE = 0.2  # of learning
_LARGEST_STEP = 0.05  # of the time known, so that a pass that another program has held up changes little


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

    @property
    def accuracy(self) -> float:
        """How often the next guess is right, if there is one."""
        return self._accuracies[_level(self._num_alike)]

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
    """How the time of a pass grows with its tokens: in proportion to 1 + slope · tokens, fitted to what was seen. Not thread-safe."""

    def __init__(self) -> None:
        self._typical: dict[int, _Typical] = {}  # by the size of the pass: between a power of two and the next

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Learn from a pass."""
        self._typical.setdefault(num_tokens.bit_length(), _Typical(num_tokens)).add(num_tokens, seconds)

    @property
    def seconds_per_token(self) -> float | None:
        """In passes of the size in which a token costs least, as far as is known."""
        known = [typical for typical in self._typical.values() if typical.known]
        return min((typical.seconds / typical.num_tokens for typical in known), default=None)

    @property
    def share(self) -> float:
        """What a second token adds to a pass of one, as a part of what that takes. At most 1."""
        slope = self._slope()
        return slope / (1 + slope)

    def draft_length(self, accuracy: float) -> int:
        """How many guessed tokens, each right with `accuracy` if all before it are, make passes yield most for what they cost."""
        accuracy, share = min(accuracy, _BEST_ACCURACY), self.share
        length, tokens, cost, likelihood = 0, 1.0, 1.0, accuracy  # tokens that a pass yields on average
        while length < _LONGEST_DRAFT and (tokens + likelihood) * cost > tokens * (cost + share):
            length, tokens, cost, likelihood = length + 1, tokens + likelihood, cost + share, likelihood * accuracy
        return length

    def _slope(self) -> float:
        """Least squares of the relative errors, as soon as passes of two sizes are known."""
        known = [typical for typical in self._typical.values() if typical.known]
        if len(known) < 2:
            return _SLOPE_AT_FIRST
        weights = [1 / typical.num_tokens**2 for typical in known]
        tokens = _mean([typical.num_tokens for typical in known], weights)
        seconds = _mean([typical.seconds for typical in known], weights)
        products = _mean([(typical.num_tokens - tokens) * (typical.seconds - seconds) for typical in known], weights)
        per_token = products / _mean([(typical.num_tokens - tokens) ** 2 for typical in known], weights)
        base = seconds - per_token * tokens
        least, most = _SLOPES
        return min(max(per_token / base, least), most) if base > 0 else most


class _Typical:
    """Passes of about one size: how many tokens they have and how long they take, whatever the machine does besides."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = float(num_tokens)
        self.seconds = math.inf
        self._count = 0

    @property
    def known(self) -> bool:
        return self._count >= _KNOWN_AFTER

    def add(self, num_tokens: int, seconds: float) -> None:
        self._count += 1
        self.num_tokens += _PASS_RATE * (num_tokens - self.num_tokens)
        if self._count <= _KNOWN_AFTER:
            self.seconds = min(self.seconds, seconds)
        else:
            step = _LARGEST_STEP * self.seconds
            self.seconds += min(max(_PASS_RATE * (seconds - self.seconds), -step), step)


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
