"""Where a model's engine runs: among the server's threads, or in a process of its own.

A library may die of a file that it opens. In a process of its own that is the end of this load; before a file is opened among
the server's threads, it is probed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from llmserve.config import ModelSpec
from llmserve.engine.chat_template import ChatTemplate
from llmserve.engine.compute import ComputeBudget
from llmserve.engine.engine import Engine, EngineInfo, EngineSettings, Vectors
from llmserve.engine.gguf import GGUFFile
from llmserve.engine.statistics import StatisticsCounter
from llmserve.engine.tokenizer import LibraryTokenizer, Tokenizer
from llmserve.errors import ModelCrashed, ModelFileError
from llmserve.models import probe
from llmserve.models.common import make_chat_template
from llmserve.models.probe import Trial

log = logging.getLogger(__name__)

T = TypeVar("T")

_CHILD = ["-m", "llmserve.models.child"]


class Model(Protocol):
    """A model whose file is here. Picklable."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def path(self) -> Path: ...
    @property
    def header(self) -> GGUFFile | None: ...
    @property
    def info(self) -> EngineInfo: ...
    @property
    def settings(self) -> EngineSettings: ...
    @property
    def trial(self) -> Trial: ...

    def fallback(self, cache_dir: Path) -> tuple[Model, Path] | None:
        """How it may open yet when the library dies of it, and the note by which that is remembered."""
        ...

    def tokenizer(self) -> Tokenizer | None:
        """The one that needs no library, if it has one. Raises ModelFileError."""
        ...

    def vectors(self, tokenizer: Tokenizer, dimensions: int | None) -> Vectors | None:
        """What it makes instead of text, if it does: its library says of how many dimensions."""
        ...

    def open(self, budget: ComputeBudget, statistics: StatisticsCounter, *, reads_text: bool = True) -> Engine:
        """An engine in this process; without what reads text, if it is to be given token ids only. Raises ModelFileError."""
        ...


def prepare(model: Model, budget: ComputeBudget, cache_dir: Path) -> ThreadModel | ProcessModel:
    """The model, ready to be opened as it is configured. Raises ModelFileError."""
    if model.spec.isolation == "process":
        return ProcessModel(model, budget, cache_dir)
    return ThreadModel(_survive(model, cache_dir, partial(_probe, cache_dir)), budget)


@dataclass(frozen=True, slots=True)
class ThreadModel:
    """A model that a process was seen to open."""

    model: Model
    budget: ComputeBudget

    @property
    def memory_bytes(self) -> int:
        return self.model.info.memory_bytes

    def open(self, statistics: StatisticsCounter) -> Engine:
        """Load it in this process. Raises ModelFileError."""
        return self.model.open(self.budget, statistics)


@dataclass(frozen=True, slots=True)
class ProcessModel:
    """A model that is to have a process of its own."""

    model: Model
    budget: ComputeBudget
    cache_dir: Path

    @property
    def memory_bytes(self) -> int:
        return self.model.info.memory_bytes

    def open(self, statistics: StatisticsCounter) -> Engine:
        """Load it in a process of its own. Raises ModelFileError, also when the library dies of it."""
        return _survive(self.model, self.cache_dir, partial(self._open, statistics))

    def _open(self, statistics: StatisticsCounter, model: Model) -> Engine:
        # Imported when needed: a third of a megabyte.
        from llmserve.engine.channel import Open
        from llmserve.engine.process import EngineProcess, ProcessEnded
        from llmserve.engine.process_engine import ProcessEngine

        message = Open((model, self.cache_dir), self.budget.cores, log.getEffectiveLevel())
        with ExitStack() as opened:
            process = opened.enter_context(closing(EngineProcess(model.spec.id, [*_CHILD, model.spec.id], message)))
            own_tokenizer = model.tokenizer()  # while the process loads
            try:
                vocabulary, dimensions = process.opened()
            except ProcessEnded as error:
                kind = ModelCrashed if error.crashed else ModelFileError
                reason = str(error).replace(str(model.path), model.path.name)
                raise kind(f"{model.path.name} cannot be loaded: {reason}.") from None
            if vocabulary is not None:
                tokenizer: Tokenizer = LibraryTokenizer(vocabulary, process.tokenize)
            else:
                assert own_tokenizer is not None
                tokenizer = own_tokenizer
            vectors = model.vectors(tokenizer, dimensions)
            engine = ProcessEngine(
                model.info,
                process,
                tokenizer,
                ChatTemplate(None) if vectors else make_chat_template(model.spec, model.header, tokenizer),
                self.budget,
                model.settings,
                statistics,
                vectors=vectors,
            )
            opened.pop_all()  # the engine closes it from now on
        return engine


def _probe(cache_dir: Path, model: Model) -> Model:
    probe.probe(model.path, model.trial, cache_dir)
    return model


def _survive(model: Model, cache_dir: Path, attempt: Callable[[Model], T]) -> T:
    """Attempt it, and when the library dies of it, as it may be survived yet. Raises ModelFileError."""
    try:
        return attempt(model)
    except ModelCrashed as error:
        if (fallback := model.fallback(cache_dir)) is None:
            raise
        other, note = fallback
        result = attempt(other)
        log.warning("%s It can in another way, which is remembered in %s.", error, note)
        probe.remember(note)
        return result
