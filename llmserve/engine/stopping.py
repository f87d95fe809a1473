"""Find stop strings in text that arrives in pieces. Knows nothing of tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Releases text up to the first stop string, and holds back only what may still become one.

    The match that completes first wins, whatever the order of `stop`; of those that complete with the same character, the
    longest. So the outcome does not depend on how the text is cut into pushes. What is held is the longest suffix that is
    a proper prefix of a stop string. Time per character is amortized constant for each stop string, however they are
    built. Not thread-safe: a sequence owns it.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._prefixes = [_Prefix(text) for text in stop if text]
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that is certain to stand before any stop string. Nothing, once one has matched."""
        if not self._prefixes:
            return text
        if self.matched is not None:
            return ""
        held = self._held + text
        for end, character in enumerate(text, len(self._held) + 1):
            complete = [prefix.text for prefix in self._prefixes if prefix.extend(character)]
            if complete:
                self.matched = max(complete, key=len)
                self._held = ""
                return held[: end - len(self.matched)]
        certain = len(held) - max(prefix.length for prefix in self._prefixes)
        self._held = held[certain:]
        return held[:certain]

    def flush(self) -> str:
        """What was held: no more text comes, so it is no stop string."""
        held, self._held = self._held, ""
        return held


class _Prefix:
    """How much of `text` the end of what was read spells: the automaton of Knuth, Morris and Pratt (1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.length = 0
        self._borders = _borders(text)

    def extend(self, character: str) -> bool:
        """Read one more character; whether `text` is now complete, after which there is nothing more to read."""
        while self.length and self.text[self.length] != character:
            self.length = self._borders[self.length - 1]
        self.length += self.text[self.length] == character
        return self.length == len(self.text)


def _borders(text: str) -> list[int]:
    """For each prefix of `text`, the length of its longest proper prefix that is also its suffix."""
    borders = [0]
    for character in text[1:]:
        length = borders[-1]
        while length and text[length] != character:
            length = borders[length - 1]
        borders.append(length + (text[length] == character))
    return borders
