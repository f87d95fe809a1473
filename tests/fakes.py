"""The one fake of the tests: a `Backend` without a model, and an engine around it. Everything else in a test is real."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llmserve.config import ModelSpec
from llmserve.engine.backend import Piece
from llmserve.engine.batch_engine import BatchEngine
from llmserve.engine.chat_template import ChatTemplate
from llmserve.engine.compute import ComputeBudget
from llmserve.engine.embedding_engine import EmbeddingEngine
from llmserve.engine.engine import Engine, EngineInfo, EngineSettings, Vectors
from llmserve.engine.slot_engine import SlotEngine
from llmserve.engine.statistics import StatisticsCounter
from llmserve.engine.tokenizer import LibraryTokenizer, Vocabulary, text_by_text

EOS, BOS, START, END = 256, 257, 258, 259
CONTROLS = {"<eos>": EOS, "<bos>": BOS, "<start>": START, "<end>": END}
VOCAB_SIZE = 260
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<start>{{ m['role'] }}\n{{ m['content'] }}<end>{% endfor %}{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)

Reply = Callable[[Sequence[int]], int]


def babble(held: Sequence[int]) -> int:
    """A letter that depends on everything the cache holds, so that a wrong cache gives another answer; never EOS."""
    return 97 + zlib.crc32(np.asarray(held, dtype=np.int32).tobytes()) % 26


def ramble(held: Sequence[int]) -> int:
    """A letter that mostly depends on the last few alone, so that the text goes round in circles, and now and then on everything."""
    seen = held if zlib.crc32(np.asarray(held, dtype=np.int32).tobytes()) % 7 == 0 else held[-4:]
    return 97 + zlib.crc32(np.asarray(seen, dtype=np.int32).tobytes()) % 3


def say(text: str) -> Reply:
    """Answer every chat with `text` and EOS."""
    script = [*text.encode(), EOS]

    def reply(held: Sequence[int]) -> int:
        said = len(held) - 1 - max(i for i, token_id in enumerate(held) if token_id == START) - len(b"assistant\n")
        return script[max(0, min(said, len(script) - 1))]

    return reply


class FakeBackend:
    """A cache of byte tokens whose scores come from a function of what it holds.

    It checks what a real library would crash on: positions beyond the cache, holes in it, ids beyond the vocabulary,
    use by two threads at once, use after close.
    """

    vocab_size = VOCAB_SIZE

    def __init__(self, reply: Reply = babble, context_length: int = 256, grid: int = 1) -> None:
        self.context_length = context_length
        self.grid = grid
        self.reply = reply
        self.held: list[int] = []
        self.passes: list[tuple[int, int, int]] = []  # (position, number of tokens, threads)
        self.closed = False
        self.on_forward: Callable[[], None] = lambda: None
        self._busy = False

    def forward(self, token_ids: Sequence[int], position: int, threads: int) -> None:
        assert not self.closed, "used after close"
        assert not self._busy, "used by two threads at once"
        assert 0 <= position <= len(self.held), "a hole in the cache"
        assert token_ids and position + len(token_ids) <= self.context_length, "beyond the cache"
        assert all(0 <= token_id < VOCAB_SIZE for token_id in token_ids), "beyond the vocabulary"
        assert threads >= 1
        self._busy = True
        self.passes.append((position, len(token_ids), threads))
        self.on_forward()
        self.held[position:] = token_ids
        self._busy = False

    def logits(self) -> np.ndarray:
        return scores_of(self.reply(self.held))

    def close(self) -> None:
        self.closed = True


class FakeBatchBackend:
    """Several such caches, evaluated in one pass. It checks what llama.cpp would abort the process on.

    `rounding`: scores depend, as its do, on whether a position was evaluated in a whole piece of the grid: what the cache holds
    of such a position is not the token id but its complement.
    """

    vocab_size = VOCAB_SIZE

    def __init__(
        self,
        reply: Reply = babble,
        context_length: int = 256,
        num_sequences: int = 3,
        batch_size: int = 64,
        *,
        grid: int = 16,
        rounding: bool = False,
    ) -> None:
        self.grid = grid
        self._rounding = rounding
        self.context_length = context_length
        self.num_sequences = num_sequences
        self.batch_size = batch_size
        self.reply = reply
        self.held: list[list[int]] = [[] for _ in range(num_sequences)]
        self.passes: list[list[tuple[int, int, int]]] = []  # of each piece: (sequence, position, number of tokens)
        self.copies: list[tuple[int, int]] = []
        self.closed = False
        self.on_forward: Callable[[], None] = lambda: None
        self._asked_for: dict[tuple[int, int], np.ndarray] = {}

    def forward(self, pieces: Sequence[Piece], threads: int) -> None:
        assert not self.closed, "used after close"
        assert threads >= 1
        assert len({piece.sequence for piece in pieces}) == len(pieces), "a sequence twice in a pass"
        assert sum(len(piece.token_ids) for piece in pieces) <= self.batch_size, "more than a batch"
        assert len({len(piece.token_ids) for piece in pieces}) == 1, "pieces of several lengths in a pass"
        self.passes.append([(piece.sequence, piece.position, len(piece.token_ids)) for piece in pieces])
        self.on_forward()
        self._asked_for.clear()
        for index, piece in enumerate(pieces):
            held = self.held[piece.sequence]
            assert piece.token_ids and piece.position == len(held), "a hole in the cache, or two tokens at one position"
            assert piece.position + len(piece.token_ids) <= self.context_length, "beyond the cache"
            whole = piece.position % self.grid == 0 and len(piece.token_ids) % self.grid == 0
            assert whole or len(piece.token_ids) < self.grid, "a piece that is neither whole nor a rest"
            for token, token_id in enumerate(piece.token_ids):
                held.append(~token_id if self._rounding and whole else token_id)
                last = token == len(piece.token_ids) - 1
                if piece.wants_all or (piece.wants_logits and last):
                    self._asked_for[index, token] = scores_of(self.reply(held))

    def logits(self, index: int, token: int = -1) -> np.ndarray:
        num_tokens = self.passes[-1][index][2]
        return self._asked_for[index, token % num_tokens]

    def truncate(self, sequence: int, num_tokens: int) -> None:
        del self.held[sequence][num_tokens:]

    def copy(self, source: int, target: int) -> None:
        assert source != target
        self.copies.append((source, target))
        self.held[target] = self.held[source][:]

    def close(self) -> None:
        self.closed = True


class FakeEmbedder:
    """A text's vector is its length, its first token id, and 0."""

    dimensions = 3
    threads_linger = False

    def __init__(self, context_length: int = 16) -> None:
        self.context_length = context_length
        self.texts: list[bytes] = []
        self.threads: list[int] = []
        self.closed = False
        self.on_forward: Callable[[], None] = lambda: None

    def embed(self, token_ids: Sequence[int], threads: int) -> np.ndarray:
        assert not self.closed, "used after close"
        assert 0 < len(token_ids) <= self.context_length, "beyond the context"
        assert threads >= 1
        self.threads.append(threads)
        self.texts.append(bytes(token_ids))
        self.on_forward()
        return np.array([len(token_ids), token_ids[0], 0], dtype=np.float32)

    def close(self) -> None:
        self.closed = True


Backends = Sequence[FakeBackend] | FakeBatchBackend | FakeEmbedder


def scores_of(token_id: int) -> np.ndarray:
    """Scores of which `token_id` is the best, and draws at temperature 1 and more differ."""
    scores = np.zeros(VOCAB_SIZE, dtype=np.float32)
    scores[token_id] = 10
    scores[97:123] += 1
    return scores


def byte_tokenizer() -> LibraryTokenizer:
    """Every byte is a token, behind them the control tokens."""
    vocabulary = Vocabulary(
        pieces=[bytes([value]) for value in range(256)] + [b""] * len(CONTROLS),
        control_texts=CONTROLS,
        user_texts={},
        eos_token_ids=frozenset({EOS}),
        bos_token_id=BOS,
    )
    return LibraryTokenizer(vocabulary, text_by_text(list, list))


def info_of(backends: Backends) -> EngineInfo:
    match backends:
        case FakeBatchBackend():
            context_length, num_slots = backends.context_length, backends.num_sequences
        case FakeEmbedder():
            context_length, num_slots = backends.context_length, 1
        case _:
            context_length, num_slots = backends[0].context_length, len(backends)
    return EngineInfo("fake", "fake", "it is a test", context_length, num_slots, 1000, 100 * num_slots)


def vectors_of(backends: Backends) -> Vectors | None:
    if isinstance(backends, FakeEmbedder):
        return Vectors(backends.dimensions, lambda texts: [list(text.encode()) for text in texts])
    return None


def make_engine(
    backends: Backends,
    *,
    budget: ComputeBudget | None = None,
    statistics: StatisticsCounter | None = None,
    info: EngineInfo | None = None,
    template: str | None = TEMPLATE,
    **settings: object,
) -> Engine:
    info, budget = info or info_of(backends), budget or ComputeBudget(2)
    if (vectors := vectors_of(backends)) is not None:
        return EmbeddingEngine(info, backends, byte_tokenizer(), vectors, budget, EngineSettings(**settings), statistics)
    return (BatchEngine if isinstance(backends, FakeBatchBackend) else SlotEngine)(
        info,
        backends,
        tokenizer=byte_tokenizer(),
        chat_template=ChatTemplate(template, control_texts=CONTROLS, special={"bos_token": "<bos>", "eos_token": "<eos>"}),
        budget=budget,
        settings=EngineSettings(**settings),
        statistics=statistics,
    )


class FakeLoader:
    """A `ModelLoader` whose engines run on fake backends, one slot each; loads can be held up and made to fail."""

    def __init__(
        self, reply: Reply = babble, memory_bytes: int = 1100, context_length: int = 256, **engine_options: object
    ) -> None:
        self._context_length = context_length
        self.memory_bytes = memory_bytes
        self.prepared: list[str] = []
        self.failures: dict[str, Exception] = {}
        self.backends: list[FakeBackend] = []
        self._reply = reply
        self._engine_options = engine_options
        self._held: dict[str, threading.Event] = {}

    def hold(self, model_id: str) -> None:
        self._held[model_id] = threading.Event()

    def let_go(self, model_id: str) -> None:
        self._held[model_id].set()

    def prepare(self, spec: ModelSpec) -> FakePrepared:
        self.prepared.append(spec.id)
        if spec.id in self._held:
            assert self._held[spec.id].wait(10)
        if spec.id in self.failures:
            raise self.failures[spec.id]
        return FakePrepared(self, f"{spec.id}-{self.prepared.count(spec.id)}", self.memory_bytes)

    def open(self, identity: str, statistics: StatisticsCounter) -> Engine:
        backend = FakeBackend(self._reply, self._context_length)
        self.backends.append(backend)
        info = EngineInfo(identity, "fake", "it is a test", backend.context_length, 1, self.memory_bytes, 0)
        return make_engine([backend], statistics=statistics, info=info, **self._engine_options)


@dataclass(frozen=True)
class FakePrepared:
    loader: FakeLoader
    identity: str
    memory_bytes: int

    def open(self, statistics: StatisticsCounter) -> Engine:
        return self.loader.open(self.identity, statistics)
