"""Logarithmic probabilities of tokens, in the model's own distribution: scores in, `TokenScore`s out, in step with the text."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmserve.engine.backend import Logits
from llmserve.engine.generation import TokenScore
from llmserve.engine.tokenizer import Tokenizer


class TokenScorer:
    """Scores tokens, each with the `num_top` likeliest in its place. Stateless."""

    def __init__(self, num_top: int, tokenizer: Tokenizer) -> None:
        self._num_top = num_top
        self._tokenizer = tokenizer
        self._control_texts = {token_id: text.encode() for text, token_id in tokenizer.control_texts.items()} if num_top else {}

    def score(self, logits: Logits, token_id: int) -> TokenScore:
        """Of raw scores of shape (vocab_size,). An alternative that is a control token is named by its text."""
        largest = logits.max()
        norm = float(largest) + math.log(float(np.exp(logits - largest).sum(dtype=np.float64)))
        top = tuple((self._name(each), float(logits[each]) - norm) for each in _likeliest(logits, self._num_top))
        return TokenScore(self._tokenizer.piece(token_id), float(logits[token_id]) - norm, top)

    def first(self, token_id: int) -> TokenScore:
        """Of a token that nothing stands before."""
        return TokenScore(self._tokenizer.piece(token_id), None)

    def _name(self, token_id: np.int64) -> bytes:
        return self._control_texts.get(int(token_id)) or self._tokenizer.piece(int(token_id))


class PromptScorer:
    """Scores the tokens of a prompt while it is evaluated. Not thread-safe: the thread that evaluates it owns it."""

    def __init__(self, prompt_ids: Sequence[int], scorer: TokenScorer) -> None:
        self._prompt_ids = prompt_ids
        self._scorer = scorer
        self.tokens = [scorer.first(prompt_ids[0])]

    def push(self, logits: Logits) -> None:
        """Take the scores after the next token of the prompt; those after its last are the answer's."""
        if not self.complete:
            self.tokens.append(self._scorer.score(logits, self._prompt_ids[len(self.tokens)]))

    @property
    def complete(self) -> bool:
        return len(self.tokens) == len(self._prompt_ids)


class _Entry(NamedTuple):
    """A token that waits: its score, the characters that it completed, and where in the answer those end.

    `num_pending`: bytes at its end that are a part of another character.
    """

    score: TokenScore
    text: str
    end: int
    num_pending: int


class Ledger:
    """Keeps an answer's text and its tokens together: both wait until the other is certain. Not thread-safe."""

    def __init__(self) -> None:
        self._entries: deque[_Entry] = deque()
        self._text = ""  # certain, of tokens that are not
        self._num_decoded = 0  # characters
        self._num_released = 0

    def push(self, score: TokenScore, text: str, num_pending: int) -> None:
        """A token, the characters that it completed, and how many bytes at its end are a part of another."""
        self._num_decoded += len(text)
        self._entries.append(_Entry(score, text, self._num_decoded, num_pending))

    def release(self, text: str) -> tuple[str, tuple[TokenScore, ...]]:
        """With so much more text certain, what goes out: text and the tokens that spell just that."""
        self._text += text
        count = size = 0
        for number, entry in enumerate(self._entries, 1):
            if entry.end > self._num_released + len(self._text):
                break
            if not entry.num_pending:
                count, size = number, entry.end - self._num_released
        tokens = tuple(self._entries.popleft().score for _ in range(count))
        text, self._text = self._text[:size], self._text[size:]
        self._num_released += size
        return text, tokens

    def end(self, text: str) -> tuple[str, tuple[TokenScore, ...]]:
        """The rest, when this is the last text. Of a token within which it ends, what is text."""
        text = self._text + text
        total = self._num_released + len(text)
        tokens = []
        for score, own, end, num_pending in self._entries:
            if end > total or (end == total and num_pending):
                kept = total - (end - len(own))
                if kept > 0:
                    surplus = len(own[kept:].encode()) + num_pending
                    tokens.append(score._replace(piece=score.piece[: len(score.piece) - surplus]))
                break
            tokens.append(score)
        return text, tuple(tokens)


def _likeliest(logits: Logits, number: int) -> NDArray[np.int64]:
    """The ids of the highest scores, highest first; equal ones by id."""
    number = min(number, len(logits))
    if not number:
        return np.empty(0, dtype=np.int64)
    ids = np.flatnonzero(logits >= np.partition(logits, -number)[-number])
    return ids[np.argsort(-logits[ids], kind="stable")][:number]
