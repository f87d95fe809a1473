"""Logarithmic probabilities of tokens, in the model's own distribution: scores in, `TokenScore`s out, in step with the text."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

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


class Ledger:
    """Holds the tokens of an answer back until their text is certain, and cuts what a stop string cuts. Not thread-safe."""

    def __init__(self) -> None:
        self._held: deque[tuple[TokenScore, str, int]] = deque()  # score, text that came with it, where that ends
        self._num_decoded = 0  # characters
        self._num_released = 0

    def push(self, score: TokenScore, text: str, pending: bool) -> None:
        """A token, the characters that it completed, and whether it ends with a part of another one."""
        self._num_decoded += len(text)
        self._held.append((score, text, self._num_decoded + pending))

    def release(self, num_characters: int) -> tuple[TokenScore, ...]:
        """The tokens that so much more text ends."""
        self._num_released += num_characters
        released = []
        while self._held and self._held[0][2] <= self._num_released:
            released.append(self._held.popleft()[0])
        return tuple(released)

    def cut(self) -> tuple[TokenScore, ...]:
        """No more text comes: of the token in which it ended, what is text."""
        if not self._held:
            return ()
        score, text, end = self._held[0]
        self._held.clear()
        kept = self._num_released - (end - len(text))
        if kept <= 0:
            return ()
        return (score._replace(piece=score.piece[: len(score.piece) - len(text[kept:].encode())]),)


def _likeliest(logits: Logits, number: int) -> NDArray[np.int64]:
    """The ids of the highest scores, highest first; equal ones by id."""
    number = min(number, len(logits))
    if not number:
        return np.empty(0, dtype=np.int64)
    ids = np.flatnonzero(logits >= np.partition(logits, -number)[-number])
    return ids[np.argsort(-logits[ids], kind="stable")][:number]
