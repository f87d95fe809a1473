"""Continuous batching: one thread, and one forward pass for everybody, over and over.

Each round evaluates the next token of every sequence that decodes, and a bounded piece of a prompt that is being read: a
long prompt stalls nobody, and a short one is not stuck behind it. Requests come and leave between two rounds.

An answer that is not drafted does not depend, to the last bit, on what else is evaluated beside it, up to 256 tokens with the prompt
(from there on the library divides a lone token's attention). The library rounds differently in pieces of
different lengths: so prompts are cut at the same places whatever there is room for (the backend's grid), and a pass has
pieces of one length only.

A prompt takes the longest beginning that any sequence holds, also one that is running, or is about to hold, as far as it is
what the prompt itself would have come to (engine/slots.py).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from llmserve.engine.backend import BatchBackend, Logits, Piece
from llmserve.engine.chat_template import ChatTemplate
from llmserve.engine.compute import ComputeBudget
from llmserve.engine.engine import Engine, EngineInfo, EngineSettings, Job
from llmserve.engine.generation import ChoiceEnd, PromptScores
from llmserve.engine.logprobs import PromptScorer
from llmserve.engine.pass_cost import LONGEST_DRAFT, PassCost
from llmserve.engine.sequence import Sequence
from llmserve.engine.slots import advance_grid, common_prefix_length, gain, num_reusable, round_up_to_grid
from llmserve.engine.speculation import PromptLookup
from llmserve.engine.statistics import StatisticsCounter
from llmserve.engine.tokenizer import Tokenizer
from llmserve.errors import APIError

log = logging.getLogger(__name__)

_LEAST_SHARED_AT_FIRST = 32
"""Tokens that two prompts must have in common for cells to be copied, or waited for, while it is not known how fast they are read."""
_COPY_RATE = 2e9
"""Bytes per second of cells, which are copied as a whole, however few of them are in use. A modest one: to read is certain to be right."""

MOST_CHUNKS = 2
"""Prefill chunks in a pass while many more sequences read their prompts than wait for their next token: the sooner all decode, the better."""


@dataclass(slots=True, eq=False)
class _Choice:
    """One choice of a job. It is a sequence of its own, and shares the prompt with the others as any two prompts do."""

    job: Job
    index: int


@dataclass(slots=True, eq=False)
class _Lane:
    """A sequence of the backend: what its cells hold, and the choice that it makes at present."""

    number: int
    token_ids: list[int] = field(default_factory=list)  # evaluated
    num_on_grid: int = 0  # of these, as of Slot
    pending: list[int] = field(default_factory=list)  # to be evaluated: a prompt's rest, or the token just sampled and a draft
    num_drafted: int = 0  # of the pending ones; guesses at what comes after the token just sampled
    choice: _Choice | None = None
    sequence: Sequence | None = None
    reading: bool = False  # its prompt
    due: int = 0  # who is due first is read first: the prompt tokens read before it came, and its own
    leader: _Lane | None = None  # holds, or will hold, the beginning of this one's prompt
    num_shared: int = 0  # tokens to take from the leader
    scorer: PromptScorer | None = None  # of a prompt whose tokens' probabilities are asked for
    lookup: PromptLookup | None = None  # of a sequence that decodes
    last_used: float = 0.0

    def promised(self, grid: int) -> tuple[list[int], int]:
        """What it holds, or will hold when it has read its prompt; and how much of that on the grid."""
        if not self.reading:
            return self.token_ids, self.num_on_grid
        promised = self.token_ids + self.pending
        return promised, advance_grid(self.num_on_grid, len(self.token_ids), len(promised), grid)


class BatchEngine(Engine):
    """An engine on a backend that evaluates many sequences in one pass. Thread-safe: one thread has the backend and the lanes."""

    threads_linger = True

    def __init__(
        self,
        info: EngineInfo,
        backend: BatchBackend,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        budget: ComputeBudget,
        settings: EngineSettings,
        statistics: StatisticsCounter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(info, backend.num_sequences, tokenizer, chat_template, budget, settings, statistics, clock)
        self._backend = backend
        self._lanes = [_Lane(number) for number in range(backend.num_sequences)]
        self._choices: deque[_Choice] = deque()  # of jobs that have begun; without a lane as yet
        self._num_open: Counter[Job] = Counter()  # choices of each job that are not complete
        self._num_read = 0  # prompt tokens
        self._pass_cost = PassCost()
        self._thread: threading.Thread | None = None  # guarded by _condition; while there is something to do
        self._freeing = threading.Lock()

    def close(self, error: APIError | None = None) -> None:
        super().close(error)
        with self._condition:
            thread = self._thread
        if thread is not None:
            thread.join()
        with self._freeing:  # not twice: an unload and the end of the server may come together
            self._backend.close()

    def _dispatch(self) -> None:
        """See that there is a thread, which takes jobs by itself. Caller holds the lock.

        It ends when there is nothing to do, and with it the library's threads that helped it: libgomp's of several models
        would outnumber the cores, and then wait for each other in the kernel, which takes twice as long.
        """
        if self._thread is None and self._waiting:
            thread = threading.Thread(target=self._serve, name="llmserve-batch", daemon=True)
            thread.start()  # raises where the system has none left
            self._thread = thread

    def _serve(self) -> None:
        try:
            with self._budget.share():
                while self._advance() or self._has_more():
                    pass
        finally:  # whatever ends it, the next request is to have another
            with self._condition:
                if self._thread is threading.current_thread():
                    self._thread = None

    def _has_more(self) -> bool:
        """Whether somebody waits; if not, the thread is over."""
        with self._condition:
            if self._waiting:
                return True
            self._thread = None
            return False

    def _advance(self) -> bool:
        """One round for everybody; whether there was anything to do."""
        try:
            self._dismiss()
            self._follow_all()  # before a lane that others wait for is given away
            self._admit()
            self._follow_all()
            batches = self._plan()
            for batch in batches:
                self._pass(batch)
        except Exception as error:  # nobody knows what the cells hold then
            log.exception("the engine failed in a pass")
            self._reset(error)
            return True
        return bool(batches)

    # Who comes and leaves.

    def _dismiss(self) -> None:
        """Let those go whom nobody waits for any more."""
        for job in [job for job in self._num_open if job.unwanted]:
            self._drop(job)

    def _admit(self) -> None:
        """Give free lanes to those who wait longest, all choices of a job before the next job."""
        free = [lane for lane in self._lanes if lane.choice is None]
        while free and (self._choices or self._take_job()):
            lane = self._occupy(free, self._choices.popleft())
            free.remove(lane)

    def _take_job(self) -> bool:
        with self._condition:
            self._drop_cancelled()
            if not self._waiting:
                return False
            job = self._begin()
        self._choices.extend(_Choice(job, index) for index in range(job.params.n))
        self._num_open[job] = job.params.n
        return True

    def _occupy(self, free: Ids[_Lane], choice: _Choice) -> _Lane:
        """Put a choice into one of the free lanes, with as much of its prompt as that one holds or another one promises."""
        prompt_ids = choice.job.prompt_ids
        scored = choice.job.params.prompt_logprobs and choice.index == 0  # by a pass over all of it
        grid = self._backend.grid
        shared = {lane.number: 0 if scored else self._num_shared(*lane.promised(grid), prompt_ids) for lane in self._lanes}
        lane = max(free, key=lambda lane: (gain(shared[lane.number], len(lane.token_ids)), -lane.last_used))
        for other in self._lanes:
            if other.leader is lane:
                other.leader = None
        num_kept = shared.pop(lane.number)
        self._truncate(lane, num_kept)
        lane.sequence = self._sequence(choice.job, choice.index)
        lane.scorer = self._prompt_scorer(choice.job) if scored else None
        lane.choice, lane.reading, lane.pending = choice, True, prompt_ids[num_kept:]
        lane.due = self._num_read + len(lane.pending)
        best = max(shared, key=shared.__getitem__, default=lane.number)
        if shared.get(best, 0) >= num_kept + self._least_shared():
            lane.leader, lane.num_shared = self._lanes[best], shared[best]
        self._note_cached(lane)
        return lane

    def _num_shared(self, held: list[int], num_on_grid: int, prompt_ids: list[int]) -> int:
        """Tokens of the prompt that need not be evaluated, thanks to a lane that holds those: never all, for the last one gives the scores."""
        if not self._settings.prefix_cache:
            return 0
        grid = self._backend.grid
        num_common = min(common_prefix_length(held, prompt_ids), len(prompt_ids) - 1)
        num_shared = num_reusable(num_common, num_on_grid, len(prompt_ids), grid)
        if num_common <= num_on_grid:
            return num_shared // grid * grid  # a piece that begins elsewhere is another one
        # A last token by itself is rounded otherwise than in company, unless a fresh prefill leaves it alone too.
        return num_shared - (num_shared == len(prompt_ids) - 1 and num_shared % grid > 0)

    def _least_shared(self) -> int:
        """Tokens that take as long to read as it takes to copy a sequence's cells."""
        seconds = self._pass_cost.seconds_per_token
        if seconds is None:
            return _LEAST_SHARED_AT_FIRST
        return max(1, math.ceil(self.info.kv_cache_bytes / self.info.num_slots / _COPY_RATE / seconds))

    def _follow_all(self) -> None:
        for lane in self._lanes:
            self._follow(lane)

    def _follow(self, lane: _Lane) -> None:
        """Take what the leader has by now, if that is all there is to wait for."""
        leader = lane.leader
        if leader is None or lane.choice is None:
            return
        if leader.choice is not None and len(leader.token_ids) < lane.num_shared:
            return
        lane.leader = None
        lane.num_shared = self._num_shared(leader.token_ids, leader.num_on_grid, lane.choice.job.prompt_ids)
        if lane.num_shared >= len(lane.token_ids) + self._least_shared():
            prompt_ids = lane.choice.job.prompt_ids
            self._backend.copy(leader.number, lane.number)
            self._backend.truncate(lane.number, lane.num_shared)
            lane.token_ids, lane.pending = prompt_ids[: lane.num_shared], prompt_ids[lane.num_shared :]
            lane.num_on_grid = min(leader.num_on_grid, lane.num_shared)
            lane.due = self._num_read + len(lane.pending)
            self._note_cached(lane)

    def _note_cached(self, lane: _Lane) -> None:
        if lane.choice is not None and lane.choice.index == 0:
            lane.choice.job.num_cached_tokens = len(lane.token_ids)

    def _leave(self, lane: _Lane) -> None:
        """The lane is free; what it holds stays, for whoever begins alike."""
        assert lane.choice is not None and lane.sequence is not None
        lane.choice.job.num_output_tokens += lane.sequence.num_output_tokens
        lane.choice = lane.sequence = lane.leader = lane.scorer = lane.lookup = None
        lane.reading = False
        lane.pending = []
        lane.num_drafted = 0
        lane.last_used = self._clock()

    def _drop(self, job: Job, error: Exception | None = None) -> None:
        """End a job before its choices are complete."""
        for lane in self._lanes:
            if lane.choice is not None and lane.choice.job is job:
                self._leave(lane)
        self._choices = deque(choice for choice in self._choices if choice.job is not job)
        del self._num_open[job]
        self._end(job, error)

    def _reset(self, error: Exception) -> None:
        """End all that has begun, and forget what the cells hold."""
        for job in list(self._num_open):
            self._drop(job, error)
        for lane in self._lanes:
            self._truncate(lane, 0)

    # What a pass does.

    def _plan(self) -> list[list[tuple[_Lane, int]]]:
        """Passes, each of lanes and how many of their pending tokens are evaluated: every decoding one's, and a piece of the prompts.

        One prompt is read after the other, the shortest first, but a long one need not wait for more tokens than it has (fair
        queueing by virtual finish times).
        """
        decoding = [lane for lane in self._lanes if lane.choice is not None and not lane.reading]
        reading = [lane for lane in self._lanes if lane.reading and lane.leader is None]
        if len(decoding) == 1 and not reading:  # drafts of several would have different lengths: a pass of its own for each
            return [self._with_draft(decoding[0])]
        batches = {1: [(lane, 1) for lane in decoding]} if decoding else {}
        grid = self._backend.grid
        chunk = round_up_to_grid(self._settings.prefill_chunk, grid)
        room = min(chunk * min(max(1, 1 + len(reading) - len(decoding)), MOST_CHUNKS), self._backend.batch_size)
        for lane in sorted(reading, key=self._due):
            if num_tokens := _piece_length(len(lane.token_ids), len(lane.pending), room, grid):
                batches.setdefault(num_tokens, []).append((lane, num_tokens))
                room -= num_tokens
                self._num_read += num_tokens
        return list(batches.values())

    def _due(self, lane: _Lane) -> int:
        """When a prompt is due, or the first of those that wait for its beginning."""
        return min([lane.due, *(self._due(other) for other in self._lanes if other.leader is lane)])

    def _with_draft(self, lane: _Lane) -> list[tuple[_Lane, int]]:
        """The token of the only sequence there is, and what it will probably say next, as far as that pays."""
        if lane.lookup is not None and lane.sequence is not None:
            most = min(lane.sequence.num_left - 1, self._backend.batch_size - 1, LONGEST_DRAFT)
            token_ids, accuracies = lane.lookup.draft(most)
            lane.num_drafted = self._pass_cost.draft_length(accuracies)
            lane.pending += token_ids[: lane.num_drafted]
        return [(lane, len(lane.pending))]

    def _pass(self, batch: list[tuple[_Lane, int]]) -> None:
        pieces = [self._piece(lane, num_tokens) for lane, num_tokens in batch]
        num_tokens = sum(len(piece.token_ids) for piece in pieces)
        with self._passes.lease(num_tokens) as threads:
            begun = self._clock()
            self._backend.forward(pieces, threads)
            if len(pieces) == 1:  # those of several sequences read more cells: they tell nothing about drafts
                self._pass_cost.observe(num_tokens, self._clock() - begun)
        for index, (lane, piece) in enumerate(zip((lane for lane, _ in batch), pieces, strict=True)):
            if lane.scorer is not None:
                self._score(lane, lane.scorer, index, piece)
            lane.num_on_grid = advance_grid(
                lane.num_on_grid, piece.position, piece.position + len(piece.token_ids), self._backend.grid
            )
            lane.token_ids += piece.token_ids
            del lane.pending[: len(piece.token_ids)]
            if not lane.pending:
                self._take(lane, index, piece)

    def _piece(self, lane: _Lane, num_tokens: int) -> Piece:
        token_ids = lane.pending[:num_tokens]
        wants_all = lane.num_drafted > 0 or lane.scorer is not None
        return Piece(lane.number, len(lane.token_ids), token_ids, num_tokens == len(lane.pending), wants_all)

    def _score(self, lane: _Lane, scorer: PromptScorer, index: int, piece: Piece) -> None:
        """Take the scores of a piece of the prompt, which is piece `index` of the pass."""
        for token in range(len(piece.token_ids)):
            scorer.push(self._backend.logits(index, token))
        if piece.wants_logits and lane.choice is not None:
            lane.choice.job.generation.publish(PromptScores(0, tuple(scorer.tokens)))
            lane.scorer = None

    def _take(self, lane: _Lane, index: int, piece: Piece) -> None:
        """Sample after the last token that is certain, and again after every drafted one that turns out to be what was sampled.

        So an answer's distribution is what it is without drafts.
        """
        assert lane.choice is not None
        job, num_wrong = lane.choice.job, lane.num_drafted
        job.num_drafted += num_wrong
        lane.num_drafted = 0
        while True:
            token_id = self._sample(lane, self._backend.logits(index, -1 - num_wrong))
            if lane.choice is None or not num_wrong or piece.token_ids[-num_wrong] != token_id:
                break
            num_wrong -= 1
            job.num_accepted += 1
        if num_wrong:
            self._truncate(lane, len(lane.token_ids) - num_wrong)

    def _sample(self, lane: _Lane, logits: Logits) -> int | None:
        """Choose the next token of a lane and say what it means. One that may have none is complete as it is."""
        choice, sequence = lane.choice, lane.sequence
        assert choice is not None and sequence is not None
        job = choice.job
        if lane.reading:
            lane.reading = False
            job.prefill_time = job.prefill_time or self._clock() - job.started
        token_id = None
        if sequence.finish_reason is None:
            token_id = sequence.sample(logits)
            if delta := sequence.append(token_id):
                job.generation.publish(delta)
        if sequence.finish_reason is None:
            assert token_id is not None
            lane.pending = [token_id]
            self._look_up(lane, token_id)
            return token_id
        self._leave(lane)
        job.generation.publish(ChoiceEnd(choice.index, sequence.finish_reason, sequence.num_output_tokens))
        self._num_open[job] -= 1
        if not self._num_open[job]:
            del self._num_open[job]
            self._end(job)
        return token_id

    def _look_up(self, lane: _Lane, token_id: int) -> None:
        """Note the token of a sequence whose next ones may be guessed."""
        if lane.lookup is not None:
            lane.lookup.append(token_id)
        elif self._settings.prompt_lookup and lane.choice is not None and _may_be_drafted(lane.choice):
            lane.lookup = PromptLookup([*lane.token_ids, token_id], lane.choice.job.params.sampling.temperature)

    def _truncate(self, lane: _Lane, num_tokens: int) -> None:
        self._backend.truncate(lane.number, num_tokens)
        del lane.token_ids[num_tokens:]
        lane.num_on_grid = min(lane.num_on_grid, num_tokens)


def _piece_length(position: int, num_pending: int, room: int, grid: int) -> int:
    """How many of a prompt's tokens to read now, 0 for none: up to a multiple of the grid, or the rest behind the last one."""
    last = (position + num_pending) // grid * grid
    if position >= last:
        return num_pending if num_pending <= room else 0
    return max(0, min((position + room) // grid * grid, last) - position)


def _may_be_drafted(choice: _Choice) -> bool:
    """Whoever gives a seed wants the same answer again, and whoever asks for probabilities the same numbers: to the last bit."""
    return choice.job.params.sampling.seed is None and choice.job.params.logprobs is None
