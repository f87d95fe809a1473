"""Make vectors of texts: the same admission, queue and budget as for generations, one thread, one text in a pass.

A text's vector therefore does not depend on what else is asked for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

import numpy as np

from llmserve.engine.backend import Embedder, Vector
from llmserve.engine.chat_template import ChatTemplate
from llmserve.engine.compute import ComputeBudget
from llmserve.engine.engine import Engine, EngineInfo, EngineSettings, Job
from llmserve.engine.generation import Embedding, Generation, GenerationParams
from llmserve.engine.statistics import StatisticsCounter
from llmserve.engine.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Texts(Job):
    texts: list[list[int]] = field(default_factory=list)


class EmbeddingEngine(Engine):
    """One model that makes vectors. Thread-safe: its thread alone has the embedder."""

    generates = False

    def __init__(
        self,
        info: EngineInfo,
        embedder: Embedder,
        tokenizer: Tokenizer,
        encode: Callable[[str], list[int]],
        budget: ComputeBudget,
        settings: EngineSettings,
        statistics: StatisticsCounter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`encode` makes a text the token ids whose vector it gets."""
        super().__init__(info, 1, tokenizer, ChatTemplate(None), budget, settings, statistics, clock)
        self.encode = encode
        self.dimensions = embedder.dimensions
        self._embedder = embedder
        self._start_thread("llmserve-embed", self._serve)

    def embed(self, texts: Ids[Ids[int]]) -> Generation:
        """Queue texts, each of 1 to `context_length` token ids: an `Embedding` for each, in order. Raises as `submit` does."""
        if not all(0 < len(token_ids) <= self.context_length for token_ids in texts):
            raise ValueError(f"a text does not fit {self.context_length} tokens")
        return self._enqueue(_Texts([], GenerationParams(0), Generation(), self._clock(), texts=[list(each) for each in texts]))

    def submit(self, prompt_ids: Ids[int], params: GenerationParams, generation: Generation | None = None) -> Generation:
        raise ValueError("this model makes vectors only")

    def _dispatch(self) -> None:
        """Wake the thread, which takes jobs by itself. Caller holds the lock."""
        self._condition.notify_all()

    def _serve(self) -> None:
        while (job := self._next_job()) is not None:
            self._end(job, self._run(job))
        self._embedder.close()

    def _next_job(self) -> _Texts | None:
        with self._condition:
            self._condition.wait_for(lambda: self._waiting or self._closed_with is not None)
            if self._closed_with is not None:
                return None
            job = self._begin()
        assert isinstance(job, _Texts)
        return job

    def _run(self, job: _Texts) -> Exception | None:
        try:
            with self._budget.share():
                for index, token_ids in enumerate(job.texts):
                    if job.unwanted:
                        break
                    vector = unit(self._embed(token_ids))
                    job.prompt_ids += token_ids  # they are what the end counts
                    job.generation.publish(Embedding(index, vector.astype("<f4").tobytes()))
        except Exception as error:
            log.exception("the engine failed to make a vector")
            return error
        return None

    def _embed(self, token_ids: list[int]) -> Vector:
        threads = self._budget.acquire(at_most=self._budget.cores)
        try:
            return self._embedder.embed(token_ids, threads)
        finally:
            self._budget.release(threads)


def unit(vector: Vector) -> Vector:
    """The vector of length 1 in the same direction."""
    length = float(np.linalg.norm(vector.astype(np.float64)))
    return vector if length == 0 else vector / np.float32(length)
