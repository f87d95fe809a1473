"""Run generations on a model's slots: admit, queue, prefill, decode, publish.

Prompt token ids and parameters come in, events go out. Knows nothing of HTTP, JSON or model ids. Each slot has a
thread that alone touches its backend; callers only ever touch the queue and their `Generation`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Ids
from copy import copy
from dataclasses import dataclass

from llmserve.engine import slots
from llmserve.engine.backend import Backend, Logits
from llmserve.engine.chat_template import ChatTemplate
from llmserve.engine.compute import ComputeBudget, StallGuard, count_free_cores
from llmserve.engine.generation import ChoiceEnd, Delta, Failed, Generation, GenerationEnd, GenerationParams
from llmserve.engine.sequence import Sequence
from llmserve.engine.slots import Slot
from llmserve.engine.statistics import StatisticsCounter
from llmserve.engine.tokenizer import Tokenizer
from llmserve.errors import APIError, EngineFailed, QueueFull, ShuttingDown

log = logging.getLogger(__name__)

_SECONDS_PER_REQUEST_AT_FIRST = 5.0
_LONGEST_RETRY_AFTER = 60.0  # openai-python does not retry at all when told to wait for more than two minutes


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What is said of an engine to the outside. Memory in bytes; weights count once however many slots share them.

    `identity` changes with everything that shapes answers: file, template, settings. `reason` says why this library runs it.
    """

    identity: str
    name: str
    reason: str
    context_length: int
    num_slots: int
    weights_bytes: int
    kv_cache_bytes: int

    @property
    def memory_bytes(self) -> int:
        return self.weights_bytes + self.kv_cache_bytes


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine has to do at one moment."""

    running: int
    waiting: int


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """`prefill_chunk` is rounded up to the backend's grid."""

    max_waiting: int = 32
    prefill_chunk: int = 32
    prefix_cache: bool = True


@dataclass(slots=True)
class _Job:
    """A generation on its way through the engine. Times are of the engine's clock."""

    prompt_ids: list[int]
    params: GenerationParams
    generation: Generation
    submitted: float
    started: float = 0.0
    num_cached_tokens: int = 0
    prefill_time: float = 0.0
    num_output_tokens: int = 0
    abort: APIError | None = None  # set by close(); read by the slot's thread between two passes


class Engine:
    """One loaded model with its tokenizer, chat template and slots. Thread-safe."""

    def __init__(
        self,
        info: EngineInfo,
        backends: Ids[Backend],
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        budget: ComputeBudget,
        settings: EngineSettings = EngineSettings(),
        statistics: StatisticsCounter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.context_length = info.context_length
        self._budget = budget
        self._stall_guard = StallGuard(budget.cores)
        self._settings = settings
        self._statistics = statistics or StatisticsCounter()
        self._clock = clock
        self._condition = threading.Condition()
        self._waiting: deque[_Job] = deque()  # guarded by _condition
        self._running: dict[Slot, _Job] = {}  # guarded by _condition
        self._idle = [Slot(backend, settings.prefix_cache) for backend in backends]  # guarded by _condition
        self._closed_with: APIError | None = None  # guarded by _condition
        self._seconds_per_request = _SECONDS_PER_REQUEST_AT_FIRST  # guarded by _condition; a moving average
        self._num_slots = len(self._idle)
        self._threads = [
            threading.Thread(target=self._serve, args=(slot,), name=f"llmserve-slot-{number}", daemon=True)
            for number, slot in enumerate(self._idle)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, prompt_ids: Ids[int], params: GenerationParams) -> Generation:
        """Queue a generation. Raises QueueFull, with the seconds after which there should be room, and ShuttingDown.

        The prompt has at least one token, and prompt and `max_tokens` fit `context_length`: the caller has checked.
        """
        if not prompt_ids or len(prompt_ids) + params.max_tokens > self.context_length:
            raise ValueError(f"{len(prompt_ids)} + {params.max_tokens} tokens do not fit {self.context_length}")
        job = _Job(list(prompt_ids), params, Generation(), submitted=self._clock())
        with self._condition:
            if self._closed_with is not None:
                raise copy(self._closed_with)
            self._drop_cancelled()
            if not self._idle and len(self._waiting) >= self._settings.max_waiting:
                raise self._queue_full()
            self._waiting.append(job)
            self._dispatch()
        self._statistics.add(requests=1)
        self._statistics.touch()
        return job.generation

    @property
    def load(self) -> EngineLoad:
        with self._condition:
            self._drop_cancelled()
            return EngineLoad(running=len(self._running), waiting=len(self._waiting))

    def drain(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds until nothing runs or waits; whether that came true. Refuses nothing by itself."""
        with self._condition:
            return self._condition.wait_for(self._is_empty, timeout)

    def close(self, error: APIError | None = None) -> None:
        """Refuse new work, end what runs or waits with `error`, then free the slots. Returns when the memory is free."""
        error = error or ShuttingDown("The server is shutting down.")
        with self._condition:
            self._closed_with = self._closed_with or error
            for job in (*self._waiting, *self._running.values()):
                job.abort = error
                job.generation.publish(Failed(error))
            self._waiting.clear()
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()

    def _is_empty(self) -> bool:
        self._drop_cancelled()
        return not self._waiting and not self._running

    def _drop_cancelled(self) -> None:
        """Forget waiting jobs that nobody reads any more. Caller holds the lock."""
        gone = [job for job in self._waiting if job.generation.closed]
        for job in gone:
            self._waiting.remove(job)
        if gone:
            self._statistics.add(cancelled=len(gone))

    def _queue_full(self) -> QueueFull:
        """Caller holds the lock."""
        seconds = self._seconds_per_request * (len(self._waiting) + 1) / self._num_slots
        return QueueFull(
            f"{len(self._running)} requests are running and {len(self._waiting)} waiting; there is no room for one more. "
            f"Please try again in {math.ceil(seconds)} s.",
            retry_after=min(max(1.0, math.ceil(seconds)), _LONGEST_RETRY_AFTER),
        )

    def _dispatch(self) -> None:
        """Give idle slots to those who wait longest. Caller holds the lock."""
        self._drop_cancelled()
        while self._waiting and self._idle:
            job = self._waiting.popleft()
            slot = slots.choose(self._idle, job.prompt_ids)
            self._idle.remove(slot)
            self._running[slot] = job
            self._condition.notify_all()

    def _serve(self, slot: Slot) -> None:
        """The life of a slot's thread: one job after the other, then the end of its backend."""
        while (job := self._next_job(slot)) is not None:
            self._run(slot, job)
            self._finish(slot, job)
        slot.backend.close()

    def _next_job(self, slot: Slot) -> _Job | None:
        with self._condition:
            self._condition.wait_for(lambda: slot in self._running or self._closed_with is not None)
            return self._running.get(slot)

    def _finish(self, slot: Slot, job: _Job) -> None:
        with self._condition:
            del self._running[slot]
            slot.last_used = self._clock()
            self._idle.append(slot)
            self._seconds_per_request += 0.2 * (slot.last_used - job.started - self._seconds_per_request)
            self._dispatch()
            self._condition.notify_all()

    def _run(self, slot: Slot, job: _Job) -> None:
        """Make every choice of a generation, one after the other: the prompt is prefilled once and forked by truncation."""
        job.started = self._clock()
        try:
            with self._budget.share():
                for index in range(job.params.n):
                    self._make_choice(slot, job, index)
            job.generation.publish(self._end(job))
            self._statistics.add(
                prompt_tokens=len(job.prompt_ids), cached_tokens=job.num_cached_tokens, output_tokens=job.num_output_tokens
            )
        except _Cancelled:
            self._statistics.add(cancelled=1, output_tokens=job.num_output_tokens)
        except Exception as error:
            log.exception("the engine failed during a generation")
            self._statistics.add(errors=1)
            job.generation.publish(Failed(EngineFailed(f"The model failed while it answered: {error}.")))

    def _end(self, job: _Job) -> GenerationEnd:
        return GenerationEnd(
            num_prompt_tokens=len(job.prompt_ids),
            num_cached_tokens=job.num_cached_tokens,
            queue_time=job.started - job.submitted,
            prefill_time=job.prefill_time,
            decode_time=self._clock() - job.started - job.prefill_time,
        )

    def _make_choice(self, slot: Slot, job: _Job, index: int) -> None:
        sequence = Sequence(index, job.prompt_ids, job.params, self.tokenizer)
        begun = self._clock()
        logits = self._prefill(slot, job, index)
        job.prefill_time += self._clock() - begun
        while True:
            token_id = sequence.sample(logits)
            if text := sequence.append(token_id):
                job.generation.publish(Delta(index, text))
            if sequence.finish_reason is not None:
                break
            logits = self._forward(slot, job, [token_id])
        job.num_output_tokens += sequence.num_output_tokens
        job.generation.publish(ChoiceEnd(index, sequence.finish_reason, sequence.num_output_tokens))

    def _prefill(self, slot: Slot, job: _Job, index: int) -> Logits:
        """Evaluate what the slot does not hold of the prompt, in chunks that end on the backend's grid."""
        num_cached = slot.num_reusable(job.prompt_ids)
        slot.truncate(num_cached)
        if index == 0:
            job.num_cached_tokens = num_cached
        position, grid = num_cached, slot.backend.grid
        while True:
            end = min((position + max(self._settings.prefill_chunk, grid)) // grid * grid, len(job.prompt_ids))
            logits = self._forward(slot, job, job.prompt_ids[position:end])
            position = end
            if position == len(job.prompt_ids):
                return logits

    def _forward(self, slot: Slot, job: _Job, token_ids: list[int]) -> Logits:
        """One forward pass within the compute budget, unless nobody wants its result any more."""
        threads = self._budget.acquire(at_most=self._stall_guard.limit)
        try:
            if job.generation.closed or job.abort is not None:
                raise _Cancelled
            begun = self._clock()
            logits = slot.forward(token_ids, threads)
            if len(token_ids) == 1 and not self._budget.contended:  # else the other passes' threads would be counted
                cores = self._budget.cores
                self._stall_guard.observe(threads, self._clock() - begun, count_free_cores(cores))
            return logits
        finally:
            self._budget.release(threads)


class _Cancelled(Exception):
    """The client left, or the engine is being closed."""
