"""One completion being made: token ids go in one by one, text comes out, and a reason to stop."""

from __future__ import annotations

from collections.abc import Sequence as Ids

from llmserve.engine.backend import Logits
from llmserve.engine.detokenizer import Detokenizer
from llmserve.engine.generation import FinishReason, GenerationParams
from llmserve.engine.sampling import Sampler
from llmserve.engine.stopping import StopMatcher
from llmserve.engine.tokenizer import Tokenizer


class Sequence:
    """The state of choice `index`. Not thread-safe: the thread that runs it owns it."""

    def __init__(self, index: int, prompt_ids: Ids[int], params: GenerationParams, tokenizer: Tokenizer) -> None:
        self.index = index
        self.num_output_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._max_tokens = params.max_tokens
        self._tokenizer = tokenizer
        self._sampler = Sampler(params.sampling, prompt_ids, index)
        self._detokenizer = Detokenizer()
        self._stop_matcher = StopMatcher(params.stop)

    @property
    def num_left(self) -> int:
        """Most tokens it may still get."""
        return self._max_tokens - self.num_output_tokens

    def sample(self, logits: Logits) -> int:
        return self._sampler.sample(logits)

    def append(self, token_id: int) -> str:
        """Take the sampled id; the text that is certain now, often "". Sets `finish_reason` when it was the last one.

        An EOS token ends the sequence and is no part of it: neither its text nor its count.
        """
        if token_id in self._tokenizer.eos_token_ids:
            self.finish_reason = FinishReason.STOP
            return self._flush()
        self.num_output_tokens += 1
        text = self._stop_matcher.push(self._detokenizer.push(self._tokenizer.piece(token_id)))
        if self._stop_matcher.matched is not None:
            self.finish_reason = FinishReason.STOP
        elif self.num_output_tokens >= self._max_tokens:
            self.finish_reason = FinishReason.LENGTH
            text += self._flush()
        return text

    def _flush(self) -> str:
        text = self._stop_matcher.push(self._detokenizer.flush())
        return text if self._stop_matcher.matched is not None else text + self._stop_matcher.flush()
