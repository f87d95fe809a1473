"""What all engines are to their callers: admit a generation, queue it, end it. Their subclasses run it.

Prompt token ids and parameters come in, events go out. Knows nothing of HTTP, JSON or model ids. Threads of the engine alone
touch the model; callers only ever touch the queue and their `Generation`.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Ids
from copy import copy
from dataclasses import dataclass, field
from itertools import chain

from llmserve.engine.chat_template import ChatTemplate
from llmserve.engine.compute import ComputeBudget, Passes
from llmserve.engine.constraint import Constraint, Constraints
from llmserve.engine.generation import Delta, Failed, Generation, GenerationEnd, GenerationParams
from llmserve.engine.logprobs import PromptScorer, TokenScorer
from llmserve.engine.sequence import Sequence
from llmserve.engine.statistics import StatisticsCounter
from llmserve.engine.tokenizer import Tokenizer
from llmserve.errors import APIError, EngineFailed, QueueFull, ShuttingDown

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
    prompt_lookup: bool = True


@dataclass(frozen=True, slots=True)
class Vectors:
    """Of a model that makes vectors: how long they are, and what makes texts the token ids whose vectors they get."""

    dimensions: int
    encode: Callable[[Ids[str]], list[list[int]]]


@dataclass(slots=True, eq=False)
class Job:
    """A generation on its way through an engine. Times are of the engine's clock.

    With `texts`, whose ids together are the prompt's, it is one of vectors.
    """

    prompt_ids: list[int]
    params: GenerationParams
    generation: Generation
    submitted: float
    constraint: Constraint | None = None  # to be copied for each choice
    started: float = 0.0
    num_cached_tokens: int = 0
    prefill_time: float = 0.0
    num_output_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0  # of the drafted ones, because they were right
    abort: APIError | None = None  # set by close(); read by the engine's threads between two passes
    texts: list[list[int]] = field(default_factory=list)

    @property
    def unwanted(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.generation.closed or self.abort is not None

    def end(self, now: float) -> GenerationEnd:
        return GenerationEnd(
            num_prompt_tokens=len(self.prompt_ids),
            num_cached_tokens=self.num_cached_tokens,
            queue_time=self.started - self.submitted,
            prefill_time=self.prefill_time,
            decode_time=now - self.started - self.prefill_time,
            num_drafted_tokens=self.num_drafted,
            num_accepted_tokens=self.num_accepted,
        )


class Engine(ABC):
    """One loaded model with its tokenizer, chat template and slots. Thread-safe. `vectors`: what it makes instead of text."""

    threads_linger = False  # as of Passes

    def __init__(
        self,
        info: EngineInfo,
        num_slots: int,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        budget: ComputeBudget,
        settings: EngineSettings,
        statistics: StatisticsCounter | None,
        clock: Callable[[], float],
        vectors: Vectors | None = None,
    ) -> None:
        self.info = info
        self.vectors = vectors
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.context_length = info.context_length
        self._budget = budget
        self._passes = Passes(budget, clock, threads_linger=self.threads_linger)
        self._settings = settings
        self._statistics = statistics or StatisticsCounter()
        self._clock = clock
        self._condition = threading.Condition()
        self._waiting: deque[Job] = deque()  # guarded by _condition
        self._running: set[Job] = set()  # guarded by _condition
        self._closed_with: APIError | None = None  # guarded by _condition
        self._seconds_per_request = _SECONDS_PER_REQUEST_AT_FIRST  # guarded by _condition; a moving average
        self._num_slots = num_slots
        self._callback: Callable[[APIError], None] | None = None  # guarded by _condition; of on_death
        self._constraints = Constraints(tokenizer)
        self._threads: list[threading.Thread] = []

    @abstractmethod
    def _dispatch(self) -> None:
        """Begin with those who wait longest, as far as there is room. Caller holds the lock."""

    def _start_thread(self, name: str, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def on_death(self, callback: Callable[[APIError], None]) -> None:
        """Have the callback called, once, when the engine has ended although nobody closed it. It is closed all the same.

        Only one in a process of its own does: others take the server with them.
        """
        with self._condition:
            self._callback = callback

    def submit(self, prompt_ids: Ids[int], params: GenerationParams, generation: Generation | None = None) -> Generation:
        """Queue a generation, in the log that is given. Raises InvalidGrammar, ShuttingDown, and QueueFull with the
        seconds after which there should be room.

        The prompt has at least one token, and prompt and `max_tokens` fit `context_length`: the caller has checked.
        """
        if self.vectors is not None:
            raise ValueError("this model makes vectors only")
        if not prompt_ids or len(prompt_ids) + params.max_tokens > self.context_length:
            raise ValueError(f"{len(prompt_ids)} + {params.max_tokens} tokens do not fit {self.context_length}")
        constraint = None if params.grammar is None else self._constraints.get(params.grammar)
        job = Job(list(prompt_ids), params, generation or Generation(), submitted=self._clock(), constraint=constraint)
        return self._enqueue(job)

    def embed(self, texts: Ids[Ids[int]], generation: Generation | None = None) -> Generation:
        """Queue texts for their vectors, each of 1 to `context_length` token ids: an `Embedding` for each, in order. Raises as
        `submit` does.
        """
        if self.vectors is None:
            raise ValueError("this model makes text only")
        if not all(0 < len(token_ids) <= self.context_length for token_ids in texts):
            raise ValueError(f"a text does not fit {self.context_length} tokens")
        job = Job(list(chain.from_iterable(texts)), GenerationParams(0), generation or Generation(), submitted=self._clock())
        job.texts = list(map(list, texts))
        return self._enqueue(job)

    def _enqueue(self, job: Job) -> Generation:
        with self._condition:
            if self._closed_with is not None:
                raise copy(self._closed_with)
            self._drop_cancelled()
            if len(self._running) + len(self._waiting) >= self._num_slots + self._settings.max_waiting:
                raise self._queue_full()
            self._publish_opening(job)
            self._waiting.append(job)
            self._dispatch()
        self._statistics.add(requests=1)
        self._statistics.touch()
        return job.generation

    def _publish_opening(self, job: Job) -> None:
        if job.params.opening:
            for index in range(job.params.n):
                job.generation.publish(Delta(index, job.params.opening))

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
            for job in (*self._waiting, *self._running):
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

    def _begin(self) -> Job:
        """Take the job that has waited longest. Caller holds the lock; somebody waits."""
        job = self._waiting.popleft()
        job.started = self._clock()
        self._running.add(job)
        return job

    def _sequence(self, job: Job, index: int) -> Sequence:
        """Choice `index` of a job, at its beginning."""
        constraint = None if job.constraint is None else job.constraint.copy()
        return Sequence(index, job.prompt_ids, job.params, self.tokenizer, constraint)

    def _prompt_scorer(self, job: Job) -> PromptScorer:
        return PromptScorer(job.prompt_ids, TokenScorer(job.params.logprobs or 0, self.tokenizer))

    def _end(self, job: Job, error: Exception | None = None) -> None:
        """The job is over: say so, count it, and give its place to the next."""
        if error is not None:
            self._statistics.add(errors=1)
            job.generation.publish(Failed(_failure(error)))
        elif job.unwanted:
            self._statistics.add(cancelled=1, output_tokens=job.num_output_tokens)
        else:
            job.generation.publish(job.end(self._clock()))
            self._statistics.add(
                prompt_tokens=len(job.prompt_ids),
                cached_tokens=job.num_cached_tokens,
                output_tokens=job.num_output_tokens,
                drafted_tokens=job.num_drafted,
                accepted_tokens=job.num_accepted,
            )
        with self._condition:
            self._running.remove(job)
            self._seconds_per_request += 0.2 * (self._clock() - job.started - self._seconds_per_request)
            self._dispatch()
            self._condition.notify_all()


def _failure(error: Exception) -> APIError:
    return error if isinstance(error, APIError) else EngineFailed(f"The model failed while it answered: {error}.")
