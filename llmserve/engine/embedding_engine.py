"""Make vectors of texts: the same admission, queue and budget as for generations, one thread, one text in a pass.

A text's vector therefore does not depend on what else is asked for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np

from llmserve.engine.backend import Embedder, Vector
from llmserve.engine.chat_template import ChatTemplate
from llmserve.engine.compute import ComputeBudget
from llmserve.engine.engine import Engine, EngineInfo, EngineSettings, Job, Vectors
from llmserve.engine.generation import Embedding
from llmserve.engine.statistics import StatisticsCounter
from llmserve.engine.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class EmbeddingEngine(Engine):
    """One model that makes vectors. Thread-safe: its thread alone has the embedder."""

    def __init__(
        self,
        info: EngineInfo,
        embedder: Embedder,
        tokenizer: Tokenizer,
        vectors: Vectors,
        budget: ComputeBudget,
        settings: EngineSettings,
        statistics: StatisticsCounter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.threads_linger = embedder.threads_linger
        super().__init__(info, 1, tokenizer, ChatTemplate(None), budget, settings, statistics, clock, vectors)
        self._embedder = embedder
        self._start_thread("llmserve-embed", self._serve)

    def _dispatch(self) -> None:
        """Wake the thread, which takes jobs by itself. Caller holds the lock."""
        self._condition.notify_all()

    def _serve(self) -> None:
        while (job := self._next_job()) is not None:
            self._end(job, self._run(job))
        self._embedder.close()

    def _next_job(self) -> Job | None:
        with self._condition:
            self._condition.wait_for(lambda: self._waiting or self._closed_with is not None)
            if self._closed_with is not None:
                return None
            return self._begin()

    def _run(self, job: Job) -> Exception | None:
        try:
            with self._budget.share():
                for index, token_ids in enumerate(job.texts):
                    if job.unwanted:
                        break
                    vector = unit(self._embed(token_ids))
                    job.generation.publish(Embedding(index, vector.astype("<f4").tobytes()))
        except Exception as error:
            log.exception("the engine failed to make a vector")
            return error
        return None

    def _embed(self, token_ids: list[int]) -> Vector:
        with self._passes.lease(len(token_ids)) as threads:
            return self._embedder.embed(token_ids, threads)


def unit(vector: Vector) -> Vector:
    """The vector of length 1 in the same direction."""
    length = float(np.linalg.norm(vector.astype(np.float64)))
    return vector if length == 0 else vector / np.float32(length)
