"""Run generations on a library that evaluates one sequence in a pass: a backend, a KV cache and a thread for each slot.

A slot's thread alone touches its backend; all of them lease their cores from the compute budget.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Ids
from functools import partial

from llmserve.engine import slots
from llmserve.engine.backend import Backend, Logits
from llmserve.engine.chat_template import ChatTemplate
from llmserve.engine.compute import ComputeBudget
from llmserve.engine.engine import Engine, EngineInfo, EngineSettings, Job
from llmserve.engine.generation import ChoiceEnd, PromptScores
from llmserve.engine.slots import Slot
from llmserve.engine.statistics import StatisticsCounter
from llmserve.engine.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class SlotEngine(Engine):
    """An engine of as many slots as it is given backends. Thread-safe."""

    def __init__(
        self,
        info: EngineInfo,
        backends: Ids[Backend],
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        budget: ComputeBudget,
        settings: EngineSettings,
        statistics: StatisticsCounter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(info, len(backends), tokenizer, chat_template, budget, settings, statistics, clock)
        self._idle = [Slot(backend, settings.prefix_cache) for backend in backends]  # guarded by _condition
        self._jobs: dict[Slot, Job] = {}  # guarded by _condition: of the slots that are not idle
        for number, slot in enumerate(self._idle[:]):
            self._start_thread(f"llmserve-slot-{number}", partial(self._serve, slot))

    def _dispatch(self) -> None:
        """Give idle slots to those who wait longest. Caller holds the lock."""
        self._drop_cancelled()
        while self._waiting and self._idle:
            job = self._begin()
            slot = slots.choose(self._idle, job.prompt_ids)
            self._idle.remove(slot)
            self._jobs[slot] = job
            self._condition.notify_all()

    def _serve(self, slot: Slot) -> None:
        """The life of a slot's thread: one job after the other, then the end of its backend."""
        while (job := self._next_job(slot)) is not None:
            error = self._run(slot, job)
            with self._condition:
                del self._jobs[slot]
                slot.last_used = self._clock()
                self._idle.append(slot)
            self._end(job, error)
        slot.backend.close()

    def _next_job(self, slot: Slot) -> Job | None:
        with self._condition:
            self._condition.wait_for(lambda: slot in self._jobs or self._closed_with is not None)
            return self._jobs.get(slot)

    def _run(self, slot: Slot, job: Job) -> Exception | None:
        """Make every choice of a generation, one after the other: the prompt is prefilled once and forked by truncation."""
        try:
            with self._budget.share():
                for index in range(job.params.n):
                    self._make_choice(slot, job, index)
        except _Unwanted:
            pass
        except Exception as error:
            log.exception("the engine failed during a generation")
            return error
        finally:
            if job.params.prompt_logprobs:  # no position is on the grid: nobody's answer shall depend on that
                slot.truncate(0)
        return None

    def _make_choice(self, slot: Slot, job: Job, index: int) -> None:
        sequence = self._sequence(job, index)
        begun = self._clock()
        logits = self._prefill(slot, job, index)
        job.prefill_time += self._clock() - begun
        while sequence.finish_reason is None:
            token_id = sequence.sample(logits)
            if delta := sequence.append(token_id):
                job.generation.publish(delta)
            if sequence.finish_reason is None:
                assert token_id is not None
                logits = self._forward(slot, job, [token_id])
        job.num_output_tokens += sequence.num_output_tokens
        job.generation.publish(ChoiceEnd(index, sequence.finish_reason, sequence.num_output_tokens))

    def _prefill(self, slot: Slot, job: Job, index: int) -> Logits:
        """Evaluate what the slot does not hold of the prompt, in chunks that end on the backend's grid."""
        if job.params.prompt_logprobs and index == 0:
            return self._score_prompt(slot, job)
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

    def _score_prompt(self, slot: Slot, job: Job) -> Logits:
        """Evaluate the prompt token by token, for a pass gives the scores after its last one only."""
        slot.truncate(0)
        scorer = self._prompt_scorer(job)
        for token_id in job.prompt_ids:
            logits = self._forward(slot, job, [token_id])
            scorer.push(logits)
        job.generation.publish(PromptScores(0, tuple(scorer.tokens)))
        return logits

    def _forward(self, slot: Slot, job: Job, token_ids: list[int]) -> Logits:
        """One forward pass within the compute budget, unless nobody wants its result any more."""
        with self._passes.lease(len(token_ids)) as threads:
            if job.unwanted:
                raise _Unwanted
            return slot.forward(token_ids, threads)


class _Unwanted(Exception):
    """The client left, or the engine is being closed."""
