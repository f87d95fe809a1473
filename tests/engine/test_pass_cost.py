"""How much of a guess is worth evaluating, by what passes of each size take."""

import pytest

from llmserve.engine.pass_cost import PassCost

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
