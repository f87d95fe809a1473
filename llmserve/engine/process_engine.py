"""An engine whose slots are in a process of their own: the queue is here, and as many of its jobs as there are slots are there.

To its callers it is an engine like the others. What was in flight ends with an error when the process dies; then the engine is
closed, and says so to whoever started it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import copy
from itertools import count
from typing import Any

from llmserve.engine.channel import Acquire, Cancel, Cores, Embed, Published, Recall, Return, Submit
from llmserve.engine.chat_template import ChatTemplate
from llmserve.engine.compute import ComputeBudget
from llmserve.engine.engine import Engine, EngineInfo, EngineSettings, Job, Vectors
from llmserve.engine.generation import ChoiceEnd, Event, Failed, GenerationEnd
from llmserve.engine.process import EngineProcess
from llmserve.engine.statistics import StatisticsCounter
from llmserve.engine.tokenizer import Tokenizer
from llmserve.errors import APIError, EngineDied


class ProcessEngine(Engine):
    """Thread-safe. The process is its own from now on, with the model open."""

    def __init__(
        self,
        info: EngineInfo,
        process: EngineProcess,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        budget: ComputeBudget,
        settings: EngineSettings,
        statistics: StatisticsCounter | None = None,
        clock: Callable[[], float] = time.monotonic,
        vectors: Vectors | None = None,
    ) -> None:
        super().__init__(info, info.num_slots, tokenizer, chat_template, budget, settings, statistics, clock, vectors)
        self._process = process
        self._lease = budget.lease(lambda threads: process.send(Cores(threads)), lambda: process.send(Recall()))
        self._numbers = count()
        self._jobs: dict[int, Job] = {}  # guarded by _condition: those in the process, by number
        self._death: EngineDied | None = None  # guarded by _condition
        process.attach(self)

    def on_death(self, callback: Callable[[APIError], None]) -> None:
        with self._condition:
            super().on_death(callback)
            death = self._death
        if death is not None:
            callback(death)

    def close(self, error: APIError | None = None) -> None:
        super().close(error)
        self._process.close()
        self._end_all(None)

    def receive(self, message: Any) -> None:
        match message:
            case Published(number, event):
                self._take(number, event)
            case Acquire():
                self._lease.request()
            case Return():
                self._lease.give_back()

    def turn(self) -> None:
        """Give the slots of those back whom nobody waits for any more. The process hears of it before it hears of the next job."""
        with self._condition:
            unwanted = [number for number, job in self._jobs.items() if job.unwanted]
        for number in unwanted:
            self._process.send(Cancel(number))
            self._end_job(number)

    def died(self, error: EngineDied) -> None:
        with self._condition:
            if self._closed_with is not None:
                return  # close() has told everybody
            self._closed_with = self._death = error
            waiting = list(self._waiting)
            self._waiting.clear()
            callback = self._callback
        if callback is not None:  # before any client hears of it: who asks again is to find a model that loads
            callback(error)
        for job in waiting:
            self._statistics.add(errors=1)
            job.generation.publish(Failed(copy(error)))
        self._end_all(error)

    def _dispatch(self) -> None:
        self._drop_cancelled()
        while self._waiting and len(self._running) < self._num_slots:
            job = self._begin()
            number = next(self._numbers)
            self._jobs[number] = job
            self._process.send(self._message(number, job))
        self._lease.share(active=bool(self._running))

    def _message(self, number: int, job: Job) -> Submit | Embed:
        return Submit(number, job.prompt_ids, job.params) if self.vectors is None else Embed(number, job.texts)

    def _take(self, number: int, event: Event) -> None:
        with self._condition:
            job = self._jobs.get(number)
        if job is None:  # cancelled
            return
        match event:
            case GenerationEnd():
                job.started += event.queue_time
                job.num_cached_tokens, job.prefill_time = event.num_cached_tokens, event.prefill_time
                job.num_drafted, job.num_accepted = event.num_drafted_tokens, event.num_accepted_tokens
                self._end_job(number)
            case Failed(error):
                self._end_job(number, error)
            case _:
                if isinstance(event, ChoiceEnd):
                    job.num_output_tokens += event.num_output_tokens
                job.generation.publish(event)

    def _end_job(self, number: int, error: APIError | None = None) -> None:
        with self._condition:
            job = self._jobs.pop(number, None)
        if job is not None:  # two threads may close the engine
            self._end(job, error)

    def _end_all(self, error: APIError | None) -> None:
        """The process is gone."""
        with self._condition:
            numbers = list(self._jobs)
        for number in numbers:
            self._end_job(number, error)
        self._lease.close()
