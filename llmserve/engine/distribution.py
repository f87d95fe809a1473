"""The distribution that scores and a temperature make, as it is drawn from: of a large vocabulary, only the tokens that matter are weighed.

A trained model's scores lie far apart, so a few hundred tokens have nearly all of the weight. What the others could weigh is
bounded, and only a draw that falls there looks at them: comparing scores with a number takes a fraction of the time of exp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmserve.engine import kernels
from llmserve.engine.backend import Logits
from llmserve.engine.generation import SamplingParams

Places = NDArray[np.int64]

_STRIDE = 256
_RANK = 3
"""Of every 256th score the third best is the edge of the top, which then has some 750 tokens."""
_MOST_PART = 1 / 16
"""More of a vocabulary than this takes longer to pick out than to weigh all of it."""
_SMALL = int(_STRIDE * _RANK / _MOST_PART)
"""Vocabularies up to this size are weighed whole."""
_MOST_TRIALS = 1000
"""Where the others' bound is more times the weight of the top, all are weighed."""
_MOST_DRAWS = 16
"""Before the nucleus is found by sorting: a small one of flat scores is hard to meet."""
_ROUNDING = 1e-2
"""In nats, and more than any rounding of a weight is."""
_LOWEST = np.finfo(np.float32).min  # an edge that leaves out -inf alone
_BLOCK = 256
_SEVERAL = 8


class Distribution:
    """Of the tokens of a vocabulary. Not thread-safe.

    `scores` of shape (vocab_size,) are left as they are. Raises ValueError if they are NaN, or all -inf, or the best is not finite; some NaN
    among many scores may only never be drawn.
    """

    def __init__(self, scores: Logits, temperature: float) -> None:
        self._scores = scores
        self._temperature = np.float32(temperature)
        ids, edge = _find_top(scores)
        self._best = scores[likeliest(scores)] if ids is None else scores[ids].max()
        if not math.isfinite(self._best):
            raise ValueError("the model's scores are not finite numbers")
        self._top = self._whole if ids is None else self._part(ids, edge)

    def draws(self, rng: np.random.Generator) -> Iterator[int]:
        """Tokens in the order in which they are drawn, each once, until none is left that weighs anything in float32.

        Drawn among the top and one more outcome, "another one", which has all the weight that tokens below the edge could have. That
        one is then any token, and taken with its share of that weight if it does lie below (rejection sampling, von Neumann 1951).
        """
        drawn: list[int] = []
        for part in self._parts():
            weights = part.weights.copy()
            if drawn:  # from the top, and the whole's places are ids
                weights[drawn] = 0
            urn = _Urn(weights)
            while urn.total * _MOST_TRIALS > part.bound:
                num_trials = int(rng.geometric(urn.total / (urn.total + part.bound))) - 1
                token_id = self._draw_below(part.edge, num_trials, drawn, rng) if num_trials else None
                if token_id is not None:
                    yield token_id
                    drawn.append(token_id)
                else:
                    place = urn.find(rng.random() * urn.total)
                    token_id = part.token_id(place)
                    yield token_id
                    drawn.append(token_id)
                    urn.remove(place)
            if not part.bound:
                return

    def draw_kept(self, params: SamplingParams, rng: np.random.Generator, first: int | None = None) -> int:
        """One that top-k, top-p (of what top-k left) and min-p leave, of which one truncates. `first` is it if it is left: it has been
        drawn already. (What was drawn and is not left says nothing about which of those that are left comes first.)
        """
        if params.top_p < 1 and not params.top_k:
            draws = chain([] if first is None else [first], islice(self.draws(rng), _MOST_DRAWS))
            for token_id in draws:
                if self._weight(self._scores[token_id]) >= params.min_p and self._in_nucleus(token_id, params.top_p):
                    return token_id
            part, first = self._whole, None
        elif params.top_k:
            part = self._top if len(self._top.weights) >= params.top_k else self._whole
        else:
            part = self._near(-math.log(params.min_p))
        weights, count = part.weights, params.top_k or len(part.weights)
        if params.top_p < 1:
            cumulative = np.sort(weights)[::-1][:count].cumsum(dtype=np.float64)
            count = int(cumulative.searchsorted(params.top_p * cumulative[-1])) + 1
        weights = _heaviest(weights, count)
        if params.min_p:
            weights = np.where(weights >= np.float32(params.min_p), weights, 0)
        if first is not None and part.has(first) and weights[part.place(first)]:
            return first
        urn = _Urn(weights)
        return part.token_id(urn.find(rng.random() * urn.total))

    def _draw_below(self, edge: np.float32, num_trials: int, without: list[int], rng: np.random.Generator) -> int | None:
        """The first that is taken of so many tokens, each drawn from all with equal chances."""
        ids = rng.integers(len(self._scores), size=num_trials)
        scores = self._scores[ids]
        taken = (scores < edge) & (rng.random(num_trials) * self._weight(edge) < self._weigh(scores))
        return next((token_id for token_id in ids[taken].tolist() if token_id not in without), None)

    def _in_nucleus(self, token_id: int, share: float) -> bool:
        """Whether the tokens likelier than this one have less than such a share of all weight; of equal ones the first is the likelier."""
        score = self._scores[token_id]
        for part in self._parts():
            before = float(part.weights[part.scores > score].sum(dtype=np.float64))
            before += self._weight(score) * np.count_nonzero(part.scores[: part.place(token_id)] == score)
            if not before or before < share * part.total:
                return True
            if before >= share * (part.total + part.bound):
                break
        return False

    def _parts(self) -> Iterator[_Part]:
        yield self._top
        yield self._whole

    def _near(self, depth: float) -> _Part:
        """All tokens that are at most so many nats below the best one, and perhaps some that are more."""
        edge = self._best - self._temperature * np.float32(depth + _ROUNDING)
        return self._top if edge >= self._top.edge else self._part(np.flatnonzero(self._scores >= edge), edge)

    @cached_property
    def _whole(self) -> _Part:
        weights = self._weigh(self._scores)
        return _Part(None, self._scores, weights, float(weights.sum(dtype=np.float64)), _LOWEST, 0.0)

    def _part(self, ids: Places, edge: np.float32) -> _Part:
        scores = self._scores[ids]
        weights = self._weigh(scores)
        return _Part(ids, scores, weights, float(weights.sum(dtype=np.float64)), edge, len(self._scores) * self._weight(edge))

    def _weigh(self, scores: Logits) -> Logits:
        """1 for the best score."""
        weights: Logits = scores - self._best
        if self._temperature != 1:
            weights /= self._temperature
        return np.exp(weights, out=weights)

    def _weight(self, score: np.float32) -> float:
        return math.exp((float(score) - float(self._best)) / float(self._temperature))


class _Part(NamedTuple):
    """Of a vocabulary: the tokens with a score of `edge` and more, by id, and what all others weigh together at the most."""

    ids: Places | None  # all
    scores: Logits
    weights: Logits
    total: float  # of these weights
    edge: np.float32
    bound: float

    def token_id(self, place: int) -> int:
        return place if self.ids is None else int(self.ids[place])

    def place(self, token_id: int) -> int:
        """That it has, or would have."""
        return token_id if self.ids is None else int(self.ids.searchsorted(token_id))

    def has(self, token_id: int) -> bool:
        return self.ids is None or token_id in self.ids


class _Urn:
    """Places of an array are found with their share of its weight, by inverse transform sampling.

    Many places are summed up in blocks first, so that only one block is summed up place by place.
    """

    def __init__(self, weights: Logits) -> None:
        self._weights = weights
        self._num_blocks = len(weights) // _BLOCK if len(weights) > _SEVERAL * _BLOCK else 0
        if self._num_blocks:
            blocks = weights[: self._num_blocks * _BLOCK].reshape(self._num_blocks, _BLOCK)
            rest = weights[self._num_blocks * _BLOCK :].sum(dtype=np.float64)
            self._sums = np.append(np.einsum("ij->i", blocks), rest)  # a fifth of sum()'s time
        else:
            self._sums = weights
        self._add_up()

    def _add_up(self) -> None:
        self._cumulative = self._sums.cumsum(dtype=np.float64)
        self.total = float(self._cumulative[-1])

    def find(self, target: float) -> int:
        """The place at which the sum of the weights exceeds `target`, a number below the total."""
        block = _find(self._cumulative, target)
        if not self._num_blocks:
            return block
        members = self._weights[block * _BLOCK : (block + 1) * _BLOCK]
        return block * _BLOCK + _find(
            members.cumsum(dtype=np.float64), target - (self._cumulative[block - 1] if block else 0.0)
        )

    def remove(self, place: int) -> None:
        """It weighs nothing from now on."""
        self._weights[place] = 0
        if self._num_blocks:
            block = place // _BLOCK
            self._sums[block] = self._weights[block * _BLOCK : (block + 1) * _BLOCK].sum(dtype=np.float64)
        self._add_up()


def _find_top(scores: Logits) -> tuple[Places | None, np.float32]:
    """Some 750 of the likeliest tokens and the least score they may have; None (of all) where those do not stand out."""
    if len(scores) > _SMALL:
        sample = scores[::_STRIDE]
        edge = max(np.partition(sample, len(sample) - _RANK)[len(sample) - _RANK], _LOWEST)
        most = int(_MOST_PART * len(scores))
        ids = kernels.select(scores, edge, most)
        if 0 < len(ids) < most:
            return ids, edge
    return None, _LOWEST


def likeliest(scores: Logits) -> int:
    """The likeliest token, of several the first. Raises ValueError on NaN and if all are -inf."""
    token_id = int(scores.argmax())
    if not np.isfinite(scores[token_id]):
        raise ValueError("the model's scores are not finite numbers")
    return token_id


def _heaviest(weights: Logits, count: int) -> Logits:
    """With 0 for all but the `count` greatest, of equal ones the first."""
    if len(weights) <= count:
        return weights
    least = np.partition(weights, len(weights) - count)[len(weights) - count]
    kept = weights > least
    kept[np.flatnonzero(weights == least)[: count - np.count_nonzero(kept)]] = True
    return np.where(kept, weights, 0)


def _find(cumulative: NDArray[np.float64], target: float) -> int:
    """The first index whose cumulative weight exceeds `target`; by no rounding one behind the last that has any weight."""
    return int(min(cumulative.searchsorted(target, side="right"), cumulative.searchsorted(cumulative[-1])))
