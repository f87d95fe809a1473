"""Guessing what comes next: from the text, and only where it pays."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.engine.speculation import PassCost, PromptLookup


def followed(prompt_ids, token_ids):
    lookup = PromptLookup(prompt_ids)
    for token_id in token_ids:
        lookup.append(token_id)
    return lookup


def test_what_followed_the_last_tokens_before_is_the_draft():
    assert PromptLookup([1, 2, 3, 4, 5, 6, 9, 1, 2, 3]).draft(4) == [4, 5, 6, 9]


def test_nothing_is_drafted_where_the_last_tokens_are_new():
    assert PromptLookup([1, 2, 3, 4, 5, 9, 2, 3]).draft(4) == []
    assert PromptLookup([1]).draft(4) == []
    assert PromptLookup([1, 2, 3, 4, 1, 2, 3]).draft(0) == []


def test_the_last_of_several_places_is_taken():
    assert PromptLookup([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3]).draft(1) == [5]


def test_of_several_places_the_one_with_the_longest_beginning_is_taken():
    assert PromptLookup([8, 1, 2, 3, 4, 9, 1, 2, 3, 5, 8, 1, 2, 3]).draft(1) == [4]


def test_a_text_that_repeats_itself_goes_on_so():
    assert PromptLookup([7, 8, 1, 2, 3, 1, 2, 3]).draft(7) == [1, 2, 3, 1, 2, 3, 1]


def test_a_right_guess_is_followed_on_and_a_wrong_one_left():
    lookup = followed([1, 2, 3, 4, 5, 6, 7, 1, 2, 3], [4, 5])
    assert lookup.draft(2) == [6, 7]
    lookup.append(9)
    assert lookup.draft(2) == []


def test_accuracy_is_learned_also_while_nothing_is_drafted():
    text = list(range(50))
    assert followed(text, text[:20]).accuracy > 0.85
    wrong = [token for number in range(20) for token in (number, number + 1, number + 2, 99)]
    assert followed(text, wrong).accuracy < 0.2


@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(0, 3), max_size=60), st.integers(0, 10))
def test_a_draft_is_what_stands_behind_an_equal_run_of_tokens(prompt_ids, token_ids, length):
    text = prompt_ids + token_ids
    draft = followed(prompt_ids, token_ids).draft(length)
    assert len(draft) in (0, length)
    if draft:
        places = [end for end in range(3, len(text)) if text[end - 3 : end] == text[-3:]]
        assert any((text[end:] * length)[:length] == draft for end in places)


def learned(seconds, sizes=(1, 1, 8, 1, 9, 32) * 20):
    cost = PassCost()
    for size in sizes:
        cost.observe(size, seconds(size))
    return cost


def test_the_share_of_one_more_token_is_that_of_the_times_seen():
    cost = learned(lambda tokens: 0.008 + 0.007 * tokens)
    assert cost.share == pytest.approx(7 / 15, rel=0.01)


def test_a_stalled_pass_now_and_then_changes_little():
    stalls = iter([1, 1, 1, 1, 1, 50, 1, 1] * 100)
    cost = learned(lambda tokens: (0.008 + 0.007 * tokens) * next(stalls))
    assert cost.share == pytest.approx(7 / 15, rel=0.35)


def test_passes_of_one_size_leave_the_cost_as_it_was():
    cost = learned(lambda tokens: 0.008 + 0.007 * tokens)
    for _ in range(1000):
        cost.observe(1, 0.015)
    assert cost.share == pytest.approx(7 / 15, rel=0.1)


@pytest.mark.parametrize(
    "seconds", [lambda tokens: 0.01, lambda tokens: 0.01 * tokens, lambda tokens: 0.01 / tokens, lambda tokens: 0.0]
)
def test_whatever_the_times_a_draft_has_a_length_within_bounds(seconds):
    cost = learned(seconds)
    lengths = [cost.draft_length(accuracy / 20) for accuracy in range(21)]
    assert min(lengths) == 0 and max(lengths) <= 24


def test_a_draft_has_the_length_that_yields_most_tokens_for_the_time():
    cost = learned(lambda tokens: 0.008 + 0.007 * tokens)

    def tokens_per_second(accuracy, length):
        return sum(accuracy**number for number in range(length + 1)) / (0.008 + 0.007 * (length + 1))

    accuracies = [0.3, 0.5, 0.8, 0.9, 0.95]
    best = [max(range(25), key=lambda length: tokens_per_second(accuracy, length)) for accuracy in accuracies]
    assert [cost.draft_length(accuracy) for accuracy in accuracies] == best == sorted(best)
    assert best[0] == 0 and best[-1] > 4
