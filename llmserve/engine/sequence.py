"""One completion being made: token ids go in one by one, text comes out, and a reason to stop."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from collections.abc import Set

import numpy as np

from llmserve.engine.backend import Logits
from llmserve.engine.constraint import Constraint
from llmserve.engine.detokenizer import Detokenizer
from llmserve.engine.generation import Delta, FinishReason, GenerationParams, TokenScore
from llmserve.engine.logprobs import Ledger, TokenScorer
from llmserve.engine.sampling import Sampler
from llmserve.engine.stopping import StopMatcher
from llmserve.engine.tokenizer import Tokenizer


class Sequence:
    """The state of choice `index`. Not thread-safe: the thread that runs it owns it.

    One that may have no token at all is complete from the start.
    """

    def __init__(
        self,
        index: int,
        prompt_ids: Ids[int],
        params: GenerationParams,
        tokenizer: Tokenizer,
        constraint: Constraint | None = None,
    ) -> None:
        """`constraint` is the sequence's own from now on."""
        self.index = index
        self.num_output_tokens = 0
        self.finish_reason: FinishReason | None = None if params.max_tokens else FinishReason.LENGTH
        self._params = params
        self._tokenizer = tokenizer
        self._sampler = Sampler(params.sampling, prompt_ids, index)
        self._detokenizer = Detokenizer()
        self._stop_matcher = StopMatcher(params.stop)
        self._constraint = constraint
        self._ends = tokenizer.eos_token_ids.union(params.stop_token_ids)
        self._scorer = None if params.logprobs is None else TokenScorer(params.logprobs, tokenizer)
        self._score: TokenScore | None = None  # of the token just sampled
        self._ledger = Ledger()

    @property
    def num_left(self) -> int:
        """Most tokens it may still get."""
        return self._params.max_tokens - self.num_output_tokens

    def sample(self, logits: Logits) -> int | None:
        """The next token id from the model's own scores, which are left as they are; None if the grammar lets none follow."""
        token_id = self._sample(logits)
        if self._scorer is not None and token_id is not None:
            self._score = self._scorer.score(logits, token_id)
        return token_id

    def _sample(self, logits: Logits) -> int | None:
        constraint, barred = self._constraint, self._barred_ends()
        if constraint is None:
            return self._sampler.sample(_without(barred, logits))
        return self._sampler.sample_within(
            logits,
            lambda token_id: token_id not in barred and constraint.allows(token_id),
            lambda scores: _without(barred, constraint.apply(scores)),
        )

    def _barred_ends(self) -> Set[int]:
        """Tokens that would end the sequence and may not yet, unless nothing else is left."""
        if self.num_output_tokens < self._params.min_tokens:
            return self._ends
        return self._tokenizer.eos_token_ids if self._params.ignore_eos else frozenset()

    def append(self, token_id: int | None) -> Delta | None:
        """Take what was sampled; what is certain now, often nothing. Sets `finish_reason` when it was the last one.

        An EOS token ends the sequence and is no part of it: neither its text nor its count.
        """
        if token_id is None:
            self.finish_reason = FinishReason.LENGTH
            return self._delta(self._flush())
        if token_id in self._ends:
            self.finish_reason = FinishReason.STOP
            return self._delta(self._flush())
        self.num_output_tokens += 1
        text = self._push(self._detokenizer.push(self._tokenizer.piece(token_id)))
        if self._stop_matcher.matched is not None:
            self.finish_reason = FinishReason.STOP
        elif self._constraint is not None:
            self._constraint.advance(token_id)
            if self._constraint.complete:
                self.finish_reason = FinishReason.STOP
        if self.finish_reason is None and self.num_output_tokens >= self._params.max_tokens:
            self.finish_reason = FinishReason.LENGTH
        if self.finish_reason is not None and self._stop_matcher.matched is None:
            text += self._flush()
        return self._delta(text)

    def _push(self, text: str) -> str:
        """What of new text is certain to stand before any stop string; there is none within the first `min_tokens`."""
        if self._score is not None:
            self._ledger.push(self._score, text, self._detokenizer.num_pending)
        return text if self.num_output_tokens <= self._params.min_tokens else self._stop_matcher.push(text)

    def _flush(self) -> str:
        text = self._stop_matcher.push(self._detokenizer.flush())
        return text if self._stop_matcher.matched is not None else text + self._stop_matcher.flush()

    def _delta(self, text: str) -> Delta | None:
        tokens: tuple[TokenScore, ...] = ()
        if self._scorer is not None:
            text, tokens = self._ledger.release(text) if self.finish_reason is None else self._ledger.end(text)
        return Delta(self.index, text, tokens) if text or tokens else None


def _without(token_ids: Set[int], scores: Logits) -> Logits:
    """Scores with which none of these is chosen, unless nothing else is left."""
    if not token_ids:
        return scores
    others = scores.copy()
    others[list(token_ids)] = -np.inf
    return others if np.isfinite(others.max()) else scores
