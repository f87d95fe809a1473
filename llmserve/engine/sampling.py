"""Choose the next token from raw logits: biases, penalties, temperature, top-k, top-p, min-p, then one seeded draw.

The same for every backend. What a draw costs is `distribution.py`'s concern; greedy is one argmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np

from llmserve.engine.backend import Logits
from llmserve.engine.distribution import Distribution, likeliest
from llmserve.engine.generation import SamplingParams

GREEDY_BELOW = 1e-4
"""Temperatures under this are greedy: at them one nat is less than what scores are rounded by."""

_MOST_DRAWS = 5
"""Before a mask is made. Where one takes longest, in grammars of words, the model's own choice is allowed three times in four."""
_MOST_QUESTIONS = 256
_NEAR = math.log(4)
"""How far below a token in question (in nats) others are asked about. With these two, most of what is doubtful needs no mask."""


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
            return likeliest(scores)
        distribution = Distribution(scores, self._params.temperature)
        if not self._truncates:
            return next(distribution.draws(self._rng))
        return distribution.draw_kept(self._params, self._rng, first)

    def _draws(self, scores: Logits) -> Iterator[int]:
        """Tokens in the order in which they are drawn if nothing is truncated, each once."""
        if self._rng is None:
            return _descending(scores)
        return Distribution(scores, self._params.temperature).draws(self._rng)

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


def _descending(scores: Logits) -> Iterator[int]:
    """The likeliest token, then the likeliest of the others, …"""
    token_id = likeliest(scores)
    while scores[token_id] > -np.inf:
        yield token_id
        scores = scores.copy()
        scores[token_id] = -np.inf
        token_id = int(scores.argmax())
