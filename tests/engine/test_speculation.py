"""Guessing what comes next from the text so far."""

from hypothesis import given
from hypothesis import strategies as st

from llmserve.engine.speculation import PromptLookup


def followed(prompt_ids, token_ids):
    lookup = PromptLookup(prompt_ids)
    for token_id in token_ids:
        lookup.append(token_id)
    return lookup


def test_what_followed_the_last_tokens_before_is_the_draft():
    assert PromptLookup([1, 2, 3, 4, 5, 9, 1, 2]).draft(4).token_ids == [3, 4, 5, 9]


def test_nothing_is_drafted_where_the_last_tokens_are_new():
    for token_ids in ([1, 2, 3, 4, 9, 3], [1]):
        assert PromptLookup(token_ids).draft(4).token_ids == []
        assert PromptLookup(token_ids).draft(4).accuracies == []
    assert PromptLookup([1, 2, 3, 4, 1, 2, 3]).draft(0).token_ids == []


def test_the_last_of_several_places_is_taken():
    assert PromptLookup([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3]).draft(1).token_ids == [5]


def test_of_several_places_the_one_with_the_longest_beginning_is_taken():
    assert PromptLookup([8, 1, 2, 3, 4, 9, 1, 2, 3, 5, 8, 1, 2, 3]).draft(1).token_ids == [4]


def test_a_text_that_repeats_itself_goes_on_so():
    assert PromptLookup([7, 8, 1, 2, 3, 1, 2, 3]).draft(7).token_ids == [1, 2, 3, 1, 2, 3, 1]


def test_a_right_guess_is_followed_on_and_a_wrong_one_left():
    lookup = followed([1, 2, 3, 4, 5, 6, 7, 1, 2, 3], [4, 5])
    assert lookup.draft(2).token_ids == [6, 7]
    lookup.append(9)
    assert lookup.draft(2).token_ids == []


def test_accuracy_is_learned_also_while_nothing_is_drafted():
    text = list(range(50))
    assert followed(text, [0, 1, 2]).draft(1).accuracies[0] < 0.7
    wrong = [token for number in range(20) for token in (number, number + 1, number + 2, 99)]
    assert followed(text, [*wrong, 0, 1, 2]).draft(1).accuracies[0] < 0.4


def test_the_longer_a_copy_is_the_surer_is_its_next_token():
    text = list(range(50))
    lookup = followed(text, text[:2])
    found = [lookup.draft(1).accuracies[0]]
    for token_id in text[2:20]:
        lookup.append(token_id)
        found += lookup.draft(1).accuracies
    assert found == sorted(found) and found[0] < 0.5 and found[-1] > 0.9


def test_a_draft_is_reckoned_to_be_the_copy_that_it_is_if_it_is_right():
    text = list(range(50))
    ahead = followed(text, text[:2]).draft(40).accuracies
    assert ahead == sorted(ahead) and ahead[0] < 0.5 and ahead[-1] > 0.9


def test_no_token_of_a_draft_is_thought_worse_than_the_first():
    text = list(range(50))
    early_ends = [token for number in range(20) for token in (*range(number, number + 6), 99)]
    ahead = followed(text, [*early_ends, 0, 1, 2]).draft(20).accuracies
    assert min(ahead) == ahead[0]


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 10))
def test_a_draft_is_what_stands_behind_an_equal_run_of_tokens(text, length):
    draft = PromptLookup(text).draft(length).token_ids
    assert len(draft) in (0, length)
    if draft:
        places = [end for end in range(2, len(text)) if text[end - 2 : end] == text[-2:]]
        assert any((text[end:] * length)[:length] == draft for end in places)


def replayed(prompt_ids, token_ids):
    """Each token of an answer, and what was guessed to be it."""
    lookup, guesses = PromptLookup(prompt_ids), []
    for token_id in token_ids:
        guesses += lookup.draft(1).token_ids or [None]
        lookup.append(token_id)
    return list(zip(token_ids, guesses, strict=True))


def lines(begin, end, count=6):
    """Lines of a text: a few tokens that all have, a number of its own, and an end."""
    return [[*begin, 100 + number, *end, 200 + number] for number in range(count)]


def flat(parts):
    return [token_id for part in parts for token_id in part]


def test_a_text_that_has_departed_from_what_it_copies_goes_on_behind_the_departure():
    """Though other places, even ones with a longer beginning, would come next by what stands before."""
    source = flat(lines([1, 2], [3], 30))
    answer = flat(lines([9, 1, 2], [3], 30))[1:]
    assert [guess for token, guess in replayed(source, answer) if token >= 100][1:] == [
        token for token in answer if token >= 100
    ][1:]


def test_an_edit_that_was_made_once_is_guessed_to_be_made_again():
    source, answer = flat(lines([1, 2], [3])), flat(lines([8, 9, 2], [3]))
    found = replayed([5, 6, *source, 7, 5, 6], answer)
    third_line = 2 * len(answer) // 6
    assert all(token == guess for token, guess in found[third_line:])


def test_tokens_that_were_left_out_or_put_in_are_edits_too():
    left_out = replayed([5, 6, *flat(lines([1, 2, 3], [4])), 7, 5, 6], flat(lines([3], [4])))
    put_in = replayed([5, 6, *flat(lines([1, 2], [4])), 7, 5, 6], flat(lines([1, 9, 2], [4])))
    for found in (left_out, put_in):
        assert all(token == guess for token, guess in found[-len(found) // 2 :])


def test_a_whole_draft_has_the_edit_in_it():
    source, answer = flat(lines([1, 2], [3])), flat(lines([8, 9, 2], [3]))
    lookup = followed([5, 6, *source, 7, 5, 6], answer[:18])
    draft = lookup.draft(12)
    assert draft.token_ids == answer[18:30]
    assert min(draft.accuracies) > 0.5


def test_an_edit_that_is_not_made_again_is_forgotten_and_the_copy_goes_on():
    source = [5, 6, *flat(lines([1, 2], [3]))]
    edited, plain = flat(lines([8, 9, 2], [3], 2)), flat(lines([1, 2], [3]))[10:]
    found = replayed([*source, 7, 5, 6], [*edited, plain[0]])
    assert found[-1][1] == 8 != found[-1][0]
    lookup = followed([*source, 7, 5, 6], [*edited, plain[0]])
    assert lookup.draft(6).token_ids[:5] == plain[1:6]
    assert 8 not in lookup.draft(20).token_ids


def test_edits_that_hold_are_believed():
    source, answer = flat(lines([1, 2], [3], 20)), flat(lines([8, 9, 2], [3], 20))
    lookup = followed([5, 6, *source, 7, 5, 6], answer[:6])
    once = lookup.draft(1).accuracies
    for token_id in answer[6:60]:
        lookup.append(token_id)
    assert lookup.draft(1).token_ids == [8]
    assert once[0] < 0.7 < lookup.draft(1).accuracies[0]


def test_who_has_departed_for_long_is_not_expected_back():
    source = list(range(30))
    lookup = followed([*source, 90, 0, 1], [2, 3, 50])
    for token_id in range(60, 80):
        lookup.append(token_id)
    assert followed([*source, 90, 0, 1], [2, 3, 50, 5, 6]).draft(1).token_ids == [7]
    assert lookup.draft(1).token_ids == []


@given(st.lists(st.integers(0, 3), max_size=80), st.lists(st.integers(0, 3), max_size=80), st.integers(0, 30))
def test_a_draft_is_of_the_text_and_has_an_accuracy_for_each_token(prompt_ids, token_ids, length):
    draft = followed(prompt_ids, token_ids).draft(length)
    assert len(draft.token_ids) == len(draft.accuracies) <= length
    assert set(draft.token_ids) <= {*prompt_ids, *token_ids}
    assert all(0 < accuracy < 1 for accuracy in draft.accuracies)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=80), st.integers(0, 60))
def test_what_is_guessed_next_depends_on_the_text_alone_not_on_what_was_drafted(token_ids, split):
    """Whoever asks for drafts in between changes nothing."""
    asked, silent = PromptLookup(token_ids[:split]), PromptLookup(token_ids[:split])
    for token_id in token_ids[split:]:
        asked.draft(24)
        asked.append(token_id)
        silent.append(token_id)
    assert asked.draft(24) == silent.draft(24)


def test_a_guess_is_less_sure_the_hotter_tokens_are_drawn():
    text = [1, 2, 3, 4, 5, 6, 1, 2]
    cool, warm, hot = (PromptLookup(text, temperature).draft(4).accuracies for temperature in (0.0, 0.5, 1.0))
    assert all(a > b > c for a, b, c in zip(cool, warm, hot, strict=True))
    assert PromptLookup(text, 2.0).draft(4).accuracies == hot
