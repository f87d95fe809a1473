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
    assert PromptLookup([1, 2, 3, 4, 5, 9, 1, 2]).draft(4) == [3, 4, 5, 9]


def test_nothing_is_drafted_where_the_last_tokens_are_new():
    for token_ids in ([1, 2, 3, 4, 9, 3], [1]):
        assert PromptLookup(token_ids).draft(4) == []
        assert PromptLookup(token_ids).accuracies(4) == []
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
    assert followed(text, [0, 1, 2]).accuracies(1)[0] < 0.7
    wrong = [token for number in range(20) for token in (number, number + 1, number + 2, 99)]
    assert followed(text, [*wrong, 0, 1, 2]).accuracies(1)[0] < 0.4


def test_the_longer_a_copy_is_the_surer_is_its_next_token():
    text = list(range(50))
    lookup = followed(text, text[:2])
    found = [lookup.accuracies(1)[0]]
    for token_id in text[2:20]:
        lookup.append(token_id)
        found += lookup.accuracies(1)
    assert found == sorted(found) and found[0] < 0.5 and found[-1] > 0.9


def test_a_draft_is_reckoned_to_be_the_copy_that_it_is_if_it_is_right():
    text = list(range(50))
    ahead = followed(text, text[:2]).accuracies(40)
    assert ahead == sorted(ahead) and ahead[0] < 0.5 and ahead[-1] > 0.9


def test_no_token_of_a_draft_is_thought_worse_than_the_first():
    text = list(range(50))
    early_ends = [token for number in range(20) for token in (*range(number, number + 6), 99)]
    ahead = followed(text, [*early_ends, 0, 1, 2]).accuracies(20)
    assert min(ahead) == ahead[0]


@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(0, 3), max_size=60), st.integers(0, 10))
def test_a_draft_is_what_stands_behind_an_equal_run_of_tokens(prompt_ids, token_ids, length):
    text = prompt_ids + token_ids
    draft = followed(prompt_ids, token_ids).draft(length)
    assert len(draft) in (0, length)
    if draft:
        places = [end for end in range(2, len(text)) if text[end - 2 : end] == text[-2:]]
        assert any((text[end:] * length)[:length] == draft for end in places)


# Milliseconds of passes on two cores by their tokens, of weights in Q8_0 and in Q4_1: kernels take four tokens at a time.
Q8_0 = {1: 10.94, 2: 15.22, 3: 17.41, 4: 19.21, 5: 24.04, 6: 26.23, 7: 27.5, 8: 28.64, 12: 37.92, 16: 47.38}
Q4_1 = {1: 9.88, 2: 15.28, 3: 19.01, 4: 23.0, 5: 28.67, 6: 32.66, 8: 38.56, 12: 54.2, 16: 70.4}


def line(num_tokens):
    return 0.008 + 0.007 * num_tokens


def learned(seconds, sizes=(1, 1, 8, 1, 9, 32)):
    cost = PassCost()
    for size in [*sizes] * 20:
        cost.observe(size, seconds(size))
    return cost


def length(cost, accuracy, num_guessed=24):
    return cost.draft_length([accuracy] * num_guessed)


def best_length(seconds, accuracy):
    def tokens_per_second(length):
        return sum(accuracy**number for number in range(length + 1)) / seconds(length + 1)

    return max(range(25), key=tokens_per_second)


ACCURACIES = [0.3, 0.5, 0.8, 0.9, 0.95]


def test_a_draft_has_the_length_that_yields_most_tokens_for_the_time():
    best = [best_length(line, accuracy) for accuracy in ACCURACIES]
    assert [length(learned(line, range(1, 26)), accuracy) for accuracy in ACCURACIES] == best == sorted(best)
    assert best[0] == 0 and best[-1] > 4


def test_times_that_grow_by_steps_end_a_draft_before_a_step():
    cost = learned(Q8_0.__getitem__, Q8_0)
    assert length(cost, 0.65) == length(cost, 0.75) == 3
    assert length(cost, 0.35) == 0
    assert length(cost, 0.97) >= 11
    assert length(learned(Q4_1.__getitem__, Q4_1), 0.5) == 0


def test_a_dear_second_token_does_not_hide_that_four_are_cheap():
    cost = learned({1: 1.0, 2: 2.0, 3: 2.01, 4: 2.02, 5: 4.0, 32: 32.0}.__getitem__, (1, 2, 3, 4, 5, 32))
    assert cost.draft_length([0.8] * 24) == 3
    assert cost.draft_length([0.8]) == 0


def test_a_draft_is_as_long_as_the_guesses_that_there_are_at_most():
    cost = learned(line)
    assert cost.draft_length([]) == 0
    assert length(cost, 0.95, num_guessed=2) == 2


def test_a_guess_that_is_likely_only_behind_others_is_worth_what_they_are():
    cost = learned(line, range(1, 26))
    assert cost.draft_length([0.1] + [0.97] * 20) == 0
    assert cost.draft_length([0.6] + [0.97] * 20) > length(cost, 0.6)


def test_sizes_never_seen_lie_between_those_seen():
    cost = learned(line, (1, 64))
    assert [length(cost, accuracy) for accuracy in ACCURACIES] == [best_length(line, accuracy) for accuracy in ACCURACIES]


@pytest.mark.parametrize("sizes", [(), (1,), (64,), (5,)])
def test_before_two_sizes_are_known_one_more_token_is_half_a_pass_of_one(sizes):
    cost = learned(lambda tokens: 0.01 * (1 + tokens), sizes)
    assert length(cost, 0.95) == best_length(lambda tokens: 1 + tokens, 0.95)
    assert length(cost, 0.3) == 0


def test_a_stalled_pass_now_and_then_changes_little():
    stalls = iter([1, 1, 1, 1, 1, 50, 1] * 100)
    cost = learned(lambda tokens: line(tokens) * next(stalls), range(1, 26))
    for accuracy in ACCURACIES:
        found = length(cost, accuracy)
        chosen, best = (
            sum(accuracy**n for n in range(length + 1)) / line(length + 1) for length in (found, best_length(line, accuracy))
        )
        assert chosen > 0.9 * best


def test_one_stalled_pass_changes_no_draft():
    cost = learned(Q8_0.__getitem__, Q8_0)
    assert length(cost, 0.8) == 3
    cost.observe(4, 5000.0)
    assert length(cost, 0.8) == 3


def test_a_size_once_thought_too_dear_is_tried_again():
    cost = learned(lambda tokens: line(tokens) * (1 if tokens == 1 else 10), (*range(1, 26), 64))
    assert length(cost, 0.95) == 0
    for _ in range(1000):
        cost.observe(1, line(1))
        cost.observe(64, line(64))
    assert length(cost, 0.95) == best_length(line, 0.95)


def test_a_machine_that_has_become_slower_is_believed_to_be():
    cost = learned(line, range(1, 26))
    for _ in range(100):
        cost.observe(4, 5 * line(4))
    assert length(cost, 0.6) != 3


def test_what_reading_a_token_takes_is_that_of_long_passes():
    cost = PassCost()
    assert cost.seconds_per_token is None
    cost = learned(line, (1, 64))
    for _ in range(2000):
        cost.observe(1, line(1))
    assert cost.seconds_per_token == pytest.approx(line(64) / 64)


@pytest.mark.parametrize(
    "seconds", [lambda tokens: 0.01, lambda tokens: 0.01 * tokens, lambda tokens: 0.01 / tokens, lambda tokens: 0.0]
)
def test_whatever_the_times_a_draft_has_a_length_within_bounds(seconds):
    cost = learned(seconds)
    lengths = [length(cost, accuracy / 20) for accuracy in range(21)]
    assert min(lengths) >= 0 and max(lengths) <= 24
