import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.config import ModelSpec
from llmserve.engine.generation import Failed, GenerationEnd, GenerationParams
from llmserve.errors import (
    MemoryBudgetExceeded,
    ModelFileError,
    ModelLoadFailed,
    ModelNotFound,
    ShuttingDown,
)
from llmserve.registry import COOL_DOWN, ModelRegistry, ModelState, Resident, choose_evictions
from tests.fakes import FakeBackend, FakeLoader

TIMEOUT = 10.0


def specs(*ids, load="on_demand"):
    return [ModelSpec(id=name, source="none", aliases=(f"{name}-alias",), load=load) for name in ids]


@pytest.fixture
def registry_of():
    made = []

    def make(loader, *ids, load="on_demand", **options):
        registry = ModelRegistry(specs(*ids, load=load), lambda: loader, **options)
        made.append((registry, loader))
        return registry

    yield make
    for registry, loader in made:
        registry.close(grace=0)
        wait_until(lambda loader=loader: all(backend.closed for backend in loader.backends))


def wait_until(condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        threading.Event().wait(0.005)


def in_threads(*calls):
    """Run calls at once; their results, an exception standing for itself."""
    results = [None] * len(calls)

    def run(number):
        try:
            results[number] = calls[number]()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    return threads, results


def submit(registry, name, max_tokens=5):
    with registry.use(name, watch=lambda: None) as engine:
        return engine.submit([1, 2, 3], GenerationParams(max_tokens=max_tokens))


def last_event(generation):
    return list(generation.events(TIMEOUT))[-1]


def test_names_are_resolved_and_unknown_ones_are_not(registry_of):
    registry = registry_of(FakeLoader(), "a", "b")
    assert registry.resolve("b-alias").id == registry.resolve("b").id == "b"
    with pytest.raises(ModelNotFound):
        registry.resolve("c")


def test_a_model_is_loaded_by_its_first_use_and_once_only(registry_of):
    loader = FakeLoader()
    registry = registry_of(loader, "a")
    assert registry.status("a").state is ModelState.UNLOADED
    assert registry.identity("a") is None
    threads, results = in_threads(*[lambda: last_event(submit(registry, "a"))] * 8)
    for thread in threads:
        thread.join(TIMEOUT)
    assert all(isinstance(result, GenerationEnd) for result in results)
    assert loader.prepared == ["a"]
    assert registry.status("a").state is ModelState.READY
    assert registry.identity("a") == "a-1"
    assert registry.status("a").statistics.requests == 8


def test_startup_models_are_loaded_without_being_asked_for(registry_of):
    loader = FakeLoader()
    loader.hold("a")
    registry = registry_of(loader, "a", load="startup")
    registry.start()
    assert registry.starting
    loader.let_go("a")
    wait_until(lambda: registry.status("a").state is ModelState.READY)
    assert not registry.starting


def test_a_slow_load_delays_no_other_model(registry_of):
    loader = FakeLoader()
    loader.hold("slow")
    registry = registry_of(loader, "slow", "quick")
    threads, _ = in_threads(lambda: registry.load("slow"))
    wait_until(lambda: registry.status("slow").state is ModelState.LOADING)
    assert isinstance(last_event(submit(registry, "quick")), GenerationEnd)
    loader.let_go("slow")
    threads[0].join(TIMEOUT)


def test_who_waits_for_a_load_may_give_up(registry_of):
    loader = FakeLoader()
    loader.hold("a")
    registry = registry_of(loader, "a")

    def give_up():
        raise TimeoutError("enough")

    with pytest.raises(TimeoutError), registry.use("a", give_up):
        pass
    loader.let_go("a")
    wait_until(lambda: registry.status("a").state is ModelState.READY)


def test_a_failed_load_is_reported_remembered_and_tried_again_after_a_while(registry_of):
    now = [100.0]
    loader = FakeLoader()
    loader.failures["a"] = ModelFileError("The file is half a file.")
    registry = registry_of(loader, "a", clock=lambda: now[0])
    for _ in range(3):
        with pytest.raises(ModelLoadFailed, match="half a file") as caught:
            submit(registry, "a")
    assert 0 < caught.value.retry_after <= COOL_DOWN
    assert len(loader.prepared) == 1
    assert (registry.status("a").state, "half a file" in registry.status("a").reason) == (ModelState.FAILED, True)
    del loader.failures["a"]
    now[0] += COOL_DOWN + 1
    assert isinstance(last_event(submit(registry, "a")), GenerationEnd)
    assert registry.status("a").reason is None


def test_a_failed_load_is_tried_again_at_once_when_asked_for(registry_of):
    loader = FakeLoader()
    loader.failures["a"] = RuntimeError("surprise")
    registry = registry_of(loader, "a")
    with pytest.raises(ModelLoadFailed, match="surprise"):
        registry.load("a")
    del loader.failures["a"]
    registry.load("a")
    assert registry.status("a").state is ModelState.READY


def test_unload_waits_for_what_is_in_flight_and_frees_everything(registry_of):
    loader = FakeLoader()
    registry = registry_of(loader, "a")
    registry.load("a")
    gate = threading.Event()
    for backend in loader.backends:
        backend.on_forward = lambda: gate.wait(TIMEOUT)
    generation = submit(registry, "a")
    threads, _ = in_threads(lambda: registry.unload("a"))
    wait_until(lambda: registry.status("a").state is ModelState.DRAINING)
    assert not loader.backends[0].closed
    gate.set()
    assert isinstance(last_event(generation), GenerationEnd)
    threads[0].join(TIMEOUT)
    assert registry.status("a").state is ModelState.UNLOADED
    assert all(backend.closed for backend in loader.backends)


def test_a_request_during_unload_gets_the_model_loaded_again(registry_of):
    loader = FakeLoader()
    registry = registry_of(loader, "a")
    registry.load("a")
    gate = threading.Event()
    loader.backends[0].on_forward = lambda: gate.wait(TIMEOUT)
    first = submit(registry, "a")
    in_threads(lambda: registry.unload("a"))
    wait_until(lambda: registry.status("a").state is ModelState.DRAINING)
    threads, results = in_threads(lambda: last_event(submit(registry, "a")))
    gate.set()
    threads[0].join(TIMEOUT)
    assert isinstance(last_event(first), GenerationEnd)
    assert isinstance(results[0], GenerationEnd)
    assert loader.prepared == ["a", "a"]


def test_a_reload_lets_the_old_engine_finish_and_gives_new_requests_the_new_one(registry_of):
    loader = FakeLoader()
    registry = registry_of(loader, "a")
    registry.load("a")
    (old,) = loader.backends
    gate = threading.Event()
    old.on_forward = lambda: gate.wait(TIMEOUT)
    generation = submit(registry, "a")
    threads, _ = in_threads(lambda: registry.reload("a"))
    wait_until(lambda: registry.identity("a") == "a-2")
    assert isinstance(last_event(submit(registry, "a")), GenerationEnd)
    assert not old.closed
    gate.set()
    assert isinstance(last_event(generation), GenerationEnd)
    threads[0].join(TIMEOUT)
    assert old.closed


def test_a_reload_that_fails_leaves_the_old_engine_in_place(registry_of):
    loader = FakeLoader()
    registry = registry_of(loader, "a")
    registry.load("a")
    loader.failures["a"] = ModelFileError("The new file is text.")
    with pytest.raises(ModelLoadFailed, match="is text"):
        registry.reload("a")
    assert registry.status("a").state is ModelState.READY
    assert isinstance(last_event(submit(registry, "a")), GenerationEnd)


def test_the_least_recently_used_idle_model_makes_room(registry_of):
    loader = FakeLoader(memory_bytes=100)
    registry = registry_of(loader, "a", "b", "c", memory_budget=250)
    for name in ("a", "b", "a", "c"):
        assert isinstance(last_event(submit(registry, name)), GenerationEnd)
        with registry.use(name, lambda: None) as engine:
            assert engine.drain(TIMEOUT)
    states = {name: registry.status(name).state for name in "abc"}
    assert states == {"a": ModelState.READY, "b": ModelState.UNLOADED, "c": ModelState.READY}


def test_a_busy_model_is_never_evicted(registry_of):
    loader = FakeLoader(memory_bytes=100)
    registry = registry_of(loader, "a", "b", memory_budget=150)
    registry.load("a")
    gate = threading.Event()
    loader.backends[0].on_forward = lambda: gate.wait(TIMEOUT)
    generation = submit(registry, "a")
    with pytest.raises(MemoryBudgetExceeded, match="150"):
        registry.load("b")
    gate.set()
    assert isinstance(last_event(generation), GenerationEnd)
    with registry.use("a", lambda: None) as engine:
        assert engine.drain(TIMEOUT)
    registry.load("b")
    assert registry.status("a").state is ModelState.UNLOADED


def test_a_reload_that_does_not_fit_beside_the_old_engine_unloads_it_first(registry_of):
    loader = FakeLoader(memory_bytes=100)
    registry = registry_of(loader, "a", memory_budget=150)
    registry.load("a")
    registry.reload("a")
    assert registry.identity("a") not in ("a-1", None)
    assert [backend.closed for backend in loader.backends] == [True, False]
    assert registry._entries["a"].memory_bytes == 100


def test_close_cuts_what_the_grace_period_does_not_suffice_for(registry_of):
    loader = FakeLoader()
    registry = registry_of(loader, "a")
    registry.load("a")
    gate = threading.Event()
    loader.backends[0].on_forward = lambda: gate.wait(TIMEOUT)
    generation = submit(registry, "a", max_tokens=100)
    threads, _ = in_threads(lambda: registry.close(grace=0.05))
    event = last_event(generation)
    assert isinstance(event, Failed)
    assert isinstance(event.error, ShuttingDown)
    gate.set()
    threads[0].join(TIMEOUT)
    with pytest.raises(ShuttingDown):
        submit(registry, "a")


@pytest.mark.slow
def test_whatever_is_done_at_once_ends_with_every_request_answered(registry_of):
    """Requests, loads, unloads and reloads of two models from many threads, within a budget for one and a half."""
    loader = FakeLoader(memory_bytes=100)
    registry = registry_of(loader, "a", "b", memory_budget=350)

    def requests(name):
        return [type(last_event(submit(registry, name))) for _ in range(15)]

    def actions(name):
        for action in (registry.unload, registry.reload, registry.load, registry.unload, registry.load) * 2:
            action(name)

    calls = [lambda n=n: requests(n) for n in "abababab"] + [lambda n=n: actions(n) for n in "abab"]
    threads, results = in_threads(*calls)
    for thread in threads:
        thread.join(60)
    assert [result for result in results if isinstance(result, Exception)] == []
    assert all(kinds == [GenerationEnd] * 15 for kinds in results[:8])
    loaded = [name for name in "ab" if registry.status(name).state is ModelState.READY]
    assert sum(not backend.closed for backend in loader.backends) == len(loaded)
    assert sum(registry._entries[name].memory_bytes for name in "ab") == 100 * len(loaded)


residents = st.lists(
    st.builds(Resident, st.text(max_size=3), st.integers(1, 100), st.floats(0, 100), st.booleans()),
    max_size=8,
    unique_by=lambda r: r.id,
)


@given(st.integers(1, 150), residents, st.integers(1, 500))
def test_evictions_are_enough_needed_and_never_of_a_busy_model(wanted, loaded, budget):
    victims = choose_evictions(wanted, loaded, budget)
    by_id = {resident.id: resident for resident in loaded}
    total = sum(resident.memory_bytes for resident in loaded)
    if victims is None:
        assert total - sum(r.memory_bytes for r in loaded if not r.busy) + wanted > budget
        return
    freed = sum(by_id[victim].memory_bytes for victim in victims)
    assert not any(by_id[victim].busy for victim in victims)
    assert total - freed + wanted <= budget
    if victims:
        assert total - freed + by_id[victims[-1]].memory_bytes + wanted > budget
        kept = [r.last_used for r in loaded if r.id not in victims and not r.busy]
        assert all(by_id[victim].last_used <= last_used for victim in victims for last_used in kept)


def test_the_fake_notices_use_after_close():
    backend = FakeBackend()
    backend.close()
    with pytest.raises(AssertionError, match="after close"):
        backend.forward([1], 0, 1)
