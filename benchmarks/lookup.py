"""python -m benchmarks.lookup: prompt lookup against the same engine without it, on text that copies from its prompt and text that does not.

Two models of one file in one server, in alternation; a stream's rate as in `python -m benchmarks`. The default model is too small to
copy faithfully by itself for long, so the copying kinds are what it does well: going on with a text that repeats what stands before.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator

from benchmarks import harness
from benchmarks.figures import HEAD, Figure, paired
from benchmarks.harness import chat, story

_NUM_TOKENS = 160


def _record(number: int, place: int) -> str:
    return f'{{"id": {100 * number + place}, "name": "station {place}", "status": "open", "line": {number % 7}}}'


def extraction(number: int) -> str:
    records = "\n".join(_record(number, place) for place in range(12))
    return f"Repeat these lines exactly as they are, all of them, without a change:\n\n{records}"


def code_edit(number: int) -> str:
    fields = ["width", "height", "depth", "weight", "colour", "price", "label", "origin"]
    body = "\n".join(f"        self.{field} = {field}  # number {number}" for field in fields)
    code = f"class Box{number}:\n    def __init__(self, {', '.join(fields)}):\n{body}\n"
    return f"Write this Python class once more, with the class name Crate instead of Box{number}:\n\n```python\n{code}```"


KINDS: dict[str, tuple[Callable[[int], str], float, str]] = {
    "extraction, greedy": (extraction, 0.0, "≥ 1.5"),
    "code edit, greedy": (code_edit, 0.0, "≥ 1.5"),
    "extraction, temperature 0.3": (extraction, 0.3, "≥ 1.5"),
    "stories, greedy": (story, 0.0, "≥ 0.97"),
    "stories, temperature 1": (story, 1.0, "≥ 0.97"),
}


def figures(rounds: int = 5) -> Iterator[Figure]:
    options = {"engine": "llamacpp", "slots": 2}
    tables = harness.model_table("with", **options) + harness.model_table("without", prompt_lookup=False, **options)
    with harness.llmserve(tables) as server:

        def rate(model: str, content: str, temperature: float) -> float:
            stream = chat(server.port, content, _NUM_TOKENS, model=model, temperature=temperature)
            return (stream.num_tokens - 1) / (stream.last - stream.first)

        for model in ("with", "without"):
            statistics.median(rate(model, story(99), 1.0) for _ in range(3))  # what passes cost is learnt
        for name, (content, temperature, limit) in KINDS.items():

            def measure(
                number: int, content: Callable[[int], str] = content, temperature: float = temperature
            ) -> tuple[float, float]:
                return rate("with", content(number), temperature), rate("without", content(number), temperature)

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
