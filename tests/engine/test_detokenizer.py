from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.engine.detokenizer import Detokenizer


def outputs(pieces):
    detokenizer = Detokenizer()
    return [*map(detokenizer.push, pieces), detokenizer.flush()]


def test_a_character_split_over_pieces_comes_once_and_whole():
    assert outputs([b"a\xf0", b"\x9f", b"\x98\x80b"]) == ["a", "", "😀b", ""]


def test_a_character_that_never_comes_whole_is_replaced_at_the_end():
    assert outputs([b"ok \xe6\x97"]) == ["ok ", "\ufffd"]


@pytest.mark.parametrize("piece", [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80\x80\x80"])
def test_bytes_that_are_no_utf8_are_replaced_at_once(piece):
    first, rest = outputs([b"a" + piece + b"b"])
    assert first.strip("\ufffd") == f"a{first[1:-1]}b"
    assert set(first[1:-1]) == {"\ufffd"}
    assert rest == ""


def test_a_character_cut_off_by_another_is_replaced_and_the_other_kept():
    assert outputs([b"\xe6\x97", b"a"]) == ["", "\ufffda", ""]


def test_a_piece_of_no_bytes_changes_nothing():
    assert outputs([b"\xc3", b"", b"\xa9"]) == ["", "", "é", ""]


@given(st.lists(st.binary(max_size=5) | st.text(max_size=3).map(str.encode)))
def test_text_is_that_of_all_bytes_at_once(pieces):
    assert "".join(outputs(pieces)) == b"".join(pieces).decode("utf-8", "replace")


@given(st.text(), st.lists(st.integers(0, 100)))
def test_valid_text_is_never_replaced_however_it_is_split(text, cuts):
    data = text.encode()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[begin:end] for begin, end in pairwise(edges)]
    assert "".join(outputs(pieces)) == text
