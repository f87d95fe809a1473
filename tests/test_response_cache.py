import gc
import threading
import tracemalloc

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmserve.config import CacheConfig
from llmserve.engine.generation import ChoiceEnd, Delta, Failed, FinishReason, Generation, GenerationEnd, SamplingParams
from llmserve.errors import EngineFailed, QueueFull
from llmserve.response_cache import Answer, Outcome, ResponseCache, key

END = GenerationEnd(3, 0, 0.0, 0.1, 0.2)
EVENTS = [Delta(0, "Hello"), Delta(0, " there"), ChoiceEnd(0, FinishReason.STOP, 3), END]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def finished(events=EVENTS) -> Generation:
    generation = Generation()
    for event in events:
        generation.publish(event)
    return generation


def must_not_start() -> Generation:
    raise AssertionError("a generation was begun")


def read_all(answer: Answer) -> list:
    events = []
    while not answer.ended:
        events += answer.read(5)
    return events


def remember(cache: ResponseCache, name: bytes = b"k", events=EVENTS) -> None:
    answer = cache.open(name, lambda: finished(events))
    read_all(answer)
    answer.close()


# ---- the key


def test_a_request_that_chance_decides_has_no_key():
    assert key(SamplingParams(temperature=0.7), "chat") is None


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0), SamplingParams(seed=0), SamplingParams(seed=-5)])
def test_a_greedy_or_seeded_request_has_a_key(sampling):
    assert len(key(sampling, "chat")) == 32


@pytest.mark.parametrize("changed", [{"seed": 7}, {"top_p": 0.5}, {"top_k": 4}, {"min_p": 0.1}])
def test_what_a_greedy_choice_does_not_look_at_does_not_change_the_key(changed):
    greedy = SamplingParams(temperature=0.0)
    assert key(greedy._replace(**changed), "chat") == key(greedy, "chat")


@pytest.mark.parametrize("changed", [{"presence_penalty": 1.0}, {"frequency_penalty": 1.0}, {"repetition_penalty": 1.1}])
def test_penalties_change_the_key_of_a_greedy_request(changed):
    greedy = SamplingParams(temperature=0.0)
    assert key(greedy._replace(**changed), "chat") != key(greedy, "chat")


@pytest.mark.parametrize("changed", [{"seed": 2}, {"temperature": 0.5}, {"top_p": 0.5}, {"top_k": 4}, {"min_p": 0.1}])
def test_everything_changes_the_key_of_a_seeded_request(changed):
    seeded = SamplingParams(seed=1)
    assert key(seeded._replace(**changed), "chat") != key(seeded, "chat")


def test_the_rest_of_the_request_changes_the_key_but_not_the_order_of_its_names():
    greedy = SamplingParams(temperature=0)
    assert key(greedy, "chat", {"a": 1, "b": 2}) == key(greedy, "chat", {"b": 2, "a": 1})
    assert key(greedy, "chat", {"a": 1}) != key(greedy, "chat", {"a": 2})
    assert key(greedy, "chat", "ab", "c") != key(greedy, "chat", "a", "bc")


# ---- remember and replay


def test_a_whole_answer_is_repeated_with_its_deltas_and_its_age():
    clock = Clock()
    cache = ResponseCache(CacheConfig(), clock)
    first = cache.open(b"k", finished)
    assert (first.outcome, first.age) == (Outcome.MISS, None)
    assert read_all(first) == EVENTS
    clock.now = 12.5
    second = cache.open(b"k", must_not_start)
    assert (second.outcome, second.age) == (Outcome.HIT, 12.5)
    assert read_all(second) == EVENTS


def test_an_answer_is_forgotten_when_it_is_too_old():
    clock = Clock()
    cache = ResponseCache(CacheConfig(max_age=60), clock)
    remember(cache)
    clock.now = 60
    assert cache.open(b"k", must_not_start).outcome is Outcome.HIT
    clock.now = 60.1
    assert cache.open(b"k", finished).outcome is Outcome.MISS


def test_a_failed_answer_is_not_remembered():
    cache = ResponseCache(CacheConfig())
    remember(cache, events=[Delta(0, "x"), Failed(EngineFailed("broken"))])
    assert cache.open(b"k", finished).outcome is Outcome.MISS


def test_an_answer_whose_end_nobody_read_is_not_remembered():
    cache = ResponseCache(CacheConfig())
    generation = Generation()
    answer = cache.open(b"k", lambda: generation)
    answer.close()
    assert generation.closed
    assert cache.open(b"k", finished).outcome is Outcome.MISS


def test_without_a_key_every_request_has_its_own_generation():
    cache = ResponseCache(CacheConfig())
    remember(cache, None)
    answer = cache.open(None, finished)
    assert answer.outcome is Outcome.BYPASS
    assert read_all(answer) == EVENTS


def test_a_cache_without_entries_neither_remembers_nor_joins():
    cache = ResponseCache(CacheConfig(max_entries=0))
    running = cache.open(b"k", Generation)
    assert cache.open(b"k", finished).outcome is Outcome.BYPASS
    assert running.outcome is Outcome.BYPASS


def test_no_store_neither_looks_nor_remembers():
    cache = ResponseCache(CacheConfig())
    answer = cache.open(b"k", finished, may_lookup=False, may_store=False)
    assert answer.outcome is Outcome.BYPASS
    read_all(answer)
    assert cache.open(b"k", finished).outcome is Outcome.MISS


def test_no_cache_generates_anew_and_replaces_what_was_remembered():
    cache = ResponseCache(CacheConfig())
    remember(cache)
    fresh = [Delta(0, "Goodbye"), ChoiceEnd(0, FinishReason.STOP, 2), END]
    answer = cache.open(b"k", lambda: finished(fresh), may_lookup=False)
    assert answer.outcome is Outcome.BYPASS
    read_all(answer)
    assert read_all(cache.open(b"k", must_not_start)) == fresh


def test_clear_forgets_everything():
    cache = ResponseCache(CacheConfig())
    remember(cache)
    cache.clear()
    assert cache.open(b"k", finished).outcome is Outcome.MISS


def test_the_bytes_of_an_entry_are_those_it_takes():
    texts = [f"word {number} " for number in range(2000)]
    events = [*(Delta(0, text) for text in texts), ChoiceEnd(0, FinishReason.STOP, 2000), END]
    gc.collect()
    tracemalloc.start()
    cache = ResponseCache(CacheConfig(max_bytes=10**8))
    remember(cache, events=[Delta(each.choice, f"{each.text}.") if isinstance(each, Delta) else each for each in events])
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert cache._entries.num_bytes == pytest.approx(taken, rel=0.15)


def test_an_answer_larger_than_the_cache_is_not_kept():
    cache = ResponseCache(CacheConfig(max_bytes=2000))
    remember(cache, events=[Delta(0, "x" * 2000), ChoiceEnd(0, FinishReason.STOP, 3), END])
    assert cache.open(b"k", finished).outcome is Outcome.MISS


def test_find_gives_what_is_remembered_and_begins_nothing():
    clock = Clock()
    cache = ResponseCache(CacheConfig(max_age=60), clock)
    assert cache.find(b"k") is None
    remember(cache)
    clock.now = 5
    found = cache.find(b"k")
    assert (found.outcome, found.age, read_all(found)) == (Outcome.HIT, 5, EVENTS)
    assert cache.find(None) is None
    clock.now = 61
    assert cache.find(b"k") is None


def test_what_was_made_of_a_repeated_answer_is_kept_with_it_and_goes_with_it():
    cache = ResponseCache(CacheConfig())
    remember(cache)
    before = cache._entries.num_bytes
    first = cache.find(b"k")
    assert first.rendering is None
    first.keep("made", 1000)
    first.keep("made again", 1000)
    assert cache.find(b"k").rendering == "made"
    assert cache._entries.num_bytes == before + 1000
    cache.clear()
    first.keep("too late", 1000)
    assert cache._entries.num_bytes == 0


def test_a_rendering_that_has_no_room_goes_with_its_answer():
    cache = ResponseCache(CacheConfig(max_bytes=3000))
    remember(cache)
    cache.find(b"k").keep("made", 3000)
    assert cache.find(b"k") is None


def test_nothing_is_kept_with_an_answer_that_was_not_repeated():
    cache = ResponseCache(CacheConfig())
    answer = cache.open(b"k", finished)
    read_all(answer)
    answer.keep("made", 1000)
    assert answer.rendering is None
    assert cache.find(b"k").rendering is None


# ---- single flight


def test_identical_requests_share_a_running_generation_and_each_gets_all_of_it():
    cache = ResponseCache(CacheConfig())
    generation = Generation()
    first = cache.open(b"k", lambda: generation)
    generation.publish(EVENTS[0])
    assert first.read(5) == EVENTS[:1]
    second = cache.open(b"k", must_not_start)
    assert second.outcome is Outcome.COALESCED
    for event in EVENTS[1:]:
        generation.publish(event)
    assert read_all(second) == EVENTS
    assert read_all(first) == EVENTS[1:]


def test_a_shared_generation_goes_on_when_the_first_client_leaves():
    cache = ResponseCache(CacheConfig())
    generation = Generation()
    first = cache.open(b"k", lambda: generation)
    second = cache.open(b"k", must_not_start)
    first.close()
    first.close()
    assert not generation.closed
    second.close()
    assert generation.closed


def test_a_cancelled_generation_is_not_joined():
    cache = ResponseCache(CacheConfig())
    cache.open(b"k", Generation).close()
    assert cache.open(b"k", finished).outcome is Outcome.MISS


def test_a_generation_that_failed_unnoticed_is_not_joined():
    cache = ResponseCache(CacheConfig())
    first = cache.open(b"k", lambda: finished([Failed(EngineFailed("broken"))]))
    second = cache.open(b"k", finished)
    assert second.outcome is Outcome.MISS
    read_all(first)
    assert cache.open(b"k", must_not_start).outcome is Outcome.COALESCED


def test_an_answer_that_ended_well_unnoticed_is_joined():
    cache = ResponseCache(CacheConfig())
    cache.open(b"k", finished)
    assert read_all(cache.open(b"k", must_not_start)) == EVENTS


def test_a_no_cache_request_is_not_joined():
    cache = ResponseCache(CacheConfig())
    cache.open(b"k", Generation, may_lookup=False)
    assert cache.open(b"k", finished).outcome is Outcome.MISS


def test_closing_after_the_end_does_not_cancel():
    cache = ResponseCache(CacheConfig())
    generation = finished()
    answer = cache.open(b"k", lambda: generation)
    read_all(answer)
    answer.close()
    assert not generation.closed


def test_simultaneous_identical_requests_begin_one_generation():
    cache = ResponseCache(CacheConfig())
    inside, go = threading.Event(), threading.Event()
    starts, answers = [], []

    def start() -> Generation:
        starts.append(1)
        inside.set()
        assert go.wait(5)
        return finished()

    threads = [threading.Thread(target=lambda: answers.append(cache.open(b"k", start))) for _ in range(6)]
    threads[0].start()
    assert inside.wait(5)  # the lock is free meanwhile: others may come and go
    assert cache.open(b"other", finished).outcome is Outcome.MISS
    for thread in threads[1:]:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(5)
    assert len(starts) == 1
    assert sorted(answer.outcome for answer in answers) == [Outcome.COALESCED] * 5 + [Outcome.MISS]
    assert all(read_all(answer) == EVENTS for answer in answers)


def test_when_the_start_fails_it_fails_for_everyone_who_waited_for_it():
    cache = ResponseCache(CacheConfig())
    inside, go = threading.Event(), threading.Event()
    errors = []

    def start() -> Generation:
        inside.set()
        assert go.wait(5)
        raise QueueFull("no room", retry_after=3)

    def ask(begin) -> None:
        try:
            cache.open(b"k", begin)
        except QueueFull as error:
            errors.append(error.retry_after)

    first = threading.Thread(target=ask, args=(start,))
    first.start()
    assert inside.wait(5)
    flight = cache._flights[b"k"]
    second = threading.Thread(target=ask, args=(must_not_start,))
    second.start()
    while flight.readers < 2:
        second.join(0.001)
    go.set()
    first.join(5)
    second.join(5)
    assert errors == [3, 3]
    assert cache.open(b"k", finished).outcome is Outcome.MISS


def test_many_threads_that_come_and_go_get_whole_answers_and_leave_nothing_behind():
    cache = ResponseCache(CacheConfig(max_entries=2))
    wrong, generations = [], []

    def start() -> Generation:
        generations.append(generation := Generation())
        threading.Thread(target=lambda: [generation.publish(event) for event in EVENTS]).start()
        return generation

    def client(number: int) -> None:
        for turn in range(40):
            answer = cache.open(b"%d" % ((number + turn) % 3), start, may_lookup=turn % 7 != 0)
            if turn % 3 == number % 3:
                answer.read(0.001)
            elif read_all(answer) != EVENTS:
                wrong.append((number, turn))
            answer.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert wrong == []
    assert cache._flights == {}
    assert all(generation.closed or generation.finished for generation in generations)


# ---- any interleaving


class CacheMachine(RuleBasedStateMachine):
    """Clients, an engine and time in any order, against a plain model of what each client must see."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.cache = ResponseCache(CacheConfig(max_entries=2, max_age=10), self.clock)
        self.running: list[Generation] = []
        self.clients: list[tuple[Answer, Generation | None, list]] = []  # None: replayed

    def start(self) -> Generation:
        self.running.append(generation := Generation())
        return generation

    @rule(name=st.sampled_from([b"a", b"b", b"c", None]), may_lookup=st.booleans(), may_store=st.booleans())
    def open(self, name, may_lookup, may_store):
        before = len(self.running)
        answer = self.cache.open(name, self.start, may_lookup=may_lookup, may_store=may_store)
        begun = len(self.running) > before
        assert begun == (answer.outcome in (Outcome.MISS, Outcome.BYPASS))
        assert (answer.age is not None) == (answer.outcome is Outcome.HIT)
        assert answer.age is None or 0 <= answer.age <= 10
        self.clients.append((answer, answer._generation, []))
        if not begun:
            assert not answer._generation.closed, "joined or repeated what was cancelled"

    @precondition(lambda self: self.running)
    @rule(data=st.data(), event=st.sampled_from([Delta(0, "x"), END, Failed(EngineFailed("broken"))]))
    def publish(self, data, event):
        data.draw(st.sampled_from(self.running)).publish(event)

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def read(self, data):
        answer, _, seen = data.draw(st.sampled_from(self.clients))
        seen += answer.read(0)

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def close(self, data):
        client = data.draw(st.sampled_from(self.clients))
        self.clients.remove(client)
        client[0].close()
        client[0].close()

    @rule(seconds=st.floats(0, 12))
    def wait(self, seconds):
        self.clock.now += seconds

    @invariant()
    def every_client_sees_a_prefix_of_its_generation(self):
        for _, generation, seen in self.clients:
            assert seen == generation.read(0, 0)[: len(seen)]

    @invariant()
    def a_generation_is_cancelled_just_when_nobody_follows_it_any_more(self):
        followed = {generation for _, generation, _ in self.clients}
        for generation in self.running:
            if generation in followed:
                assert not generation.closed
            elif not generation.finished:
                assert generation.closed

    @invariant()
    def what_is_remembered_ended_well(self):
        for entry, _ in self.cache._entries._entries.values():
            assert entry.generation.read(-1, 0) == [END]
        assert len(self.cache._entries) <= 2

    def teardown(self):
        for answer, _, _ in self.clients:
            answer.close()
        assert self.cache._flights == {}


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
