"""The seam between a server and an engine's process: nothing that happens on either side, in any order, leaves anybody waiting."""

import re
import threading
import time
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmserve.config import ModelSpec
from llmserve.engine.compute import ComputeBudget
from llmserve.engine.engine import EngineLoad
from llmserve.engine.generation import ChoiceEnd, Delta, Failed, GenerationEnd, GenerationParams, Grammar, SamplingParams
from llmserve.engine.statistics import StatisticsCounter
from llmserve.errors import EngineDied, EngineFailed, QueueFull, ShuttingDown
from llmserve.registry import MAX_CRASHES, ModelRegistry, ModelState
from tests.fake_process import FakeProcessLoader, make_process_engine
from tests.fakes import FakeBackend, FakeBatchBackend, FakeEmbedder, make_engine

TIMEOUT = 10.0
GREEDY = SamplingParams(temperature=0)
MANY = [lambda: [FakeBackend(), FakeBackend()], lambda: FakeBatchBackend(num_sequences=2)]
ALL = [*MANY, FakeEmbedder]


@pytest.fixture
def engine_of():
    made = []

    def make(backends=None, **options):
        engine, process = make_process_engine(backends or [FakeBackend(), FakeBackend()], **options)
        made.append(engine)
        return engine, process

    yield make
    for engine in made:
        engine.close()


def submit(engine, prompt_ids=(1, 2, 3), max_tokens=8, **params):
    """So many tokens, or so many vectors."""
    if engine.vectors is not None:
        return engine.embed([prompt_ids] * max_tokens)
    return engine.submit(list(prompt_ids), GenerationParams(max_tokens, sampling=GREEDY, **params))


def events_of(generation):
    return list(generation.events(TIMEOUT))


def wait_until(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        threading.Event().wait(0.002)


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, Delta))


def slowed(backends):
    """Backends that take a while for each pass, so that what is done to a long answer is done before its end."""
    for backend in backends if isinstance(backends, list) else [backends]:
        backend.on_forward = lambda: time.sleep(0.003)
    return backends


def is_free(budget):
    with budget._lock:
        return (budget._free, budget._num_sharers, len(budget._waiting), len(budget._leased)) == (budget.cores, 0, 0, 0)


@pytest.mark.parametrize("make_backends", MANY)
def test_answers_are_those_of_an_engine_in_the_process(engine_of, make_backends):
    engine, _ = engine_of(make_backends())
    other = make_engine(make_backends())
    prompts = [[number, 2, 3, 4] for number in range(7)]
    there, here = [[events_of(each) for each in [submit(e, p, n=2) for p in prompts]] for e in (engine, other)]
    assert [text_of(events) for events in there] == [text_of(events) for events in here]
    for events in there:
        assert [event.num_output_tokens for event in events if isinstance(event, ChoiceEnd)] == [8, 8]
        assert isinstance(events[-1], GenerationEnd)
        assert events[-1].num_prompt_tokens == 4
    other.close()


def test_vectors_are_those_of_an_engine_in_the_process(engine_of):
    statistics = StatisticsCounter()
    (there, _), here = engine_of(FakeEmbedder(), statistics=statistics), make_engine(FakeEmbedder())
    requests = [[[1], [2, 3, 4], [9] * 16], [[5]]]
    for engine in (here, there):
        assert (engine.vectors.dimensions, engine.vectors.encode(["ab", "c"])) == (3, [[97, 98], [99]])
    made = [[events_of(each)[:-1] for each in [engine.embed(texts) for texts in requests]] for engine in (here, there)]
    assert made[0] == made[1]
    assert [[event.choice for event in events] for events in made[0]] == [[0, 1, 2], [0]]
    assert there.drain(TIMEOUT)
    assert (statistics.snapshot().requests, statistics.snapshot().prompt_tokens) == (2, 21)
    here.close()


@pytest.mark.parametrize("make_backends", ALL)
def test_what_the_other_kind_of_model_makes_is_not_asked_for(engine_of, make_backends):
    engine, _ = engine_of(make_backends())
    with pytest.raises(ValueError, match="only"):
        engine.embed([[1]]) if engine.vectors is None else engine.submit([1], GenerationParams(1))


def test_vectors_that_nobody_waits_for_any_more_are_not_made(engine_of):
    embedder, gate = FakeEmbedder(), threading.Event()
    embedder.on_forward = lambda: gate.wait(TIMEOUT)
    engine, process = engine_of(embedder)
    generation = engine.embed([[1]] * 10)
    wait_until(lambda: embedder.texts)
    generation.close()
    wait_until(lambda: process._child._generations == {})  # it has heard of it
    gate.set()
    wait_until(lambda: process.engine.load == EngineLoad(0, 0))
    assert len(embedder.texts) == 1


@pytest.mark.parametrize("make_backends", MANY)
def test_answers_are_kept_within_a_grammar_there_as_well(engine_of, make_backends):
    engine, process = engine_of(make_backends())
    gone = submit(engine, grammar=Grammar("regex", "[x-z]{8}"))
    gone.close()
    events = events_of(submit(engine, grammar=Grammar("regex", "[abc]{4}"), max_tokens=20))
    assert re.fullmatch("[abc]{4}", text_of(events))
    assert isinstance(events[-1], GenerationEnd)
    wait_until(lambda: engine.load == process.engine.load == EngineLoad(0, 0))


def test_statistics_count_what_the_process_did(engine_of):
    statistics = StatisticsCounter()
    engine, _ = engine_of(statistics=statistics)
    for _ in range(3):
        events_of(submit(engine))
    assert engine.drain(TIMEOUT)
    snapshot = statistics.snapshot()
    assert (snapshot.requests, snapshot.prompt_tokens, snapshot.output_tokens, snapshot.errors) == (3, 9, 24, 0)
    assert snapshot.cached_tokens > 0


def test_the_queue_is_the_servers(engine_of):
    gate = threading.Event()
    backends = [FakeBackend()]
    backends[0].on_forward = lambda: gate.wait(TIMEOUT)
    engine, _ = engine_of(backends, max_waiting=1)
    first, second = submit(engine), submit(engine)
    with pytest.raises(QueueFull):
        submit(engine)
    assert (engine.load.running, engine.load.waiting) == (1, 1)
    second.close()
    assert engine.load.waiting == 0
    gate.set()
    assert isinstance(events_of(first)[-1], GenerationEnd)


@pytest.mark.parametrize("make_backends", ALL)
def test_who_leaves_frees_the_slot(engine_of, make_backends):
    statistics = StatisticsCounter()
    engine, _ = engine_of(slowed(make_backends()), statistics=statistics)
    generations = [submit(engine, max_tokens=200) for _ in range(4)]
    assert generations[0].read(0, TIMEOUT)
    for generation in generations[:3]:
        generation.close()
    assert isinstance(events_of(generations[3])[-1], GenerationEnd)
    assert engine.drain(TIMEOUT)
    assert statistics.snapshot().cancelled == 3


def test_an_engine_that_fails_in_a_pass_says_so_and_goes_on(engine_of):
    backend = FakeBackend()

    def fail():
        backend._busy = False
        raise RuntimeError("the library could not evaluate the tokens")

    backend.on_forward = fail
    engine, _ = engine_of([backend])
    (failed,) = events_of(submit(engine))
    assert isinstance(failed.error, EngineFailed)
    assert failed.error.message == "The model failed while it answered: the library could not evaluate the tokens."
    backend.on_forward = lambda: None
    assert isinstance(events_of(submit(engine))[-1], GenerationEnd)


@pytest.mark.parametrize("make_backends", ALL)
def test_a_death_ends_everything_with_an_error_and_is_told(engine_of, make_backends):
    budget, deaths = ComputeBudget(2), []
    engine, process = engine_of(slowed(make_backends()), budget=budget)
    engine.on_death(deaths.append)
    generations = [submit(engine, max_tokens=250) for _ in range(5)]
    assert generations[0].read(0, TIMEOUT)
    process.crash()
    assert process.over.wait(TIMEOUT)
    for generation in generations:
        last = events_of(generation)[-1]
        assert isinstance(last, Failed)
        assert isinstance(last.error, EngineDied)
        assert last.error.status == 503
    assert len(deaths) == 1
    assert engine.drain(0)
    assert is_free(budget)
    with pytest.raises(EngineDied):
        submit(engine)
    late = []
    engine.on_death(late.append)
    assert late == deaths


def test_who_started_it_hears_of_a_death_before_the_clients_do(engine_of):
    engine, process = engine_of(slowed([FakeBackend()]))
    generation = submit(engine, max_tokens=250)
    assert generation.read(0, TIMEOUT)
    finished = []
    engine.on_death(lambda _: finished.append(generation.finished))
    process.crash()
    assert process.over.wait(TIMEOUT)
    assert isinstance(events_of(generation)[-1], Failed)
    assert finished == [False]


def test_close_ends_what_runs_and_tells_nobody_of_a_death(engine_of):
    budget, deaths = ComputeBudget(2), []
    engine, _ = engine_of(slowed([FakeBackend(), FakeBackend()]), budget=budget)
    engine.on_death(deaths.append)
    generation = submit(engine, max_tokens=250)
    assert generation.read(0, TIMEOUT)
    engine.close()
    assert isinstance(events_of(generation)[-1].error, ShuttingDown)
    assert (deaths, is_free(budget), engine.drain(0)) == ([], True, True)


def test_two_engines_share_the_cores(engine_of):
    budget = ComputeBudget(2)
    backends = [FakeBackend(), FakeBackend()]
    engines = [engine_of([backend], budget=budget)[0] for backend in backends]
    alone = submit(engines[0], max_tokens=20)
    assert isinstance(events_of(alone)[-1], GenerationEnd)
    assert {threads for _, _, threads in backends[0].passes[3:]} <= {1, 2}
    generations = [submit(engine, max_tokens=200) for engine in engines]
    for generation in generations:
        assert isinstance(events_of(generation)[-1], GenerationEnd)
    for engine in engines:
        engine.close()
    assert is_free(budget)


@pytest.fixture
def registry_of():
    made = []

    def make(loader):
        registry = ModelRegistry([ModelSpec(id="m", source="none", load="on_demand")], lambda: loader)
        made.append(registry)
        return registry

    yield make
    for registry in made:
        registry.close(0)


def ask(registry, max_tokens=5):
    with registry.use("m", watch=lambda: None) as engine:
        return submit(engine, max_tokens=max_tokens)


class TestRecovery:
    def test_a_model_whose_engine_died_is_loaded_again(self, registry_of):
        loader = FakeProcessLoader()
        registry = registry_of(loader)
        assert isinstance(events_of(ask(registry))[-1], GenerationEnd)
        loader.processes[0].crash()
        wait_until(lambda: len(loader.engines) == 2 and registry.status("m").state is ModelState.READY)
        assert isinstance(events_of(ask(registry))[-1], GenerationEnd)
        assert registry.status("m").statistics.crashes == 1
        assert registry._entries["m"].memory_bytes == 1100

    def test_after_several_deaths_in_a_row_it_is_failed_with_the_reason(self, registry_of, monkeypatch):
        monkeypatch.setattr("llmserve.registry._BACK_OFF", 0.001)
        loader = FakeProcessLoader()
        registry = registry_of(loader)
        registry.load("m")
        for number in range(MAX_CRASHES):
            wait_until(lambda number=number: len(loader.engines) == number + 1 and registry.identity("m") is not None)
            loader.processes[number].crash()
            assert loader.processes[number].over.wait(TIMEOUT)
        wait_until(lambda: registry.status("m").state is ModelState.FAILED)
        assert "has crashed 5 times in a row" in registry.status("m").reason
        assert registry._entries["m"].memory_bytes == 0
        registry.load("m")
        assert isinstance(events_of(ask(registry))[-1], GenerationEnd)

    @pytest.mark.parametrize("make_backends", ALL)
    def test_an_answer_between_begins_the_count_anew(self, registry_of, monkeypatch, make_backends):
        monkeypatch.setattr("llmserve.registry._BACK_OFF", 60.0)
        loader = FakeProcessLoader(make_backends)
        registry = registry_of(loader)
        for number in range(MAX_CRASHES + 2):
            assert isinstance(events_of(ask(registry))[-1], GenerationEnd)
            with registry.use("m", lambda: None) as engine:
                assert engine.drain(TIMEOUT)
            loader.processes[number].crash()
            wait_until(lambda number=number: len(loader.engines) == number + 2)


act = st.sampled_from(["submit", "submit", "submit", "cancel", "crash", "unload", "reload", "load", "wait"])


@pytest.mark.slow
@pytest.mark.parametrize("make_backends", ALL)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(actions=st.lists(act, min_size=3, max_size=14))
def test_in_any_order_every_request_is_answered_once_and_every_slot_is_free(make_backends, actions):
    loader = FakeProcessLoader(make_backends)
    registry = ModelRegistry([ModelSpec(id="m", source="none", load="on_demand")], lambda: loader)
    registry._entries["m"].num_crashes = -1000  # it is not the giving up that is tried here
    generations, cancelled, threads = perform(actions, loader, registry)
    for index, generation in enumerate(generations):
        if index not in cancelled:
            ends = [event for event in events_of(generation) if isinstance(event, GenerationEnd | Failed)]
            assert len(ends) == 1
            assert isinstance(ends[0], GenerationEnd) or isinstance(ends[0].error, EngineDied), ends
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    wait_until(lambda: registry.status("m").state is not ModelState.LOADING)
    for engine, process in zip(loader.engines, loader.processes, strict=True):
        assert engine.drain(TIMEOUT)
        wait_until(lambda process=process: process.over.is_set() or process.engine.load == EngineLoad(0, 0))
    registry.close(TIMEOUT)
    for engine in loader.engines:
        engine.close()
    assert is_free(loader.budget)


def perform(actions, loader, registry):
    """What was submitted, which of it was cancelled by number, and the threads that load and unload."""
    generations, cancelled, threads = [], set(), []
    for number, action in enumerate(actions):
        match action:
            case "submit":
                with suppress(EngineDied):  # told at once
                    generations.append(ask(registry, max_tokens=5 + 11 * (number % 3)))
            case "cancel" if generations:
                cancelled.add(number % len(generations))
                generations[number % len(generations)].close()
            case "crash" if loader.processes:
                loader.processes[-1].crash()
            case "wait" if generations:
                generations[-1].read(0, 0.05)
            case "unload" | "reload" | "load":
                threads.append(threading.Thread(target=getattr(registry, action), args=("m",)))
                threads[-1].start()
    return generations, cancelled, threads
