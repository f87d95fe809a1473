"""Continuous batching on a fake library: who is evaluated when, what is shared, and that nothing is lost."""

import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmserve.engine.generation import ChoiceEnd, Delta, Failed, GenerationEnd, GenerationParams, SamplingParams
from llmserve.engine.pass_cost import PassCost
from llmserve.engine.statistics import StatisticsCounter
from llmserve.errors import EngineFailed, QueueFull, ShuttingDown
from tests.fakes import FakeBackend, FakeBatchBackend, babble, make_engine, ramble, say

TIMEOUT = 10.0
GREEDY = SamplingParams(temperature=0)


@pytest.fixture
def engine_of():
    """Make engines that are closed after the test, with their backend."""
    made = []

    def make(backend=None, **options):
        backend = backend or FakeBatchBackend()
        engine = make_engine(backend, **options)
        made.append((engine, backend))
        return engine

    yield make
    for engine, backend in made:
        engine.close()
        assert backend.closed


def submit(engine, prompt_ids, max_tokens=8, **params):
    return engine.submit(prompt_ids, GenerationParams(max_tokens, sampling=params.pop("sampling", GREEDY), **params))


def events_of(generation):
    return list(generation.events(TIMEOUT))


def text_of(generation, choice=0):
    return "".join(event.text for event in events_of(generation) if isinstance(event, Delta) and event.choice == choice)


def answer(prompt_ids, max_tokens=8, reply=babble):
    """What a greedy loop on one cache gives."""
    held, text = list(prompt_ids), ""
    for _ in range(max_tokens):
        held.append(reply(held))
        text += chr(held[-1])
    return text


def rounded(prompt_ids, grid):
    """What a cache of a backend that rounds holds of a prompt that was read alone."""
    num_full = len(prompt_ids) // grid * grid
    return [~token_id for token_id in prompt_ids[:num_full]] + prompt_ids[num_full:]


@pytest.fixture
def drafting(monkeypatch):
    """Draft as many tokens as one likes, whether it pays or not."""

    def set_length(num_tokens):
        monkeypatch.setattr(PassCost, "draft_length", lambda self, accuracies: min(num_tokens, len(accuracies)))

    return set_length


class Brake:
    """Holds every pass up until it is let go."""

    def __init__(self, backend):
        self._steps = threading.Semaphore(0)
        self._entered = threading.Semaphore(0)
        self._free = False
        backend.on_forward = self

    def __call__(self):
        self._entered.release()
        if not self._free:
            assert self._steps.acquire(timeout=TIMEOUT)

    def wait(self):
        """Until a pass has begun."""
        assert self._entered.acquire(timeout=TIMEOUT)

    def step(self):
        """Let the pass that is held end, and wait until the next one begins."""
        self._steps.release()
        self.wait()

    def release(self):
        self._free = True
        self._steps.release(1000)


def test_answers_made_together_equal_those_made_alone(engine_of):
    backend = FakeBatchBackend()
    engine = engine_of(backend)
    prompts = [[number] * (5 + number) for number in range(1, 9)]
    generations = [submit(engine, prompt_ids) for prompt_ids in prompts]
    assert [text_of(generation) for generation in generations] == [answer(prompt_ids) for prompt_ids in prompts]
    assert max(map(len, backend.passes)) == backend.num_sequences


def test_decoding_goes_on_while_a_long_prompt_is_read(engine_of):
    backend = FakeBatchBackend(context_length=512)
    brake = Brake(backend)
    engine = engine_of(backend, prefill_chunk=16)
    running = submit(engine, [1, 2, 3], max_tokens=100)
    brake.wait()
    long = submit(engine, [9] * 200, max_tokens=2)
    brake.release()
    assert text_of(long) == answer([9] * 200, 2)
    running.close()
    order = ["decodes" if pieces[0][0] == 0 else "reads" for pieces in backend.passes if pieces[0][2] > 1 or pieces[0][0] == 0]
    order = order[order.index("reads") - 1 :][: 2 * (200 // 16)]
    assert order == ["decodes", "reads"] * (200 // 16)
    assert all(sum(num_tokens for _, _, num_tokens in pieces) <= 16 for pieces in backend.passes)


@pytest.mark.parametrize("chunk", [1, 16, 33])
def test_prompts_are_cut_at_the_same_places_whatever_there_is_room_for(engine_of, chunk):
    backend = FakeBatchBackend()
    brake = Brake(backend)
    engine = engine_of(backend, prefill_chunk=chunk, prefix_cache=False)
    generations = [submit(engine, [number] * length, max_tokens=1) for number, length in enumerate((100, 16, 35))]
    brake.release()
    assert all(isinstance(events_of(generation)[-1], GenerationEnd) for generation in generations)
    pieces = [piece for batch in backend.passes for piece in batch]
    assert all(position % 16 == 0 and (size % 16 == 0 or position + size in (100, 35)) for _, position, size in pieces)


def test_a_prompt_that_waits_for_another_ones_beginning_makes_that_one_due(engine_of):
    backend = FakeBatchBackend(context_length=512)
    brake = Brake(backend)
    engine = engine_of(backend, prefill_chunk=16)
    first = submit(engine, [7] * 100, max_tokens=1)
    brake.wait()
    long, short = submit(engine, [9] * 300, max_tokens=1), submit(engine, [*[9] * 50, 1], max_tokens=1)
    brake.release()
    assert text_of(short) == answer([*[9] * 50, 1], 1)
    assert isinstance(events_of(long)[-1], GenerationEnd) and isinstance(events_of(first)[-1], GenerationEnd)
    ends = [[position + size for _, position, size in batch] for batch in backend.passes]
    assert ends.index([51]) < ends.index([100])


def test_a_short_prompt_is_not_stuck_behind_a_long_one(engine_of):
    backend = FakeBatchBackend(context_length=512)
    brake = Brake(backend)
    engine = engine_of(backend, prefill_chunk=16)
    submit(engine, [9] * 400, max_tokens=1)
    brake.wait()
    short = submit(engine, [1] * 16, max_tokens=1)
    brake.step()
    brake.step()
    assert short.read(0, timeout=TIMEOUT)
    assert len(backend.held[0]) < 400
    brake.release()


def test_a_long_prompt_is_not_stuck_behind_ever_more_short_ones(engine_of):
    backend = FakeBatchBackend(context_length=512)
    brake = Brake(backend)
    engine = engine_of(backend, prefill_chunk=16, max_waiting=100)
    long = submit(engine, [9] * 400, max_tokens=1)
    brake.wait()
    short = [submit(engine, [number] * 30, max_tokens=1) for number in range(10, 50)]
    brake.release()
    assert text_of(long) == answer([9] * 400, 1)
    assert all(isinstance(events_of(generation)[-1], GenerationEnd) for generation in short)
    reads_the_end = [any(position + num_tokens == 400 for _, position, num_tokens in pieces) for pieces in backend.passes]
    assert reads_the_end.index(True) < 2 * 400 / 16 + 4  # half of what is read by then is its own


def test_what_an_idle_sequence_holds_is_not_read_again(engine_of):
    backend = FakeBatchBackend()
    engine = engine_of(backend)
    first = list(range(60))
    said = [ord(character) for character in text_of(submit(engine, first))]
    *_, end = events_of(submit(engine, [*first, *said, 1, 2, 3]))
    assert end.num_cached_tokens == 60 + 7  # the last token of an answer is never evaluated
    assert backend.copies == []


def test_what_a_running_sequence_holds_is_copied(engine_of):
    backend = FakeBatchBackend()
    brake = Brake(backend)
    engine = engine_of(backend)
    common = list(range(50))
    running = submit(engine, [*common, 1], max_tokens=60)
    brake.wait()
    brake.step()
    other = submit(engine, [*common, 2])
    brake.release()
    *_, end = events_of(other)
    assert end.num_cached_tokens == 49  # two are read, for one by itself would be rounded otherwise
    assert text_of(other) == answer([*common, 2])
    assert text_of(running) == answer([*common, 1], 60)
    assert len(backend.copies) == 1


def test_prompts_that_come_together_are_read_once_where_they_are_alike(engine_of):
    backend = FakeBatchBackend(num_sequences=4)
    brake = Brake(backend)
    engine = engine_of(backend)
    common = list(range(100))
    generations = [submit(engine, [*common, number]) for number in range(4)]
    brake.release()
    assert [text_of(generation) for generation in generations] == [answer([*common, number]) for number in range(4)]
    num_evaluated = sum(num_tokens for pieces in backend.passes for _, _, num_tokens in pieces)
    assert num_evaluated == 99 + 4 * 2 + 4 * 7  # of each prompt's end two, for one by itself would be rounded otherwise
    assert sorted(events_of(generation)[-1].num_cached_tokens for generation in generations) == [0, 99, 99, 99]


def test_a_prompt_is_read_once_also_if_its_answers_end_at_once(engine_of):
    backend = FakeBatchBackend(num_sequences=2)
    brake = Brake(backend)
    engine = engine_of(backend)
    common = list(range(100))
    generations = [submit(engine, [*common, number], max_tokens=1) for number in range(6)]
    brake.release()
    assert [text_of(generation) for generation in generations] == [answer([*common, number], 1) for number in range(6)]
    assert sum(num_tokens for pieces in backend.passes for _, _, num_tokens in pieces) == 99 + 6 * 2


def test_who_waits_for_a_prompt_that_is_given_up_reads_the_rest_itself(engine_of):
    backend = FakeBatchBackend()
    brake = Brake(backend)
    engine = engine_of(backend, prefill_chunk=16)
    common = list(range(200))
    leader, follower = submit(engine, [*common, 1]), submit(engine, [*common, 2])
    brake.wait()
    leader.close()
    brake.release()
    *_, end = events_of(follower)
    assert text_of(follower) == answer([*common, 2])
    assert 0 < end.num_cached_tokens < 200


def test_without_a_prefix_cache_everything_is_read(engine_of):
    engine = engine_of(prefix_cache=False)
    prompt_ids = list(range(60))
    ends = [events_of(submit(engine, prompt_ids))[-1] for _ in range(2)]
    assert [end.num_cached_tokens for end in ends] == [0, 0]


def test_choices_are_made_side_by_side_of_one_prompt(engine_of):
    backend = FakeBatchBackend()
    engine = engine_of(backend)
    prompt_ids = list(range(83))
    generation = submit(engine, prompt_ids, n=3, sampling=SamplingParams(seed=1, temperature=1.5))
    events = events_of(generation)
    assert sorted(event.choice for event in events if isinstance(event, ChoiceEnd)) == [0, 1, 2]
    assert len({text_of(generation, choice) for choice in range(3)}) == 3
    assert max(map(len, backend.passes)) == 3
    assert events[-1].num_prompt_tokens == 83
    assert sum(num_tokens for pieces in backend.passes for _, _, num_tokens in pieces) == 83 + 2 * 2 + 3 * 7


def test_more_choices_than_sequences_take_turns(engine_of):
    generation = submit(engine_of(), [1, 2, 3], n=7)
    assert sorted(event.choice for event in events_of(generation) if isinstance(event, ChoiceEnd)) == list(range(7))


def test_a_draw_is_that_of_an_engine_of_slots(engine_of):
    sampling = SamplingParams(seed=7, temperature=2.0)
    slots = make_engine([FakeBackend()])
    expected = [text_of(submit(slots, [1, 2, 3], n=2, sampling=sampling), choice) for choice in range(2)]
    slots.close()
    generation = submit(engine_of(), [1, 2, 3], n=2, sampling=sampling)
    assert [text_of(generation, choice) for choice in range(2)] == expected


@pytest.mark.parametrize("max_tokens", [1, 2, 7, 60, 192])
def test_drafts_change_no_answer_and_save_passes(engine_of, drafting, max_tokens):
    drafting(6)
    backend = FakeBatchBackend(ramble, batch_size=24)
    engine = engine_of(backend, statistics=(statistics := StatisticsCounter()))
    prompt_ids = [97, 98, 99] * 20
    said = answer(prompt_ids, max_tokens, ramble)
    assert text_of(submit(engine, prompt_ids, max_tokens)) == said
    assert max_tokens < 60 or len(backend.passes) < 3 + 0.8 * max_tokens
    assert [*prompt_ids, *said.encode()][:-1] in backend.held  # what was guessed wrong is gone
    assert engine.drain(TIMEOUT)
    counted = statistics.snapshot()
    assert counted.accepted_tokens <= counted.drafted_tokens
    assert max_tokens < 60 or counted.accepted_tokens >= max_tokens // 4


@pytest.mark.parametrize("asked", [{"sampling": SamplingParams(temperature=0, seed=3)}, {"logprobs": 0}])
def test_who_asks_for_the_same_to_the_last_bit_gets_no_drafts(engine_of, drafting, asked):
    drafting(6)
    backend = FakeBatchBackend(ramble)
    end = events_of(submit(engine_of(backend), [97, 98, 99] * 10, 60, **asked))[-1]
    assert end.num_drafted_tokens == 0
    assert all(num_tokens == 1 for pieces in backend.passes[2:] for _, _, num_tokens in pieces)


@pytest.mark.parametrize(
    ("said", "expected"),
    [("one two one two one two", "one two one two one two"), ("one two one. two one two", "one two one")],
    ids=["eos", "stop"],
)
def test_an_answer_ends_in_the_middle_of_a_draft(engine_of, drafting, said, expected):
    drafting(8)
    backend = FakeBatchBackend(say(said))
    engine = engine_of(backend)
    prompt_ids = [*b"one two one two one two one two", 258, *b"assistant\n"]
    for _ in range(2):
        generation = submit(engine, prompt_ids, 100, stop=(". ",))
        end = next(event for event in events_of(generation) if isinstance(event, ChoiceEnd))
        assert (text_of(generation), end.finish_reason) == (expected, "stop")
    assert max(num_tokens for pieces in backend.passes for _, _, num_tokens in pieces[:1]) > 1
    assert bytes(backend.held[0][len(prompt_ids) :]).decode().startswith(expected[:-1])


def test_only_passes_of_one_sequence_teach_what_a_draft_costs(engine_of, monkeypatch):
    seen = []
    monkeypatch.setattr(PassCost, "observe", lambda self, num_tokens, seconds: seen.append(num_tokens))
    backend = FakeBatchBackend()
    engine = engine_of(backend)
    for generation in [submit(engine, [number] * 5) for number in range(1, 5)] + [submit(engine, [9] * 70)]:
        text_of(generation)
    assert max(map(len, backend.passes)) > 1
    assert len(seen) == sum(len(pieces) == 1 for pieces in backend.passes)


def test_without_prompt_lookup_every_pass_has_one_token_of_a_sequence(engine_of, drafting):
    drafting(6)
    backend = FakeBatchBackend(ramble)
    text_of(submit(engine_of(backend, prompt_lookup=False), [97, 98, 99] * 10, 60))
    assert all(num_tokens == 1 for pieces in backend.passes[2:] for _, _, num_tokens in pieces)


@pytest.mark.parametrize("num_read", [0, 1])
def test_who_leaves_frees_the_sequence_before_the_next_pass(engine_of, num_read):
    backend = FakeBatchBackend(context_length=1024)
    brake = Brake(backend)
    engine = engine_of(backend, prefill_chunk=16)
    generation = submit(engine, [1] * (3 if num_read else 900), max_tokens=100, n=2)
    brake.wait()
    for _ in range(num_read):
        brake.step()
    generation.close()
    brake.release()
    assert engine.drain(TIMEOUT)
    assert len(backend.passes) <= num_read + 2


def test_a_failed_pass_fails_those_in_it_and_nobody_after_them(engine_of):
    backend = FakeBatchBackend()
    engine = engine_of(backend, statistics=(statistics := StatisticsCounter()))

    def fail():
        raise RuntimeError("it broke")

    backend.on_forward = fail
    (failed,) = events_of(submit(engine, [1, 2, 3], n=2))
    assert isinstance(failed, Failed) and isinstance(failed.error, EngineFailed)
    backend.on_forward = lambda: None
    assert text_of(submit(engine, [1, 2, 3])) == answer([1, 2, 3])
    assert statistics.snapshot().errors == 1


def test_a_full_queue_refuses_with_a_time(engine_of):
    backend = FakeBatchBackend(num_sequences=1)
    brake = Brake(backend)
    engine = engine_of(backend, max_waiting=1)
    generations = [submit(engine, [1]), submit(engine, [2])]
    with pytest.raises(QueueFull) as caught:
        submit(engine, [3])
    assert caught.value.retry_after >= 1
    brake.release()
    assert all(isinstance(events_of(generation)[-1], GenerationEnd) for generation in generations)


def test_closing_ends_what_runs_and_what_waits(engine_of):
    backend = FakeBatchBackend(num_sequences=1)
    brake = Brake(backend)
    engine = engine_of(backend)
    generations = [submit(engine, [1], max_tokens=200), submit(engine, [2])]
    brake.wait()
    threading.Timer(0.05, brake.release).start()
    engine.close()
    assert all(isinstance(events_of(generation)[-1].error, ShuttingDown) for generation in generations)
    with pytest.raises(ShuttingDown):
        submit(engine, [3])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    jobs=st.lists(
        st.tuples(
            st.integers(0, 2), st.integers(1, 120), st.integers(1, 20), st.integers(1, 4), st.none() | st.integers(0, 10)
        ),
        min_size=1,
        max_size=12,
    ),
    num_sequences=st.integers(1, 4),
    num_drafted=st.integers(0, 9),
)
def test_whatever_is_submitted_and_cancelled_is_answered_right_and_nothing_is_left(
    engine_of, drafting, jobs, num_sequences, num_drafted
):
    """Prompts of three families, so that they share beginnings with what runs, what waits and what has run."""
    drafting(num_drafted)
    backend = FakeBatchBackend(ramble, num_sequences=num_sequences, rounding=True)
    engine = engine_of(backend, max_waiting=20)
    kept = []
    for family, length, max_tokens, n, close_after in jobs:
        prompt_ids = [family] * length
        generation = submit(engine, prompt_ids, max_tokens, n=n)
        if close_after is None:
            kept.append((generation, answer(rounded(prompt_ids, backend.grid), max_tokens, ramble), n))
        else:
            generation.read(close_after, timeout=0.001)
            generation.close()
    for generation, expected, n in kept:
        assert isinstance(events_of(generation)[-1], GenerationEnd)
        assert [text_of(generation, choice) for choice in range(n)] == [expected] * n
    assert engine.drain(TIMEOUT)
    assert not engine._num_open and not engine._choices
    assert engine._budget._free == engine._budget.cores
