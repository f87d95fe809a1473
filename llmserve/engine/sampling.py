"""Choose the next token from raw logits: biases, penalties, temperature, top-k, top-p, min-p, then one seeded draw.

The same for every backend. Works on the few candidates that matter and never sorts a vocabulary: greedy is one argmax,
a draw from the whole distribution is one exp and a sum over blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from llmserve.engine.backend import Logits
from llmserve.engine.generation import SamplingParams

GREEDY_BELOW = 1e-4
"""Temperatures under this are greedy: no two float32 logits closer than it are told apart anyway."""

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
        self._greedy = params.temperature < GREEDY_BELOW
        self._biased_ids = [token_id for token_id, _ in params.logit_bias]
        self._biases = np.array([bias for _, bias in params.logit_bias], dtype=np.float32)
        self._penalties = _Penalties(params, prompt_ids) if _has_penalties(params) else None
        self._rng = None if self._greedy else _generator(params.seed, choice)

    def sample(self, logits: Logits) -> int:
        """The next token id from scores of shape (vocab_size,), which are left as they are. Raises ValueError on NaN."""
        if self._biased_ids:
            logits = logits.copy()
            logits[self._biased_ids] += self._biases
        if self._penalties is not None:
            logits = self._penalties.apply(logits)
        token_id = int(logits.argmax())
        if not np.isfinite(logits[token_id]):
            raise ValueError("the model's scores are not finite numbers")
        if self._rng is not None:
            token_id = self._draw(logits, logits[token_id], self._rng)
        if self._penalties is not None:
            self._penalties.count(token_id)
        return token_id

    def _draw(self, logits: Logits, largest: np.float32, rng: np.random.Generator) -> int:
        params = self._params
        weights = np.exp((logits - largest) / np.float32(params.temperature))
        if not (params.top_k or params.top_p < 1 or params.min_p):
            return _draw_from_all(weights, rng.random())
        candidates = _candidates(weights, params)
        cumulative = weights[candidates].cumsum(dtype=np.float64)
        return int(candidates[_find(cumulative, rng.random() * cumulative[-1])])


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


def _draw_from_all(weights: Logits, uniform: float) -> int:
    """Inverse transform sampling in two levels, blocks then tokens, so that only one block is summed up token by token."""
    num_blocks = len(weights) // _BLOCK
    sums = weights[: num_blocks * _BLOCK].reshape(num_blocks, _BLOCK).sum(axis=1, dtype=np.float64)
    cumulative = np.append(sums, weights[num_blocks * _BLOCK :].sum(dtype=np.float64)).cumsum()
    target = uniform * cumulative[-1]
    block = _find(cumulative, target)
    within = weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
    return block * _BLOCK + _find(within, target - (cumulative[block - 1] if block else 0.0))


def _find(cumulative: NDArray[np.float64], target: float) -> int:
    """The first index whose cumulative weight exceeds `target`; by no rounding one behind the last that has any weight."""
    return int(min(np.searchsorted(cumulative, target, side="right"), np.searchsorted(cumulative, cumulative[-1])))


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
