"""python -m benchmarks.lookup: prompt lookup against the same engine without it, on text that copies from its prompt and text that does not.

One model, and every request twice in alternation, once with a seed: such answers are not drafted. (Two models in one server, with
and without, differ by 4 % either way before anything is drafted, by where their buffers lie.) A stream's rate as in `python -m benchmarks`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from benchmarks import harness
from benchmarks.figures import HEAD, Figure, paired
from benchmarks.harness import chat, story

_NUM_TOKENS = 160


_SENTENCES = (
    "The river rises in the hills behind the town, where the rain of the winter months gathers in a chain of small lakes.",
    "For two hundred years the people here have built mills along it: first for grain, then for wool, and at last for electric light.",
    "When the railway came, most of the mills were closed, and the youngest families moved to the coast.",
    "What remains is a quiet place with a bridge of five arches, a market on Thursdays and a school with ninety children.",
    "The mayor, who is also the baker, says that nothing ever happens, and that this is why he would not live anywhere else.",
)


def correction(number: int) -> str:
    return f"Correct the spelling of this text and return it:\n\n{_text(number)}"


def repetition(number: int) -> str:
    return f"Repeat this text word for word:\n\n{_text(number)}"


def _text(number: int) -> str:
    return " ".join(_in_turn(_SENTENCES, number))


def _in_turn(parts: tuple[str, ...], number: int) -> tuple[str, ...]:
    """Another order each time."""
    first = number % len(parts)
    return parts[first:] + parts[:first]


_EVENTS = (
    "INFO server started on port 8080",
    "ERROR disk /dev/sda1 is full",
    "INFO user anna logged in",
    "ERROR connection to database lost",
    "INFO user bert logged in",
    "ERROR request timed out after 30 seconds",
    "INFO backup finished",
    "ERROR certificate has expired",
)


def extraction(number: int) -> str:
    log = "\n".join(
        f"2026-03-{number % 20 + 1:02} 0{hour}:{(17 * hour + 7 * number) % 60:02} {event}"
        for hour, event in enumerate(_in_turn(_EVENTS, number), start=1)
    )
    return f"Write down the lines of this log that say ERROR:\n\n{log}"


_FIELDS = ("width", "height", "depth", "weight", "colour", "price", "label", "origin")
_MORE_FIELDS = ("owner", "serial", "batch", "shelf", "volume", "status", "vendor", "stock")


def code_edit(number: int) -> str:
    return _code_edit(number, _FIELDS)


def long_code_edit(number: int) -> str:
    """One that takes all of the answer: behind a shorter class the default model has much to say about it."""
    return _code_edit(number, _FIELDS + _MORE_FIELDS)


def _code_edit(number: int, fields: tuple[str, ...]) -> str:
    body = "\n".join(f"        self.{field} = {field}  # number {number}" for field in fields)
    code = f"class Box{number}:\n    def __init__(self, {', '.join(fields)}):\n{body}\n"
    return f"Write this Python class once more, with the class name Crate instead of Box{number}:\n\n```python\n{code}```"


KINDS: dict[str, tuple[Callable[[int], str], float, str]] = {
    "correction, greedy": (correction, 0.0, "≥ 1.5"),
    "repetition, greedy": (repetition, 0.0, "≥ 1.5"),
    "extraction, greedy": (extraction, 0.0, "≥ 1.5"),
    "code edit, greedy": (long_code_edit, 0.0, "≥ 1.5"),
    "code edit and as much commentary, greedy": (code_edit, 0.0, "≥ 0.97"),
    "correction, temperature 0.3": (correction, 0.3, "≥ 1.5"),
    "stories, greedy": (story, 0.0, "≥ 0.97"),
    "stories, temperature 1": (story, 1.0, "≥ 0.97"),
}


def figures(rounds: int = 15) -> Iterator[Figure]:
    with harness.llmserve(harness.model_table(engine="llamacpp", slots=2)) as server:

        def rate(content: str, temperature: float, **options: object) -> float:
            stream = chat(server.port, content, _NUM_TOKENS, temperature=temperature, **options)
            return (stream.num_tokens - 1) / (stream.last - stream.first)

        for number in range(90, 93):  # what passes cost is learnt
            rate(story(number), 1.0)
        for name, (content, temperature, limit) in KINDS.items():

            def measure(
                number: int, content: Callable[[int], str] = content, temperature: float = temperature
            ) -> tuple[float, float]:
                if number % 2:
                    return rate(content(number), temperature), rate(content(number), temperature, seed=number)
                without = rate(content(number), temperature, seed=number)
                return rate(content(number), temperature), without

            ours, other = paired(rounds, measure)
            yield Figure(name, "tokens/s", ours, other, "without", limit)


def main() -> int:
    found = []
    for figure in figures():
        found.append(figure)
        print(figure.row(), file=sys.stderr)
    print(HEAD + "\n".join(figure.row() for figure in found))
    return 0 if all(figure.holds for figure in found) else 1


if __name__ == "__main__":
    sys.exit(main())
