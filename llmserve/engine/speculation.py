"""Guess what a sequence says next from what stands in it already.

Text that copies from its prompt (edits, extraction, quotes), or repeats itself, is guessed right for long runs. Where it departs from
what it copies, it mostly comes back soon, and departs in the same way again: a name that is another now, lines that are indented
otherwise. Knows nothing of models: it sees token ids. What a guess is worth says engine/pass_cost.py.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

_MATCH = 2  # tokens that must be the same for what followed them to be guessed again
_NUM_PLACES = 8
"""Of one run of tokens that are looked at, the last ones: of lines that begin alike, the text before them tells which one comes."""
_LEVELS = (3, 4, 8, 16, 32)
"""Tokens alike in a row that make a guess one of another kind: short matches are chance, long ones a copy."""
_ACCURACIES_AT_FIRST = (0.35, 0.6, 0.8, 0.9, 0.96, 0.98)
_ACCURACIES_AT_TEMPERATURE_1 = (0.2, 0.35, 0.55, 0.8, 0.9, 0.95)
"""At first, too, and above; between them they are mixed."""
_EDIT_ACCURACIES_AT_FIRST = (0.35, 0.9)
_LEARNING_RATE = 0.05  # of an accuracy
_REACH = 16
"""Tokens after which a text that has departed from what it copies is not expected back any more: of its own, and of what it copies."""
_ELSEWHERE = 5  # tokens alike that say that it is copying something else by now


class Draft(NamedTuple):
    """Tokens that should come next, and how often each is right, if all before it are."""

    token_ids: list[int]
    accuracies: list[float]


class _Place(NamedTuple):
    """Where the next token stands in the text already, if the guess is right."""

    position: int
    num_alike: int  # tokens before it that stand at the end too, as far as that tells anything
    written: tuple[int, ...] = ()  # tokens that come first, of an edit
    edited: int | None = None  # the position where an edit begins with the next token, if it is made again


class _Edit(NamedTuple):
    """What was written instead of some tokens of a text that was copied; either may be none."""

    written: tuple[int, ...]
    num_left_out: int
    again: bool = False  # it has been made more than once


class _Departure(NamedTuple):
    """Where a copy was left: the position in what was copied, and that of the first token that is another."""

    position: int
    since: int


class PromptLookup:
    """The text of one sequence, and where in it the last few tokens stood before ("prompt lookup decoding", Saxena 2023).

    It learns how often its guesses are right from every token, also while none of them is evaluated: the longer the text has been
    what stood before, the more often. An edit is remembered by the token in whose place it came, and guessed where that would come
    again. Not thread-safe.
    """

    def __init__(self, token_ids: Sequence[int], temperature: float = 0.0) -> None:
        """The sequence so far, and at what temperature its next tokens are drawn."""
        self._token_ids = list(token_ids)
        self._followers: dict[tuple[int, ...], list[int]] = {}  # the positions behind each run of _MATCH tokens
        for end in range(_MATCH, len(token_ids)):
            self._note(end)
        heat = min(temperature, 1.0)
        self._accuracies = [
            cool + heat * (hot - cool) for cool, hot in zip(_ACCURACIES_AT_FIRST, _ACCURACIES_AT_TEMPERATURE_1, strict=True)
        ]
        self._edits: dict[int, _Edit] = {}  # by the first token of what was copied that did not come
        self._edit_accuracies = list(_EDIT_ACCURACIES_AT_FIRST)  # of those made once, and of others
        self._departure: _Departure | None = None  # from which the text may come back
        self._next: _Place | None = None
        self._look_up()
        self._note(len(self._token_ids))

    def draft(self, max_tokens: int) -> Draft:
        """What should come next, at most so many tokens; a text that repeats itself is guessed to go on so.

        A right guess makes the run of tokens that are alike a longer one: the next is as good as those behind such a run.
        """
        draft, place = Draft([], []), self._next
        while place is not None and len(draft.token_ids) < max_tokens:
            token_id = self._token(place, draft.token_ids)
            if token_id is None:
                break
            draft.token_ids.append(token_id)
            draft.accuracies.append(self._accuracy(place))
            place = self._after(place)
        return draft

    def append(self, token_id: int) -> None:
        """Take the next token of the sequence."""
        place, self._next = self._next, None
        guessed = None if place is None else self._token(place)
        self._token_ids.append(token_id)
        if place is not None and guessed is not None:
            self._learn(place, right=guessed == token_id)
            self._next = self._after(place) if guessed == token_id else self._instead(place, token_id)
        self._look_up()
        self._note(len(self._token_ids))

    # What comes next at a place.

    def _token(self, place: _Place, draft: Sequence[int] = ()) -> int | None:
        """The token that is guessed, behind a draft; none where the text ends before the place."""
        if place.written:
            return place.written[0]
        behind = place.position - len(self._token_ids)
        if behind < 0:
            return self._token_ids[place.position]
        return draft[behind] if behind < len(draft) else None

    def _accuracy(self, place: _Place) -> float:
        if place.edited is not None:
            return self._edit_accuracies[self._edits[self._token_ids[place.edited]].again]
        return max(self._accuracies[: _level(place.num_alike) + 1])

    def _after(self, place: _Place) -> _Place:
        """The place when its token has come."""
        if place.written:
            return _Place(place.position, place.num_alike + 1, place.written[1:])
        return self._at(place.position + 1, place.num_alike + 1)

    def _instead(self, place: _Place, token_id: int) -> _Place | None:
        """The place when another token has come: none, but where an edit was not made again and the copy goes on."""
        position = place.position if place.edited is None else place.edited
        if place.edited is not None and self._token_ids[position] == token_id:
            return self._at(position + 1, place.num_alike)
        self._departure = _Departure(position, len(self._token_ids) - 1)
        return None

    def _at(self, position: int, num_alike: int) -> _Place:
        """The place of what is copied from a position on, with the edit that was made where it last went on so."""
        edit = self._edits.get(self._token_ids[position]) if position < len(self._token_ids) else None
        if edit is None:
            return _Place(position, num_alike)
        return _Place(position + edit.num_left_out, num_alike, edit.written, position)

    def _learn(self, place: _Place, *, right: bool) -> None:
        """An edit that is not made again is forgotten."""
        if place.edited is None:
            accuracies, kind = self._accuracies, _level(place.num_alike)
        else:
            replaced = self._token_ids[place.edited]
            edit = self._edits.pop(replaced)
            accuracies, kind = self._edit_accuracies, int(edit.again)
            if right:
                self._edits[replaced] = edit._replace(again=True)
        accuracies[kind] += _LEARNING_RATE * (right - accuracies[kind])

    # Which place is the next one.

    def _look_up(self) -> None:
        """Find where the last tokens stood before, unless it is known: of several places the one where most of them did, and of such the last.

        For a text that has departed from what it copies, to be back there counts as one token more.
        """
        self._give_up()
        if self._next is not None and (self._departure is None or self._next.written):
            return
        num_alike, back, position = max(map(self._rank, self._places()), default=(0, False, 0))
        if back:
            self._come_back(-position, num_alike)
        elif num_alike and (self._next is None or self._next.position != position):
            self._next = self._at(position, num_alike)

    def _places(self) -> list[int]:
        """Positions behind tokens like the last ones: some of the last, and where the text may come back to."""
        places = self._followers.get(tuple(self._token_ids[-_MATCH:]), [])
        found = places[-_NUM_PLACES:]
        if self._departure:
            begin, end = self._departure.position + 1, self._departure.position + _REACH
            found += places[bisect.bisect_left(places, begin) : bisect.bisect_right(places, end)]
        return found

    def _rank(self, position: int) -> tuple[int, bool, int]:
        num_alike = self._count_alike(position)
        back = self._num_since(position, num_alike) >= _MATCH
        return num_alike + back, back, -position if back else position

    def _give_up(self) -> None:
        """Whoever has departed for long, or follows something else, is not expected back."""
        left = self._departure
        if left and (len(self._token_ids) - left.since > _REACH or (self._next and self._next.num_alike >= _ELSEWHERE)):
            self._departure = None

    def _come_back(self, position: int, num_alike: int) -> None:
        """Go on from a position behind the departure, and remember the edit that was made between them."""
        left = self._departure
        assert left is not None
        num_since = self._num_since(position, self._count_alike(position))
        written = tuple(self._token_ids[left.since : len(self._token_ids) - num_since])
        self._edits[self._token_ids[left.position]] = _Edit(written, position - num_since - left.position)
        self._departure = None
        self._next = self._at(position, num_alike)

    def _num_since(self, position: int, num_alike: int) -> int:
        """Tokens before a position that stand at the end too and are behind the departure in both; none where that is not near."""
        left = self._departure
        if left is None or not left.position < position <= min(left.position + _REACH, left.since):
            return 0
        return min(num_alike, len(self._token_ids) - left.since, position - left.position)

    def _note(self, end: int) -> None:
        """From now on the tokens before this position stand there."""
        self._followers.setdefault(tuple(self._token_ids[end - _MATCH : end]), []).append(end)

    def _count_alike(self, place: int) -> int:
        ids, count = self._token_ids, 0
        while count < min(_LEVELS[-1], place) and ids[-1 - count] == ids[place - 1 - count]:
            count += 1
        return count


def _level(num_alike: int) -> int:
    return bisect.bisect_right(_LEVELS, num_alike)
