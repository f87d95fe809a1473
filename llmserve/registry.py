"""The models there are, and which of them is loaded: model id in, engine out.

One lock guards the table. It is held for bookkeeping only, never across a load, a drain or a forward pass, so a slow
load delays nobody but those who want that model.

    unloaded → loading → ready → draining → unloaded
                   ↘ failed (with the reason; the next try is made after a cool-down, or when asked for)
    ready → loading, when its engine died by itself; → failed, when it did so several times in a row without an answer between

Knows nothing of HTTP, tokens or files.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

from llmserve.config import ModelSpec
from llmserve.engine import memory
from llmserve.engine.statistics import Statistics, StatisticsCounter
from llmserve.errors import APIError, MemoryBudgetExceeded, ModelFileError, ModelLoadFailed, ModelNotFound, ShuttingDown

if TYPE_CHECKING:  # these import numpy, which would delay the first answer of /health
    from llmserve.engine.engine import Engine, EngineInfo

log = logging.getLogger(__name__)

COOL_DOWN = 10.0  # seconds before a request makes a failed model try again
MAX_CRASHES = 5  # in a row, without an answer between, after which a model is failed
_BACK_OFF = 0.5  # seconds before a second load in a row; it doubles with each one more
_POLL = 0.25  # seconds between two looks at whether a waiting caller has given up


class ModelState(StrEnum):
    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class PreparedModel(Protocol):
    """A model whose file is here and known to open."""

    @property
    def memory_bytes(self) -> int:
        """What the loaded model will take: weights and KV caches."""
        ...

    def open(self, statistics: StatisticsCounter) -> Engine:
        """Load it. Raises ModelFileError."""
        ...


class ModelLoader(Protocol):
    """Where engines come from. Thread-safe; everything in it may be slow."""

    def prepare(self, spec: ModelSpec) -> PreparedModel:
        """Fetch, check and adapt the model's file. Raises ModelFileError."""
        ...


class ModelStatus(NamedTuple):
    """A snapshot of one model. `created` is in Unix time."""

    state: ModelState
    reason: str | None
    info: EngineInfo | None
    running: int
    waiting: int
    statistics: Statistics
    created: int


class Resident(NamedTuple):
    """A loaded model as the choice of evictions sees it."""

    id: str
    memory_bytes: int
    last_used: float
    busy: bool


@dataclass(slots=True)
class _Entry:
    """One configured model. Everything but `spec`, `statistics` and `created` is guarded by the registry's lock."""

    spec: ModelSpec
    created: int
    statistics: StatisticsCounter = field(default_factory=StatisticsCounter)
    state: ModelState = ModelState.UNLOADED
    engine: Engine | None = None
    users: Counter[Engine] = field(default_factory=Counter)  # callers between lookup and submit
    memory_bytes: int = 0  # what was made room for: also while loading, and for both engines during a reload
    failure: APIError | None = None
    failed_at: float = 0.0
    reloading: bool = False
    num_crashes: int = 0  # in a row: none of the engines that died had answered anything
    tokens_before: int = 0  # of the model's answers, before the engine was opened


class ModelRegistry:
    """Thread-safe."""

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        make_loader: Callable[[], ModelLoader],
        memory_budget: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`make_loader` is called once, by the first thread that loads. `memory_budget` is in bytes; 0 is no limit."""
        self.specs = tuple(specs)
        self._make_loader = make_loader
        self._loader: ModelLoader | None = None  # guarded by _loader_lock
        self._loader_lock = threading.Lock()
        self._memory_budget = memory_budget
        self._clock = clock
        self._condition = threading.Condition()
        now = int(time.time())
        self._entries = {spec.id: _Entry(spec, now) for spec in specs}  # the dict itself never changes
        self._ids = {name: spec.id for spec in specs for name in spec.names}
        self._starting: set[str] = set()  # guarded by _condition
        self._closing: APIError | None = None  # guarded by _condition

    def start(self) -> None:
        """Begin to load the models that are wanted at start-up; returns at once."""
        for entry in self._entries.values():
            if entry.spec.load == "startup":
                with self._condition:
                    self._starting.add(entry.spec.id)
                    self._begin_load(entry)

    @property
    def starting(self) -> bool:
        """Whether a startup model is still in its first load."""
        with self._condition:
            return bool(self._starting)

    def resolve(self, name: str) -> ModelSpec:
        """The model of an id or alias. Raises ModelNotFound."""
        if name not in self._ids:
            raise ModelNotFound(name)
        return self._entries[self._ids[name]].spec

    def identity(self, model_id: str) -> str | None:
        """What shapes the loaded model's answers: its file and settings, as one string. None while it is not loaded."""
        engine = self._entries[model_id].engine
        return engine.info.identity if engine is not None else None

    @contextmanager
    def use(self, model_id: str, watch: Callable[[], None]) -> Iterator[Engine]:
        """The model's engine, loaded if need be, which stays open within the block.

        Hold it from lookup to submit: after that the engine itself knows that it is in use. While the caller waits for a
        load, `watch` is called every quarter of a second; it may raise to give up. Raises ModelLoadFailed,
        MemoryBudgetExceeded and ShuttingDown.
        """
        entry = self._entries[model_id]
        while (engine := self._enter(entry)) is None:
            watch()
        try:
            yield engine
        finally:
            with self._condition:
                entry.users -= Counter((engine,))  # forgets an engine without users
                self._condition.notify_all()

    def load(self, model_id: str) -> None:
        """Load the model, also one that failed a moment ago, and wait until it is ready. Raises as `use` does."""
        entry = self._entries[model_id]
        with self._condition:
            if entry.state is ModelState.FAILED:
                entry.state, entry.num_crashes = ModelState.UNLOADED, 0
        with self.use(model_id, watch=lambda: None):
            pass

    def unload(self, model_id: str) -> None:
        """Let what is in flight finish, then free the model's memory. The next request loads it again."""
        entry = self._entries[model_id]
        with self._condition:
            self._wait_for_quiet(entry)
            entry.failure = None
            if entry.engine is None:
                entry.state = ModelState.UNLOADED
                return
            entry.state = ModelState.DRAINING
            engine = entry.engine
        self._retire(entry, engine)
        self._set_unloaded(entry)

    def reload(self, model_id: str) -> None:
        """Load the model's file anew and swap: requests in flight finish on the old engine, new ones go to the new one.

        When the new one cannot be loaded, the old one stays. Where memory does not allow both, the old one is unloaded first.
        """
        entry = self._entries[model_id]
        with self._condition:
            self._wait_for_quiet(entry)
            if entry.engine is None:
                old = None
            else:
                old, entry.reloading = entry.engine, True
        if old is None:
            self.load(model_id)
            return
        try:
            new = self._open_beside(entry)
        finally:
            with self._condition:
                entry.reloading = False
                if entry.engine is None:  # the old one has died meanwhile
                    entry.state, entry.memory_bytes = ModelState.UNLOADED, 0
                self._condition.notify_all()
        if new is None:
            self.unload(model_id)
            self.load(model_id)
        else:
            self._retire(entry, old)
            self._give_back(entry, old.info.memory_bytes)

    def status(self, model_id: str) -> ModelStatus:
        entry = self._entries[model_id]
        with self._condition:
            engine, state, failure = entry.engine, entry.state, entry.failure
        load = engine.load if engine is not None else None
        return ModelStatus(
            state=state,
            reason=failure.message if failure is not None else None,
            info=engine.info if engine is not None else None,
            running=load.running if load else 0,
            waiting=load.waiting if load else 0,
            statistics=entry.statistics.snapshot(),
            created=entry.created,
        )

    def close(self, grace: float) -> None:
        """Refuse new work, wait up to `grace` seconds for what is in flight, cut the rest, free everything."""
        error = ShuttingDown("The server is shutting down.", retry_after=1.0)
        deadline = time.monotonic() + grace
        with self._condition:
            self._closing = error
            self._condition.notify_all()
            engines = [entry.engine for entry in self._entries.values() if entry.engine is not None]
        for engine in engines:
            engine.drain(max(0.0, deadline - time.monotonic()))
            engine.close(error)

    def _enter(self, entry: _Entry) -> Engine | None:
        """Count one more user of the model's engine; None when there is none yet, after a short wait for it."""
        with self._condition:
            if self._closing is not None:
                raise copy(self._closing)
            if entry.state is ModelState.READY:
                assert entry.engine is not None
                entry.users[entry.engine] += 1
                return entry.engine
            if entry.state is ModelState.FAILED and entry.failure is not None:
                remaining = entry.failed_at + COOL_DOWN - self._clock()
                if remaining > 0:
                    failure = copy(entry.failure)
                    failure.retry_after = max(1.0, round(remaining))
                    raise failure
            if entry.state in (ModelState.UNLOADED, ModelState.FAILED):
                self._begin_load(entry)
            self._condition.wait(_POLL)
        return None

    def _begin_load(self, entry: _Entry, delay: float = 0.0) -> None:
        """Caller holds the lock, and the model is not loaded: so two requests for it cause one load."""
        entry.state = ModelState.LOADING
        threading.Thread(target=self._load, args=(entry, delay), name=f"llmserve-load-{entry.spec.id}", daemon=True).start()

    def _load(self, entry: _Entry, delay: float) -> None:
        """A loading thread's work: the model ends up ready or failed."""
        with self._condition:
            if self._condition.wait_for(lambda: self._closing is not None, delay):
                return
        try:
            engine = self._open(entry)
        except Exception as error:
            self._set_failed(entry, _load_failure(entry.spec, error))
            return
        with self._condition:
            wanted = self._closing is None
            if wanted:
                self._put(entry, engine)
            self._starting.discard(entry.spec.id)
            self._condition.notify_all()
        if wanted:
            engine.on_death(partial(self._lose, entry, engine))
        else:
            engine.close()
        memory.trim()

    def _put(self, entry: _Entry, engine: Engine) -> None:
        """Give it to whoever asks for the model from now on. Caller holds the lock."""
        entry.engine, entry.state, entry.failure = engine, ModelState.READY, None
        entry.tokens_before = entry.statistics.snapshot().tokens

    def _lose(self, entry: _Entry, engine: Engine, error: APIError) -> None:
        """The engine died by itself, in a process of its own: load the model again, or give it up."""
        entry.statistics.add(crashes=1)
        with self._condition:
            if self._closing is not None or entry.engine is not engine or entry.state is not ModelState.READY:
                return  # it is being closed, and whoever does that goes on
            entry.num_crashes += 1
            if entry.statistics.snapshot().tokens > entry.tokens_before:
                entry.num_crashes = 1
            entry.engine, entry.failure = None, error
            if entry.reloading:
                entry.state = ModelState.LOADING
                return
            entry.memory_bytes -= engine.info.memory_bytes
            if entry.num_crashes < MAX_CRASHES:
                self._begin_load(entry, delay=_BACK_OFF * 2 ** (entry.num_crashes - 2) if entry.num_crashes > 1 else 0.0)
            else:
                message = f"The model `{entry.spec.id}` has crashed {entry.num_crashes} times in a row. {error.message}"
                self._fail(entry, ModelLoadFailed(message))

    def _open(self, entry: _Entry) -> Engine:
        """Prepare the model, make room for it, open it."""
        begun = time.monotonic()
        prepared = self._get_loader().prepare(entry.spec)
        if not self._make_room(entry, prepared.memory_bytes):
            raise MemoryBudgetExceeded(
                f"The model `{entry.spec.id}` needs {prepared.memory_bytes} bytes; the memory budget of {self._memory_budget} bytes "
                "has no room for it beside the models in use."
            )
        try:
            engine = prepared.open(entry.statistics)
        except BaseException:
            self._give_back(entry, prepared.memory_bytes)
            raise
        seconds = time.monotonic() - begun
        entry.statistics.note_load(seconds)
        log.info("loaded %s in %.2f s: %s, %s", entry.spec.id, seconds, engine.info.name, engine.info.reason)
        return engine

    def _open_beside(self, entry: _Entry) -> Engine | None:
        """A second engine of a loaded model, already swapped in; None when memory does not allow both."""
        try:
            new = self._open(entry)
        except MemoryBudgetExceeded:
            return None
        except Exception as error:
            raise _load_failure(entry.spec, error) from error
        with self._condition:
            self._put(entry, new)
        new.on_death(partial(self._lose, entry, new))
        return new

    def _get_loader(self) -> ModelLoader:
        with self._loader_lock:
            if self._loader is None:
                self._loader = self._make_loader()
            return self._loader

    def _make_room(self, entry: _Entry, wanted: int) -> bool:
        """Reserve memory for a model, evicting idle ones if need be; whether there is room."""
        with self._condition:
            if not self._memory_budget:
                entry.memory_bytes += wanted
                return True
            residents = [self._resident(other) for other in self._entries.values() if other.memory_bytes]
            victims = choose_evictions(wanted, residents, self._memory_budget)
            if victims is None:
                return False
            evicted = [self._entries[victim] for victim in victims]
            for victim in evicted:
                victim.state = ModelState.DRAINING
            entry.memory_bytes += wanted
        for victim in evicted:
            log.info("evicting %s to make room for %s", victim.spec.id, entry.spec.id)
            if victim.engine is not None:
                self._retire(victim, victim.engine)
            self._set_unloaded(victim)
        return True

    def _give_back(self, entry: _Entry, num_bytes: int) -> None:
        with self._condition:
            entry.memory_bytes -= num_bytes

    def _resident(self, entry: _Entry) -> Resident:
        """Caller holds the lock: no user can appear between this look and what is decided on it."""
        engine = entry.engine
        load = engine.load if engine is not None else None
        idle = load is not None and not load.running and not load.waiting and not any(entry.users.values())
        evictable = idle and entry.state is ModelState.READY and not entry.reloading
        return Resident(entry.spec.id, entry.memory_bytes, entry.statistics.snapshot().last_used or 0.0, busy=not evictable)

    def _retire(self, entry: _Entry, engine: Engine) -> None:
        """Close an engine that no new caller can get any more, after those who have it and what they submitted."""
        with self._condition:
            self._condition.wait_for(lambda: not entry.users[engine] or self._closing is not None)
            del entry.users[engine]
        while not engine.drain(_POLL) and self._closing is None:
            pass
        engine.close()
        memory.trim()

    def _wait_for_quiet(self, entry: _Entry) -> None:
        """Wait until nobody loads, unloads or swaps the model. Caller holds the lock. Raises ShuttingDown."""
        busy = (ModelState.LOADING, ModelState.DRAINING)
        self._condition.wait_for(lambda: self._closing is not None or not (entry.state in busy or entry.reloading))
        if self._closing is not None:
            raise copy(self._closing)

    def _set_unloaded(self, entry: _Entry) -> None:
        with self._condition:
            entry.engine, entry.state, entry.memory_bytes = None, ModelState.UNLOADED, 0
            self._condition.notify_all()

    def _set_failed(self, entry: _Entry, failure: APIError) -> None:
        with self._condition:
            self._fail(entry, failure)

    def _fail(self, entry: _Entry, failure: APIError) -> None:
        """Caller holds the lock."""
        log.error("%s", failure.message)
        entry.state, entry.failure, entry.failed_at = ModelState.FAILED, failure, self._clock()
        entry.statistics.add(errors=1)
        self._starting.discard(entry.spec.id)
        self._condition.notify_all()


def choose_evictions(wanted: int, residents: Sequence[Resident], budget: int) -> list[str] | None:
    """Which models to unload so that `wanted` bytes more fit `budget`: the least recently used, never a busy one.

    Empty when there is room already; None when there is not enough to evict.
    """
    excess = sum(resident.memory_bytes for resident in residents) + wanted - budget
    victims: list[str] = []
    for resident in sorted(residents, key=lambda resident: resident.last_used):
        if excess <= 0:
            break
        if not resident.busy:
            victims.append(resident.id)
            excess -= resident.memory_bytes
    return victims if excess <= 0 else None


def _load_failure(spec: ModelSpec, error: Exception) -> APIError:
    if isinstance(error, APIError):
        return error
    if isinstance(error, ModelFileError):
        return ModelLoadFailed(f"The model `{spec.id}` could not be loaded: {error}")
    log.error("unexpected error while %s was loaded", spec.id, exc_info=error)
    return ModelLoadFailed(f"The model `{spec.id}` could not be loaded: {type(error).__name__}: {error}")
