import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.engine.slots import Slot, choose, common_prefix_length
from tests.fakes import FakeBackend

PROMPT = list(range(100, 180))


def filled(token_ids, grid=32, chunks=None, context_length=512):
    """A slot that has evaluated `token_ids` in one chunk, or in chunks of these sizes."""
    slot = Slot(FakeBackend(grid=grid, context_length=context_length))
    position = 0
    for size in chunks or [len(token_ids)]:
        slot.forward(token_ids[position : position + size], threads=1)
        position += size
    return slot


def test_the_last_token_of_a_prompt_is_always_evaluated_again():
    assert filled(PROMPT, grid=1).num_reusable(PROMPT) == len(PROMPT) - 1


def test_a_repeated_prompt_reuses_its_tail_although_that_is_off_the_grid():
    assert filled(PROMPT[:40]).num_reusable(PROMPT[:40]) == 39


def test_a_longer_prompt_reuses_only_what_is_on_the_grid():
    assert filled(PROMPT[:40]).num_reusable(PROMPT[:70]) == 32


def test_a_shorter_prompt_does_not_reuse_grid_positions_for_its_tail():
    assert filled(PROMPT[:64]).num_reusable(PROMPT[:50]) == 32


def test_a_common_prefix_that_ends_within_the_grid_is_reused_whole():
    other = [*PROMPT[:40], *range(20)]  # fills its own second grid step, whose first 8 positions are shared
    other += list(range(20, 40))
    assert filled(PROMPT[:64]).num_reusable(other) == 40


def test_the_next_turn_of_a_conversation_reuses_the_answer_too():
    turn = [*PROMPT[:40], *range(50)]
    slot = filled(turn, chunks=[32, 8] + [1] * 50)
    assert slot.num_on_grid == 32
    assert slot.num_reusable([*turn, 1, 2, 3]) == len(turn)


def test_a_few_answer_tokens_are_rather_evaluated_again_than_mixed():
    turn = [*PROMPT[:40], *range(10)]
    assert filled(turn, chunks=[40] + [1] * 10).num_reusable([*turn, *range(60, 90)]) == 32


def test_without_prefix_cache_nothing_is_reused():
    slot = Slot(FakeBackend(), prefix_cache=False)
    slot.forward(PROMPT, 1)
    assert slot.num_reusable(PROMPT) == 0


def test_an_error_of_the_library_empties_the_slot():
    slot = filled(PROMPT[:40])

    def fail():
        raise RuntimeError("out of memory")

    slot.backend.on_forward = fail
    with pytest.raises(RuntimeError):
        slot.forward([1], 1)
    assert (slot.token_ids, slot.num_on_grid) == ([], 0)


def test_the_slot_with_the_longest_prefix_is_chosen():
    slots = [filled(PROMPT[:10], grid=1), filled(PROMPT[:60], grid=1), filled(PROMPT[:30], grid=1)]
    assert choose(slots, PROMPT) is slots[1]


def test_a_slot_is_not_emptied_for_a_few_shared_words():
    conversation, empty = filled(PROMPT, grid=1), filled([1], grid=1)
    conversation.last_used, empty.last_used = 5.0, 9.0
    assert choose([conversation, empty], [*PROMPT[:11], *range(20)]) is conversation  # the least recently used
    conversation.last_used = 10.0
    assert choose([conversation, empty], [*PROMPT[:11], *range(20)]) is empty
    assert choose([conversation, empty], [*PROMPT[:41], *range(20)]) is conversation


def test_without_a_shared_prefix_the_least_recently_used_slot_is_chosen():
    slots = [filled([1], grid=1), filled([2], grid=1), filled([3], grid=1)]
    for slot, time in zip(slots, [5.0, 2.0, 9.0], strict=True):
        slot.last_used = time
    assert choose(slots, PROMPT) is slots[1]


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix_length_is_what_a_loop_counts(a, b):
    expected = 0
    while expected < min(len(a), len(b)) and a[expected] == b[expected]:
        expected += 1
    assert common_prefix_length(a, b) == expected


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 5), st.integers(0, 12)), min_size=2, max_size=6))
def test_reuse_is_exact_but_for_conversations(turns):
    """Model the bits: a position is on the grid if its chunk reached the next grid line. Compare reuse with a fresh prefill."""
    grid = 4
    slot = Slot(FakeBackend(grid=grid))
    bits: list[bool] = []  # of what the slot holds

    def forward(token_ids):
        end = (len(slot.token_ids) + len(token_ids)) // grid * grid
        bits.extend(position < end for position in range(len(slot.token_ids), len(slot.token_ids) + len(token_ids)))
        slot.forward(token_ids, 1)

    for length, flavour, answered in turns:
        prompt = [1] * (length // 2) + [flavour] * (length - length // 2)
        num_reused = slot.num_reusable(prompt)
        continues = num_reused - slot.num_on_grid >= grid
        slot.truncate(num_reused)
        del bits[num_reused:]
        while len(slot.token_ids) < length:
            position = len(slot.token_ids)
            forward(prompt[position : min((position + 2 * grid) // grid * grid, length)])
        if not continues:
            fresh = [position < length // grid * grid for position in range(length)]
            # The last position of a grid step is the same either way: its own sum ends on the line.
            assert all(ours == right or (p + 1) % grid == 0 for p, (ours, right) in enumerate(zip(bits, fresh, strict=True)))
        for _ in range(answered):
            forward([9])
