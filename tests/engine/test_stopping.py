import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.engine.stopping import StopMatcher


def release(stop, pushes):
    """(text released by each push, the matched stop string, text held to the end)"""
    matcher = StopMatcher(stop)
    return [matcher.push(text) for text in pushes], matcher.matched, matcher.flush()


def reference(stop, text):
    """(text before the match that completes first, that stop string)"""
    for end in range(1, len(text) + 1):
        complete = [string for string in stop if text[:end].endswith(string)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def num_held(stop, text):
    """Length of the longest suffix of `text` that is a proper prefix of a stop string"""
    return max(length for string in stop for length in range(len(string)) if text.endswith(string[:length]))


def test_without_stop_strings_text_passes():
    assert release([], ["a", "", "bc"]) == (["a", "", "bc"], None, "")


def test_an_empty_stop_string_never_matches():
    assert release([""], ["abc"]) == (["abc"], None, "")


def test_text_before_a_stop_string_is_released_and_nothing_after_it():
    assert release(["END"], ["one END two", "three"]) == (["one ", ""], "END", "")


def test_a_stop_string_over_many_pushes_is_found():
    assert release(["</s>"], ["hi<", "/", "s", ">x"]) == (["hi", "", "", ""], "</s>", "")


def test_only_what_may_become_a_stop_string_is_held():
    assert release(["\n\nUser:"], ["a\n", "\n", "Us", "a b"]) == (["a", "", "", "\n\nUsa b"], None, "")


def test_what_is_held_at_the_end_is_flushed():
    assert release(["stop"], ["don't st", "o"]) == (["don't ", ""], None, "sto")


def test_a_beginning_inside_of_a_beginning_is_not_lost():
    assert release(["aab"], ["aa", "ab"]) == (["", "a"], "aab", "")


def test_a_beginning_inside_of_a_longer_beginning_is_not_lost():
    assert release(["aabaaac"], ["aabaaabaaac"]) == (["aaba"], "aabaaac", "")


def test_the_match_that_completes_first_wins():
    assert release(["abcd", "bc"], ["abcd"]) == (["a"], "bc", "")


def test_of_matches_that_complete_together_the_longest_wins():
    assert release(["b", "ab"], ["xab"]) == (["x"], "ab", "")


def test_it_matches_by_character_also_beyond_ascii():
    assert release(["。終"], ["はい。", "終わり"]) == (["はい", ""], "。終", "")


stop_strings = st.lists(st.text("ab", min_size=1, max_size=8), min_size=1, max_size=4)
pushes = st.lists(st.text("abc", max_size=6), max_size=8)


@given(stop_strings, pushes)
def test_the_outcome_is_that_of_the_whole_text(stop, pushes):
    released, matched, held = release(stop, pushes)
    assert ("".join(released) + held, matched) == reference(stop, "".join(pushes))


@given(stop_strings, pushes)
def test_what_is_held_is_as_little_as_can_be(stop, pushes):
    matcher = StopMatcher(stop)
    text = released = ""
    for push in pushes:
        text += push
        released += matcher.push(push)
        if matcher.matched is not None:
            break
        assert len(released) == len(text) - num_held(stop, text)


@pytest.mark.parametrize(
    "stop", ["a" * 2000 + "b", ("a" * 40 + "b") * 50 + "c", "ab" * 1000 + "c"], ids=["one letter", "blocks", "pairs"]
)
def test_time_does_not_grow_with_the_length_of_a_repetitive_stop_string(stop):
    """20,000 pushes that each compared 2,000 prefixes of up to 2,000 characters would take minutes."""
    matcher = StopMatcher([stop])
    begun = time.process_time()
    released = "".join(matcher.push(character) for character in stop[:-1] * 10)
    assert released + matcher.flush() == stop[:-1] * 10
    assert time.process_time() - begun < 5
