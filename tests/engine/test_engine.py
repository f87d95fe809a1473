import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmserve.engine.compute import ComputeBudget
from llmserve.engine.generation import (
    ChoiceEnd,
    Delta,
    Failed,
    FinishReason,
    GenerationEnd,
    GenerationParams,
    SamplingParams,
)
from llmserve.engine.statistics import StatisticsCounter
from llmserve.errors import EngineFailed, QueueFull, ShuttingDown
from tests.fakes import START, FakeBackend, babble, make_engine, say

TIMEOUT = 10.0
GREEDY = SamplingParams(temperature=0)


@pytest.fixture
def engine_of():
    """Make engines that are closed after the test, with every backend."""
    made = []

    def make(*backends, **options):
        engine = make_engine(backends or [FakeBackend()], **options)
        made.append((engine, backends))
        return engine

    yield make
    for engine, backends in made:
        engine.close()
        assert all(backend.closed for backend in backends)


def chat_ids(engine, content="hi"):
    return engine.tokenizer.encode(engine.chat_template.render([{"role": "user", "content": content}]))


def text_of(events, index=0):
    return "".join(event.text for event in events if isinstance(event, Delta) and event.choice == index)


def run(engine, prompt_ids, **params):
    params.setdefault("sampling", GREEDY)
    params.setdefault("max_tokens", 20)
    return list(engine.submit(prompt_ids, GenerationParams(**params)).events(TIMEOUT))


def ask(engine, content="hi", **params):
    return run(engine, chat_ids(engine, content), **params)


class Gate:
    """Lets forward passes through one by one, and tells when one stands at it."""

    def __init__(self, backend):
        self.arrived, self.passes, self.is_open = threading.Semaphore(0), threading.Semaphore(0), False
        backend.on_forward = self.wait

    def wait(self):
        self.arrived.release()
        if not self.is_open:
            assert self.passes.acquire(timeout=TIMEOUT)

    def open(self):
        self.is_open = True
        self.passes.release()


def test_an_answer_ends_with_eos_which_is_neither_text_nor_counted(engine_of):
    engine = engine_of(FakeBackend(say("Hello")))
    *_, end, last = events = ask(engine)
    assert text_of(events) == "Hello"
    assert end == ChoiceEnd(0, FinishReason.STOP, num_output_tokens=5)
    assert isinstance(last, GenerationEnd)
    assert last.num_prompt_tokens == len(chat_ids(engine))


def test_an_answer_ends_at_max_tokens(engine_of):
    events = ask(engine_of(FakeBackend(say("Hello"))), max_tokens=3)
    assert text_of(events) == "Hel"
    assert events[-2] == ChoiceEnd(0, FinishReason.LENGTH, num_output_tokens=3)


def test_a_stop_string_over_several_tokens_ends_the_answer_and_is_no_part_of_it(engine_of):
    events = ask(engine_of(FakeBackend(say("one two three"))), stop=("wo t", "zzz"))
    assert text_of(events) == "one t"
    assert events[-2].finish_reason is FinishReason.STOP


def test_text_held_back_for_a_stop_string_comes_out_at_the_end(engine_of):
    assert text_of(ask(engine_of(FakeBackend(say("so long"))), stop=("long ago",))) == "so long"


def test_a_character_split_over_tokens_arrives_whole(engine_of):
    events = ask(engine_of(FakeBackend(say("née 🦙!"))))
    assert [event.text for event in events if isinstance(event, Delta)] == ["n", "é", "e", " ", "🦙", "!"]


def test_a_prompt_is_prefilled_in_chunks_that_end_on_the_grid(engine_of):
    backend = FakeBackend(grid=8)
    run(engine_of(backend, prefill_chunk=16), list(range(45)), max_tokens=1)
    assert [size for _, size, _ in backend.passes] == [16, 16, 13]


def test_the_second_request_reuses_the_first_ones_prompt(engine_of):
    backend = FakeBackend()
    engine = engine_of(backend)
    first, second = ask(engine, "the same"), ask(engine, "the same")
    assert text_of(first) == text_of(second)
    assert first[-1].num_cached_tokens == 0
    assert second[-1].num_cached_tokens == second[-1].num_prompt_tokens - 1


def test_choices_share_one_prefill_and_are_sampled_separately(engine_of):
    backend = FakeBackend()
    engine = engine_of(backend)
    prompt = chat_ids(engine, "three of them")
    events = run(engine, prompt, n=3, max_tokens=8, sampling=SamplingParams(temperature=5, seed=1))
    texts = [text_of(events, index) for index in range(3)]
    assert len(set(texts)) == 3
    assert sum(size for _, size, _ in backend.passes if size > 1) == len(prompt)
    again = run(engine, prompt, n=3, max_tokens=8, sampling=SamplingParams(temperature=5, seed=1))
    assert [text_of(again, index) for index in range(3)] == texts


def test_a_full_queue_refuses_with_a_time_to_come_back(engine_of):
    backend = FakeBackend()
    gate = Gate(backend)
    engine = engine_of(backend, max_waiting=2)
    for _ in range(3):
        engine.submit([1], GenerationParams(max_tokens=1))
    with pytest.raises(QueueFull) as caught:
        engine.submit([1], GenerationParams(max_tokens=1))
    assert 1 <= caught.value.retry_after <= 60
    assert (engine.load.running, engine.load.waiting) == (1, 2)
    gate.open()
    assert engine.drain(TIMEOUT)


def test_a_waiting_request_whose_client_left_makes_room(engine_of):
    backend = FakeBackend()
    gate = Gate(backend)
    engine = engine_of(backend, max_waiting=1)
    engine.submit([1], GenerationParams(max_tokens=1))
    engine.submit([1], GenerationParams(max_tokens=1)).close()
    engine.submit([1], GenerationParams(max_tokens=1))
    gate.open()
    assert engine.drain(TIMEOUT)
    assert engine._statistics.snapshot().cancelled == 1


def test_waiting_requests_are_served_in_order(engine_of):
    backend = FakeBackend()
    gate = Gate(backend)
    engine = engine_of(backend)
    order = []
    backend.reply = lambda held: order.append(held[0]) or babble(held)
    for number in range(5):
        engine.submit([number], GenerationParams(max_tokens=1))
    gate.open()
    assert engine.drain(TIMEOUT)
    assert order == [0, 1, 2, 3, 4]


def test_closing_a_generation_stops_it_at_the_next_token(engine_of):
    backend = FakeBackend()
    gate = Gate(backend)
    engine = engine_of(backend)
    generation = engine.submit([1, 2], GenerationParams(max_tokens=100))
    for _ in range(3):
        assert gate.arrived.acquire(timeout=TIMEOUT)
        gate.passes.release()
    generation.close()
    gate.open()
    assert engine.drain(TIMEOUT)
    assert len(backend.passes) <= 4


def test_closing_a_generation_stops_its_prefill_at_the_next_chunk(engine_of):
    backend = FakeBackend(grid=4)
    gate = Gate(backend)
    engine = engine_of(backend, prefill_chunk=4)
    generation = engine.submit(list(range(100)), GenerationParams(max_tokens=1))
    assert gate.arrived.acquire(timeout=TIMEOUT)
    generation.close()
    gate.open()
    assert engine.drain(TIMEOUT)
    assert len(backend.passes) == 1


def test_an_error_of_the_library_fails_its_request_and_no_other(engine_of):
    backend = FakeBackend(say("fine"))
    statistics = StatisticsCounter()
    engine = engine_of(backend, statistics=statistics)

    def fail():
        raise RuntimeError("no memory for the batch")

    backend.on_forward = fail
    (failed,) = ask(engine)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, EngineFailed)
    assert "no memory for the batch" in failed.error.message
    backend.on_forward, backend._busy = lambda: None, False
    assert text_of(ask(engine)) == "fine"
    assert (statistics.snapshot().errors, statistics.snapshot().requests) == (1, 2)


def test_closing_the_engine_ends_what_runs_and_what_waits(engine_of):
    backend = FakeBackend()
    gate = Gate(backend)
    engine = engine_of(backend)
    generations = [engine.submit([number], GenerationParams(max_tokens=50)) for number in range(3)]
    assert gate.arrived.acquire(timeout=TIMEOUT)
    closer = threading.Thread(target=engine.close)
    closer.start()
    for generation in generations:
        (*_, last) = generation.events(TIMEOUT)
        assert isinstance(last.error, ShuttingDown)
    gate.open()
    closer.join(TIMEOUT)
    assert backend.closed
    with pytest.raises(ShuttingDown):
        engine.submit([1], GenerationParams(max_tokens=1))


def test_slots_together_never_use_more_threads_than_cores(engine_of):
    lock, state = threading.Lock(), {"running": 0, "most": 0}
    backends = [FakeBackend() for _ in range(4)]
    engine = engine_of(*backends, budget=ComputeBudget(3))
    for backend in backends:
        forward = backend.forward

        def counted(token_ids, position, threads, forward=forward):
            with lock:
                state["running"] += threads
                state["most"] = max(state["most"], state["running"])
            forward(token_ids, position, threads)
            with lock:
                state["running"] -= threads

        backend.forward = counted
    generations = [engine.submit([number], GenerationParams(max_tokens=40)) for number in range(8)]
    for generation in generations:
        list(generation.events(TIMEOUT))
    assert 0 < state["most"] <= 3


def test_concurrent_greedy_answers_equal_sequential_ones(engine_of):
    engine = engine_of(*(FakeBackend(grid=8) for _ in range(3)))
    prompts = [[START, *f"prompt {number % 5} {'x' * (7 * number)}".encode()] for number in range(24)]
    expected = [text_of(run(engine_of(FakeBackend(grid=8)), prompt)) for prompt in prompts]
    generations = [engine.submit(prompt, GenerationParams(max_tokens=20, sampling=GREEDY)) for prompt in prompts]
    assert [text_of(generation.events(TIMEOUT)) for generation in generations] == expected


def test_a_prompt_that_does_not_fit_is_the_callers_mistake(engine_of):
    engine = engine_of(FakeBackend(context_length=16))
    with pytest.raises(ValueError, match="do not fit"):
        engine.submit(list(range(10)), GenerationParams(max_tokens=7))
    assert text_of(run(engine, list(range(10)), max_tokens=6))


def test_scores_that_are_no_numbers_fail_the_request(engine_of):
    backend = FakeBackend()
    backend.logits = lambda: np.full(backend.vocab_size, np.nan, dtype=np.float32)
    (failed,) = run(engine_of(backend), [1])
    assert isinstance(failed.error, EngineFailed)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    jobs=st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 30), st.integers(1, 3), st.none() | st.integers(0, 10)),
        min_size=1,
        max_size=12,
    ),
    num_slots=st.integers(1, 3),
)
def test_whatever_is_submitted_and_cancelled_every_slot_is_free_in_the_end(engine_of, jobs, num_slots):
    engine = engine_of(*(FakeBackend() for _ in range(num_slots)), max_waiting=20)
    kept = []
    for length, max_tokens, n, close_after in jobs:
        generation = engine.submit([length] * length, GenerationParams(max_tokens=max_tokens, n=n))
        if close_after is None:
            kept.append((generation, n))
        else:
            generation.read(close_after, timeout=0.001)
            generation.close()
    for generation, n in kept:
        events = list(generation.events(TIMEOUT))
        assert [event.choice for event in events if isinstance(event, ChoiceEnd)] == list(range(n))
        assert isinstance(events[-1], GenerationEnd)
    assert engine.drain(TIMEOUT)
    assert len(engine._idle) == num_slots
    assert not engine._jobs
    assert engine._budget._free == engine._budget.cores
