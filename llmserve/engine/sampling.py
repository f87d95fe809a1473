"""Choose the next token from raw logits: biases, penalties, temperature, top-k, top-p, min-p, then one seeded draw.

The same for every backend. Works on the few candidates that matter and never sorts a vocabulary: greedy is one argmax,
a draw from the whole distribution is one exp and a sum over blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from llmserve.engine.backend import Logits
from llmserve.engine.generation import SamplingParams

GREEDY_BELOW = 1e-4
"""Temperatures under this are greedy: no two float32 logits closer than it are told apart anyway."""

_MOST_DRAWS = 5
"""Before a mask is made. Where one takes longest, in grammars of words, the model's own choice is allowed three times in four."""
_MOST_QUESTIONS = 256
_NEAR = math.log(4)
"""How far below a token in question (in nats) others are asked about. With these two, most of what is doubtful needs no mask."""

_BLOCK = 256
_THRESHOLDS = (1e-2, 1e-4, 1e-7)
"""Weights, the likeliest token's being 1, tried in turn until the tokens above one are enough."""


class Sampler:
    """The sampler of one sequence. Not thread-safe.

    Presence and frequency penalties count the tokens of the answer (OpenAI's formula, API reference, "frequency and
    presence penalties"); the repetition penalty also those of the prompt (Keskar et al. 2019, CTRL, section 4.1).
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], choice: int = 0) -> None:
        self._params = params
        greedy = params.temperature < GREEDY_BELOW
        self._truncates = not greedy and bool(params.top_k or params.top_p < 1 or params.min_p)
        self._biased_ids = [token_id for token_id, _ in params.logit_bias]
        self._biases = np.array([bias for _, bias in params.logit_bias], dtype=np.float32)
        self._penalties = _Penalties(params, prompt_ids) if _has_penalties(params) else None
        self._rng = None if greedy else _generator(params.seed, choice)

    def sample(self, logits: Logits) -> int:
        """The next token id from scores of shape (vocab_size,), which are left as they are. Raises ValueError on NaN."""
        return self._count(self._choose(self._adjust(logits)))

    def sample_within(self, logits: Logits, allows: Callable[[int], bool], mask: Callable[[Logits], Logits]) -> int | None:
        """The next token id from what a mask leaves of the scores; None if that is nothing. `allows` tells it of one token.

        The mask is asked for only where a few draws and questions do not tell, and the distribution is the same: to draw from
        all tokens, and again without what was drawn, is to see them in the order of independent exponential waiting times whose
        rates are their weights (Efraimidis and Spirakis 2006). So of any set of tokens, here those that the mask and truncation
        leave, each comes first with its part of the set's weight, whatever was drawn before.
        """
        scores = self._adjust(logits)
        undecided = None
        for token_id in islice(self._draws(scores), _MOST_DRAWS):
            kept = allows(token_id) and self._keeps(token_id, scores, allows)
            if kept:
                return self._count(token_id)
            if kept is None:
                undecided = token_id
                break
        scores = mask(scores)
        return None if scores.max() == -np.inf else self._count(self._choose(scores, undecided))

    def _adjust(self, logits: Logits) -> Logits:
        """Biased and penalized scores."""
        if self._biased_ids:
            logits = logits.copy()
            logits[self._biased_ids] += self._biases
        return logits if self._penalties is None else self._penalties.apply(logits)

    def _choose(self, scores: Logits, first: int | None = None) -> int:
        """One of all tokens, as the parameters want it. `first` is it if it is among them at all: it has been drawn already."""
        if self._rng is None:
            return _greedy(scores)
        weights = self._weights(scores)
        if not self._truncates:
            return next(_draws_from_all(weights, self._rng))
        candidates = _candidates(weights, self._params)
        if first is not None and first in candidates:
            return first
        cumulative = weights[candidates].cumsum(dtype=np.float64)
        return int(candidates[_find(cumulative, self._rng.random() * cumulative[-1])])

    def _draws(self, scores: Logits) -> Iterator[int]:
        """Tokens in the order in which they are drawn if nothing is truncated, each once."""
        return _descending(scores) if self._rng is None else _draws_from_all(self._weights(scores), self._rng)

    def _weights(self, scores: Logits) -> Logits:
        """Of each token, the likeliest one's being 1."""
        weights: Logits = scores - scores[_greedy(scores)]
        if self._params.temperature != 1:
            weights /= np.float32(self._params.temperature)
        return np.exp(weights, out=weights)

    def _keeps(self, token_id: int, scores: Logits, allows: Callable[[int], bool]) -> bool | None:
        """Whether truncation leaves an allowed token among the allowed ones; None if that takes more than a few questions."""
        if not self._truncates:
            return True
        params = self._params
        near = scores >= scores[token_id] - params.temperature * _NEAR
        if np.count_nonzero(near) > _MOST_QUESTIONS:
            return None
        ids = np.flatnonzero(near)
        ids = ids[np.argsort(-scores[ids], kind="stable")]
        place = int(np.flatnonzero(ids == token_id)[0])
        above = [each for each in ids[:place].tolist() if allows(each)]
        if not above:
            return True
        weights = np.exp((scores[[*above, token_id]] - scores[above[0]]) / params.temperature, dtype=np.float64)
        if weights[-1] < params.min_p or (params.top_k and len(above) >= params.top_k):
            return False
        before, known = float(weights[:-1].sum()), float(weights.sum())  # known: what top_p is a part of is no less
        num_left = (params.top_k or len(ids)) - len(above) - 1
        for each in ids[place + 1 :].tolist():
            if before < params.top_p * known or not num_left:
                break
            if allows(each):
                known += math.exp((scores[each] - scores[above[0]]) / params.temperature)
                num_left -= 1
        return True if before < params.top_p * known else None

    def _count(self, token_id: int) -> int:
        if self._penalties is not None:
            self._penalties.count(token_id)
        return token_id


class _Penalties:
    """Counts of the tokens so far, as arrays that grow: ids seen, and how often each stands in the answer."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self._params = params
        seen = dict.fromkeys(prompt_ids) if params.repetition_penalty != 1 else {}
        self._row = {token_id: row for row, token_id in enumerate(seen)}
        self._ids = np.fromiter(seen, dtype=np.int64, count=len(seen))
        self._counts = np.zeros(len(seen), dtype=np.float32)

    def apply(self, logits: Logits) -> Logits:
        """A penalized copy."""
        params = self._params
        ids, counts = self._ids[: len(self._row)], self._counts[: len(self._row)]
        logits = logits.copy()
        scores = logits[ids]
        if params.repetition_penalty != 1:
            factor = np.float32(params.repetition_penalty)
            scores = np.where(scores > 0, scores / factor, scores * factor)
        scores -= np.float32(params.frequency_penalty) * counts + np.float32(params.presence_penalty) * (counts > 0)
        logits[ids] = scores
        return logits

    def count(self, token_id: int) -> None:
        row = self._row.setdefault(token_id, len(self._row))
        if row == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros(row + 64, dtype=np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(row + 64, dtype=np.float32)])
        self._ids[row] = token_id
        self._counts[row] += 1


def _has_penalties(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)


def _generator(seed: int | None, choice: int) -> np.random.Generator:
    """One generator per choice: equal seeds repeat, the choices of one request differ."""
    return np.random.default_rng(None if seed is None else [seed % 2**64, choice])


def _greedy(scores: Logits) -> int:
    """The likeliest token, of several the first. Raises ValueError on NaN."""
    token_id = int(scores.argmax())
    if not np.isfinite(scores[token_id]):
        raise ValueError("the model's scores are not finite numbers")
    return token_id


def _descending(scores: Logits) -> Iterator[int]:
    """The likeliest token, then the likeliest of the others, …"""
    token_id = _greedy(scores)
    while scores[token_id] > -np.inf:
        yield token_id
        scores = scores.copy()
        scores[token_id] = -np.inf
        token_id = int(scores.argmax())


def _draws_from_all(weights: Logits, rng: np.random.Generator) -> Iterator[int]:
    """Inverse transform sampling in two levels, blocks then tokens, so that only one block is summed up token by token.

    What was drawn weighs nothing from then on.
    """
    num_blocks = len(weights) // _BLOCK
    blocks = weights[: num_blocks * _BLOCK].reshape(num_blocks, _BLOCK)
    sums = np.append(
        np.einsum("ij->i", blocks), weights[num_blocks * _BLOCK :].sum(dtype=np.float64)
    )  # a fifth of sum()'s time
    while (cumulative := sums.cumsum())[-1]:
        target = rng.random() * cumulative[-1]
        block = _find(cumulative, target)
        members = weights[block * _BLOCK : (block + 1) * _BLOCK]
        member = _find(members.cumsum(dtype=np.float64), target - (cumulative[block - 1] if block else 0.0))
        yield block * _BLOCK + member
        members[member] = 0
        sums[block] = members.sum(dtype=np.float64)


def _find(cumulative: NDArray[np.float64], target: float) -> int:
    """The first index whose cumulative weight exceeds `target`; by no rounding one behind the last that has any weight."""
    return int(min(cumulative.searchsorted(target, side="right"), cumulative.searchsorted(cumulative[-1])))


def _candidates(weights: Logits, params: SamplingParams) -> NDArray[np.int64]:
    """Ids that top-k, top-p (of what top-k left) and min-p leave, likeliest first; equal weights by id. Never empty."""
    total = 0.0
    if params.top_k:
        ids = _likeliest(weights, params.top_k)
    elif params.top_p < 1:
        total = float(weights.sum())
        ids = _above_threshold(weights, lambda ids: weights[ids].sum(dtype=np.float64) >= params.top_p * total)
    else:
        ids = np.flatnonzero(weights >= np.float32(params.min_p))
    ids = ids[np.argsort(-weights[ids], kind="stable")]
    if params.top_k:
        ids = ids[: params.top_k]
    if params.top_p < 1:
        cumulative = weights[ids].cumsum(dtype=np.float64)
        ids = ids[: int(np.searchsorted(cumulative, params.top_p * (total or cumulative[-1]))) + 1]
    if params.min_p:
        ids = ids[weights[ids] >= np.float32(params.min_p)]
    return ids


def _likeliest(weights: Logits, count: int) -> NDArray[np.int64]:
    """The ids of the `count` likeliest tokens that can be drawn at all, and perhaps of some more."""
    for threshold in _THRESHOLDS:
        ids = np.flatnonzero(weights >= np.float32(threshold))
        if len(ids) >= count:
            return ids
    rank = max(0, len(weights) - count)
    return np.flatnonzero((weights >= np.partition(weights, rank)[rank]) & (weights > 0))


def _above_threshold(weights: Logits, enough: Callable[[NDArray[np.int64]], bool]) -> NDArray[np.int64]:
    """The ids of the likeliest tokens, by the highest threshold that leaves enough."""
    for threshold in (*_THRESHOLDS, 0.0):
        ids = np.flatnonzero(weights >= np.float32(threshold))
        if enough(ids):
            break
    return ids
